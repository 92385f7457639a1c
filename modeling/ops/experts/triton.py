"""Triton kernels for the element-wise steps of an expert layer; `pointwise.py` has the reference of each.

All are bound by memory: each tensor is read or written once, a row's columns in blocks of consecutive addresses. Sums
run in a fixed order, so results repeat bit by bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Columns per program: a thread then moves 16 bytes of bf16 at a time with four warps.
_BLOCK_I = 256
_BLOCK_H = 1024
_BLOCK_ROWS = 4


@triton.jit
def _lay_out_rows_kernel(
    sorted_keys,
    order,
    route,
    token,
    position,
    offsets,
    num_rows,
    E,
    K,
    STEPS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    program = tl.program_id(0)
    if program == 0:
        # offsets[e]: how many keys are below e, by bisection for all e at once.
        expert = tl.arange(0, BLOCK_E)
        low = tl.zeros([BLOCK_E], dtype=tl.int32)
        high = tl.zeros([BLOCK_E], dtype=tl.int32) + num_rows
        for _ in range(STEPS):
            middle = (low + high) // 2
            below = (tl.load(sorted_keys + middle, mask=low < high, other=0).to(tl.int32) < expert) & (low < high)
            high = tl.where(below, high, middle)
            low = tl.where(below, middle + 1, low)
        tl.store(offsets + expert, low, mask=expert <= E)
    else:
        row = (program - 1) * BLOCK_R + tl.arange(0, BLOCK_R)
        mask = row < num_rows
        served = tl.load(order + row, mask=mask, other=0).to(tl.int32)
        tl.store(route + row, served, mask=mask)
        tl.store(token + row, served // K, mask=mask)
        tl.store(position + served, row, mask=mask)


def lay_out_rows(
    sorted_keys: torch.Tensor, order: torch.Tensor, shape: torch.Size, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `routing.lay_out_rows_reference`; one launch for what would be ten."""
    num_rows = order.numel()
    # Two tensors, not two views of one: an operator's outputs may not share memory (`compiled.py`).
    route, token = (torch.empty(num_rows, dtype=torch.int32, device=order.device) for _ in range(2))
    position = torch.empty(shape, dtype=torch.int32, device=order.device)
    offsets = torch.empty(num_experts + 1, dtype=torch.int32, device=order.device)
    _lay_out_rows_kernel[(1 + triton.cdiv(num_rows, 1024),)](
        sorted_keys,
        order,
        route,
        token,
        position,
        offsets,
        num_rows,
        num_experts,
        shape[1],
        STEPS=num_rows.bit_length(),
        BLOCK_R=1024,
        BLOCK_E=triton.next_power_of_2(num_experts + 1),
    )
    return route, token, position, offsets


@triton.jit
def _swiglu_kernel(pre, out, num_rows, I, BLOCK_ROWS: tl.constexpr, BLOCK_I: tl.constexpr):
    row = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)[:, None]
    column = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)[None, :]
    mask = (row < num_rows) & (column < I)
    gate = tl.load(pre + row * 2 * I + column, mask=mask).to(tl.float32)
    up = tl.load(pre + row * 2 * I + I + column, mask=mask).to(tl.float32)
    tl.store(out + row * I + column, gate * tl.sigmoid(gate) * up, mask=mask)


def swiglu(pre: torch.Tensor) -> torch.Tensor:
    """See `pointwise.swiglu`."""
    pre = pre.contiguous()
    num_rows, intermediate = pre.shape[0], pre.shape[1] // 2
    out = pre.new_empty(num_rows, intermediate)
    grid = (triton.cdiv(num_rows, _BLOCK_ROWS), triton.cdiv(intermediate, _BLOCK_I))
    _swiglu_kernel[grid](pre, out, num_rows, intermediate, BLOCK_ROWS=_BLOCK_ROWS, BLOCK_I=_BLOCK_I)
    return out


