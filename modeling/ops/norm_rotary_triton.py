"""Triton kernels behind `rms_norm.py` and `rotary.py`, which hold the readable references.

All are bound by memory: each tensor is read and written once, rows in tiles of a few thousand elements. Sums over
rows go through a fixed number of partial sums, so results repeat bit by bit.
"""

import torch
import triton
import triton.language as tl

from modeling.ops.column_sums_triton import sum_rows
from modeling.ops.triton_support import launch

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
