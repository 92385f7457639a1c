"""Triton kernels behind `norm.py` and `rotary.py`, which hold the readable references.

All are bound by memory: each tensor is read and written once, rows in tiles of a few thousand elements. Sums over
rows go through a fixed number of partial sums, so results repeat bit by bit.
"""

import torch
import triton
import triton.language as tl

from modeling.ops.column_sums import sum_rows
from modeling.ops.launch import launch

_TILE = 4096  # elements per program and step
_FLAT = 1024  # elements per program of a rotation, whose lanes read consecutive addresses whatever the head's size
_PARTIALS = 512  # partial sums of a weight gradient; a few programs for each multiprocessor


@triton.jit
def _rms_norm_kernel(x, weight, y, inverse_rms, rows, H, eps, ROWS: tl.constexpr, BLOCK_H: tl.constexpr):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, BLOCK_H)[None, :]
    at = row[:, None] * H + column
    mask = (row[:, None] < rows) & (column < H)
    value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, axis=1) / H + eps)
    normalised = (value * scale[:, None]).to(y.dtype.element_ty).to(tl.float32)
    tl.store(y + at, normalised * tl.load(weight + column, mask=column < H, other=0.0).to(tl.float32), mask=mask)
    tl.store(inverse_rms + row, scale, mask=row < rows)


