"""Every mesh in bf16, as a training run computes it: no further from upstream in fp32 than one rank is.

    python -m pytest tests/distributed/test_bf16_matrix.py              two meshes, three kinds of batch
    python -m pytest tests/distributed/test_bf16_matrix.py -m matrix    all meshes x all kinds of batch

Weights are kept in fp32, gathered and multiplied in bf16, and gradients summed over ranks in fp32. The reference is the
matrix's: upstream in one process in fp32. How far bf16 may be from it depends on model, batch and kernels, so one rank
of the same device is asked: the same model, weights and kernels, and nobody to share with. A mesh rounds the same
products, only its sums over tokens are cut elsewhere; the two errors are nearly the same numbers (on CPUs their ratio
is 0.97 to 1.00). NO_WORSE leaves a mistake no more than half of that error, under one percent of the gradient.

Rounding flips a near-tie between two experts now and then, and one flip moves a gradient more than all other rounding
does, so every router takes the reference's choices (as in `tests/parity/test_bf16.py`).
"""

from collections.abc import Callable
from functools import cache

import pytest
import torch

from tests.distributed.device import DEVICE
from tests.distributed.oracle import reference, routes
from tests.distributed.pool import Pool
from tests.distributed.ranks import Mesh, Options, gradients_of
from tests.distributed.test_matrix import MESHES
from tests.distributed.toy import NAMES
from tests.parity.harness import relative_error

NO_WORSE = 1.1
OPTIONS = Options(parallelize={"param_dtype": torch.bfloat16}, aligned=True)
# On GPUs the first step waits for every kernel to be compiled.
LIMIT = 240.0 if DEVICE == "cpu" else 600.0
DEFAULT_MESHES = [Mesh(1, sp=2, ep=2), Mesh(2, sp=2, ep=4)]
DEFAULT_KINDS = ["mixed", "straddling image", "one expert"]


def cell(mesh: Mesh, kind: str) -> object:
    by_default = mesh in DEFAULT_MESHES and kind in DEFAULT_KINDS
    marks = [pytest.mark.matrix] if by_default else [pytest.mark.matrix, pytest.mark.nightly]
    return pytest.param(mesh, kind, marks=marks, id=f"{mesh}-{kind}")


def bf16_error(pool: Pool, mesh: Mesh, kind: str) -> float:
    """Relative error of all gradients as one vector: single parameters' errors are noise at this precision."""
    choices = [[layer.numpy() for layer in sample] for sample in routes(kind, aligned=True)]
    found = pool.run(gradients_of, mesh, kind, OPTIONS, choices, timeout=LIMIT)[0]["gradients"]
    expected = reference(kind, aligned=True).gradients
    assert found.keys() == expected.keys()
    whole = torch.cat([torch.from_numpy(found[name]).flatten() for name in expected])
    return relative_error(whole, torch.cat([gradient.flatten() for gradient in expected.values()]))


@cache
def error_of_one_rank(pools: Callable[[int], Pool], kind: str) -> float:
    return bf16_error(pools(1), Mesh(), kind)


@pytest.mark.parametrize(("mesh", "kind"), [cell(mesh, kind) for mesh in MESHES for kind in NAMES])
def test_bf16_gradients_are_no_worse_than_one_ranks(device_pools, mesh: Mesh, kind: str):
    found, alone = bf16_error(device_pools(mesh.world), mesh, kind), error_of_one_rank(device_pools, kind)
    assert 1e-3 < alone < 5e-2, f"one rank's error is {alone:.1e}: not that of bf16"
    assert found <= NO_WORSE * alone, f"{found:.5f} against one rank's {alone:.5f}"
