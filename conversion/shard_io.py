"""safetensors files, streaming: headers read and checked, data read and written by byte range.

The format (https://github.com/huggingface/safetensors#format): 8 bytes little-endian header length, a JSON header
{name: {dtype, shape, data_offsets}}, the data. Headers are parsed here, not by the safetensors library, for two
reasons: a damaged one is reported by what is wrong with it, and plain positioned reads keep a tensor of any size out
of memory, where the library's memory map would count towards the process's resident size.
"""

import ctypes
import errno
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from conversion.errors import InputError

# Element sizes in bytes. float4 and other sub-byte types are in no checkpoint of this model.
DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
# Direct writes are of whole blocks of the disk and of the page cache.
BLOCK = 4096
# 100,000 tensors need about 16 MB of header; parsing takes some ten times that in memory.
MAX_HEADER_BYTES = 16 * 2**20


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a file: `begin` is its first byte's position in the file, not in the data section."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class ShardHeader:
    """A file's header: its tensors in the order of their data, and the string metadata."""

    path: Path
    size: int
    mtime_ns: int
    raw: bytes
    metadata: dict[str, str]
    tensors: dict[str, TensorInfo]


def read_header(path: Path) -> ShardHeader:
    """Read and check the header of the safetensors file `path`.

    Raises InputError when the file cannot be read or the header is not one that accounts for every byte of the file
    exactly once.
    """
    try:
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            size = status.st_size
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > size - 8:
                raise InputError(
                    f"{path}: truncated: {size} bytes, but the header alone should take {8 + length}"
                    if len(prefix) == 8
                    else f"{path}: {size} bytes is too short for a safetensors file"
                )
            if length > MAX_HEADER_BYTES:
                raise InputError(f"{path}: a header of {length} bytes; at most {MAX_HEADER_BYTES} are supported")
            raw = file.read(length)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    header = _parse_json(path, raw)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise InputError(f"{path}: __metadata__ is not an object of strings")
    tensors = [_tensor_info(path, name, entry, 8 + length) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.begin, tensor.nbytes))
    _check_cover(path, tensors, 8 + length, size)
    return ShardHeader(
        path, size, status.st_mtime_ns, prefix + raw, metadata, {tensor.name: tensor for tensor in tensors}
    )


def _parse_json(path: Path, raw: bytes) -> dict[str, Any]:
    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            name = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise InputError(f"{path}: the header names {name!r} twice")
        return result

    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=no_duplicates)
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: the header is not valid JSON: {error}") from None
    if not isinstance(header, dict):
        raise InputError(f"{path}: the header is a JSON {type(header).__name__}, expected an object")
    return header


