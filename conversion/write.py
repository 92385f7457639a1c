"""Writes a plan's files: pieces are made and written by a pool of threads, hashed in order, each file then finished.

A piece's way: a worker reads its source bytes, transposes or casts them, and writes the result at its place in the
file; the main thread then updates the hashes, for which order matters, and hands the piece's arena to the next one.
When the last piece of a file is hashed, a thread of its own syncs the file, renames it and enters it in the journal,
while the pieces of the next file are made. So reading, transposing, hashing, writing and syncing all overlap.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from conversion import journal
from conversion.budget import Budget
from conversion.cast import NOTHING, Findings
from conversion.checkpoint import Checkpoint
from conversion.errors import InputError
from conversion.hashing import Hasher, new_hasher
from conversion.manifest import FileRecord, TensorRecord, sync_folder
from conversion.plan import OutputFile, Piece, pieces, units_per_piece
from conversion.produce import Arena, Made, produce
from conversion.shard_io import NewFile, byte_view
from conversion.transpose import Kernel

TEMPORARY = ".tmp"


class OpenFile:
    """An output file being written under its temporary name, and the hashes of what is written so far."""

    def __init__(self, file: OutputFile, output: Path, algorithm: str) -> None:
        self.file = file
        self.final = output / file.name
        self.temporary = output / (file.name + TEMPORARY)
        self.algorithm = algorithm
        self.data = NewFile(self.temporary, file.size)
        self.hasher = new_hasher(algorithm)
        self.records: list[TensorRecord] = []
        self._tensor: tuple[Hasher, Hasher, Findings] | None = None

    def write_header(self) -> None:
        """The header; the first piece comes after it."""
        self.data.write(0, memoryview(self.file.header))
        self.hasher.update(self.file.header)

    def add(self, piece: Piece, made: Made) -> None:
        """Hash a piece; pieces come in order."""
        tensor_hash, source_hash, findings = self._tensor or (
            new_hasher(self.algorithm),
            new_hasher(self.algorithm),
            NOTHING,
        )
        data = byte_view(made.out)
        self.hasher.update(data)
        tensor_hash.update(data)
        for values in made.read:
            source_hash.update(byte_view(values))
        tensor = piece.tensor
        unit = tensor.nbytes // max(1, tensor.units) // max(1, made.out.itemsize)
        findings = findings.merged(made.findings, piece.first * unit)
        self._tensor = tensor_hash, source_hash, findings
        if piece.is_last:
            digest = tensor_hash.hexdigest()
            made_from = source_hash.hexdigest() if made.read else digest
            part = tensor.part
            record = TensorRecord(part.name, part.ep_rank, tensor.dtype, part.shape, digest, made_from, findings)
            self.records.append(record)
            self._tensor = None

    def finish(self, output: Path) -> FileRecord:
        """Sync, rename, enter in the journal."""
        try:
            self.data.sync()
        finally:
            self.data.close()
        os.replace(self.temporary, self.final)
        sync_folder(output)
        record = FileRecord(self.file.name, self.file.size, self.hasher.hexdigest(), tuple(self.records))
        journal.append(output, record)
        return record


@dataclass
class Writer:
    """Writes files of a plan into `output`; `advance` is told the bytes of every piece that is done."""

    source: Checkpoint
    output: Path
    budget: Budget
    workers: int
    algorithm: str
    transpose: Kernel
    advance: Callable[[int], None]
    _open: list[OpenFile] = field(default_factory=list)

    def write(self, files: list[OutputFile]) -> list[FileRecord]:
        """Write `files` and return their records.

        Raises InputError when reading the source or writing the output fails; files finished until then are in the
        journal.
        """
        finishing: list[Future[FileRecord]] = []
        # Twice as many threads as there should be work for cores: at any time some wait for the disk.
        with ThreadPoolExecutor(2 * self.workers) as pool, ThreadPoolExecutor(1) as finisher:
            try:
                for file, piece, made in self._made(files, pool):
                    file.add(piece, made)
                    self.advance(len(byte_view(made.out)))
                    if piece.is_last and piece.tensor is file.file.tensors[-1]:
                        finishing.append(finisher.submit(file.finish, self.output))
                        if len(finishing) > 1:
                            finishing[-2].result()
                return [future.result() for future in finishing]
            except OSError as error:
                raise InputError(
                    f"writing to {self.output} failed: {error.strerror}; what is finished stays, and --resume goes on"
                ) from None
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
                finisher.shutdown(wait=True)
                for file in self._open:
                    file.data.close()

    def _made(self, files: list[OutputFile], pool: ThreadPoolExecutor) -> Iterator[tuple[OpenFile, Piece, Made]]:
        """Every piece of every file in order, already in its file; asking for the next takes its arena back."""
        free = [Arena(self.budget.arena_bytes) for _ in range(self.budget.slots)]
        ahead: deque[tuple[OpenFile, Piece, Arena, Future[Made]]] = deque()
        for file in files:
            opened = OpenFile(file, self.output, self.algorithm)
            self._open.append(opened)
            opened.write_header()
            offset = len(file.header)
            for tensor in file.tensors:
                for piece in pieces(tensor, units_per_piece(tensor, self.budget.piece_memory), offset):
                    if not free:
                        first, done, arena, future = ahead.popleft()
                        yield first, done, future.result()
                        free.append(arena)
                    arena = free.pop()
                    arena.clear()
                    ahead.append((opened, piece, arena, pool.submit(self._make, opened, piece, arena)))
                offset += tensor.nbytes
        while ahead:
            first, done, _, future = ahead.popleft()
            yield first, done, future.result()

    def _make(self, file: OpenFile, piece: Piece, arena: Arena) -> Made:
        made = produce(piece, self.source, arena, self.transpose)
        file.data.write(piece.offset, byte_view(made.out))
        return made
