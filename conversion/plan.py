"""What a conversion will write: files, tensors, and the pieces in which their bytes are made.

A piece is a run of whole experts (or, for any other tensor, of values) of one output tensor; its bytes are contiguous
in the output file. Pieces are small: a few of them, with what they are made from, fit in the memory bound at once, and
one that has just been made is still in the processor's cache when it is hashed and written.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

from conversion.checkpoint import Checkpoint
from conversion.errors import InputError
from conversion.hashing import new_hasher
from conversion.layout import (
    FORMAT_VERSION,
    Stamp,
    StoredTensor,
    check_ep_size,
    logical_name,
    overlap,
    stamp_metadata,
    stored_tensors,
)
from conversion.shard_io import BLOCK, DTYPE_BYTES, build_header


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """A tensor to write, made from `sources`, all of `source_dtype`; `part.shape` is its shape."""

    part: StoredTensor
    dtype: str
    source_dtype: str
    sources: tuple[StoredTensor, ...]
    is_expert: bool

    @property
    def nbytes(self) -> int:
        """Bytes it takes in the output."""
        return prod(self.part.shape) * DTYPE_BYTES[self.dtype]

    @property
    def units(self) -> int:
        """How many experts, or values, it can be cut into."""
        if not self.is_expert:
            return prod(self.part.shape)
        return self.part.shape[0] if self.part.stacked else 1

    @property
    def transposes(self) -> bool:
        """Whether its bytes are another order of the source's."""
        return any(source.transposed != self.part.transposed for source in self.sources)


