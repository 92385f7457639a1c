"""Makes the bytes of one piece: reads the source slices, reorders and casts them."""

from math import prod

import numpy as np

from conversion.cast import cast, storage_dtype
from conversion.checkpoint import Checkpoint
from conversion.layout import StoredTensor, overlap
from conversion.plan import Piece
from conversion.shard_io import DTYPE_BYTES, FileCache
from conversion.transpose import transpose_into


def produce(piece: Piece, source: Checkpoint, files: FileCache) -> tuple[np.ndarray, list[np.ndarray]]:
    """The piece's output bytes as a contiguous array, and the source bytes it was made from, in reading order."""
    tensor = piece.tensor
    if not tensor.is_expert:
        location = source.stored[tensor.part.name, tensor.part.ep_rank]
        values = np.empty(piece.last - piece.first, storage_dtype(tensor.source_dtype))
        files.read_into(location.path, location.info.begin + piece.first * values.itemsize, values)
        return cast(values, tensor.source_dtype, tensor.dtype), [values]
    block, read = _expert_block(piece, source, files)
    return cast(block, tensor.source_dtype, tensor.dtype), read


def _expert_block(piece: Piece, source: Checkpoint, files: FileCache) -> tuple[np.ndarray, list[np.ndarray]]:
    """Experts of an output tensor in the source's dtype, in the form the output stores them."""
    part = piece.tensor.part
    first = part.experts[0] + piece.first
    wanted = StoredTensor(part.name, part.shape, (first, first + piece.last - piece.first), part.rows, part.transposed)
    matrix = part.shape[-2:]
    out = np.empty((piece.last - piece.first, *matrix), storage_dtype(piece.tensor.source_dtype))
    read: list[np.ndarray] = []
    for stored in piece.tensor.sources:
        common = overlap(wanted, stored)
        if common is None:
            continue
        (e0, e1), (r0, r1) = common
        rows = slice(r0 - wanted.rows[0], r1 - wanted.rows[0])
        dest = out[e0 - first : e1 - first]
        dest = dest[:, :, rows] if part.transposed else dest[:, rows]
        if not stored.transposed and not part.transposed:
            for expert, d in enumerate(dest, e0):
                _read_experts(stored, (expert, expert + 1), (r0, r1), source, files, d[None])
                read.append(d)
            continue
        slab = np.empty((e1 - e0, *stored.shape[-2:]), out.dtype)
        _read_experts(stored, (e0, e1), stored.rows, source, files, slab)
        read.append(slab)
        rows = slice(r0 - stored.rows[0], r1 - stored.rows[0])
        block = slab[:, :, rows] if stored.transposed else slab[:, rows]
        for d, s in zip(dest, block):
            if stored.transposed != part.transposed:
                transpose_into(d, s)
            else:
                d[...] = s
    return out, read


def _read_experts(
    stored: StoredTensor,
    experts: tuple[int, int],
    rows: tuple[int, int],
    source: Checkpoint,
    files: FileCache,
    out: np.ndarray,
) -> None:
    """Fill `out` with whole experts of a stored tensor, or with some rows of one expert."""
    location = source.stored[stored.name, stored.ep_rank]
    matrix = prod(stored.shape[-2:])
    n_rows = stored.rows[1] - stored.rows[0]
    skipped = (experts[0] - stored.experts[0]) * matrix + (rows[0] - stored.rows[0]) * (matrix // n_rows)
    files.read_into(location.path, location.info.begin + skipped * DTYPE_BYTES[location.info.dtype], out)
