"""RMSNorm over the last dimension: readable torch, and on a GPU one Triton kernel each way.

The kernel rounds where the reference does (normalised values to the storage dtype, then the weight), keeps the input
and one number per row, and sums the weight's gradient in a fixed order.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from modeling.ops.launch import use_triton


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / rms(x) * weight, statistics in float32 (Zhang & Sennrich, 2019). (..., H), (H,) -> (..., H)."""
    normalised = x.float()
    normalised = normalised * torch.rsqrt(normalised.pow(2).mean(-1, keepdim=True) + eps)
    return weight * normalised.to(x.dtype)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See `rms_norm_reference`; same arguments, same result to rounding. Differentiable once on a GPU."""
    if use_triton(x) and x.dtype == weight.dtype:
        return _RMSNorm.apply(x, weight, eps)
    return rms_norm_reference(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    """forward: y = weight * x / rms(x); backward: the adjoint in x and weight."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        from modeling.ops.norm_rotary import triton

        y, inverse_rms = triton.rms_norm_forward(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse_rms)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        from modeling.ops.norm_rotary import triton

        return *triton.rms_norm_backward(d_y, *ctx.saved_tensors), None