@dataclass(frozen=True)
class OutputFile:
    """A file to write: its name, its metadata, its tensors in order."""

    name: str
    stamp: dict[str, str]
    tensors: tuple[OutputTensor, ...]

    @cached_property
    def header(self) -> bytes:
        """The bytes before the data."""
        return build_header(((t.part.name, t.dtype, t.part.shape) for t in self.tensors), self.stamp)

    @cached_property
    def data_bytes(self) -> int:
        """Bytes of tensor data."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return len(self.header) + self.data_bytes


@dataclass(frozen=True)
class Plan:
    """A whole conversion."""

    source: Checkpoint
    target: Stamp
    dtype: str | None
    files: tuple[OutputFile, ...]

    @cached_property
    def data_bytes(self) -> int:
        """Bytes of tensor data in the output."""
        return sum(file.data_bytes for file in self.files)

    @cached_property
    def transposed_bytes(self) -> int:
        """Bytes of the output tensors that are transposed."""
        return sum(tensor.nbytes for file in self.files for tensor in file.tensors if tensor.transposes)

    @cached_property
    def fingerprint(self) -> str:
        """Tells whether another run would write the same bytes: the source's headers, sizes and times, the output's
        headers. Equal fingerprints are what --resume asks for."""
        hasher = new_hasher("sha256")
        source: list[Any] = [FORMAT_VERSION, self.source.layout.layout]
        for header in self.source.headers:
            source.append([header.path.name, header.size, header.mtime_ns])
            hasher.update(header.raw)
        hasher.update(json.dumps(source).encode())
        for file in self.files:
            hasher.update(file.name.encode() + file.header)
        return hasher.hexdigest()


@dataclass(frozen=True, slots=True)
class Piece:
    """Experts, or values, [first, last) of a tensor; `offset` is where its bytes begin in the output file."""

    tensor: OutputTensor
    first: int
    last: int
    offset: int
    is_last: bool


def make_plan(source: Checkpoint, target: Stamp, dtype: str | None, max_shard_bytes: int, keep_unknown: bool) -> Plan:
    """Lay out the output of converting `source` to `target`; `dtype` (as in safetensors, or None) casts every weight.

    Raises UsageError when the experts do not divide, InputError when there are tensors the model does not have (and
    not `keep_unknown`), or when one output tensor would mix dtypes.
    """
    if target.layout == "ep-sharded":
        check_ep_size(target.ep_size, source.dims.num_experts)
    if source.unknown and not keep_unknown:
        names = ", ".join(source.unknown[:8]) + (" …" if source.unknown[8:] else "")
        raise InputError(f"{len(source.unknown)} tensor(s) are not the model's: {names}; --keep-unknown copies them")
    groups: dict[int | None, list[OutputTensor]] = {None: []}
    for name in _in_file_order(source):
        for tensor in _output_tensors(source, name, target, dtype):
            groups.setdefault(tensor.part.ep_rank, []).append(tensor)
    for name in source.unknown:
        info = source.stored[name, None].info
        part = StoredTensor(name, info.shape, (0, 1), (0, 1))
        groups[None].append(OutputTensor(part, info.dtype, info.dtype, (part,), is_expert=False))
    files: list[OutputFile] = []
    for rank in sorted(groups, key=lambda r: -1 if r is None else r):
        files += _cut_into_files(groups[rank], target, rank, max_shard_bytes)
    return Plan(source, target, dtype, tuple(files))


def _in_file_order(source: Checkpoint) -> list[str]:
    """Logical names by where their first stored tensor lies, so that the source is read from front to back."""
    order = {header.path: i for i, header in enumerate(source.headers)}

    def place(name: str) -> tuple[int, int]:
        first = source.parts(name)[0]
        location = source.stored[first.name, first.ep_rank]
        return order[location.path], location.info.begin

    return sorted(source.logical, key=place)


def _output_tensors(source: Checkpoint, name: str, target: Stamp, dtype: str | None) -> Iterator[OutputTensor]:
    shape, parts = source.logical[name], source.parts(name)
    dtypes = {source.stored[part.name, part.ep_rank].info.dtype for part in parts}
    if len(dtypes) > 1:
        raise InputError(f"the experts of {name} are stored in different dtypes: {', '.join(sorted(dtypes))}")
    source_dtype = dtypes.pop()
    if logical_name(name) is None:
        yield OutputTensor(parts[0], dtype or source_dtype, source_dtype, tuple(parts), is_expert=False)
        return
    assert len(shape) == 3
    for part in stored_tensors(target.layout, name, shape, target.ep_size):
        used = tuple(p for p in parts if overlap(part, p) is not None)
        yield OutputTensor(part, dtype or source_dtype, source_dtype, used, is_expert=True)


def _cut_into_files(tensors: list[OutputTensor], target: Stamp, rank: int | None, max_bytes: int) -> list[OutputFile]:
    shards: list[list[OutputTensor]] = []
    room = 0
    for tensor in tensors:
        if not shards or tensor.nbytes > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(tensor)
        room -= tensor.nbytes
    for shard in shards:  # tensors of whole blocks first: all of them then begin at one, and are written directly
        shard.sort(key=lambda tensor: tensor.nbytes % BLOCK != 0)
    if target.layout != "ep-sharded":
        stem = "model"
    else:
        stem = "model-dense" if rank is None else f"model-ep{rank:03d}-of-{target.ep_size:03d}"
    stamp = stamp_metadata(target.layout, target.ep_size, rank)
    return [
        OutputFile(f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors", stamp, tuple(shard))
        for i, shard in enumerate(shards, 1)
    ]


def unit_bytes(tensor: OutputTensor) -> int:
    """Memory it takes to make one expert (or value) of `tensor`: its bytes, those it is made from, those between."""
    values = prod(tensor.part.shape) // max(1, tensor.units)
    source_size = DTYPE_BYTES[tensor.source_dtype]
    total = values * DTYPE_BYTES[tensor.dtype]
    if tensor.dtype != tensor.source_dtype:
        total += values * source_size
    if tensor.transposes:
        # Every source that the expert overlaps is read whole: one where experts are stacked, one or two (gate and up)
        # where they are not.
        matrices = {source.rows: prod(source.shape[-2:]) for source in tensor.sources}
        total += sum(matrices.values()) * source_size
    return total


def units_per_piece(tensor: OutputTensor, piece_memory: int) -> int:
    """How many experts of `tensor` (or values, in whole blocks) make a piece that takes about `piece_memory` bytes."""
    units = max(1, piece_memory // max(1, unit_bytes(tensor)))
    return units if tensor.is_expert else max(1, units // BLOCK) * BLOCK


def pieces(tensor: OutputTensor, step: int, offset: int = 0) -> Iterator[Piece]:
    """`tensor`, whose bytes begin at `offset` in its file, in pieces of `step` units, in order."""
    count = tensor.units
    nbytes = tensor.nbytes // max(1, count)
    for first in range(0, max(1, count), step):  # an empty tensor is one empty piece
        last = min(count, first + step)
        yield Piece(tensor, first, last, offset + first * nbytes, last >= count)
