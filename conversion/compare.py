"""Two checkpoints compared bit for bit, whatever their layouts; a checkpoint checked against its manifest."""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from conversion.cast import FLOATS, cast
from conversion.checkpoint import EP_INDEX, HF_INDEX, JOURNAL, MANIFEST, Checkpoint
from conversion.errors import InputError
from conversion.hashing import new_hasher
from conversion.layout import Stamp
from conversion.manifest import FileRecord, Manifest, parse_manifest
from conversion.plan import OutputTensor, Piece, make_plan, pieces, unit_bytes
from conversion.produce import Arena, produce
from conversion.shard_io import read_header, read_into
from conversion.transpose import choose_kernel

_BLOCK = 8 * 2**20


@dataclass(frozen=True)
class Difference:
    """What differs: a tensor's name, or a file's, and how."""

    name: str
    what: str

    def __str__(self) -> str:
        return f"{self.name}: {self.what}"


def compare(
    a: Checkpoint, b: Checkpoint, piece_memory: int, workers: int, advance: Callable[[int], None]
) -> list[Difference]:
    """The first difference of every tensor that differs, in A's order. `advance` is told the bytes compared.

    Both are read as A's layout, or as fused where A's is cut into parts; indexes count in that form.
    """
    form = a.layout.layout if a.layout.layout in ("hub", "fused") else "fused"
    tensors_a, tensors_b = _tensors(a, form), _tensors(b, form)
    only = [Difference(name, "only in A") for name in tensors_a if name not in tensors_b]
    only += [Difference(name, "only in B") for name in tensors_b if name not in tensors_a]
    common = [(tensors_a[name], tensors_b[name]) for name in tensors_a if name in tensors_b]
    kernel = choose_kernel(sum(pair[i].nbytes for pair in common for i in (0, 1) if pair[i].transposes))

    def first_difference(pair: tuple[OutputTensor, OutputTensor]) -> Difference | None:
        one, other = pair
        name = one.part.name
        if one.dtype != other.dtype:
            return Difference(name, f"{one.dtype} in A, {other.dtype} in B")
        if one.part.shape != other.part.shape:
            return Difference(name, f"shape {one.part.shape} in A, {other.part.shape} in B")
        step = max(1, piece_memory // max(1, unit_bytes(one) + unit_bytes(other)))
        arena = Arena(2 * 64 * 1024 + step * (unit_bytes(one) + unit_bytes(other)))
        for piece in pieces(one, step):
            arena.clear()
            made_a = produce(piece, a, arena, kernel).out
            made_b = produce(Piece(other, piece.first, piece.last, 0, piece.is_last), b, arena, kernel).out
            place = _first_unequal(made_a, made_b)
            advance(made_a.nbytes)
            if place is not None:
                values = prod(one.part.shape) // max(1, one.units) * piece.first + place
                index = tuple(int(i) for i in np.unravel_index(values, one.part.shape))
                return Difference(name, f"at {list(index)} {_value(made_a[place], one.dtype)} in A, "
                                        f"{_value(made_b[place], one.dtype)} in B ({form} form)")  # fmt: skip
        return None

    with ThreadPoolExecutor(workers) as pool:
        return only + [difference for difference in pool.map(first_difference, common) if difference is not None]


def _tensors(checkpoint: Checkpoint, form: str) -> dict[str, OutputTensor]:
    plan = make_plan(checkpoint, Stamp(form), None, 2**62, keep_unknown=True)
    return {tensor.part.name: tensor for file in plan.files for tensor in file.tensors}


def _first_unequal(a: np.ndarray, b: np.ndarray) -> int | None:
    """Flat index of the first value whose bits differ, by steps that keep temporaries small."""
    for start in range(0, a.size, 2**20):
        unequal = a[start : start + 2**20] != b[start : start + 2**20]
        if unequal.any():
            return start + int(np.argmax(unequal))
    return None


def _value(bits: np.generic, dtype: str) -> str:
    """A value as a number and its bits."""
    shown = f"0x{int(bits):0{2 * bits.itemsize}x}"
    if dtype not in FLOATS:
        return shown
    return f"{float(cast(np.array([bits]), dtype, 'F64').view(np.float64)[0])!r} ({shown})"


def read_manifest(folder: Path) -> Manifest:
    """The manifest of `folder`. Raises InputError when there is none, or it is not one."""
    path = folder / MANIFEST
    try:
        return parse_manifest(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path} is missing: only the converter's outputs have one") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path} cannot be understood: {error!r}") from None


def check_hashes(folder: Path, manifest: Manifest, workers: int, advance: Callable[[int], None]) -> list[Difference]:
    """What in `folder` is not as `manifest` says: files by size and hash, their tensors by hash, the index."""
    differences = [Difference(JOURNAL, "the folder is being converted into")] if (folder / JOURNAL).exists() else []
    named = {record.name for record in manifest.weights}
    extra = sorted(path.name for path in folder.glob("*.safetensors") if path.name not in named)
    differences += [Difference(name, "not in the manifest") for name in extra]
    differences += _check_index(folder, manifest)
    records = manifest.weights + manifest.companions
    with ThreadPoolExecutor(workers) as pool:
        for found in pool.map(lambda r: list(_check_file(folder, r, manifest.algorithm, advance)), records):
            differences += found
    return differences


def _check_index(folder: Path, manifest: Manifest) -> list[Difference]:
    name = EP_INDEX if manifest.layout == "ep-sharded" else HF_INDEX
    expected: dict[str, Any] = {}
    for record in manifest.weights:
        for tensor in record.tensors:
            if tensor.ep_rank is None:
                expected[tensor.name] = record.name
            else:
                expected.setdefault(tensor.name, []).append(record.name)
    try:
        weight_map = json.loads((folder / name).read_bytes())["weight_map"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        return [Difference(name, f"cannot be understood: {error!r}")]
    return [] if weight_map == expected else [Difference(name, "its weight_map is not the manifest's")]


def _check_file(
    folder: Path, record: FileRecord, algorithm: str, advance: Callable[[int], None]
) -> Iterator[Difference]:
    path = folder / record.name
    if not path.is_file():
        yield Difference(record.name, "missing")
        return
    size = path.stat().st_size
    if size != record.size:
        yield Difference(record.name, f"{size} bytes, the manifest says {record.size}")
        return
    whole = new_hasher(algorithm)
    if not record.tensors:
        _hash_range(path, 0, size, [whole], advance)
    else:
        header = read_header(path)
        whole.update(header.raw)
        stored = {(tensor.name, tensor.dtype, tensor.shape) for tensor in header.tensors.values()}
        named = {(tensor.name, tensor.dtype, tensor.shape) for tensor in record.tensors}
        for name, dtype, shape in sorted(stored ^ named):
            yield Difference(
                record.name, f"{name} {dtype} {shape} is only in the {'file' if name in header.tensors else 'manifest'}"
            )
        hashes = {tensor.name: tensor.hash for tensor in record.tensors}
        for info in header.tensors.values():
            own = new_hasher(algorithm)
            _hash_range(path, info.begin, info.nbytes, [whole, own], advance)
            if own.hexdigest() != hashes.get(info.name, own.hexdigest()):
                yield Difference(
                    info.name, f"in {record.name}: hash {own.hexdigest()}, the manifest says {hashes[info.name]}"
                )
    if whole.hexdigest() != record.hash:
        yield Difference(record.name, f"hash {whole.hexdigest()}, the manifest says {record.hash}")


def _hash_range(path: Path, begin: int, nbytes: int, hashers: list[Any], advance: Callable[[int], None]) -> None:
    buffer = np.empty(min(_BLOCK, nbytes), np.uint8)
    for start in range(0, nbytes, _BLOCK):
        block = buffer[: min(_BLOCK, nbytes - start)]
        read_into(path, begin + start, block)
        for hasher in hashers:
            hasher.update(block.data)
        advance(block.size)
