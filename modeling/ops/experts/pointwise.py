"""The element-wise steps of an expert layer, each once as readable torch and once as a Triton kernel.

A caller names neither: tensors on a CUDA device go to the kernel (`triton.py`), all others to the reference in this
file, which is also what the kernel is tested against. Arithmetic is fp32 whatever the storage, rounded once on the way
out.

Letters: T tokens, K routes per token, R rows sorted by expert, H hidden, I expert intermediate.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from modeling.ops.launch import use_triton


def swiglu(pre: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up. pre (R, 2I), gate columns first -> (R, I), same dtype."""
    if use_triton(pre):
        from modeling.ops.experts import triton

        return triton.swiglu(pre)
    return swiglu_reference(pre)


def swiglu_backward(
    d_act: torch.Tensor, pre: torch.Tensor, row_weight: torch.Tensor, in_place: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The adjoint of `row_weight * swiglu(pre)`, and that product, which the down projection's gradient needs.

    Args: d_act (R, I) the gradient of the weighted activation; pre (R, 2I); row_weight (R,) fp32; in_place: d_pre
        takes pre's memory.
    Returns: d_pre (R, 2I), weighted activation (R, I), both in pre's dtype, and d_row_weight (R,) fp32.
    """
    if use_triton(pre):
        from modeling.ops.experts import triton

        return triton.swiglu_backward(d_act, pre, row_weight, in_place)
    d_pre, weighted, d_row_weight = swiglu_backward_reference(d_act, pre, row_weight)
    return pre.copy_(d_pre) if in_place else d_pre, weighted, d_row_weight


def gather_sum(rows: torch.Tensor, position: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    """out[t] = sum over k of weight[t, k] * rows[position[t, k]], k ascending, accumulated in fp32.

    Args: rows (R, H); position (T, K) int32; weight (T, K) fp32, or None for a plain sum. Returns (T, H), rows' dtype.
    """
    if use_triton(rows):
        from modeling.ops.experts import triton

        return triton.gather_sum(rows, position, weight)
    return gather_sum_reference(rows, position, weight)


def swiglu_reference(pre: torch.Tensor) -> torch.Tensor:
    gate, up = pre.float().chunk(2, dim=-1)
    return (F.silu(gate) * up).to(pre.dtype)


def swiglu_backward_reference(
    d_act: torch.Tensor, pre: torch.Tensor, row_weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    gate, up = pre.float().chunk(2, dim=-1)
    d_weighted = d_act.float()
    sigmoid = torch.sigmoid(gate)
    silu = gate * sigmoid
    act = silu * up
    d_row_weight = (d_weighted * act).sum(-1)
    weight = row_weight.float()[:, None]
    d_plain = d_weighted * weight
    # d silu(g)/dg = sigmoid(g) * (1 + g * (1 - sigmoid(g)))
    d_gate = d_plain * up * sigmoid * (1 + gate * (1 - sigmoid))
    d_pre = torch.cat([d_gate, d_plain * silu], dim=-1).to(pre.dtype)
    return d_pre, (act * weight).to(pre.dtype), d_row_weight


def gather_sum_reference(rows: torch.Tensor, position: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    picked = rows[position.long()].float()  # (T, K, H)
    if weight is not None:
        picked = picked * weight.float()[..., None]
    return picked.sum(dim=1).to(rows.dtype)
