"""Bad input and wrong words, one row each: what is done to a good checkpoint, the exit code, and what is said.

Nothing is written in any of them, and nothing but the one message comes out.
"""

import json
import os
import resource
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from conversion import hf_to_veomni, veomni_to_hf
from conversion.layout import stamp_metadata
from tests.conversion.synthetic import toy_config, write_checkpoint

Damage = Callable[[Path], None]
SHARD, INDEX = "model-00001-of-00002.safetensors", "model.safetensors.index.json"
OTHER_SHARD = "model-00002-of-00002.safetensors"
GATE_UP = "model.language_model.layers.0.mlp.experts.gate_up_proj"
NORM = "model.language_model.norm.weight"  # in the other shard
VISUAL = "model.visual.pos_embed.weight"  # in the first
QKV = "model.visual.blocks.0.attn.qkv.weight"


def nothing(folder: Path) -> None:
    pass


def truncate(size: int) -> Damage:
    return lambda folder: os.truncate(folder / SHARD, (folder / SHARD).stat().st_size + size if size < 0 else size)


def header_length(length: int) -> Damage:
    def damage(folder: Path) -> None:
        with open(folder / SHARD, "r+b") as file:
            file.write(length.to_bytes(8, "little"))

    return damage


def edit_header(edit: Callable[[dict[str, Any]], None], pad: int = 0) -> Damage:
    """Rewrite a shard's header; the data stays."""

    def damage(folder: Path) -> None:
        data = (folder / SHARD).read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        edit(header)
        raw = json.dumps(header).encode() + b" " * pad
        (folder / SHARD).write_bytes(len(raw).to_bytes(8, "little") + raw + data[8 + length :])

    return damage


def raw_header(raw: bytes) -> Damage:
    return lambda folder: (folder / SHARD).write_bytes(len(raw).to_bytes(8, "little") + raw)


def set_first(key: str, value: Any) -> Damage:
    """Set a field of the shard's first tensor."""

    def edit(header: dict[str, Any]) -> None:
        header.pop("__metadata__", None)
        name = min(header, key=lambda n: header[n]["data_offsets"])
        header[name][key] = value(header[name][key]) if callable(value) else value

    return edit_header(edit)


def overlapping(header: dict[str, Any]) -> None:
    header.pop("__metadata__", None)
    first, second = sorted(header, key=lambda n: header[n]["data_offsets"])[:2]
    length = header[second]["data_offsets"][1] - header[second]["data_offsets"][0]
    begin = header[first]["data_offsets"][0]
    header[second]["data_offsets"] = [begin, begin + length]


