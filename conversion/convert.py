"""Runs a plan: writes the output folder, index and manifest last."""

import os
import shutil
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from conversion.checkpoint import EP_INDEX, HF_INDEX, MANIFEST, Checkpoint
from conversion.errors import InputError, UsageError
from conversion.hashing import PREFERRED, new_hasher
from conversion.manifest import (
    FileRecord,
    TensorRecord,
    dump,
    index_file,
    manifest,
    source_record,
    sync_folder,
    write_atomically,
)
from conversion.plan import OutputFile, Piece, Plan, pieces
from conversion.produce import produce
from conversion.shard_io import FileCache, byte_view

NOT_COMPANIONS = (".safetensors", ".bin", ".pt", ".pth", ".tmp")


@dataclass(frozen=True)
class Settings:
    """How to run: `piece_bytes` per piece of work, `workers` of them at once."""

    piece_bytes: int = 32 * 2**20
    workers: int = 2


def check_folders(source: Path, output: Path, overwrite: bool) -> None:
    """Raise UsageError unless `output` is apart from `source` and free to write to."""
    a, b = source.resolve(), output.resolve()
    if a == b or a in b.parents or b in a.parents:
        raise UsageError(f"the output {output} and the input {source} overlap; choose a folder apart from the input")
    if output.exists() and not output.is_dir():
        raise UsageError(f"the output {output} is a file")
    if output.exists() and any(output.iterdir()) and not overwrite:
        raise UsageError(f"the output {output} is not empty; add --overwrite to replace it")


def run_plan(plan: Plan, output: Path, settings: Settings, options: dict[str, Any]) -> dict[str, Any]:
    """Write `plan` to `output` and return the manifest."""
    output.mkdir(parents=True, exist_ok=True)
    _remove_old(output)
    copy_companions(plan.source, output)
    files = FileCache()
    try:
        records = [write_file(file, plan.source, output, files, settings) for file in plan.files]
    finally:
        files.close()
    name, index = index_file(plan)
    write_atomically(output / name, dump(index))
    content = manifest(plan.target, source_record(plan.source), options, PREFERRED, records)
    write_atomically(output / MANIFEST, dump(content))
    return content


def _remove_old(output: Path) -> None:
    """Take an earlier checkpoint away, manifest and index first, so that it never looks whole with parts gone."""
    for name in (MANIFEST, HF_INDEX, EP_INDEX):
        (output / name).unlink(missing_ok=True)
    for path in output.glob("*.safetensors"):
        path.unlink()


def copy_companions(source: Checkpoint, output: Path) -> None:
    """Everything in the source's folder but weights and their indexes: config, tokenizer, processor, chat template."""
    for path in sorted(source.folder.rglob("*")):
        relative = path.relative_to(source.folder)
        hidden = any(piece.startswith(".") for piece in relative.parts)
        if hidden or not path.is_file() or path.suffix in NOT_COMPANIONS or path.name in (HF_INDEX, EP_INDEX, MANIFEST):
            continue
        (output / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, output / relative)


def write_file(file: OutputFile, source: Checkpoint, output: Path, files: FileCache, settings: Settings) -> FileRecord:
    """Write one output file under a temporary name, sync it, rename it."""
    final, temporary = output / file.name, output / (file.name + ".tmp")
    file_hash = new_hasher()
    tensors: list[TensorRecord] = []
    try:
        with open(temporary, "wb") as out:
            out.write(file.header)
            file_hash.update(file.header)
            tensor_hash, source_hash = new_hasher(), new_hasher()
            for piece, made, read in _produced(file, source, files, settings):
                data = byte_view(made)
                for part in read:
                    source_hash.update(byte_view(np.ascontiguousarray(part)))
                tensor_hash.update(data)
                file_hash.update(data)
                out.write(data)
                if piece.is_last:
                    stored = piece.tensor.part
                    tensors.append(TensorRecord(stored.name, stored.ep_rank, piece.tensor.dtype, stored.shape,
                                                tensor_hash.hexdigest(), source_hash.hexdigest()))  # fmt: skip
                    tensor_hash, source_hash = new_hasher(), new_hasher()
            out.flush()
            os.fsync(out.fileno())
    except OSError as error:
        raise InputError(f"{temporary}: writing failed: {error.strerror}") from None
    os.replace(temporary, final)
    sync_folder(output)
    return FileRecord(file.name, final.stat().st_size, file_hash.hexdigest(), tuple(tensors))


def _produced(
    file: OutputFile, source: Checkpoint, files: FileCache, settings: Settings
) -> Iterator[tuple[Piece, np.ndarray, list[np.ndarray]]]:
    """Every piece of `file` in order; up to `workers` + 1 are being made ahead of the one being written."""
    with ThreadPoolExecutor(settings.workers) as pool:
        ahead: deque[tuple[Piece, Future[tuple[np.ndarray, list[np.ndarray]]]]] = deque()
        for tensor in file.tensors:
            for piece in pieces(tensor, settings.piece_bytes):
                ahead.append((piece, pool.submit(produce, piece, source, files)))
                if len(ahead) > settings.workers:
                    first, future = ahead.popleft()
                    yield first, *future.result()
        while ahead:
            first, future = ahead.popleft()
            yield first, *future.result()
