"""RMSNorm and rotary: the references against their formulas, and the Triton kernels against the references.

Without a GPU the kernels run in Triton's interpreter, in a process of its own (the switch is read at import).
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from modeling.ops.norm_rotary import rms_norm, rms_norm_reference, rotate, rotate_qkv, rotate_reference

HAS_GPU = torch.cuda.is_available()
SHAPES = [(5, 48), (3, 7, 12), (130, 2048), (1, 4096)]


def tables(tokens: int, dim: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple:
    angles = torch.arange(tokens)[:, None] * torch.rand(dim // 2, generator=torch.Generator().manual_seed(3))
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(device, dtype), angles.sin().to(device, dtype)


def test_rms_norm_is_its_formula() -> None:
    x, weight = torch.randn(4, 6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    expected = weight * x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(rms_norm(x, weight, 1e-6), expected, rtol=1e-6, atol=1e-6)  # statistics are float32


def test_rotation_turns_pairs() -> None:
    """Each pair (x_i, x_{i + D/2}) turns by its angle: norms stay, angles add up."""
    x = torch.randn(5, 3, 8)
    cos, sin = tables(5, 8)
    turned = rotate(x, cos, sin)
    pairs, turned_pairs = (
        torch.view_as_complex(y.unflatten(-1, (2, -1)).transpose(-1, -2).contiguous()) for y in (x, turned)
    )
    torch.testing.assert_close(turned_pairs, pairs * torch.complex(cos, sin)[:, None, :4], rtol=1e-5, atol=1e-6)


def test_joint_projection() -> None:
    qkv = torch.randn(5, 3 * 2 * 8)
    cos, sin = tables(5, 8)
    query, key, value = rotate_qkv(qkv.clone(), cos, sin, heads=2)
    parts = qkv.unflatten(-1, (3, 2, 8))
    torch.testing.assert_close(query, rotate_reference(parts[:, 0], cos, sin))
    torch.testing.assert_close(key, rotate_reference(parts[:, 1], cos, sin))
    assert torch.equal(value, parts[:, 2])


def gradients_of(function, *inputs: torch.Tensor) -> list[torch.Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    seed = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out)
    return [out.detach(), *torch.autograd.grad((out * seed).sum(), leaves)]


def check_kernels(device: str, dtype: torch.dtype, bound: float) -> None:
    """Forward and backward of every kernel against its reference in float32, by relative norm; repeated bit by bit."""
    from modeling.ops.norm_rotary import norm as norm_module
    from modeling.ops.norm_rotary import rotary as rotary_module

    generator = torch.Generator().manual_seed(0)

    def compare(kernel, reference, *inputs: torch.Tensor) -> None:
        inputs = tuple(x.to(device, dtype) for x in inputs)
        found = gradients_of(kernel, *inputs)
        again = gradients_of(kernel, *inputs)
        wanted = gradients_of(reference, *(x.float() for x in inputs))
        for one, twice, other in zip(found, again, wanted, strict=True):
            assert torch.equal(one, twice)
            assert (one.float() - other).norm() <= bound * other.norm()

    for shape in SHAPES:
        x, weight = torch.randn(shape, generator=generator), torch.randn(shape[-1], generator=generator)
        compare(
            lambda x, w: norm_module._RMSNorm.apply(x, w, 1e-6), lambda x, w: rms_norm_reference(x, w, 1e-6), x, weight
        )
    for tokens, heads, dim in ((5, 3, 8), (33, 2, 72), (17, 4, 128)):
        cos, sin = tables(tokens, dim, device)
        x = torch.randn(tokens, heads, dim, generator=generator)
        compare(
            lambda x, c=cos, s=sin: rotary_module._Rotate.apply(x, c, s),
            lambda x, c=cos, s=sin: rotate_reference(x, c, s),
            x,
        )
        compare(
            lambda x, w, c=cos, s=sin: rotary_module._NormRotate.apply(x, w, 1e-6, c, s),
            lambda x, w, c=cos, s=sin: rotate_reference(rms_norm_reference(x, w, 1e-6), c, s),
            x,
            torch.randn(dim, generator=generator),
        )
        # A strided view, as a slice of heads is.
        wide = torch.randn(tokens, heads + 2, dim, generator=generator)
        compare(
            lambda x, c=cos, s=sin, n=heads: rotary_module._Rotate.apply(x[:, 1 : n + 1], c, s),
            lambda x, c=cos, s=sin, n=heads: rotate_reference(x[:, 1 : n + 1], c, s),
            wide,
        )

        def joint(qkv: torch.Tensor, c: torch.Tensor = cos, s: torch.Tensor = sin, n: int = heads) -> torch.Tensor:
            return torch.stack(rotary_module._RotateQKV.apply(qkv, c, s, n), dim=1)

        def joint_reference(
            qkv: torch.Tensor, c: torch.Tensor = cos, s: torch.Tensor = sin, n: int = heads
        ) -> torch.Tensor:
            parts = qkv.unflatten(-1, (3, n, -1))
            turned = rotate_reference(parts[:, :2], c[:, None], s[:, None])
            return torch.cat((turned, parts[:, 2:]), dim=1)

        compare(joint, joint_reference, torch.randn(tokens, 3 * heads * dim, generator=generator))


@pytest.mark.skipif(HAS_GPU, reason="the kernels run on the GPU itself")
def test_kernels_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    code = (
        "import torch; from tests.unit.test_norm_rotary import check_kernels; check_kernels('cpu', torch.float32, 1e-6)"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 5e-3)])
def test_kernels_on_the_gpu(dtype: torch.dtype, bound: float) -> None:
    """bf16 results are rounded once or twice: a relative 2^-8 each."""
    check_kernels("cuda", dtype, bound)


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")
def test_launches_at_any_address() -> None:
    """A kernel compiled for addresses of whole 16 bytes is not launched at others, nor one for sizes at others."""
    weight = torch.randn(64, device="cuda")
    for rows in (1, 16, 17, 32):
        storage = torch.randn(rows * 64 + 1, device="cuda")
        for offset in (0, 1, 0):
            x = storage[offset : offset + rows * 64].view(rows, 64)
            torch.testing.assert_close(rms_norm(x, weight, 1e-6), rms_norm_reference(x, weight, 1e-6))