@triton.jit
def _rms_norm_backward_kernel(
    d_y, x, weight, inverse_rms, d_x, d_weight, rows, H, steps, ROWS: tl.constexpr, BLOCK_H: tl.constexpr
):
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK_H)[None, :]
    gain = tl.load(weight + column, mask=column < H, other=0.0).to(tl.float32)
    total = tl.zeros([1, BLOCK_H], dtype=tl.float32)
    for step in range(steps):
        row = ((program * steps + step) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        at = row[:, None] * H + column
        mask = (row[:, None] < rows) & (column < H)
        scale = tl.load(inverse_rms + row, mask=row < rows, other=0.0)[:, None]
        normalised = tl.load(x + at, mask=mask, other=0.0).to(tl.float32) * scale
        grad = tl.load(d_y + at, mask=mask, other=0.0).to(tl.float32)
        rounded = normalised.to(d_y.dtype.element_ty).to(tl.float32)
        total += tl.sum(grad * rounded, axis=0)[None, :]
        grad = grad * gain
        mean = tl.sum(grad * normalised, axis=1)[:, None] / H
        tl.store(d_x + at, (grad - normalised * mean) * scale, mask=mask)
    tl.store(d_weight + program * H + column, total, mask=column < H)


def _rows_per_program(width: int) -> tuple[int, int]:
    """Rows and padded columns of a tile, for rows of `width` elements."""
    block = triton.next_power_of_2(width)
    return max(_TILE // block, 1), block


def rms_norm_forward(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """x (..., H), weight (H,) -> y like x, and 1 / rms(x) of each row, float32."""
    x = x.contiguous()
    H = x.shape[-1]
    rows = x.numel() // H
    y, inverse_rms = torch.empty_like(x), x.new_empty(rows, dtype=torch.float32)
    tile, block = _rows_per_program(H)
    grid = (triton.cdiv(rows, tile),)
    launch(_rms_norm_kernel, grid, (x, weight, y, inverse_rms), (rows, H, eps), (tile, block))
    return y, inverse_rms


def rms_norm_backward(
    d_y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, inverse_rms: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The adjoint of `rms_norm_forward`: d_x like x, d_weight (H,) in the weight's dtype."""
    d_y, x = d_y.contiguous(), x.contiguous()
    H = x.shape[-1]
    rows = x.numel() // H
    tile, block = _rows_per_program(H)
    steps = triton.cdiv(triton.cdiv(rows, tile), _PARTIALS)
    programs = triton.cdiv(rows, tile * steps)
    d_x, partial = torch.empty_like(x), x.new_empty(programs, H, dtype=torch.float32)
    tensors = (d_y, x, weight, inverse_rms, d_x, partial)
    launch(_rms_norm_backward_kernel, (programs,), tensors, (rows, H, steps), (tile, block))
    return d_x, sum_rows(partial, weight.dtype)


@triton.jit
def _turned(source, at, d, table, cos, sin, mask, HALF, BACK: tl.constexpr):
    """The rotated values at offsets `at`, which are component d of their head, by the angles of row `table`."""
    lower = d < HALF
    value = tl.load(source + at, mask=mask, other=0.0).to(tl.float32)
    partner = tl.load(source + at + tl.where(lower, HALF, -HALF), mask=mask, other=0.0).to(tl.float32)
    c = tl.load(cos + table + d, mask=mask, other=0.0).to(tl.float32)
    s = tl.load(sin + table + d, mask=mask, other=0.0).to(tl.float32)
    if BACK:
        s = -s
    return value * c + tl.where(lower, -partner, partner) * s


@triton.jit
def _rotate_kernel(x, cos, sin, y, size, width, D, BACK: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    tl.store(y + at, _turned(x, at, at % D, at // width * D, cos, sin, mask, D // 2, BACK), mask=mask)


@triton.jit
def _halves(base, row, H2: tl.constexpr, LANES: tl.constexpr, mask):
    """Both halves (rows, LANES) of rows of 2 H2 elements, in float32."""
    at = row[:, None] * (2 * H2) + tl.arange(0, LANES)[None, :]
    first = tl.load(base + at, mask=mask, other=0.0).to(tl.float32)
    return first, tl.load(base + at + H2, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _norm_rotate_kernel(
    x, weight, cos, sin, y, inverse_rms, rows, N, eps, H2: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    lane = tl.arange(0, LANES)[None, :]
    mask = (row[:, None] < rows) & (lane < H2)
    first, second = _halves(x, row, H2, LANES, mask)
    scale = tl.rsqrt((tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)) / (2 * H2) + eps)
    first = (first * scale[:, None]).to(y.dtype.element_ty).to(tl.float32)
    second = (second * scale[:, None]).to(y.dtype.element_ty).to(tl.float32)
    first *= tl.load(weight + lane, mask=lane < H2, other=0.0).to(tl.float32)
    second *= tl.load(weight + H2 + lane, mask=lane < H2, other=0.0).to(tl.float32)
    table = (row // N)[:, None] * (2 * H2) + lane
    c = tl.load(cos + table, mask=mask, other=0.0).to(tl.float32)
    s = tl.load(sin + table, mask=mask, other=0.0).to(tl.float32)
    at = row[:, None] * (2 * H2) + lane
    tl.store(y + at, first * c - second * s, mask=mask)
    tl.store(y + at + H2, second * c + first * s, mask=mask)
    tl.store(inverse_rms + row, scale, mask=row < rows)


@triton.jit
def _norm_rotate_backward_kernel(
    d_y,
    x,
    weight,
    cos,
    sin,
    inverse_rms,
    d_x,
    d_weight,
    rows,
    N,
    steps,
    H2: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    program = tl.program_id(0)
    lane = tl.arange(0, LANES)[None, :]
    first_gain = tl.load(weight + lane, mask=lane < H2, other=0.0).to(tl.float32)
    second_gain = tl.load(weight + H2 + lane, mask=lane < H2, other=0.0).to(tl.float32)
    first_total = tl.zeros([ROWS, LANES], dtype=tl.float32)
    second_total = tl.zeros([ROWS, LANES], dtype=tl.float32)
    for step in range(steps):
        row = ((program * steps + step) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        mask = (row[:, None] < rows) & (lane < H2)
        scale = tl.load(inverse_rms + row, mask=row < rows, other=0.0)[:, None]
        first, second = _halves(x, row, H2, LANES, mask)
        first *= scale
        second *= scale
        one, other = _halves(d_y, row, H2, LANES, mask)
        table = (row // N)[:, None] * (2 * H2) + lane
        c = tl.load(cos + table, mask=mask, other=0.0).to(tl.float32)
        s = tl.load(sin + table, mask=mask, other=0.0).to(tl.float32)
        first_grad = one * c + other * s
        second_grad = other * c - one * s
        first_total += first_grad * first.to(d_y.dtype.element_ty).to(tl.float32)
        second_total += second_grad * second.to(d_y.dtype.element_ty).to(tl.float32)
        first_grad *= first_gain
        second_grad *= second_gain
        along = tl.sum(first_grad * first, axis=1) + tl.sum(second_grad * second, axis=1)
        mean = along[:, None] / (2 * H2)
        at = row[:, None] * (2 * H2) + lane
        tl.store(d_x + at, (first_grad - first * mean) * scale, mask=mask)
        tl.store(d_x + at + H2, (second_grad - second * mean) * scale, mask=mask)
    column = tl.arange(0, LANES)
    base = d_weight + program * (2 * H2) + column
    tl.store(base, tl.sum(first_total, axis=0), mask=column < H2)
    tl.store(base + H2, tl.sum(second_total, axis=0), mask=column < H2)


def norm_rotate_forward(
    x: torch.Tensor, weight: torch.Tensor, eps: float, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Every head's norm, turned: x (..., T, N, D), weight (D,), cos, sin (..., T, D) -> y like x, and 1 / rms of each
    head, float32."""
    x = x.contiguous()
    heads, dim = x.shape[-2:]
    rows = x.numel() // dim
    y, inverse_rms = torch.empty_like(x), x.new_empty(rows, dtype=torch.float32)
    tile, lanes = _rows_per_program(dim // 2)
    tensors = (x, weight, *_tables(cos, sin), y, inverse_rms)
    launch(_norm_rotate_kernel, (triton.cdiv(rows, tile),), tensors, (rows, heads, eps), (dim // 2, tile, lanes))
    return y, inverse_rms


def norm_rotate_backward(
    d_y: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    inverse_rms: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The adjoint of `norm_rotate_forward`: d_x like x, d_weight (D,) in the weight's dtype."""
    d_y, x = d_y.contiguous(), x.contiguous()
    heads, dim = x.shape[-2:]
    rows = x.numel() // dim
    tile, lanes = _rows_per_program(dim // 2)
    tile = max(tile // 2, 1)
    steps = triton.cdiv(triton.cdiv(rows, tile), _PARTIALS)
    programs = triton.cdiv(rows, tile * steps)
    d_x, partial = torch.empty_like(x), x.new_empty(programs, dim, dtype=torch.float32)
    tensors = (d_y, x, weight, *_tables(cos, sin), inverse_rms, d_x, partial)
    constants = (dim // 2, tile, lanes)
    launch(_norm_rotate_backward_kernel, (programs,), tensors, (rows, heads, steps), constants)
    return d_x, sum_rows(partial, weight.dtype)


def _tables(cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return cos.flatten(0, -2).contiguous(), sin.flatten(0, -2).contiguous()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, back: bool = False) -> torch.Tensor:
    """x (..., T, N, D) turned by cos and sin (..., T, D), or turned back; a new, contiguous tensor."""
    x = x.contiguous()
    y = torch.empty_like(x)
    heads, dim = x.shape[-2:]
    grid = (triton.cdiv(x.numel(), _FLAT),)
    launch(_rotate_kernel, grid, (x, *_tables(cos, sin), y), (x.numel(), heads * dim, dim), (back, _FLAT))
    return y
