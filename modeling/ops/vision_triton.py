"""Triton kernels for the element-wise steps of a vision block; `vision_pointwise.py` has the reference of each.

All are bound by memory: each tensor is read and written once, a row's columns at consecutive addresses. Sums over
patches go through a fixed number of partial sums, so results repeat bit by bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_TILE = 4096  # elements of rows that a program of a norm holds at a time
_PARTIALS = 264  # programs of the norm's adjoint, each with a partial sum: two for each multiprocessor of a Hopper
_ROWS, _COLUMNS = 64, 128  # patches and columns of a program that sums over patches
_STEP = 16  # patches at a time
_PAIRS = 64  # rotated pairs side by side
_TWICE = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)
_CUBIC = tl.constexpr(0.044715)


@triton.jit
def _add_layer_norm_kernel(
    x,
    branch,
    branch_bias,
    weight,
    bias,
    tail,
    out,
    h,
    means,
    inverse_deviations,
    rows,
    H,
    eps,
    ADD: tl.constexpr,
    TAIL: tl.constexpr,
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
        given = total
        if TAIL:
            given += tl.load(tail + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + at, given, mask=mask)
    mean = tl.sum(total, axis=1) / H
    centred = tl.where(mask, total - mean[:, None], 0.0)
    inverse_deviation = tl.rsqrt(tl.sum(centred * centred, axis=1) / H + eps)
    gain = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(h + at, centred * inverse_deviation[:, None] * gain + shift, mask=mask)
    tl.store(means + row, mean, mask=row < rows)
    tl.store(inverse_deviations + row, inverse_deviation, mask=row < rows)


def add_layer_norm(
    x: torch.Tensor,
    branch: torch.Tensor | None,
    branch_bias: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    tail: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `vision_pointwise.add_layer_norm`; x and branch contiguous."""
    rows, H = x.shape
    h = torch.empty_like(x)
    out = x if branch is None else torch.empty_like(x)
    mean, inverse_deviation = torch.empty(2, rows, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(H)
    tile = max(_TILE // block, 1)
    _add_layer_norm_kernel[(triton.cdiv(rows, tile),)](
        x,
        x if branch is None else branch,
        weight if branch_bias is None else branch_bias,
        weight,
        bias,
        weight if tail is None else tail,
        out,
        h,
        mean,
        inverse_deviation,
        rows,
        H,
        eps,
        ADD=branch is not None,
        TAIL=tail is not None,
        ROWS=tile,
        BLOCK_H=block,
        num_warps=8,
    )
    return out, h, mean, inverse_deviation


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
    for step in range(steps):
        row = ((program * steps + step) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        at = row[:, None] * H + column
        mask = (row[:, None] < rows) & inside
        mean = tl.load(means + row, mask=row < rows, other=0.0)[:, None]
        scale = tl.load(inverse_deviations + row, mask=row < rows, other=0.0)[:, None]
        normalised = (tl.load(total + at, mask=mask, other=0.0).to(tl.float32) - mean) * scale
        normalised = tl.where(mask, normalised, 0.0)
        grad = tl.load(d_h + at, mask=mask, other=0.0).to(tl.float32)
        beside = tl.load(d_total + at, mask=mask, other=0.0).to(tl.float32)
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
    """See `vision_pointwise.layer_norm_backward`; tensors contiguous."""
    rows, H = total.shape
    block = triton.next_power_of_2(H)
    tile = max(_TILE // block, 1)
    steps = triton.cdiv(triton.cdiv(rows, tile), _PARTIALS)
    programs = triton.cdiv(rows, tile * steps)
    d = torch.empty_like(total)
    partial = torch.empty(programs, 4, H, dtype=torch.float32, device=total.device)
    _layer_norm_backward_kernel[(programs,)](
        d_h, total, mean, inverse_deviation, weight, d_total, d, partial, rows, H, steps,
        ROWS=tile, BLOCK_H=block, num_warps=8,
    )  # fmt: skip
    return d, partial.sum(0)


@triton.jit
def _gelu_backward_kernel(
    pre, d_act, partial, P, width, ROWS: tl.constexpr, STEP: tl.constexpr, COLUMNS: tl.constexpr
):
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
    """See `vision_pointwise.gelu_backward_`; both contiguous."""
    patches, width = pre.shape
    chunks = triton.cdiv(patches, _ROWS)
    partial = torch.empty(chunks, width, dtype=torch.float32, device=pre.device)
    _gelu_backward_kernel[(triton.cdiv(width, _COLUMNS), chunks)](
        pre, d_act, partial, patches, width, ROWS=_ROWS, STEP=_STEP, COLUMNS=_COLUMNS
    )
    return partial.sum(0)


@triton.jit
def _turn_joint_kernel(
    query,
    key,
    value,
    joint,
    cos,
    sin,
    partial,
    P,
    N,
    HALF,
    BACK: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Forward: queries and keys of joint (P, 3, N, D) turned in place. Backward: three (P, N, D) turned back into it.

    A lane owns a pair (d, d + D / 2), so that nobody else reads what it writes.
    """
    pair = (tl.program_id(0) * PAIRS + tl.arange(0, PAIRS))[None, :]
    chunk = tl.program_id(1)
    part = tl.program_id(2)
    angle = pair % HALF
    inside = pair < N * HALF
    first = pair // HALF * (2 * HALF) + angle  # column of the pair's first half among N * D
    width = 2 * N * HALF
    source = query
    if part == 1:
        source = key
    if part == 2:
        source = value
    sum_first = tl.zeros([1, PAIRS], dtype=tl.float32)
    sum_second = tl.zeros([1, PAIRS], dtype=tl.float32)
    for step in range(ROWS // STEP):
        row = (chunk * ROWS + step * STEP + tl.arange(0, STEP)).to(tl.int64)[:, None]
        mask = (row < P) & inside
        target = joint + (row * 3 + part) * width + first
        read = target
        if BACK:
            read = source + row * width + first
        one = tl.load(read, mask=mask, other=0.0).to(tl.float32)
        other = tl.load(read + HALF, mask=mask, other=0.0).to(tl.float32)
        turned = mask & (part < 2)
        c = tl.load(cos + row * (2 * HALF) + angle, mask=turned, other=1.0).to(tl.float32)
        s = tl.load(sin + row * (2 * HALF) + angle, mask=turned, other=0.0).to(tl.float32)
        if BACK:
            s = -s
        new_one = one * c - other * s
        new_other = other * c + one * s
        tl.store(target, new_one, mask=mask)
        tl.store(target + HALF, new_other, mask=mask)
        if BACK:
            sum_first += tl.sum(new_one, axis=0)[None, :]
            sum_second += tl.sum(new_other, axis=0)[None, :]
    if BACK:
        base = partial + (chunk * 3 + part) * width + first
        tl.store(base, sum_first, mask=inside)
        tl.store(base + HALF, sum_second, mask=inside)


def rotate_joint_(joint: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """See `vision_pointwise.rotate_joint_`; joint, cos and sin contiguous."""
    patches, _, heads, dim = joint.shape
    grid = (triton.cdiv(heads * dim // 2, _PAIRS), triton.cdiv(patches, _ROWS), 2)
    _turn_joint_kernel[grid](
        joint, joint, joint, joint, cos, sin, joint, patches, heads, dim // 2,
        BACK=False, ROWS=_ROWS, STEP=_STEP, PAIRS=_PAIRS,
    )  # fmt: skip
    return joint


def rotate_joint_backward(
    d_query: torch.Tensor, d_key: torch.Tensor, d_value: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `vision_pointwise.rotate_joint_backward`; cos and sin contiguous."""
    parts = [part.contiguous() for part in (d_query, d_key, d_value)]
    patches, heads, dim = d_query.shape
    joint = d_query.new_empty(patches, 3 * heads * dim)
    chunks = triton.cdiv(patches, _ROWS)
    partial = torch.empty(chunks, 3 * heads * dim, dtype=torch.float32, device=joint.device)
    grid = (triton.cdiv(heads * dim // 2, _PAIRS), chunks, 3)
    _turn_joint_kernel[grid](
        *parts, joint, cos, sin, partial, patches, heads, dim // 2,
        BACK=True, ROWS=_ROWS, STEP=_STEP, PAIRS=_PAIRS,
    )  # fmt: skip
    return joint, partial.sum(0)
