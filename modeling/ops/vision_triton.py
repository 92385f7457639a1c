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
_GELU_STEP = 32
_PAIRS = 64  # rotated pairs side by side
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
    """See `vision_pointwise.layer_norm`; x contiguous."""
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
    """See `vision_pointwise.add_layer_norm`; x and branch contiguous."""
    total, ahead, h = torch.empty_like(x), torch.empty_like(x), torch.empty_like(x)
    tensors = (branch, branch_bias, tail, weight, bias, total, ahead, h)
    return total, ahead, h, *_launch_norm(x, tensors, eps, add=True)


def _launch_norm(
    x: torch.Tensor, others: tuple[torch.Tensor, ...], eps: float, add: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, H = x.shape
    mean, inverse_deviation = (torch.empty(rows, dtype=torch.float32, device=x.device) for _ in range(2))
    block = triton.next_power_of_2(H)
    tile = max(_TILE // block, 1)
    _add_layer_norm_kernel[(triton.cdiv(rows, tile),)](
        x, *others, mean, inverse_deviation, rows, H, eps, ADD=add, ROWS=tile, BLOCK_H=block, num_warps=8
    )
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
    """See `vision_pointwise.gelu_backward_`; both contiguous."""
    patches, width = pre.shape
    chunks = triton.cdiv(patches, _ROWS)
    partial = torch.empty(chunks, width, dtype=torch.float32, device=pre.device)
    _gelu_backward_kernel[(triton.cdiv(width, _COLUMNS), chunks)](
        pre, d_act, partial, patches, width, ROWS=_ROWS, STEP=_GELU_STEP, COLUMNS=_COLUMNS
    )
    return partial.sum(0)


@triton.jit
def _turn_joint_kernel(
    joint,
    query,
    key,
    value,
    cos,
    sin,
    partial,
    P,
    N: tl.constexpr,
    HALF: tl.constexpr,
    WIDE: tl.constexpr,
    BACK: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Forward: joint (P, 3, N, D) to query, key and value (P, N, WIDE), the first two turned, zeros behind a head;
    where WIDE is D, within joint. Backward: the three turned back into joint.

    A lane owns a pair (d, d + D / 2), so that nobody else reads what it writes, and joint may be query and key as well.
    All sizes are constants: the compiler then knows how many neighbours one load may fetch.
    """
    D: tl.constexpr = 2 * HALF
    TAIL: tl.constexpr = (WIDE - D) // 2
    pair = (tl.program_id(0) * PAIRS + tl.arange(0, PAIRS))[None, :]
    chunk = tl.program_id(1)
    part = tl.program_id(2)
    head = pair // HALF
    angle = pair % HALF
    inside = pair < N * HALF
    narrow = head * D + angle
    own = query
    if part == 1:
        own = key
    if part == 2:
        own = value
    sum_first = tl.zeros([1, PAIRS], dtype=tl.float32)
    sum_second = tl.zeros([1, PAIRS], dtype=tl.float32)
    for step in range(ROWS // STEP):
        row = (chunk * ROWS + step * STEP + tl.arange(0, STEP)).to(tl.int64)[:, None]
        mask = (row < P) & inside
        in_joint = joint + row * (3 * N * D) + part * (N * D) + narrow
        at = row * (N * WIDE) + head * WIDE + angle
        if BACK:
            read = own + at
            target = in_joint
        else:
            read = in_joint
            target = in_joint
            if TAIL > 0:
                target = own + at
        one = tl.load(read, mask=mask, other=0.0).to(tl.float32)
        other = tl.load(read + HALF, mask=mask, other=0.0).to(tl.float32)
        turned = mask & (part < 2)
        c = tl.load(cos + row * D + angle, mask=turned, other=1.0).to(tl.float32)
        s = tl.load(sin + row * D + angle, mask=turned, other=0.0).to(tl.float32)
        if BACK:
            s = -s
        new_one = one * c - other * s
        new_other = other * c + one * s
        tl.store(target, new_one, mask=mask)
        tl.store(target + HALF, new_other, mask=mask)
        if BACK:
            sum_first += tl.sum(new_one, axis=0)[None, :]
            sum_second += tl.sum(new_other, axis=0)[None, :]
        elif TAIL > 0:
            nothing = tl.zeros([STEP, PAIRS], dtype=tl.float32)
            tl.store(target + D, nothing, mask=mask & (angle < TAIL))
            tl.store(target + D + TAIL, nothing, mask=mask & (angle < TAIL))
    if BACK:
        base = partial + (chunk * 3 + part) * (N * D) + narrow
        tl.store(base, sum_first, mask=inside)
        tl.store(base + HALF, sum_second, mask=inside)


def _turn(
    joint: torch.Tensor,
    parts: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    cos: torch.Tensor,
    sin: torch.Tensor,
    wide: int,
    which: int,
    partial: torch.Tensor | None,
) -> None:
    """The kernel for the first `which` parts; backward where partial sums are wanted."""
    patches, _, heads, dim = joint.shape
    grid = (triton.cdiv(heads * dim // 2, _PAIRS), triton.cdiv(patches, _ROWS), which)
    _turn_joint_kernel[grid](
        joint,
        *parts,
        cos,
        sin,
        joint if partial is None else partial,
        patches,
        N=heads,
        HALF=dim // 2,
        WIDE=wide,
        BACK=partial is not None,
        ROWS=_ROWS,
        STEP=_STEP,
        PAIRS=_PAIRS,
    )


def rotate_joint_(joint: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """See `vision_pointwise.rotate_joint_`; joint, cos and sin contiguous."""
    _turn(joint, (joint, joint, joint), cos, sin, joint.shape[-1], 2, None)
    return joint


def rotate_joint_padded(
    joint: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, width: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `vision_pointwise.rotate_joint_padded`; joint, cos and sin contiguous."""
    patches, _, heads, dim = joint.shape
    if width == dim:
        query, key, value = rotate_joint_(joint, cos, sin).unbind(1)
    else:
        query, key, value = (_wide(joint, patches, heads, width) for _ in range(3))
        _turn(joint, (query, key, value), cos, sin, width, 3, None)
    return query, key, value


def _wide(like: torch.Tensor, patches: int, heads: int, width: int) -> torch.Tensor:
    """Room for padded heads. The kernels write the zeros themselves, as long as there are fewer than values."""
    make = like.new_empty if width <= 2 * like.shape[-1] else like.new_zeros
    return make(patches, heads, width)


def rotate_joint_backward(
    d_query: torch.Tensor, d_key: torch.Tensor, d_value: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `vision_pointwise.rotate_joint_backward`; cos and sin contiguous."""
    d_query, d_key, d_value = (part.contiguous() for part in (d_query, d_key, d_value))
    (patches, heads, width), dim = d_value.shape, cos.shape[-1]
    joint = d_query.new_empty(patches, 3, heads, dim)
    partial = torch.empty(triton.cdiv(patches, _ROWS), 3 * heads * dim, dtype=torch.float32, device=joint.device)
    _turn(joint, (d_query, d_key, d_value), cos, sin, width, 3, partial)
    return joint.flatten(1), partial.sum(0)


@triton.jit
def _widen_kernel(one, other, wide_one, wide_other, rows, D: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    source = one
    target = wide_one
    if tl.program_id(1) == 1:
        source = other
        target = wide_other
    for begin in range(0, WIDE, 32):
        column = begin + tl.arange(0, 32)[None, :]
        value = tl.load(source + row * D + column, mask=(row < rows) & (column < D), other=0.0)
        tl.store(target + row * WIDE + column, value, mask=(row < rows) & (column < WIDE))


def widen_heads(one: torch.Tensor, other: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """See `vision_pointwise.widen_heads`; both contiguous."""
    patches, heads, dim = one.shape
    wide_one, wide_other = (one.new_empty(patches, heads, width) for _ in range(2))
    rows = patches * heads
    _widen_kernel[(triton.cdiv(rows, _STEP * 4), 2)](
        one, other, wide_one, wide_other, rows, D=dim, WIDE=width, ROWS=_STEP * 4
    )
    return wide_one, wide_other
