"""The SIMD transpose: square blocks of 16-byte vectors, transposed in registers. Needs numba.

numba's optimiser does not find the shuffles from a scalar loop (about 1.2 GB/s), so the block is emitted as LLVM
vector instructions, which exist on every 64-bit processor: unpck on x86, zip on ARM.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

VECTOR_BYTES = 16
# Blocks are visited in tiles of TILE rows of `out` by TILE columns, so that each cache line of both matrices is used
# whole while it is in the cache.
TILE = 128


@intrinsic
def _transpose_block(
    typing_context: Any, out: Any, out_stride: Any, source: Any, source_stride: Any, value: Any
) -> tuple[Any, Any]:
    """Transpose the n x n block at address `source` to address `out`; strides in bytes; `value` gives the dtype.

    log2(n) rounds, each interleaving row i with row i + n/2: the perfect shuffle, whose log2(n)-th power on an n x n
    block is the transpose.
    """
    signature = types.void(types.intp, types.intp, types.intp, types.intp, value)

    def codegen(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        out_address, out_step, source_address, source_step, _value = arguments
        size = value.bitwidth // 8
        n = VECTOR_BYTES // size
        vector = ir.VectorType(ir.IntType(value.bitwidth), n)

        def row(address: Any, step: Any, i: int) -> Any:
            offset = builder.mul(step, ir.Constant(step.type, i))
            return builder.inttoptr(builder.add(address, offset), vector.as_pointer())

        def mask(first: int) -> Any:
            lanes = [lane for k in range(first, first + n // 2) for lane in (k, n + k)]
            return ir.Constant(ir.VectorType(ir.IntType(32), n), [ir.Constant(ir.IntType(32), lane) for lane in lanes])

        rows = [builder.load(row(source_address, source_step, i)) for i in range(n)]
        for load in rows:
            load.align = size
        low, high = mask(0), mask(n // 2)
        for _ in range(n.bit_length() - 1):
            pairs = [(rows[i], rows[i + n // 2]) for i in range(n // 2)]
            rows = [builder.shuffle_vector(a, b, half) for a, b in pairs for half in (low, high)]
        for i in range(n):
            builder.store(rows[i], row(out_address, out_step, i)).align = size
        return context.get_dummy_value()

    return signature, codegen


# Compiled once for each width, into __pycache__; typed for strided views, so that all callers share one version.
@njit([f"void({t}[:, :], {t}[:, :])" for t in ("uint16", "uint32", "uint64")], nogil=True, cache=True)
def transpose_simd(out: np.ndarray, matrix: np.ndarray) -> None:  # pragma: no cover (compiled)
    """out (R, C) = matrix (C, R) transposed; unsigned integers, rows contiguous, any distance between rows."""
    rows, cols = out.shape
    size = out.itemsize
    n = VECTOR_BYTES // size
    whole_rows, whole_cols = rows // n * n, cols // n * n
    out_address, out_step = out.ctypes.data, out.strides[0]
    source_address, source_step = matrix.ctypes.data, matrix.strides[0]
    for r_tile in range(0, whole_rows, TILE):
        for c_tile in range(0, whole_cols, TILE):
            for r in range(r_tile, min(whole_rows, r_tile + TILE), n):
                for c in range(c_tile, min(whole_cols, c_tile + TILE), n):
                    target = out_address + r * out_step + c * size
                    source = source_address + c * source_step + r * size
                    _transpose_block(target, out_step, source, source_step, matrix[0, 0])  # type: ignore[call-arg]
    # The edges that do not fill a block.
    for r in range(whole_rows, rows):
        for c in range(cols):
            out[r, c] = matrix[c, r]
    for r in range(whole_rows):
        for c in range(whole_cols, cols):
            out[r, c] = matrix[c, r]
