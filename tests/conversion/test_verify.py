"""verify.py: equal across layouts, and the first difference named precisely."""

import json
from pathlib import Path

import pytest
import torch

from conversion import hf_to_veomni, verify
from conversion.checkpoint import open_checkpoint
from tests.conversion.synthetic import random_tensors, toy_config, write_checkpoint

GATE_UP = "model.language_model.layers.2.mlp.experts.gate_up_proj"
DOWN = "model.language_model.layers.0.mlp.experts.down_proj"
NORM = "model.language_model.norm.weight"
LAYOUTS = ["hub", "fused", "per-expert", "ep-sharded"]


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    code = verify.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    for layout in LAYOUTS:
        write_checkpoint(folder / layout, layout, ep_size=4)
    return folder


@pytest.mark.parametrize("a", LAYOUTS)
@pytest.mark.parametrize("b", LAYOUTS)
def test_equal_in_any_layout(folders, capsys, a, b):
    code, out, _ = run(capsys, folders / a, folders / b)
    assert code == 0 and f"equal: {folders / a} ({a}) and {folders / b} ({b}), 105 tensors" in out


@pytest.mark.parametrize("b", LAYOUTS)
def test_the_first_difference_of_each_tensor_is_named(folders, tmp_path, capsys, b):
    logical = random_tensors(toy_config())
    logical[GATE_UP][6, 30, 17] += 1.0
    logical[GATE_UP][7, 0, 0] += 1.0
    logical[DOWN][1, 40, 3] = -logical[DOWN][1, 40, 3]
    logical[NORM][5] = float("nan")
    write_checkpoint(tmp_path / b, b, logical=logical, ep_size=2)
    good = random_tensors(toy_config())
    code, out, error = run(capsys, folders / "fused", tmp_path / b)
    assert (code, out) == (3, "")
    lines = error.splitlines()
    assert lines[0] == "error: 3 difference(s)" and len(lines) == 4
    a_value, b_value = (float(t[GATE_UP][6, 30, 17].double()) for t in (good, logical))
    assert any(f"{GATE_UP}: at [6, 30, 17] {a_value!r} (0x" in line and f"{b_value!r} (0x" in line for line in lines)
    assert any(f"{DOWN}: at [1, 40, 3] " in line for line in lines)
    assert any(f"{NORM}: at [5] " in line and "nan (0x7fc0) in B" in line for line in lines)
    # Seen from a hub checkpoint the same value has another index.
    _, _, error = run(capsys, folders / "hub", tmp_path / b)
    assert f"{GATE_UP}: at [6, 17, 30] {a_value!r} (0x" in error and "(hub form)" in error


def test_bits_count_not_values(tmp_path, capsys):
    """Minus zero is not zero; a NaN equals itself."""
    for folder, zero in (("a", 0.0), ("b", -0.0)):
        logical = random_tensors(toy_config())
        logical[NORM][0], logical[NORM][1] = float("nan"), zero
        write_checkpoint(tmp_path / folder, "fused", logical=logical)
    code, _, error = run(capsys, tmp_path / "a", tmp_path / "b")
    assert code == 3 and f"{NORM}: at [1] 0.0 (0x0000) in A, -0.0 (0x8000) in B" in error


def test_names_dtypes_and_lost_tensors(tmp_path, capsys):
    logical = random_tensors(toy_config(tie_word_embeddings=True))
    write_checkpoint(tmp_path / "a", "fused", toy_config(tie_word_embeddings=True), logical)
    changed = dict(logical) | {NORM: logical[NORM].float(), "extra": torch.zeros(3)}
    changed["lm_head.weight"] = logical["model.language_model.embed_tokens.weight"].clone()
    write_checkpoint(tmp_path / "b", "hub", toy_config(tie_word_embeddings=True), changed)
    code, _, error = run(capsys, tmp_path / "a", tmp_path / "b")
    assert code == 3
    for line in ("lm_head.weight: only in B", "extra: only in B", f"{NORM}: BF16 in A, F32 in B"):
        assert line in error


def test_square_experts_take_a_layout_each(tmp_path, capsys):
    config = toy_config(hidden_size=40)
    logical = random_tensors(config)
    for layout in ("hub", "fused"):
        write_checkpoint(tmp_path / layout, layout, config, logical)
    assert run(capsys, tmp_path / "hub", tmp_path / "fused")[0] == 2
    words = ["--layout-a", "hub", "--layout-b", "fused"]
    assert run(capsys, tmp_path / "hub", tmp_path / "fused", *words)[0] == 0


@pytest.fixture
def converted(folders, tmp_path) -> Path:
    words = ["--quiet", "--max-shard-size", "100KB", "--target", "ep-sharded", "--ep-size", "2"]
    assert hf_to_veomni.main([str(folders / "hub"), str(tmp_path / "out"), *words]) == 0
    return tmp_path / "out"


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_hashes_hold(converted, capsys):
    code, out, _ = run(capsys, "--hashes", converted)
    assert code == 0 and "as the manifest says" in out


def test_a_flipped_bit_is_found_and_its_tensor_named(converted, capsys):
    stored = open_checkpoint(converted).stored[GATE_UP, 1]
    flip(stored.path, stored.info.begin + 12)
    code, _, error = run(capsys, "--hashes", converted)
    assert code == 3
    assert f"{GATE_UP}: in {stored.path.name}: hash " in error and f"{stored.path.name}: hash " in error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: flip(f / "config.json", 3), "config.json: hash "),
        (lambda f: (f / "chat_template.jinja").unlink(), "chat_template.jinja: missing"),
        (lambda f: next(f.glob("model-ep001*")).unlink(), ".safetensors: missing"),
        (lambda f: (f / "model-extra.safetensors").touch(), "model-extra.safetensors: not in the manifest"),
        (lambda f: (f / "config.json").write_text("{}"), "config.json: 2 bytes, the manifest says"),
        (
            lambda f: (f / "model.ep.index.json").write_text('{"weight_map": {}}'),
            "its weight_map is not the manifest's",
        ),
        (lambda f: (f / "model.ep.index.json").unlink(), "model.ep.index.json: cannot be understood"),
        (lambda f: (f / "veomni_journal.jsonl").touch(), "veomni_journal.jsonl: the folder is being converted into"),
    ],
)
def test_whatever_is_not_as_the_manifest_says(converted, capsys, change, message):
    change(converted)
    code, _, error = run(capsys, "--hashes", converted)
    assert code == 3 and message in error


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"files": {"../x": {}}}', '{"files": 3}'])
def test_a_manifest_that_is_none(converted, capsys, text):
    (converted / "veomni_manifest.json").write_text(text)
    code, _, error = run(capsys, "--hashes", converted)
    assert code == 1 and "veomni_manifest.json cannot be understood" in error


def test_a_manifest_that_leaves_the_folder(converted, capsys):
    path = converted / "veomni_manifest.json"
    content = json.loads(path.read_text())
    content["companions"]["../../etc/passwd"] = {"size": 1, "hash": "0"}
    path.write_text(json.dumps(content))
    code, _, error = run(capsys, "--hashes", converted)
    assert code == 1 and "is no name of a file in the folder" in error


def test_words(folders, capsys):
    for words in ([folders / "hub"], ["--hashes", folders / "hub", folders / "hub"]):
        with pytest.raises(SystemExit) as stopped:
            run(capsys, *words)
        assert stopped.value.code == 2
    assert run(capsys, "--hashes", folders / "hub")[0] == 1
    assert "only the converter's outputs have one" in verify_error(capsys, folders)


def verify_error(capsys, folders: Path) -> str:
    return run(capsys, "--hashes", folders / "hub")[2]