@triton.jit
def _swiglu_backward_kernel(
    d_act,
    pre,
    row_weight,
    d_pre,
    weighted,
    d_row_weight,
    num_rows,
    I,
    INTERLEAVED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    rows = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    row = rows[:, None]
    weight = tl.load(row_weight + rows, mask=rows < num_rows, other=0.0).to(tl.float32)[:, None]
    total = tl.zeros([BLOCK_ROWS], dtype=tl.float32)
    for begin in range(0, I, BLOCK_I):
        column = begin + tl.arange(0, BLOCK_I)[None, :]
        mask = (row < num_rows) & (column < I)
        if INTERLEAVED:
            pair = begin * 2 + tl.arange(0, 2 * BLOCK_I)[None, :]
            both = tl.load(pre + row * 2 * I + pair, mask=(row < num_rows) & (pair < 2 * I), other=0.0)
            gate, up = tl.split(tl.reshape(both, (BLOCK_ROWS, BLOCK_I, 2)))
            gate = gate.to(tl.float32)
            up = up.to(tl.float32)
        else:
            gate = tl.load(pre + row * 2 * I + column, mask=mask, other=0.0).to(tl.float32)
            up = tl.load(pre + row * 2 * I + I + column, mask=mask, other=0.0).to(tl.float32)
        d_weighted = tl.load(d_act + row * I + column, mask=mask, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        act = silu * up
        total += tl.sum(d_weighted * act, axis=1)
        d_plain = d_weighted * weight
        d_gate = d_plain * up * sigmoid * (1 + gate * (1 - sigmoid))
        d_up = d_plain * silu
        if INTERLEAVED:
            d_both = tl.reshape(tl.join(d_gate, d_up), (BLOCK_ROWS, 2 * BLOCK_I))
            tl.store(d_pre + row * 2 * I + pair, d_both, mask=(row < num_rows) & (pair < 2 * I))
        else:
            tl.store(d_pre + row * 2 * I + column, d_gate, mask=mask)
            tl.store(d_pre + row * 2 * I + I + column, d_up, mask=mask)
        tl.store(weighted + row * I + column, act * weight, mask=mask)
    tl.store(d_row_weight + rows, total, mask=rows < num_rows)


def swiglu_backward(
    d_act: torch.Tensor, pre: torch.Tensor, row_weight: torch.Tensor, in_place: bool = False, interleaved: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `pointwise.swiglu_backward`. `interleaved`: pre and d_pre hold gate and up columns in turn."""
    d_act, pre, row_weight = d_act.contiguous(), pre.contiguous(), row_weight.contiguous()
    num_rows, intermediate = d_act.shape
    d_pre, weighted = pre if in_place else torch.empty_like(pre), torch.empty_like(d_act)
    d_row_weight = torch.empty(num_rows, dtype=torch.float32, device=pre.device)
    _swiglu_backward_kernel[(triton.cdiv(num_rows, _BLOCK_ROWS),)](
        d_act,
        pre,
        row_weight,
        d_pre,
        weighted,
        d_row_weight,
        num_rows,
        intermediate,
        INTERLEAVED=interleaved,
        BLOCK_ROWS=_BLOCK_ROWS,
        BLOCK_I=_BLOCK_I,
    )
    if in_place:
        torch.autograd.graph.increment_version(pre)  # so that autograd sees what a kernel does unseen
    return d_pre, weighted, d_row_weight


@triton.jit
def _gather_sum_kernel(
    rows, position, weight, out, H, K: tl.constexpr, HAS_WEIGHT: tl.constexpr, BLOCK_H: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    mask = column < H
    total = tl.zeros([BLOCK_H], dtype=tl.float32)
    # Unrolled, so that the loads of all routes are in flight together.
    for k in tl.static_range(K):
        row = tl.load(position + token * K + k).to(tl.int64)
        value = tl.load(rows + row * H + column, mask=mask, other=0.0).to(tl.float32)
        if HAS_WEIGHT:
            value *= tl.load(weight + token * K + k)
        total += value
    tl.store(out + token * H + column, total, mask=mask)


def gather_sum(rows: torch.Tensor, position: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    """See `pointwise.gather_sum`."""
    rows, position = rows.contiguous(), position.contiguous()
    tokens, top_k = position.shape
    hidden = rows.shape[1]
    out = rows.new_empty(tokens, hidden)
    _gather_sum_kernel[(tokens, triton.cdiv(hidden, _BLOCK_H))](
        rows,
        position,
        rows if weight is None else weight.float().contiguous(),
        out,
        hidden,
        K=top_k,
        HAS_WEIGHT=weight is not None,
        BLOCK_H=_BLOCK_H,
    )
    return out
