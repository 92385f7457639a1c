"""The lines of a training program, under torchrun, which also starts the process group."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.oracle import reference
from tests.distributed.test_checkpoint import write_checkpoint

EXAMPLE = Path(__file__).with_name("example.py")


def test_example_runs_under_torchrun(tmp_path: Path):
    folder = write_checkpoint(tmp_path / "hub", "hub")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    done = subprocess.run([*command, str(EXAMPLE), str(folder)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    match = re.search(r"loss (\S+) norm (\S+)", done.stdout)
    assert match is not None, done.stdout
    expected = reference("mixed")
    # bf16 weights and arithmetic.
    assert float(match[1]) == pytest.approx(expected.loss, rel=5e-3)
    assert float(match[2]) == pytest.approx(expected.norm, rel=5e-2)
