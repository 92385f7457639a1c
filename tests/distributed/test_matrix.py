"""Every mesh against upstream in one process, parameter by parameter.

    python -m pytest tests/distributed/test_matrix.py              a selection: every mesh, and every kind several times
    python -m pytest tests/distributed/test_matrix.py -m matrix    all meshes x all kinds of batch

Each cell trains one step on a mesh and compares the summed loss (relative error 2e-6), the whole gradient of every
parameter (1e-5 by norm) and the clipping norm (1e-5) with upstream transformers on the same samples, one by one, fp32,
on the CPU. The mesh is on the device that `device.py` reads: the CPU, or GPUs.
"""

import itertools

import pytest
import torch

from tests.distributed.device import DEVICE
from tests.distributed.oracle import Reference, reference
from tests.distributed.ranks import Mesh, Options, gradients_of
from tests.distributed.toy import NAMES

# fp32: sums over the vocabulary, over tokens and over ranks in another order. Without a mistake the worst parameter of
# the worst cell stays near 3e-6; a gradient that misses one rank's share is off by more than 0.1.
# On a GPU the loss has the bound of the rest: the exponentials and roots of its kernels are off by an ulp or two, which
# a sum in another order is not (the one-GPU tests against upstream hold 1e-5 for outputs and gradients alike).
LOSS_BOUND, GRADIENT_BOUND, NORM_BOUND = 2e-6 if DEVICE == "cpu" else 1e-5, 1e-5, 1e-5
# A gradient that is zero upstream (no label reaches it) is compared with the joint norm of all.
ZERO_BOUND = 1e-7


def meshes() -> list[Mesh]:
    """All of 2 and 4 ranks with sizes in {1, 2, 4}, and those of 8 that use every dimension."""
    sizes = (1, 2, 4)
    shapes = [s for s in itertools.product(sizes, sizes, sizes) if s[0] * s[1] * s[2] in (2, 4)] + [(2, 2, 2)]
    return [Mesh(*shape, ep) for shape in shapes for ep in sizes if shape[0] * shape[2] % ep == 0]


MESHES = sorted(meshes(), key=lambda mesh: (mesh.world, str(mesh)))
CELLS = [(mesh, kind) for mesh in MESHES for kind in NAMES]


def in_default_run(index: int) -> bool:
    """Of a mesh's nine kinds two, and the next two for the next mesh."""
    mesh, kind = divmod(index, len(NAMES))
    return (kind - 2 * mesh) % len(NAMES) < 2


def cell(index: int) -> object:
    mesh, kind = CELLS[index]
    marks = [pytest.mark.matrix] if in_default_run(index) else [pytest.mark.matrix, pytest.mark.nightly]
    return pytest.param(mesh, kind, marks=marks, id=f"{mesh}-{kind}")


def gradient_errors(result: dict, expected: Reference) -> dict[str, float]:
    """Relative error by norm of every parameter's gradient; the sets of names must be equal."""
    assert result["gradients"].keys() == expected.gradients.keys()
    errors = {}
    for name, reference_gradient in expected.gradients.items():
        gradient = torch.from_numpy(result["gradients"][name])
        assert gradient.shape == reference_gradient.shape, name
        distance = (gradient - reference_gradient).double().norm().item()
        scale = reference_gradient.double().norm().item()
        errors[name] = distance / scale if scale else distance / (ZERO_BOUND / GRADIENT_BOUND * expected.norm)
    return errors


def check(result: dict, expected: Reference, bound: float = GRADIENT_BOUND, max_norm: float = 1.0) -> None:
    assert result["loss"] == pytest.approx(expected.loss, rel=LOSS_BOUND)
    errors = gradient_errors(result, expected)
    worst = max(errors, key=lambda name: errors[name])
    assert errors[worst] <= bound, f"gradient of {worst} is off by {errors[worst]:.2e}, bound {bound:.0e}"
    assert result["norm"] == pytest.approx(expected.norm, rel=NORM_BOUND)
    assert result["clipped_norm"] == pytest.approx(min(max_norm, expected.norm), rel=NORM_BOUND)


def test_the_matrix_covers_what_it_promises():
    assert len(MESHES) >= 14
    assert any(mesh.sp > 1 and mesh.ep > mesh.shard for mesh in MESHES), "no expert group reaches across sequence ranks"
    chosen = [CELLS[i] for i in range(len(CELLS)) if in_default_run(i)]
    assert {mesh for mesh, _ in chosen} == set(MESHES)
    assert all(sum(kind == name for _, kind in chosen) >= 3 for name in NAMES)


@pytest.mark.parametrize(("mesh", "kind"), [cell(i) for i in range(len(CELLS))])
def test_gradients_equal_upstreams(device_pools, mesh: Mesh, kind: str):
    result = device_pools(mesh.world).run(gradients_of, mesh, kind, Options())[0]
    check(result, reference(kind))