def _tensor_info(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    where = f"{path}: tensor {name[:200]!r}"
    if not name.isprintable():
        raise InputError(f"{where}: the name holds characters that cannot be printed")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise InputError(f"{where}: expected dtype, shape and data_offsets, got {str(entry)[:100]}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise InputError(f"{where}: unknown dtype {str(dtype)[:40]!r}; known are {', '.join(DTYPE_BYTES)}")
    for what, values in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(values, list) or not all(type(v) is int and 0 <= v < 2**63 for v in values):
            raise InputError(f"{where}: {what} is {str(values)[:100]}, expected a list of non-negative integers")
    if len(shape) > 8 or len(offsets) != 2:
        raise InputError(f"{where}: {len(shape)} dimensions and {len(offsets)} offsets, expected at most 8 and 2")
    info = TensorInfo(name, dtype, tuple(shape), data_start + offsets[0])
    if offsets[1] - offsets[0] != info.nbytes:
        raise InputError(
            f"{where}: offsets span {offsets[1] - offsets[0]} bytes, {dtype} {tuple(shape)} takes {info.nbytes}"
        )
    return info


def _check_cover(path: Path, tensors: Iterable[TensorInfo], data_start: int, size: int) -> None:
    position = data_start
    for tensor in tensors:
        if tensor.begin != position:
            what = "overlaps the tensor before it" if tensor.begin < position else "leaves a gap before it"
            raise InputError(f"{path}: tensor {tensor.name!r} {what}: it starts at {tensor.begin}, not {position}")
        position += tensor.nbytes
    if position != size:
        what = "truncated" if size < position else "has bytes no tensor accounts for"
        raise InputError(f"{path}: {what}: {size} bytes, the header accounts for {position}")


def build_header(tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """The first bytes of a file that holds `tensors` (name, dtype, shape) one after the other, up to the data.

    Padded with spaces, as the format allows, so that the data starts at a multiple of BLOCK.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    position = 0
    for name, dtype, shape in tensors:
        end = position + prod(shape) * DTYPE_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-(8 + len(raw)) % BLOCK)
    return len(raw).to_bytes(8, "little") + raw


def byte_view(array: np.ndarray) -> memoryview:
    """The bytes of a contiguous array."""
    return memoryview(array.reshape(-1).view(np.uint8))  # type: ignore[arg-type]


def read_into(path: Path, position: int, out: np.ndarray) -> None:
    """Fill `out`, a contiguous array, with the file's bytes from `position` on. Raises InputError on failure."""
    view = byte_view(out)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            while view:
                count = os.preadv(fd, [view], position)
                if count == 0:
                    raise InputError(f"{path}: ends at byte {position}, {len(view)} bytes too early: it was cut short")
                position, view = position + count, view[count:]
        finally:
            os.close(fd)
    except OSError as error:
        raise InputError(f"{path}: reading at byte {position} failed: {error.strerror}") from None


class NewFile:
    """A new file of known size, written at any place from any thread, past the page cache where that is possible.

    Direct writes (O_DIRECT) take a small part of the processor time of ordinary ones, need no memory for the page
    cache, and leave little for the sync at the end; but they begin and end at multiples of BLOCK, in the file and in
    memory. What does not, and everything where the file system has no direct writes, is written the ordinary way. The
    two never share a block.
    """

    def __init__(self, path: Path, size: int) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC
        self._fd = os.open(path, flags | os.O_TRUNC, 0o666)
        self._direct = -1
        try:
            _reserve(self._fd, size)
            self._direct = os.open(path, flags | getattr(os, "O_DIRECT", 0))
        except OSError as error:
            if error.errno != errno.EINVAL:
                self.close()
                raise

    def write(self, position: int, data: memoryview) -> None:
        """Write all of `data` at `position`. Raises OSError."""
        aligned = position % BLOCK == 0 and np.frombuffer(data, np.uint8).ctypes.data % BLOCK == 0
        direct = len(data) // BLOCK * BLOCK if aligned and self._direct >= 0 and len(data) >= BLOCK else 0
        if direct and not self._write_direct(position, data[:direct]):
            direct = 0
        position, data = position + direct, data[direct:]
        while data:
            count = os.pwrite(self._fd, data, position)
            position, data = position + count, data[count:]

    def _write_direct(self, position: int, data: memoryview) -> bool:
        """Whether it was possible; otherwise what was written so far is written again."""
        while data:
            try:
                count = os.pwrite(self._direct, data, position)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                return False
            position, data = position + count, data[count:]
        return True

    def sync(self) -> None:
        """Put everything on the disk. Raises OSError."""
        os.fsync(self._fd)

    def close(self) -> None:
        """Close it; a second time does nothing."""
        for fd in (self._fd, self._direct):
            if fd >= 0:
                os.close(fd)
        self._fd = self._direct = -1


def _reserve(fd: int, size: int) -> None:
    """Have the file system set `size` bytes aside for the file: the sooner a full disk is noticed, the better, and
    writes into set-aside space are cheaper. Raises OSError where there is no room.

    The C function is called directly: where the file system cannot do it, os.posix_fallocate would write a byte into
    every block, while this does nothing.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "fallocate") and libc.fallocate(fd, 0, ctypes.c_int64(0), ctypes.c_int64(size)) != 0:
        number = ctypes.get_errno()
        if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(number, os.strerror(number))
