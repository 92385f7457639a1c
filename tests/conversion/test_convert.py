"""Conversions through the command lines' own main functions, bit for bit."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from conversion import hf_to_veomni, veomni_to_hf
from tests.conversion.synthetic import assert_same, read_logical, write_checkpoint

REPO = Path(__file__).resolve().parents[2]
TARGETS = {
    "hub": (veomni_to_hf, []),
    "fused": (hf_to_veomni, []),
    "per-expert": (veomni_to_hf, []),
    "ep-sharded": (hf_to_veomni, ["--ep-size", "4"]),
}


def convert(source: Path, output: Path, target: str, *options: str) -> int:
    command, fixed = TARGETS[target]
    return command.main([str(source), str(output), "--target", target, "--quiet", *fixed, *options])


@pytest.mark.parametrize(("source", "target"), list(itertools.product(TARGETS, TARGETS)))
def test_every_pair_of_layouts_is_bit_exact(tmp_path, source, target):
    logical = write_checkpoint(tmp_path / "in", source, ep_size=2)
    assert convert(tmp_path / "in", tmp_path / "out", target) == 0
    assert_same(read_logical(tmp_path / "out"), logical)


def test_output_carries_stamp_manifest_and_companions(tmp_path):
    write_checkpoint(tmp_path / "in", "hub")
    (tmp_path / "in" / "sub").mkdir()
    (tmp_path / "in" / "sub" / "extra.json").write_text("{}")
    (tmp_path / "in" / ".cache").mkdir()
    assert convert(tmp_path / "in", tmp_path / "out", "fused", "--max-shard-size", "100KB") == 0
    out = tmp_path / "out"
    manifest = json.loads((out / "veomni_manifest.json").read_text())
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert manifest["layout"] == "fused" and files == sorted(manifest["files"]) == sorted(
        set(index["weight_map"].values())
    )
    assert len(files) > 2
    for file in files:
        with safe_open(out / file, "pt") as handle:
            assert handle.metadata()["veomni_layout"] == "fused"
            assert all(index["weight_map"][name] == file for name in handle.keys())
    kept = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()} - set(files)
    assert kept == {"config.json", "tokenizer_config.json", "chat_template.jinja", "sub/extra.json",
                    "veomni_manifest.json", "model.safetensors.index.json"}  # fmt: skip


def test_runs_from_a_bare_checkout(tmp_path):
    write_checkpoint(tmp_path / "in", "hub")
    command = [sys.executable, REPO / "conversion" / "hf_to_veomni.py", "in", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("hub -> fused: ")
