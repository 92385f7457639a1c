"""The expert MLP on torch's grouped matrix product: any device, nothing but torch (and Triton on a GPU).

Two functions over rows sorted by expert, forward and its adjoint. They know no routing: row r reads `x[source[r]]`,
whether x holds this process's tokens or rows that other ranks sent. Between them only x and the pre-activation live;
gathered inputs, activations and outputs are made again or never stored.

Letters: R rows, H hidden, I expert intermediate, e experts on this rank.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from modeling.ops.experts.pointwise import swiglu, swiglu_backward

MIN_ROWS = 8  # seen with MKL: products of 1 to 3 rows differ in their last bits from the same rows among more


def forward(
    x: torch.Tensor, source: torch.Tensor, offsets: torch.Tensor, gate_up_proj: torch.Tensor, down_proj: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """x (N, H), source (R,), offsets (e + 1,), weights (e, 2I, H) and (e, H, I) -> pre (R, 2I), y (R, H)."""
    pre = grouped_linear(x[source], gate_up_proj, offsets)  # (R, 2I)
    return pre, grouped_linear(swiglu(pre), down_proj, offsets)


def backward(
    d_out: torch.Tensor,
    x: torch.Tensor,
    source: torch.Tensor,
    offsets: torch.Tensor,
    pre: torch.Tensor,
    row_weight: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    *,
    take_rows: Callable[[torch.Tensor], torch.Tensor] | None,
    need_gate_up: bool,
    need_down: bool,
    reuse_pre: bool,
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Adjoint of `row_weight[:, None] * forward(...)[1]`, its gradient given per source row as d_out (N, H).

    Returns: what take_rows makes of the gradient of the rows (R, H) in row order (None: not wanted). It sums over a
    token's rows, and is asked at once, so that they are gone before the largest weight gradient comes. Then
    d_row_weight (R,) fp32; d_gate_up_proj and d_down_proj in their parameters' shapes and dtypes. The routing weight
    enters after the matrix product, in fp32, and its gradient is <d_out @ down_proj, activation>, so the expert outputs
    need not be kept. reuse_pre: nobody needs pre any more, its memory may be written to.
    """
    d_y = d_out[source]  # (R, H), not yet times the routing weight
    d_act = grouped_linear(d_y, down_proj.transpose(1, 2), offsets)  # (R, I)
    d_pre, weighted_act, d_row_weight = swiglu_backward(d_act, pre, row_weight, in_place=reuse_pre)
    d_down = grouped_outer(d_y, weighted_act, offsets) if need_down else None
    del d_y, d_act, weighted_act  # each of a row's width: gone before the next ones come
    d_taken = None
    if take_rows is not None:
        d_taken = take_rows(grouped_linear(d_pre, gate_up_proj.transpose(1, 2), offsets))
    d_gate_up = grouped_outer(d_pre, x[source], offsets) if need_gate_up else None
    return d_taken, d_row_weight, d_gate_up, d_down


def grouped_linear(rows: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """rows[i] @ weight[e].T for the expert e of each row. rows (R, C), weight (e, D, C) or a view -> (R, D)."""
    if _kernel_takes(rows, weight):
        return F.grouped_mm(rows, weight.transpose(1, 2), offs=offsets[1:])
    out = rows.new_empty(rows.shape[0], weight.shape[1])
    for expert, begin, end in _segments(offsets):
        out[begin:end] = row_invariant_linear(rows[begin:end], weight[expert])
    return out


def grouped_outer(left: torch.Tensor, right: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """left.T @ right over each expert's rows, zero for an expert without. left (R, D), right (R, C) -> (e, D, C)."""
    if _kernel_takes(left, right):
        return F.grouped_mm(left.t(), right, offs=offsets[1:])
    out = left.new_zeros(offsets.numel() - 1, left.shape[1], right.shape[1])
    for expert, begin, end in _segments(offsets):
        out[expert] = left[begin:end].T @ right[begin:end]
    return out


def _kernel_takes(*operands: torch.Tensor) -> bool:
    """grouped_mm wants every stride but the unit one, and every address, to be a multiple of 16 bytes.

    On the CPU it is the same loop over matrix products as here, but for a row's bits (`row_invariant_linear`).
    """
    if not hasattr(F, "grouped_mm") or operands[0].device.type == "cpu":
        return False
    for operand in operands:
        strides = [stride * operand.element_size() for stride in operand.stride() if stride != 1]
        if operand.data_ptr() % 16 or any(stride % 16 for stride in strides):
            return False
    return True


def row_invariant_linear(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """rows @ weight.T, (R, C) and (D, C) -> (R, D), where a row's bits do not depend on how many rows stand beside it.

    CPU libraries take another path, with another order of summation, for one to three rows; those are padded. So a
    packed sample's outputs do not change with its neighbours' routing.
    """
    if rows.device.type != "cpu" or rows.shape[0] >= MIN_ROWS:
        return F.linear(rows, weight)
    return F.linear(F.pad(rows, (0, 0, 0, MIN_ROWS - rows.shape[0])), weight)[: rows.shape[0]]


def _segments(offsets: torch.Tensor) -> list[tuple[int, int, int]]:
    """(expert, first row, end) of every expert that has rows. Reads the offsets on the host: toy shapes only."""
    bounds = offsets.tolist()
    return [(i, bounds[i], bounds[i + 1]) for i in range(len(bounds) - 1) if bounds[i] < bounds[i + 1]]
