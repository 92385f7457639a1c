"""Matrix transpose of 1, 2, 4 or 8 byte values, blocked so that every cache line is used while it is in the cache."""

import numpy as np

TILE = 128  # 128 x 128 two-byte values: 32 KB read, 32 KB written, both in the L2 cache


def transpose_into(out: np.ndarray, matrix: np.ndarray) -> None:
    """out (R, C) = matrix (C, R) transposed; both may be views with strided rows."""
    rows, cols = out.shape
    for r in range(0, rows, TILE):
        for c in range(0, cols, TILE):
            out[r : r + TILE, c : c + TILE] = matrix[c : c + TILE, r : r + TILE].T
