"""The whole way, on four ranks: chats of photos in, a checkpoint out that upstream transformers answers from.

    python -m pytest -m slow tests/training/test_proof.py -s

About 20 minutes on two cores. Two runs of 200 steps: one on the example, one on the same chats with the photos dealt to
the wrong questions. Both learn their answers; only the first can know which answer belongs to which photo.
"""

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts.make_example_data import PHOTOS, QUESTION, make_example_data
from tests.training.runs import curve, options_of

MESH = {"dp_shard": 2, "sp": 2, "ep": 2}
RUN = {
    "max_steps": 200,
    "pack_tokens": 384,
    "pack_buffer": 32,
    "lr": 3e-3,
    "warmup_steps": 10,
    "export": True,
    "plots": True,
    "tensorboard": True,
    "router_every": 10,
    "save_every": 100,
}


def with_wrong_photos(path: Path) -> Path:
    """The same chats, each about another photo than the one its answer is about."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    parts = [
        part
        for line in lines
        for turn in line["messages"]
        if isinstance(turn["content"], list)
        for part in turn["content"]
        if part["type"] == "image"
    ]
    draw = random.Random(5)
    for part in parts:
        others = sorted({f"media/{name}.png" for name in PHOTOS} - {part["image"]})
        part["image"] = draw.choice(others)
    shuffled = path.with_name("shuffled.jsonl")
    shuffled.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return shuffled


def train_on_four_ranks(options: Any) -> None:
    config = Path(options.out).with_suffix(".yaml")
    config.write_text(options.to_yaml())
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    command += ["scripts/train.py", "--config", str(config)]
    subprocess.run(command, cwd=Path(__file__).parents[2], check=True)


def answers(export: Path, data: Path) -> dict[str, bool]:
    """Which photos upstream transformers, given the export alone, answers QUESTION about word for word, greedily."""
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(export, dtype=torch.float32).eval()
    assert type(model).__module__.startswith("transformers.")
    processor = AutoProcessor.from_pretrained(export)
    found = {}
    for name, (expected, _) in PHOTOS.items():
        photo = Image.open(data.parent / "media" / f"{name}.png")
        chat = [{"role": "user", "content": [{"type": "image", "image": photo}, {"type": "text", "text": QUESTION}]}]
        text = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        inputs = processor(text=[text], images=[photo], return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=24, do_sample=False, temperature=None, top_k=None, top_p=None)
        reply = processor.tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        found[name] = reply == expected
        print(f"{name}: {reply!r}")
    return found


@pytest.mark.slow
def test_two_hundred_steps_on_four_ranks(tiny_hub: Path, tmp_path: Path):
    data = make_example_data(tmp_path / "data", max_side=96)
    results = {}
    for name, path in (("photos", data), ("control", with_wrong_photos(data))):
        out = tmp_path / name
        train_on_four_ranks(options_of(tiny_hub, path, out, **MESH, **RUN))
        losses = [line["loss"] for line in curve(out)]
        print(f"{name}: loss {losses[0]:.3f} at step 1, {losses[-1]:.4f} at step {len(losses)}")
        assert len(losses) == 200 and losses[-1] < losses[0] / 10
        results[name] = answers(out / "export-200", data)
    print(results)
    assert sum(results["photos"].values()) >= 10
    assert sum(results["control"].values()) <= 2
