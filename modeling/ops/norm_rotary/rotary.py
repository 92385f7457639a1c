"""Rotary position embedding (Su et al., 2021): readable torch, and on a GPU one Triton kernel for queries and keys.

The kernel computes in float32 whatever the storage. Its adjoint is the rotation by the negated angle, the same kernel.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from modeling.ops.launch import use_triton
from modeling.ops.norm_rotary.norm import rms_norm


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    """(x1, x2) -> (-x2, x1) over the halves of the last dimension."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def rotate_reference(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x (..., T, N, D) turned by cos and sin (..., T, D), every head of a token alike, in the dtypes' own
    arithmetic."""
    return x * cos.unsqueeze(-2) + rotate_half(x) * sin.unsqueeze(-2)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """See `rotate_reference`; the last dimension's halves of cos and sin must be equal, as rotary tables' are."""
    if use_triton(x):
        return _Rotate.apply(x, cos, sin)
    return rotate_reference(x, cos, sin)


def norm_rotate(
    x: torch.Tensor, weight: torch.Tensor, eps: float, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """`norm.rms_norm` of every head of x (..., T, N, D), then `rotate`; on a GPU one kernel each way."""
    if use_triton(x) and x.dtype == weight.dtype:
        return _NormRotate.apply(x, weight, eps, cos, sin)
    return rotate(rms_norm(x, weight, eps), cos, sin)


def rotate_qkv(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value (P, N, D) of a joint projection qkv (P, 3 N D), the first two turned in float32.

    cos and sin (P, D). On a GPU the three share one new tensor, so that the projection's own is free at once.
    """
    if use_triton(qkv):
        return _RotateQKV.apply(qkv, cos, sin, heads)
    query, key, value = qkv.unflatten(-1, (3, heads, -1)).unbind(1)
    cos, sin = cos.float(), sin.float()
    query, key = (rotate_reference(x.float(), cos, sin).to(x.dtype) for x in (query, key))
    return query, key, value


class _Rotate(torch.autograd.Function):
    """forward: rotation; backward: rotation back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        from modeling.ops.norm_rotary import triton

        ctx.save_for_backward(cos, sin)
        return triton.rotate(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        from modeling.ops.norm_rotary import triton

        cos, sin = ctx.saved_tensors
        return triton.rotate(d_y, cos, sin, back=True), None, None


class _NormRotate(torch.autograd.Function):
    """forward: `norm_rotate`; backward: its adjoint in x and weight."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        from modeling.ops.norm_rotary import triton

        y, inverse_rms = triton.norm_rotate_forward(x, weight, eps, cos, sin)
        ctx.save_for_backward(x, weight, inverse_rms, cos, sin)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None, None]:
        from modeling.ops.norm_rotary import triton

        return *triton.norm_rotate_backward(d_y, *ctx.saved_tensors), None, None, None


class _RotateQKV(torch.autograd.Function):
    """forward: (P, 3 N D) -> rotated query, rotated key, value; backward: rotation back, joined again, in one pass."""

    @staticmethod
    def forward(ctx: Any, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: int) -> tuple:
        from modeling.ops.vision_block import triton

        cos, sin = cos.contiguous(), sin.contiguous()
        ctx.save_for_backward(cos, sin)
        # A copy: the projection's own output may be kept elsewhere (selective recomputation).
        return triton.rotate_joint_(qkv.unflatten(-1, (3, heads, -1)).clone(), cos, sin).unbind(1)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_query: torch.Tensor, d_key: torch.Tensor, d_value: torch.Tensor
    ) -> tuple[torch.Tensor, None, None, None]:
        from modeling.ops.vision_block import triton

        d_joint = torch.stack((d_query, d_key, d_value), dim=1)
        triton.rotate_joint_backward_(d_joint, *ctx.saved_tensors)
        return d_joint.flatten(1), None, None, None
