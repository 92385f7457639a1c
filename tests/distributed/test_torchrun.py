"""The lines of a training program, under torchrun, which also starts the process group."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.device import DEVICE, missing_devices
from tests.distributed.oracle import reference
from tests.distributed.test_checkpoint import write_checkpoint

EXAMPLE = Path(__file__).with_name("example.py")


def test_example_runs_under_torchrun(tmp_path: Path):
    lacking = missing_devices(4, DEVICE)
    if lacking is not None:
        pytest.skip(lacking)
    aligned = DEVICE == "cuda"  # bf16 there runs in kernels that do not take heads of 20
    folder = write_checkpoint(tmp_path / "hub", "hub", aligned=aligned)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    done = subprocess.run(
        [*command, str(EXAMPLE), str(folder)],
        env=os.environ | {"NCCL_NVLS_ENABLE": "0"},  # as `device.py` does for its ranks
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    match = re.search(r"loss (\S+) norm (\S+)", done.stdout)
    assert match is not None, done.stdout
    expected = reference("mixed", aligned=aligned)
    # bf16 weights and arithmetic.
    assert float(match[1]) == pytest.approx(expected.loss, rel=5e-3)
    assert float(match[2]) == pytest.approx(expected.norm, rel=5e-2)
