"""The bound on resident memory, on tensors that are larger than it.

The same at real size, 12 GB under 1 GB and under 512 MB: python scripts/benchmarks/benchmark_conversion.py memory
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from conversion import verify
from conversion.checkpoint import open_checkpoint
from scripts.benchmarks.benchmark_conversion import make_checkpoint, published_config

BOUND = 160 * 10**6
REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """One decoder layer of the 30B model with a quarter of its experts, and little else; one tensor has 201 MB."""
    config = published_config("30B", 1)
    config["text_config"] |= {"num_experts": 32, "vocab_size": 1000}
    config["vision_config"] |= {"depth": 1, "hidden_size": 64, "intermediate_size": 96, "deepstack_visual_indexes": [0]}
    folder = tmp_path_factory.mktemp("memory") / "in"
    assert make_checkpoint(folder, config) > 0.3e9
    assert max(location.info.nbytes for location in open_checkpoint(folder).stored.values()) > BOUND
    return folder


# Runs a script as if it had been started itself, then says what the kernel counts: VmHWM, the process's own peak.
MEASURED = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    with open("/proc/self/status") as status:
        print(next(line for line in status if line.startswith("VmHWM")), file=sys.stderr)
"""


def run(script: str, *words: object) -> tuple[int, str]:
    """(VmHWM in bytes, standard output) of a command that succeeds."""
    command = [sys.executable, "-c", MEASURED, str(REPO / "conversion" / script), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stderr.split("VmHWM:")[1].split()[0]) * 1024, done.stdout


@pytest.mark.parametrize("words", [[], ["--dtype", "float32"], ["--target", "ep-sharded", "--ep-size", "2"]], ids=str)
def test_peak_is_under_the_bound(tmp_path, source, words):
    peak, output = run("hf_to_veomni.py", source, tmp_path / "out", "--max-ram", "160MB", "--json", "-", *words)
    assert peak <= BOUND
    assert abs(json.loads(output)["peak_memory_bytes"] - peak) < 8e6  # it says what it took
    if "--dtype" not in words:
        assert verify.main([str(source), str(tmp_path / "out"), "--quiet"]) == 0


def test_per_expert_and_back(tmp_path, source):
    for target, folder, output in (("per-expert", source, tmp_path / "experts"),
                                   ("hub", tmp_path / "experts", tmp_path / "hub")):  # fmt: skip
        peak, _ = run("veomni_to_hf.py", folder, output, "--max-ram", "160MB", "--target", target, "--quiet")
        assert peak <= BOUND
    assert verify.main([str(source), str(tmp_path / "hub"), "--quiet"]) == 0


def test_a_bound_too_small_says_what_would_do(tmp_path, source, capsys):
    """The least it names is enough."""
    words = [sys.executable, str(REPO / "conversion/hf_to_veomni.py"), str(source), str(tmp_path / "out"), "--quiet"]
    refused = subprocess.run([*words, "--max-ram", "50MB"], capture_output=True, text=True)
    assert refused.returncode == 2 and not (tmp_path / "out").exists()
    least = refused.stderr.split("use at least ")[1].strip()
    peak, _ = run("hf_to_veomni.py", source, tmp_path / "out", "--quiet", "--max-ram", least)
    assert peak <= int(least.removesuffix("MB")) * 10**6