def edit_index(edit: Callable[[dict[str, Any]], Any]) -> Damage:
    def damage(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        changed = edit(index)
        (folder / INDEX).write_text(json.dumps(index if changed is None else changed))

    return damage


def edit_config(edit: Callable[[dict[str, Any]], Any]) -> Damage:
    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        changed = edit(config)
        (folder / "config.json").write_text(json.dumps(config if changed is None else changed))

    return damage


def edit_tensors(
    edit: Callable[[dict[str, torch.Tensor]], object], shard: str = SHARD, metadata: dict[str, str] | None = None
) -> Damage:
    """Rewrite a shard with other tensors; the index is removed, so that only the tensors themselves are off."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / shard)
        edit(tensors)
        save_file(tensors, folder / shard, metadata=metadata or {"format": "pt"})
        (folder / INDEX).unlink()

    return damage


def replace_by(name: str, make: Callable[[Path], None]) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return damage


def to_pickles(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        path.rename(path.with_suffix(".bin"))
    (folder / INDEX).unlink()


def no_weights(folder: Path) -> None:
    for path in [*folder.glob("*.safetensors"), folder / INDEX]:
        path.unlink()


def transposed(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        if name in tensors:
            tensors[name] = tensors[name].transpose(1, 2).contiguous()

    return edit


def duplicate(folder: Path) -> None:
    tensors = load_file(folder / OTHER_SHARD)
    tensors[next(iter(load_file(folder / SHARD)))] = torch.zeros(3)
    save_file(tensors, folder / OTHER_SHARD)


def deep(depth: int) -> bytes:
    return b'{"a":' * depth + b"1" + b"}" * depth


BAD_INPUT: dict[str, tuple[Damage, int, str]] = {
    # The files.
    "truncated shard": (truncate(-1000), 1, "truncated"),
    "empty shard": (truncate(0), 1, "0 bytes is too short for a safetensors file"),
    "shard of seven bytes": (truncate(7), 1, "7 bytes is too short for a safetensors file"),
    "shard cut inside its header": (truncate(100), 1, "truncated: 100 bytes, but the header alone"),
    "bytes after the last tensor": (lambda f: (f / SHARD).open("ab").write(b"1234") and None, 1, "no tensor accounts"),
    "header length beyond the file": (header_length(2**40), 1, "truncated"),
    "header length of 2**64 - 1": (header_length(2**64 - 1), 1, "truncated"),
    "huge header": (edit_header(lambda h: None, pad=17 * 2**20), 1, "at most 16777216 are supported"),
    "header of zero bytes": (raw_header(b""), 1, "not valid JSON"),
    "header not JSON": (raw_header(b"{'single quotes'}"), 1, "not valid JSON"),
    "header not UTF-8": (raw_header(b'{"\xff\xfe": 1}'), 1, "not valid JSON"),
    "header not an object": (raw_header(b"[1, 2]"), 1, "a JSON list, expected an object"),
    "header nested without end": (raw_header(deep(100_000)), 1, "not valid JSON"),
    "header with a number of 10,000 digits": (raw_header(b'{"a": ' + b"9" * 10_000 + b"}"), 1, "not valid JSON"),
    "header naming a tensor twice": (raw_header(b'{"a": 1, "a": 2}'), 1, "names 'a' twice"),
    "metadata not strings": (edit_header(lambda h: h.update(__metadata__={"a": 1})), 1, "not an object of strings"),
    "tensor entry without shape": (edit_header(lambda h: h[VISUAL].pop("shape")), 1, "expected dtype, shape and data"),
    "overlapping offsets": (edit_header(overlapping), 1, "overlaps the tensor before it"),
    "gap between tensors": (edit_header(lambda h: h.pop(QKV)), 1, "leaves a gap before it"),
    "offsets backwards": (set_first("data_offsets", lambda o: o[::-1]), 1, "takes"),
    "negative offsets": (set_first("data_offsets", [-2, 0]), 1, "expected a list of non-negative integers"),
    "offsets as text": (set_first("data_offsets", ["0", "8"]), 1, "expected a list of non-negative integers"),
    "negative size": (set_first("shape", lambda s: [-n for n in s]), 1, "expected a list of non-negative integers"),
    "shape of fractions": (set_first("shape", [1.5, 2]), 1, "expected a list of non-negative integers"),
    "shape of truth values": (set_first("shape", [True, True]), 1, "expected a list of non-negative integers"),
    "shape that overflows": (set_first("shape", [2**62] * 8), 1, "takes"),
    "unknown dtype": (set_first("dtype", "BF17"), 1, "unknown dtype 'BF17'; known are"),
    "dtype of another size": (set_first("dtype", "F64"), 1, "F64"),
    "integer weights": (set_first("dtype", "I16"), 1, "is I16, not a floating-point weight"),
    "unreadable shard": (replace_by(SHARD, Path.mkdir), 1, "cannot be read: Is a directory"),
    "shard linked to itself": (replace_by(SHARD, lambda p: p.symlink_to(p)), 1, "Too many levels of symbolic links"),
    "shard linked to nothing": (replace_by(SHARD, lambda p: p.symlink_to("gone")), 1, "No such file or directory"),
    "missing shard": (lambda f: (f / SHARD).unlink(), 1, f"1 file(s) that the index names are missing: {SHARD}"),
    "pickled weights": (to_pickles, 1, "pickled weights; only safetensors files are read"),
    "no weights": (no_weights, 1, "holds no .safetensors file"),
    "duplicate names across shards": (duplicate, 1, "is in both"),
    # The index.
    "index not JSON": (lambda f: (f / INDEX).write_text("{"), 1, "not valid JSON"),
    "index without weight_map": (edit_index(lambda i: {"metadata": {}}), 1, "weight_map is missing"),
    "index a list": (edit_index(lambda i: [i]), 1, "weight_map is missing"),
    "index unreadable": (replace_by(INDEX, Path.mkdir), 1, "cannot be read: Is a directory"),
    "index naming a tensor that is not there": (
        edit_index(lambda i: i["weight_map"].update(ghost=SHARD)), 1, f"says 'ghost' is in {SHARD}, which does not"),
    "index naming a file that is not there": (
        edit_index(lambda i: i["weight_map"].update(ghost="gone.safetensors")), 1, "missing: gone.safetensors"),
    "index leaving out a tensor": (edit_index(lambda i: i["weight_map"].pop(NORM) and None), 1, "does not name"),
    "index with a tensor in the wrong shard": (
        edit_index(lambda i: i["weight_map"].update({NORM: SHARD})), 1, "which does not hold it"),
    "index leaving the folder": (
        edit_index(lambda i: i["weight_map"].update(ghost="../x.safetensors")), 1, "expected a .safetensors file"),
    "index naming no text": (edit_index(lambda i: i["weight_map"].update(ghost=3)), 1, "expected a .safetensors file"),
    # The config.
    "config missing": (lambda f: (f / "config.json").unlink(), 1, "config.json is missing"),
    "config not JSON": (lambda f: (f / "config.json").write_text("no"), 1, "not valid JSON"),
    "config unreadable": (replace_by("config.json", Path.mkdir), 1, "cannot be read: Is a directory"),
    "config of another model": (edit_config(lambda c: c.update(model_type="qwen3")), 1, "of model_type 'qwen3'"),
    "config a list": (edit_config(lambda c: [c]), 1, "of model_type None"),
    "config without text_config": (edit_config(lambda c: c.pop("text_config") and None), 1, "text_config is NoneType"),
    "config without a size": (
        edit_config(lambda c: c["text_config"].pop("hidden_size") and None), 1, "text_config.hidden_size is None"),
    "config with a negative size": (
        edit_config(lambda c: c["text_config"].update(num_experts=-8)), 1, "num_experts is -8, expected a positive"),
    "config with endless layers": (
        edit_config(lambda c: c["text_config"].update(num_hidden_layers=2**31)), 1, "at most 4096 layers"),
    "config with senseless deepstack": (
        edit_config(lambda c: c["vision_config"].update(deepstack_visual_indexes="8")), 1, "list of layer numbers"),
    # What the tensors are, against the config.
    "expert shape not the config's": (
        edit_config(lambda c: c["text_config"].update(moe_intermediate_size=24)), 1, "which no layout stores with"),
    "dense shape not the config's": (
        edit_config(lambda c: c["text_config"].update(vocab_size=301)), 1, "the config asks for (301, 48)"),
    "fewer experts than the config's": (
        edit_config(lambda c: c["text_config"].update(num_experts=16)), 1, "the config asks for (16,"),
    "more layers than stored": (
        edit_config(lambda c: c["text_config"].update(num_hidden_layers=4)), 1, "tensor(s) of the model are missing"),
    "fewer layers than stored": (
        edit_config(lambda c: c["text_config"].update(num_hidden_layers=2)), 1, "are not the model's"),
    "tensor missing": (edit_tensors(lambda t: t.pop(VISUAL)), 1, f"are missing: {VISUAL}"),
    "layouts mixed": (edit_tensors(transposed(GATE_UP), OTHER_SHARD), 1, "mixes layouts"),
    "stamp contradicting the shapes": (
        edit_tensors(lambda t: None, SHARD, stamp_metadata("fused")), 1, "mixes two checkpoints"),
    "stamp unknown": (
        edit_tensors(lambda t: None, SHARD, {"veomni_layout": "new"}), 1, "this tool knows"),
    "companion linked to itself": (lambda f: (f / "merges.txt").symlink_to("merges.txt"), 1, "Too many levels"),
    "companion unreadable": (lambda f: (f / "merges.txt").symlink_to("gone"), 1, "No such file"),
    "unfinished conversion": (lambda f: (f / "veomni_journal.jsonl").touch(), 1, "is an unfinished conversion"),
    "manifest not JSON": (lambda f: (f / "veomni_manifest.json").touch(), 1, "cannot be understood"),
}  # fmt: skip

WRONG_WORDS: dict[str, tuple[list[str], int, str]] = {
    "ep-size that does not divide": (["--target", "ep-sharded", "--ep-size", "3"], 2, "does not divide the 8 experts"),
    "ep-size beyond the experts": (["--target", "ep-sharded", "--ep-size", "16"], 2, "does not divide the 8 experts"),
    "ep-size zero": (["--target", "ep-sharded", "--ep-size", "0"], 2, "'0' is not a whole number above zero"),
    "ep-size negative": (["--target", "ep-sharded", "--ep-size=-2"], 2, "'-2' is not a whole number above zero"),
    "ep-size missing": (["--target", "ep-sharded"], 2, "belong together"),
    "ep-size without ep-sharded": (["--ep-size", "2"], 2, "belong together"),
    "unknown target": (["--target", "gguf"], 2, "invalid choice: 'gguf'"),
    "hub is the other command's target": (["--target", "hub"], 2, "invalid choice: 'hub'"),
    "unknown dtype": (["--dtype", "int4"], 2, "invalid choice: 'int4'"),
    "negative shard size": (["--max-shard-size=-5GB"], 2, "is no size above zero"),
    "zero memory": (["--max-ram", "0"], 2, "is no size above zero"),
    "size without a meaning": (["--max-ram", "lots"], 2, "'lots' is no size above zero"),
    "too little memory": (["--max-ram", "20MB"], 2, "is too little for this checkpoint; use at least"),
    "workers none": (["--workers", "0"], 2, "'0' is not a whole number above zero"),
    "a GPU that is not there": (["--device", "cuda"], 2, "--device cuda cannot be used"),
    "resume and overwrite": (["--resume", "--overwrite"], 2, "not allowed with argument"),
    "source-layout against the shapes": (["--source-layout", "fused"], 2, "contradicts the expert tensors"),
    "source-layout per-expert": (["--source-layout", "per-expert"], 2, "contradicts the expert tensors"),
    "source-layout ep-sharded without stamps": (["--source-layout", "ep-sharded"], 2, "carry no stamp that says which"),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bad") / "good"
    write_checkpoint(folder, "hub", toy_config())
    return folder


def run(capsys, source: Path, output: Path, *options: str, command: Any = hf_to_veomni) -> tuple[int, str]:
    try:
        code = command.main([str(source), str(output), *options])
    except SystemExit as error:  # argparse's
        code = error.code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    return code, captured.err


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(tmp_path, good, capsys, case):
    damage, code, message = BAD_INPUT[case]
    shutil.copytree(good, tmp_path / "in")
    damage(tmp_path / "in")
    actual, error = run(capsys, tmp_path / "in", tmp_path / "out")
    assert (actual, error.count("\n")) == (code, 1), error
    assert error.startswith("error: ") and message in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", WRONG_WORDS)
def test_wrong_words(tmp_path, good, capsys, monkeypatch, case):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    options, code, message = WRONG_WORDS[case]
    actual, error = run(capsys, good, tmp_path / "out", *options)
    assert actual == code and message in error, error
    assert not (tmp_path / "out").exists()


def test_the_table_is_long_enough():
    assert len(BAD_INPUT) + len(WRONG_WORDS) >= 30


def test_per_expert_dtypes_must_agree(tmp_path, good, capsys):
    write_checkpoint(tmp_path / "in", "per-expert", toy_config())
    name = "model.language_model.layers.0.mlp.experts.5.up_proj.weight"
    edit_tensors(lambda t: t.update({name: t[name].float()}), OTHER_SHARD)(tmp_path / "in")
    code, error = run(capsys, tmp_path / "in", tmp_path / "out")
    assert code == 1 and "are stored in different dtypes: BF16, F32" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("ep_rank", ["0", "3"])
def test_ep_sharded_with_a_rank_missing(tmp_path, capsys, ep_rank):
    write_checkpoint(tmp_path / "in", "ep-sharded", toy_config(), ep_size=4)
    for path in (tmp_path / "in").glob(f"experts-{ep_rank}-*"):
        path.unlink()
    code, error = run(capsys, tmp_path / "in", tmp_path / "out")
    assert code == 1 and f"(expert rank {ep_rank})" in error


def test_source_layout_against_the_stamp(tmp_path, capsys):
    write_checkpoint(tmp_path / "in", "hub", toy_config(), stamped=True)
    code, error = run(capsys, tmp_path / "in", tmp_path / "out", "--source-layout", "fused")
    assert code == 2 and "contradicts the checkpoint, whose files are stamped hub" in error


def test_stamp_against_the_shapes(tmp_path, capsys):
    config = toy_config()
    write_checkpoint(tmp_path / "in", "hub", config, stamped=True)
    for path in (tmp_path / "in").glob("*.safetensors"):
        save_file(load_file(path), path, metadata=stamp_metadata("fused"))
    code, error = run(capsys, tmp_path / "in", tmp_path / "out")
    assert code == 1 and "the files are stamped fused, but their expert tensors have the shapes of hub" in error


def test_folders_that_overlap(tmp_path, good, capsys):
    shutil.copytree(good, tmp_path / "in")
    (tmp_path / "link").symlink_to("in")
    before = sorted((tmp_path / "in").rglob("*"))
    for output in ("in", "in/out", "link", "link/out", ".", "in/../in"):
        for options in ([], ["--overwrite"], ["--resume"]):
            code, error = run(capsys, tmp_path / "in", tmp_path / output, *options)
            assert code == 2 and "overlap" in error, output
    assert sorted((tmp_path / "in").rglob("*")) == before


def test_outputs_that_cannot_be(tmp_path, good, capsys):
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    (tmp_path / "loop").symlink_to("loop")
    for output, options, code, message in (
        ("file", [], 2, "is not a folder"),
        ("file/out", [], 1, "Not a directory"),
        ("full", [], 2, "is not empty; --resume goes on with it, --overwrite replaces it"),
        ("full", ["--resume"], 2, "not of a conversion: --resume has nothing to go on with"),
        ("loop/out", [], 1, "Too many levels of symbolic links"),
        ("n" * 300, [], 1, "File name too long"),
    ):
        actual, error = run(capsys, good, tmp_path / output, *options)
        assert actual == code and message in error, error
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]


def test_an_output_on_a_read_only_disk(tmp_path, good, capsys):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {mounted.stderr.decode().strip()}")
    try:
        assert subprocess.run(["mount", "-o", "remount,ro", str(disk)]).returncode == 0
        code, error = run(capsys, good, disk / "out")
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert (code, error) == (1, f"error: {disk / 'out'}: Read-only file system\n")


def test_an_output_too_large_for_the_disk(tmp_path, good, capsys, monkeypatch):
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result((4096, 4096, *[100] * 6, 0, 255)))
    code, error = run(capsys, good, tmp_path / "new" / "out")
    assert code == 1 and "GB free; free 0.00 GB or choose another disk" in error
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("command", [hf_to_veomni, veomni_to_hf])
def test_inputs_that_are_none(tmp_path, capsys, command):
    (tmp_path / "file.safetensors").write_bytes(b"x")
    (tmp_path / "loop").symlink_to("loop")
    for name, message in (
        ("missing", "no such folder, and not of the form of a Hub id"),
        ("file.safetensors", "is a file; give the folder that holds"),
        ("loop", "no such folder"),
    ):
        code, error = run(capsys, tmp_path / name, tmp_path / "out", command=command)
        assert code == 1 and message in error, error
    assert not (tmp_path / "out").exists()


def test_no_file_is_left_open(tmp_path, good, capsys):
    """Of many conversions, good and bad, none leaves a descriptor behind."""
    before = len(os.listdir("/proc/self/fd"))
    for i in range(3):
        assert hf_to_veomni.main([str(good), str(tmp_path / f"out{i}"), "--quiet"]) == 0
        run(capsys, good, tmp_path / "out0")
        run(capsys, tmp_path / "nowhere", tmp_path / "out")
    assert len(os.listdir("/proc/self/fd")) == before
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > before
