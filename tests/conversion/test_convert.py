"""Conversions through the command lines' own main functions, bit for bit."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from conversion import hf_to_veomni, veomni_to_hf
from conversion.checkpoint import open_checkpoint
from conversion.layout import logical_name
from tests.conversion.synthetic import (
    assert_same,
    random_tensors,
    read_logical,
    toy_config,
    write_checkpoint,
)

REPO = Path(__file__).resolve().parents[2]
COMMANDS = {"hub": veomni_to_hf, "fused": hf_to_veomni, "per-expert": veomni_to_hf, "ep-sharded": hf_to_veomni}
FORMS = [("hub", 1), ("fused", 1), ("per-expert", 1), *(("ep-sharded", n) for n in (1, 2, 4, 8))]


def convert(source: Path, output: Path, target: str, ep_size: int = 4, *options: str) -> int:
    ep = ["--ep-size", str(ep_size)] if target == "ep-sharded" else []
    return COMMANDS[target].main([str(source), str(output), "--target", target, "--quiet", *ep, *options])


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """One mixed checkpoint in every form: routers in fp32, the dense MLP in fp16, the rest in bf16."""
    logical = random_tensors(toy_config())
    for name in logical:
        if name.endswith("mlp.gate.weight"):
            logical[name] = logical[name].float()
        elif ".layers.1.mlp." in name:
            logical[name] = logical[name].half()
    folder = tmp_path_factory.mktemp("sources")
    for layout, ep_size in FORMS:
        write_checkpoint(folder / f"{layout}-{ep_size}", layout, logical=logical, ep_size=ep_size)
    return folder, logical


@pytest.mark.parametrize(("source", "target"), list(itertools.product(FORMS, FORMS)))
def test_every_pair_of_forms_is_bit_exact(tmp_path, sources, source, target):
    folder, logical = sources
    assert convert(folder / f"{source[0]}-{source[1]}", tmp_path / "out", *target) == 0
    assert open_checkpoint(tmp_path / "out").layout.ep_size == target[1]
    assert_same(read_logical(tmp_path / "out"), logical)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("target", ["fused", "per-expert"])
def test_other_dtypes_are_bit_exact(tmp_path, dtype, target):
    logical = random_tensors(toy_config(), dtype)
    write_checkpoint(tmp_path / "in", "hub", logical=logical)
    assert convert(tmp_path / "in", tmp_path / "out", target) == 0
    assert_same(read_logical(tmp_path / "out"), logical)


def test_experts_spread_over_shards(tmp_path):
    """Neighbouring experts, and gate and up of one expert, lie in different files."""

    def interleaved(names: list[str]) -> list[str]:
        return sorted(names, key=lambda name: hash_of(name) % 7)

    def hash_of(name: str) -> int:
        return sum(map(ord, name))

    logical = write_checkpoint(tmp_path / "in", "per-expert", shards=5, order=interleaved)
    files = {
        location.path
        for (name, _), location in open_checkpoint(tmp_path / "in").stored.items()
        if ".layers.0.mlp.experts." in name
    }
    assert len(files) == 5
    for target in ("hub", "fused", "ep-sharded"):
        assert convert(tmp_path / "in", tmp_path / target, target) == 0
        assert_same(read_logical(tmp_path / target), logical)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_untied_heads(tmp_path, tied):
    config = toy_config(tie_word_embeddings=tied)
    logical = write_checkpoint(tmp_path / "in", "hub", config)
    assert ("lm_head.weight" in logical) == (not tied)
    assert convert(tmp_path / "in", tmp_path / "out", "fused") == 0
    assert_same(read_logical(tmp_path / "out"), logical)


def test_tied_head_that_is_stored_is_kept(tmp_path):
    config = toy_config(tie_word_embeddings=True)
    logical = random_tensors(toy_config())
    write_checkpoint(tmp_path / "in", "hub", config, logical)
    assert convert(tmp_path / "in", tmp_path / "out", "fused") == 0
    assert_same(read_logical(tmp_path / "out"), logical)


def test_every_layer_sparse_and_every_second(tmp_path):
    for step in (1, 2):
        config = toy_config(mlp_only_layers=[], decoder_sparse_step=step)
        logical = write_checkpoint(tmp_path / f"in{step}", "hub", config)
        assert sum(logical_name(name) is not None for name in logical) == 2 * (3 // step)
        assert convert(tmp_path / f"in{step}", tmp_path / f"out{step}", "per-expert") == 0
        assert_same(read_logical(tmp_path / f"out{step}"), logical)


def test_output_carries_stamp_manifest_and_companions(tmp_path):
    write_checkpoint(tmp_path / "in", "hub")
    (tmp_path / "in" / "sub").mkdir()
    (tmp_path / "in" / "sub" / "extra.json").write_text("{}")
    (tmp_path / "in" / ".cache").mkdir()
    (tmp_path / "in" / ".cache" / "hidden").write_text("x")
    (tmp_path / "in" / "pytorch_model.bin").write_text("weights in another format")
    (tmp_path / "in" / "adapter_config.json").write_text("{}")  # without its weights it would break the output
    assert convert(tmp_path / "in", tmp_path / "out", "fused", 1, "--max-shard-size", "100KB") == 0
    out = tmp_path / "out"
    manifest = json.loads((out / "veomni_manifest.json").read_text())
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert manifest["layout"] == "fused"
    assert files == sorted(manifest["files"]) == sorted(set(index["weight_map"].values()))
    assert len(files) > 2
    for file in files:
        with safe_open(out / file, "pt") as handle:
            assert handle.metadata()["veomni_layout"] == "fused"
            assert all(index["weight_map"][name] == file for name in handle.keys())
    kept = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()} - set(files)
    companions = {"config.json", "tokenizer_config.json", "chat_template.jinja", "sub/extra.json"}
    assert kept == companions | {"veomni_manifest.json", "model.safetensors.index.json"}
    assert set(manifest["companions"]) == companions
    for name in companions:
        assert (out / name).read_bytes() == (tmp_path / "in" / name).read_bytes()


def test_manifest_proves_every_byte(tmp_path):
    """Its hashes are those of independent tools: xxhash over files, and over tensors read by safetensors."""
    xxhash = pytest.importorskip("xxhash")
    write_checkpoint(tmp_path / "in", "hub")
    assert convert(tmp_path / "in", tmp_path / "out", "fused") == 0
    manifest = json.loads((tmp_path / "out" / "veomni_manifest.json").read_text())
    assert manifest["hash_algorithm"] == "xxh3_128" and manifest["source"]["layout"] == "hub"
    for name, entry in (manifest["files"] | manifest["companions"]).items():
        data = (tmp_path / "out" / name).read_bytes()
        assert entry == {"size": len(data), "hash": xxhash.xxh3_128(data).hexdigest()}
    source = open_checkpoint(tmp_path / "in").stored
    assert len(manifest["tensors"]) == len(source)
    for tensor in manifest["tensors"]:
        for folder, key, path in (("out", "hash", tmp_path / "out" / tensor["file"]),
                                  ("in", "source_hash", source[tensor["name"], None].path)):  # fmt: skip
            with safe_open(path, "pt") as handle:
                value = handle.get_tensor(tensor["name"])
            if folder == "out":
                assert (list(value.shape), tensor["dtype"]) == (tensor["shape"], "BF16")
            assert xxhash.xxh3_128(value.view(torch.int16).numpy()).hexdigest() == tensor[key], (folder, tensor["name"])


def test_unknown_tensors(tmp_path, capsys):
    logical = random_tensors(toy_config())
    extra = {"model.visual.rotary.inv_freq": torch.arange(5, dtype=torch.float32), "extra.int": torch.arange(4)}
    write_checkpoint(tmp_path / "in", "hub", logical=logical | extra)
    assert convert(tmp_path / "in", tmp_path / "out", "fused") == 1
    error = capsys.readouterr().err
    assert "2 tensor(s) are not the model's: extra.int, model.visual.rotary.inv_freq; --keep-unknown" in error
    assert not (tmp_path / "out").exists()
    assert convert(tmp_path / "in", tmp_path / "out", "ep-sharded", 2, "--keep-unknown", "--dtype", "float32") == 0
    stored = open_checkpoint(tmp_path / "out").stored
    for name, value in extra.items():
        with safe_open(stored[name, None].path, "pt") as handle:
            torch.testing.assert_close(handle.get_tensor(name), value, rtol=0, atol=0)


@pytest.mark.parametrize("target", ["fused", "hub"])
def test_cast(tmp_path, target):
    config = toy_config()
    config["text_config"]["dtype"] = "float32"
    logical = write_checkpoint(tmp_path / "in", "hub", config, random_tensors(config, torch.float32))
    assert convert(tmp_path / "in", tmp_path / "out", target, 1, "--dtype", "bfloat16") == 0
    assert_same(read_logical(tmp_path / "out"), {name: value.bfloat16() for name, value in logical.items()})
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["dtype"] == written["text_config"]["dtype"] == "bfloat16"
    assert "dtype" not in written["vision_config"]


def test_overflow_is_reported_and_must_be_accepted(tmp_path, capsys):
    logical = random_tensors(toy_config(), torch.float32)
    name = "model.language_model.layers.2.mlp.experts.gate_up_proj"
    logical[name][3, 1, 5] = 1e6
    logical[name][7, 39, 47] = -7e4
    write_checkpoint(tmp_path / "in", "hub", logical=logical)
    assert convert(tmp_path / "in", tmp_path / "out", "fused", 1, "--dtype", "float16") == 1
    error = capsys.readouterr().err
    assert f"2 finite value(s) in 1 tensor(s), first 2 of {name}, are too large for F16" in error
    assert not (tmp_path / "out" / "veomni_manifest.json").exists()
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()
    options = ("--dtype", "float16", "--resume", "--allow-overflow")
    assert convert(tmp_path / "in", tmp_path / "out", "fused", 1, *options) == 0
    assert f"note: {name} (8, 40, 48) in model-00001-of-00001.safetensors: 2 too large for F16; first at (3, 1, 5)" in (
        capsys.readouterr().err
    )
    assert_same(read_logical(tmp_path / "out"), {name: value.half() for name, value in logical.items()})


def test_nan_and_inf_are_reported_not_fatal(tmp_path, capsys):
    logical = random_tensors(toy_config())
    down, norm = "model.language_model.layers.0.mlp.experts.down_proj", "model.language_model.norm.weight"
    logical[down][5, 7, 11] = float("nan")
    logical[down][6, 0, 0] = float("inf")
    logical[norm][4] = float("-inf")
    write_checkpoint(tmp_path / "in", "hub", logical=logical)
    assert convert(tmp_path / "in", tmp_path / "out", "fused") == 0
    error = capsys.readouterr().err
    assert (
        f"note: {down} (8, 48, 20) in model-00001-of-00001.safetensors: 1 NaN, 1 infinite; first at (5, 7, 11)" in error
    )
    assert f"note: {norm} (48,) in model-00001-of-00001.safetensors: 1 infinite; first at (4,)" in error
    assert_same(read_logical(tmp_path / "out"), logical)


def test_source_layout_settles_square_experts(tmp_path, capsys):
    config = toy_config(hidden_size=40)  # 2I = 40
    logical = random_tensors(config)
    for layout in ("hub", "fused"):
        write_checkpoint(tmp_path / layout, layout, config, logical)
        assert convert(tmp_path / layout, tmp_path / f"{layout}-out", "fused") == 2
        assert "add --source-layout hub" in capsys.readouterr().err
        assert convert(tmp_path / layout, tmp_path / f"{layout}-out", "fused", 1, "--source-layout", layout) == 0
        assert_same(read_logical(tmp_path / f"{layout}-out"), logical)
        assert convert(tmp_path / f"{layout}-out", tmp_path / f"{layout}-back", "hub") == 0  # stamped: not asked again
        assert_same(read_logical(tmp_path / f"{layout}-back"), logical)


@pytest.mark.parametrize("script", ["hf_to_veomni.py", "veomni_to_hf.py", "verify.py"])
def test_runs_from_a_bare_checkout(tmp_path, script):
    write_checkpoint(tmp_path / "in", "hub")
    command = [sys.executable, REPO / "conversion" / script, "in", "in" if script == "verify.py" else "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(
        ("hub -> fused: 1 file(s), ", "hub -> hub: 1 file(s), ", "equal: in (hub) and in (hub)")
    )
