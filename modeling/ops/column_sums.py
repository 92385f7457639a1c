"""The second half of a sum over rows in Triton: kernels that go over many rows leave some partial sums behind."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from modeling.ops.launch import launch

_ROWS, _COLUMNS = 64, 32


@triton.jit
def _sum_rows_kernel(partial, total, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    own = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for begin in range(0, rows, ROWS):
        row = begin + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & (column < columns)[None, :]
        own += tl.load(partial + row[:, None] * columns + column[None, :], mask=mask, other=0.0)
    tl.store(total + column, tl.sum(own, axis=0), mask=column < columns)


def sum_rows(partial: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """partial (n, ...) fp32, contiguous -> its sum (...) in `dtype`, rounded once. Repeats bit by bit."""
    total = torch.empty(partial.shape[1:], dtype=dtype, device=partial.device)
    columns = total.numel()
    grid = (triton.cdiv(columns, _COLUMNS),)
    launch(_sum_rows_kernel, grid, (partial, total), (partial.shape[0], columns), (_ROWS, _COLUMNS))
    return total
