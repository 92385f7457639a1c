"""Triton kernels for the element-wise steps of a vision block; `pointwise.py` has the reference of each.

All are bound by memory: each tensor is read and written once, a row's columns at consecutive addresses. Sums over
patches go through a fixed number of partial sums, so results repeat bit by bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from modeling.ops.column_sums import sum_rows
from modeling.ops.launch import launch

_TILE = 8192  # elements of rows that a program of a norm holds at a time
_PARTIALS = 132  # programs of the norm's adjoint, each with a partial sum: one for each multiprocessor of a Hopper
_ROWS, _COLUMNS = 64, 256  # patches and columns of a program of GELU's adjoint, which sums over patches
_GELU_STEP = 32  # patches at a time
_TURNED_ROWS, _TURN_STEP = 4, 1  # patches of a program of the rotation, and at a time
_TURNED_BACK_ROWS, _TURN_BACK_STEP = 32, 1
_TWICE = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)
_CUBIC = tl.constexpr(0.044715)


@triton.jit
def _add_layer_norm_kernel(
    x,
    branch,
    branch_bias,
    tail,
    weight,
    bias,
    sums,
    ahead,
    h,
    means,
    inverse_deviations,
    rows,
    H,
    eps,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, BLOCK_H)[None, :]
    at = row[:, None] * H + column
    inside = column < H
    mask = (row[:, None] < rows) & inside
    total = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        added = tl.load(branch + at, mask=mask, other=0.0).to(tl.float32)
        added += tl.load(branch_bias + column, mask=inside, other=0.0).to(tl.float32)
        total = (total + added).to(h.dtype.element_ty).to(tl.float32)
        tl.store(sums + at, total, mask=mask)
        tl.store(ahead + at, total + tl.load(tail + column, mask=inside, other=0.0).to(tl.float32), mask=mask)
    mean = tl.sum(total, axis=1) / H
    centred = tl.where(mask, total - mean[:, None], 0.0)
    inverse_deviation = tl.rsqrt(tl.sum(centred * centred, axis=1) / H + eps)
    gain = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(h + at, centred * inverse_deviation[:, None] * gain + shift, mask=mask)
    tl.store(means + row, mean, mask=row < rows)
    tl.store(inverse_deviations + row, inverse_deviation, mask=row < rows)


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `pointwise.layer_norm`; x contiguous."""
    h = torch.empty_like(x)
    return h, *_launch_norm(x, (x, weight, weight, weight, bias, x, x, h), eps, add=False)


