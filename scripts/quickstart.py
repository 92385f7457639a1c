"""python scripts/quickstart.py OUT

From a checkpoint as it is published to a reply, in four steps: make a small one, convert it, compare this project's
model with transformers on real media, generate. OUT is made anew on every run.
"""

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # from a checkout, installed or not

from scripts.make_tiny_checkpoint import make_tiny_checkpoint
from scripts.parity_report import format_report, parity_report, verdicts, write_report
from scripts.sample_media import chat_inputs, load_clip, load_photo, user

CONVERTER = Path(__file__).resolve().parents[1] / "conversion" / "hf_to_veomni.py"
NEW_TOKENS = 24


def step(title: str, command: str) -> None:
    print(f"\n== {title}\n$ {command}", flush=True)


def convert(source: Path, target: Path) -> None:
    """Run the converter as a user would."""
    step("convert it to the layout this model holds in memory", f"python conversion/{CONVERTER.name} {source} {target}")
    subprocess.run([sys.executable, CONVERTER, source, target], check=True)


def compare(hub: Path, converted: Path, out: Path) -> bool:
    """Print the parity tables, write them to `out`; whether all bounds hold."""
    step("compare with transformers on photos and a clip", f"python scripts/parity_report.py {hub} {converted}")
    report = parity_report(hub, converted, torch.device("cpu"))
    print(format_report(report, chats=("text", "image", "video", "all")))
    write_report(report, out, {"hf_dir": str(hub), "other_dir": str(converted), "device": "cpu"})
    print(f"every figure: {out / 'parity.json'}; as a picture: {out / 'parity.png'}")
    return all(holds for _, holds in verdicts(report))


def reply(hub: Path, converted: Path) -> bool:
    """Greedy replies of both implementations to a chat with a photo and a clip; whether they are the same tokens."""
    from transformers import AutoProcessor, Qwen3VLMoeForConditionalGeneration

    from modeling.qwen3_vl_moe import Qwen3VLMoeForCausalLM

    prompt = "What do the cup of coffee and the cyclists have in common?"
    step("chat: a photo (coffee), a clip (cyclists), a question", f"model.generate(...)    # {prompt}")
    processor = AutoProcessor.from_pretrained(hub)
    inputs = chat_inputs(processor, [[user(load_photo("coffee", 320), load_clip(max_side=320), prompt)]])
    ours = Qwen3VLMoeForCausalLM.from_pretrained(converted, dtype=torch.float32)
    theirs = Qwen3VLMoeForConditionalGeneration.from_pretrained(hub, dtype=torch.float32)
    new, expected = generate(ours, inputs), generate(theirs, inputs)
    same = new.equal(expected)
    print(
        f"{inputs['input_ids'].shape[1]} tokens in, {len(new)} out. The reply, of random weights and so without sense:"
    )
    print(f"  {processor.tokenizer.decode(new, skip_special_tokens=True)!r}")
    print(f"{'ok    ' if same else 'FAILED'}  transformers generates {'the same tokens' if same else 'other tokens'}")
    return same


def generate(model: Any, inputs: Any) -> torch.Tensor:
    """(new tokens,) chosen greedily."""
    with torch.no_grad():
        # Sampling settings of the published generation config, unset: they mean nothing when the choice is greedy.
        tokens = model.eval().generate(
            **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, temperature=None, top_k=None, top_p=None
        )
    return tokens[0, inputs["input_ids"].shape[1] :]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the checkpoints and the report")
    args = parser.parse_args(argv)
    started = time.monotonic()
    transformers.utils.logging.disable_progress_bar()
    hub, converted = args.out / "hub", args.out / "veomni"
    for folder in (hub, converted):
        shutil.rmtree(folder, ignore_errors=True)
    step(
        "make a small checkpoint: random weights, everything else real", f"python scripts/make_tiny_checkpoint.py {hub}"
    )
    make_tiny_checkpoint(hub)
    print(f"{hub}: {', '.join(sorted(file.name for file in hub.iterdir() if file.suffix != '.safetensors'))}, weights")
    convert(hub, converted)
    passed = compare(hub, converted, args.out)
    passed = reply(hub, converted) and passed
    print(f"\n{'Everything agrees.' if passed else 'FAILED: see above.'} {time.monotonic() - started:.0f} seconds.")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
