"""What a conversion will write: files, tensors, and the pieces in which their bytes are made.

A piece is a run of whole experts (or, for any other tensor, of values) of one output tensor; its bytes are contiguous
in the output. Pieces are small enough for a few of them to fit in the memory bound at once.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from conversion.checkpoint import Checkpoint
from conversion.errors import InputError
from conversion.layout import Stamp, StoredTensor, check_ep_size, logical_name, overlap, stamp_metadata, stored_tensors
from conversion.shard_io import DTYPE_BYTES, build_header


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class OutputFile:
    """A file to write: its name, its metadata, its tensors in order."""

    name: str
    stamp: dict[str, str]
    tensors: tuple[OutputTensor, ...]

    @property
    def header(self) -> bytes:
        """The bytes before the data."""
        return build_header(((t.part.name, t.dtype, t.part.shape) for t in self.tensors), self.stamp)

    @property
    def data_bytes(self) -> int:
        """Bytes of tensor data."""
        return sum(tensor.nbytes for tensor in self.tensors)


@dataclass(frozen=True)
class Plan:
    """A whole conversion."""

    source: Checkpoint
    target: Stamp
    files: tuple[OutputFile, ...]

    @property
    def data_bytes(self) -> int:
        """Bytes of tensor data in the output."""
        return sum(file.data_bytes for file in self.files)


@dataclass(frozen=True)
class Piece:
    """Values [first, last) of a tensor, or its experts [first, last) where it is a stacked expert tensor."""

    tensor: OutputTensor
    first: int
    last: int
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
    return Plan(source, target, tuple(files))


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
    if target.layout != "ep-sharded":
        stem = "model"
    else:
        stem = "model-dense" if rank is None else f"model-ep{rank:03d}-of-{target.ep_size:03d}"
    stamp = stamp_metadata(target.layout, target.ep_size, rank)
    return [
        OutputFile(f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors", stamp, tuple(shard))
        for i, shard in enumerate(shards, 1)
    ]


def pieces(tensor: OutputTensor, piece_bytes: int) -> Iterator[Piece]:
    """`tensor` cut into pieces of about `piece_bytes` (one expert at least), in order."""
    experts = tensor.is_expert and tensor.part.stacked
    count = tensor.part.shape[0] if experts else 1 if tensor.is_expert else prod(tensor.part.shape)
    unit = tensor.nbytes // count if count else 1
    step = max(1, piece_bytes // max(1, unit))
    for first in range(0, max(1, count), step):  # an empty tensor is one empty piece
        yield Piece(tensor, first, min(count, first + step), first + step >= count)
