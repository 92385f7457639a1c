"""Matrix transpose of 2, 4 or 8 byte values, blocked for the cache.

A kernel is a function (out, matrix) that fills out (R, C) with matrix (C, R) transposed. Both are views of one unsigned
dtype whose rows are contiguous; consecutive rows may lie any distance apart. `choose_kernel` picks the SIMD kernel of
`conversion.transpose_simd` where numba is installed and there is enough to do, else `transpose_numpy`.
Measured on one core of an AMD EPYC (Genoa), bf16 experts of the published sizes, bytes of the matrix a second: numba 5
to 6 GB/s, numpy blocked as here 2.5 to 2.8, torch's copy of an int16 view 2.3, numpy's own 0.4 to 1.7.
`scripts/benchmarks/benchmark_conversion.py` measures them again.
"""

from collections.abc import Callable

import numpy as np

from conversion.errors import UsageError

# Two-byte values: 256 KB for the scratch tile and as much for the lines it is written to, together half an L2 cache.
TILE_ROWS, TILE_COLS = 256, 512
# Matrices have sizes like 2048 and 4096, whose columns all fall into a few sets of the cache; this many values more
# per row of the scratch tile spread them over all sets.
SKEW = 32
# Importing numba takes most of a second and 100 MB of memory: more than it saves on less than this many bytes.
WORTH_NUMBA = 2**30

Kernel = Callable[[np.ndarray, np.ndarray], None]


def choose_kernel(nbytes: int, device: str = "cpu") -> Kernel:
    """The fastest kernel for `nbytes` in all. The SIMD one compiles once for each installation.

    Raises UsageError for a GPU that torch does not have.
    """
    if device != "cpu":
        return torch_kernel(device)
    if nbytes < WORTH_NUMBA:
        return transpose_numpy
    try:
        from conversion.transpose_simd import transpose_simd
    except (ImportError, RuntimeError):  # numba is missing, or finds no folder that it could cache its code in
        return transpose_numpy
    return transpose_simd


def torch_kernel(device: str) -> Kernel:
    """A kernel that transposes on a torch device. Importing torch takes half a gigabyte of memory, CUDA more."""
    try:
        import torch
    except ImportError:
        raise UsageError(f"--device {device} cannot be used: torch is not installed") from None
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda cannot be used: torch finds no CUDA device")

    def transpose(out: np.ndarray, matrix: np.ndarray) -> None:
        signed = f"i{matrix.itemsize}"  # torch knows few operations on unsigned integers
        there = torch.from_numpy(matrix.view(signed)).to(device)
        torch.from_numpy(out.view(signed)).copy_(there.t().contiguous())

    transpose(np.zeros((64, 64), np.uint16), np.zeros((64, 64), np.uint16))
    return transpose


def transpose_numpy(out: np.ndarray, matrix: np.ndarray) -> None:
    """The kernel in numpy alone: row-wise into a skewed scratch tile, transposed from there."""
    rows, cols = out.shape
    scratch = np.empty((min(cols, TILE_COLS), min(rows, TILE_ROWS) + SKEW), out.dtype)
    for r in range(0, rows, TILE_ROWS):
        for c in range(0, cols, TILE_COLS):
            block = matrix[c : c + TILE_COLS, r : r + TILE_ROWS]
            tile = scratch[: block.shape[0], : block.shape[1]]
            tile[...] = block
            out[r : r + TILE_ROWS, c : c + TILE_COLS] = tile.T