def add_layer_norm(
    x: torch.Tensor,
    branch: torch.Tensor,
    branch_bias: torch.Tensor,
    tail: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `pointwise.add_layer_norm`; x and branch contiguous."""
    total, ahead, h = torch.empty_like(x), torch.empty_like(x), torch.empty_like(x)
    tensors = (branch, branch_bias, tail, weight, bias, total, ahead, h)
    return total, ahead, h, *_launch_norm(x, tensors, eps, add=True)


def _launch_norm(
    x: torch.Tensor, others: tuple[torch.Tensor, ...], eps: float, add: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, H = x.shape
    mean, inverse_deviation = torch.empty(2, rows, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(H)
    tile = max(_TILE // block, 1)
    tensors = (x, *others, mean, inverse_deviation)
    launch(_add_layer_norm_kernel, (triton.cdiv(rows, tile),), tensors, (rows, H, eps), (add, tile, block), num_warps=8)
    return mean, inverse_deviation


@triton.jit
def _layer_norm_backward_kernel(
    d_h,
    total,
    means,
    inverse_deviations,
    weight,
    d_total,
    d_out,
    partial,
    rows,
    H,
    steps,
    ROWS: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK_H)[None, :]
    inside = column < H
    gain = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    d_weight = tl.zeros([1, BLOCK_H], dtype=tl.float32)
    d_bias = tl.zeros([1, BLOCK_H], dtype=tl.float32)
    arrived = tl.zeros([1, BLOCK_H], dtype=tl.float32)
    passed = tl.zeros([1, BLOCK_H], dtype=tl.float32)
    first = program * steps * ROWS
    stop = tl.minimum(first + steps * ROWS, rows)
    row = (first + tl.arange(0, ROWS)).to(tl.int64)
    mask = (row[:, None] < rows) & inside
    next_total = tl.load(total + row[:, None] * H + column, mask=mask, other=0.0)
    next_grad = tl.load(d_h + row[:, None] * H + column, mask=mask, other=0.0)
    next_beside = tl.load(d_total + row[:, None] * H + column, mask=mask, other=0.0)
    for step in range(steps):
        row = (first + step * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        at = row[:, None] * H + column
        mask = (row[:, None] < rows) & inside
        value, grad, beside = next_total.to(tl.float32), next_grad.to(tl.float32), next_beside.to(tl.float32)
        # The next rows are on their way while these are worked on.
        ahead = at + ROWS * H
        ahead_mask = (row[:, None] + ROWS < stop) & inside
        next_total = tl.load(total + ahead, mask=ahead_mask, other=0.0)
        next_grad = tl.load(d_h + ahead, mask=ahead_mask, other=0.0)
        next_beside = tl.load(d_total + ahead, mask=ahead_mask, other=0.0)
        mean = tl.load(means + row, mask=row < rows, other=0.0)[:, None]
        scale = tl.load(inverse_deviations + row, mask=row < rows, other=0.0)[:, None]
        normalised = tl.where(mask, (value - mean) * scale, 0.0)
        d_weight += tl.sum(grad * normalised, axis=0)[None, :]
        d_bias += tl.sum(grad, axis=0)[None, :]
        arrived += tl.sum(beside, axis=0)[None, :]
        grad = grad * gain
        mean_grad = tl.sum(grad, axis=1)[:, None] / H
        along = tl.sum(grad * normalised, axis=1)[:, None] / H
        d = tl.where(mask, (grad - mean_grad - normalised * along) * scale + beside, 0.0)
        passed += tl.sum(d, axis=0)[None, :]
        tl.store(d_out + at, d, mask=mask)
    base = partial + program * 4 * H + column
    tl.store(base, d_weight, mask=inside)
    tl.store(base + H, d_bias, mask=inside)
    tl.store(base + 2 * H, arrived, mask=inside)
    tl.store(base + 3 * H, passed, mask=inside)


def layer_norm_backward(
    d_h: torch.Tensor,
    total: torch.Tensor,
    mean: torch.Tensor,
    inverse_deviation: torch.Tensor,
    weight: torch.Tensor,
    d_total: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `pointwise.layer_norm_backward`; tensors contiguous."""
    rows, H = total.shape
    block = triton.next_power_of_2(H)
    tile = max(_TILE // block, 1)
    steps = triton.cdiv(triton.cdiv(rows, tile), _PARTIALS)
    programs = triton.cdiv(rows, tile * steps)
    d = torch.empty_like(total)
    partial = torch.empty(programs, 4, H, dtype=torch.float32, device=total.device)
    tensors = (d_h, total, mean, inverse_deviation, weight, d_total, d, partial)
    launch(_layer_norm_backward_kernel, (programs,), tensors, (rows, H, steps), (tile, block), num_warps=8)
    return d, sum_rows(partial, weight.dtype)


@triton.jit
def _gelu_backward_kernel(pre, d_act, partial, P, width, ROWS: tl.constexpr, STEP: tl.constexpr, COLUMNS: tl.constexpr):
    column = (tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    chunk = tl.program_id(1)
    total = tl.zeros([1, COLUMNS], dtype=tl.float32)
    for step in range(ROWS // STEP):
        row = (chunk * ROWS + step * STEP + tl.arange(0, STEP)).to(tl.int64)[:, None]
        at = row * width + column
        mask = (row < P) & (column < width)
        x = tl.load(pre + at, mask=mask, other=0.0).to(tl.float32)
        d = tl.load(d_act + at, mask=mask, other=0.0).to(tl.float32)
        square = x * x * _CUBIC
        gate = 1.0 / (1.0 + tl.exp(x * (square + 1.0) * -_TWICE))
        d_pre = d * (gate + x * gate * (1.0 - gate) * (square * 3.0 + 1.0) * _TWICE)
        tl.store(pre + at, x * gate, mask=mask)
        tl.store(d_act + at, d_pre, mask=mask)
        total += tl.sum(d_pre, axis=0)[None, :]
    tl.store(partial + chunk * width + column, total, mask=column < width)


def gelu_backward_(pre: torch.Tensor, d_act: torch.Tensor) -> torch.Tensor:
    """See `pointwise.gelu_backward_`; both contiguous."""
    patches, width = pre.shape
    chunks = triton.cdiv(patches, _ROWS)
    partial = torch.empty(chunks, width, dtype=torch.float32, device=pre.device)
    grid = (triton.cdiv(width, _COLUMNS), chunks)
    launch(_gelu_backward_kernel, grid, (pre, d_act, partial), (patches, width), (_ROWS, _GELU_STEP, _COLUMNS))
    return sum_rows(partial, pre.dtype)


@triton.jit
def _turn_joint_kernel(
    joint,
    cos,
    sin,
    partial,
    P,
    N: tl.constexpr,
    HALF: tl.constexpr,
    BACK: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    HEADS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Turn a part (query, key or value) of joint (P, 3, N, D) in place; back, and summed over rows, with BACK.

    A lane owns a pair (d, d + D / 2) of one head, so that nobody else reads what it writes. All heads of a patch sit
    in one program, which reads its angles once. Sizes are constants: the compiler then knows how many neighbours one
    load may fetch.
    """
    D: tl.constexpr = 2 * HALF
    chunk = tl.program_id(0)
    part = tl.program_id(1)
    head = tl.arange(0, HEADS)[None, :, None]
    angle = tl.arange(0, LANES)[None, None, :]
    inside = (head < N) & (angle < HALF)
    sum_first = tl.zeros([STEP, HEADS, LANES], dtype=tl.float32)
    sum_second = tl.zeros([STEP, HEADS, LANES], dtype=tl.float32)
    for step in range(ROWS // STEP):
        row = (chunk * ROWS + step * STEP + tl.arange(0, STEP)).to(tl.int64)[:, None, None]
        mask = (row < P) & inside
        at = joint + row * (3 * N * D) + part * (N * D) + head * D + angle
        one = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        other = tl.load(at + HALF, mask=mask, other=0.0).to(tl.float32)
        if part < 2:
            c = tl.load(cos + row * D + angle, mask=(row < P) & (angle < HALF), other=1.0).to(tl.float32)
            s = tl.load(sin + row * D + angle, mask=(row < P) & (angle < HALF), other=0.0).to(tl.float32)
            if BACK:
                s = -s
            turned = one * c - other * s
            other = other * c + one * s
            one = turned
            tl.store(at, one, mask=mask)
            tl.store(at + HALF, other, mask=mask)
        if BACK:
            sum_first += one
            sum_second += other
    if BACK:
        own_head = tl.arange(0, HEADS)[:, None]
        own_angle = tl.arange(0, LANES)[None, :]
        base = partial + (chunk * 3 + part) * (N * D) + own_head * D + own_angle
        own = (own_head < N) & (own_angle < HALF)
        tl.store(base, tl.sum(sum_first, axis=0), mask=own)
        tl.store(base + HALF, tl.sum(sum_second, axis=0), mask=own)


def _turn(joint: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, partial: torch.Tensor | None) -> None:
    """Query and key in place; with partial sums, back, and all three parts summed."""
    patches, _, heads, dim = joint.shape
    back = partial is not None
    rows, step = (_TURNED_BACK_ROWS, _TURN_BACK_STEP) if back else (_TURNED_ROWS, _TURN_STEP)
    padded = (triton.next_power_of_2(heads), triton.next_power_of_2(dim // 2))
    launch(
        _turn_joint_kernel,
        (triton.cdiv(patches, rows), 3 if back else 2),
        (joint, cos, sin, joint if partial is None else partial),
        (patches,),
        (heads, dim // 2, back, rows, step, *padded),
        num_warps=8,
    )


def rotate_joint_(joint: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """See `pointwise.rotate_joint_`; joint, cos and sin contiguous."""
    _turn(joint, cos, sin, None)
    return joint


def rotate_joint_backward_(d_joint: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """See `pointwise.rotate_joint_backward_`; d_joint, cos and sin contiguous."""
    columns = d_joint[0].numel()
    chunks = triton.cdiv(len(d_joint), _TURNED_BACK_ROWS)
    partial = torch.empty(chunks, columns, dtype=torch.float32, device=d_joint.device)
    _turn(d_joint, cos, sin, partial)
    return sum_rows(partial, d_joint.dtype)
