"""Makes the bytes of one piece: reads the source slices, reorders and casts them."""

from dataclasses import dataclass, field
from math import prod

import numpy as np

from conversion.cast import FLOATS, NOTHING, Findings, cast_into, find_non_finite, find_overflow, storage_dtype
from conversion.checkpoint import Checkpoint
from conversion.layout import StoredTensor, overlap
from conversion.plan import Piece
from conversion.shard_io import BLOCK, DTYPE_BYTES, read_into
from conversion.transpose import Kernel


class Arena:
    """A block of memory that one piece after the other is made in, so that nothing is allocated on the way."""

    def __init__(self, nbytes: int) -> None:
        memory = np.empty(nbytes + BLOCK, np.uint8)
        self._bytes = memory[-memory.ctypes.data % BLOCK :][:nbytes]
        self._used = 0

    def clear(self) -> None:
        """Take every array back."""
        self._used = 0

    def take(self, shape: tuple[int, ...], dtype: np.dtype, align: int = 64) -> np.ndarray:
        """An uninitialised array at a multiple of `align`; apart from the arena where alignment has used it up."""
        nbytes = prod(shape) * dtype.itemsize
        start = -(-self._used // align) * align
        if start + nbytes > self._bytes.size:
            return np.empty(shape, dtype)
        self._used = start + nbytes
        return self._bytes[start : start + nbytes].view(dtype).reshape(shape)


@dataclass(frozen=True, slots=True)
class Made:
    """A piece's output values, the source values it was made from in reading order, and what was found in them.

    `read` is empty where the output's bytes are the source's.
    """

    out: np.ndarray
    read: list[np.ndarray] = field(default_factory=list)
    findings: Findings = NOTHING


def produce(piece: Piece, source: Checkpoint, arena: Arena, transpose: Kernel) -> Made:
    """Make `piece` in `arena`, with the transpose kernel `transpose`."""
    tensor = piece.tensor
    if tensor.is_expert:
        block, read = _expert_block(piece, source, arena, transpose)
    else:
        location = source.stored[tensor.part.name, tensor.part.ep_rank]
        block = arena.take((piece.last - piece.first,), storage_dtype(tensor.source_dtype))
        read_into(location.path, location.info.begin + piece.first * block.itemsize, block)
        read = []
    flat = block.reshape(-1)
    findings = find_non_finite(flat, tensor.source_dtype)
    if tensor.dtype == tensor.source_dtype:
        return Made(flat, read, findings)
    out = arena.take(flat.shape, storage_dtype(tensor.dtype), BLOCK)
    cast_into(out, flat, tensor.source_dtype, tensor.dtype)
    if tensor.dtype in FLOATS and tensor.source_dtype in FLOATS:
        findings = findings.merged(find_overflow(flat, tensor.source_dtype, out, tensor.dtype), 0)
    return Made(out, read or [flat], findings)


def _expert_block(
    piece: Piece, source: Checkpoint, arena: Arena, transpose: Kernel
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Experts of an output tensor in the source's dtype, in the form the output stores them, and what was read."""
    part = piece.tensor.part
    first = part.experts[0] + piece.first
    count = piece.last - piece.first
    wanted = StoredTensor(part.name, part.shape, (first, first + count), part.rows, part.transposed)
    out = arena.take((count, *part.shape[-2:]), storage_dtype(piece.tensor.source_dtype))
    read: list[np.ndarray] = []
    for stored in piece.tensor.sources:
        common = overlap(wanted, stored)
        if common is None:
            continue
        (e0, e1), (r0, r1) = common
        rows = slice(r0 - wanted.rows[0], r1 - wanted.rows[0])
        dest = out[e0 - first : e1 - first]
        dest = dest[:, :, rows] if part.transposed else dest[:, rows]
        if stored.transposed == part.transposed:
            _read_rows(stored, (e0, e1), (r0, r1), source, dest)
            continue
        slab = arena.take((e1 - e0, *stored.shape[-2:]), out.dtype)
        _read_rows(stored, (e0, e1), stored.rows, source, slab)
        read.append(slab)
        rows = slice(r0 - stored.rows[0], r1 - stored.rows[0])
        for target, matrix in zip(dest, slab[:, :, rows] if stored.transposed else slab[:, rows]):
            transpose(target, matrix)
    return out, read


def _read_rows(
    stored: StoredTensor, experts: tuple[int, int], rows: tuple[int, int], source: Checkpoint, out: np.ndarray
) -> None:
    """Fill `out` with experts [a, b) of a stored tensor; with only some of their rows where it is not transposed."""
    location = source.stored[stored.name, stored.ep_rank]
    matrix = prod(stored.shape[-2:])
    whole = rows == stored.rows
    skipped = (rows[0] - stored.rows[0]) * stored.shape[-1]
    for expert in range(experts[0], experts[1]):
        position = (expert - stored.experts[0]) * matrix + (0 if whole else skipped)
        part = out if whole and out.flags.c_contiguous else out[expert - experts[0]]
        read_into(location.path, location.info.begin + position * DTYPE_BYTES[location.info.dtype], part)
        if part is out:
            return
