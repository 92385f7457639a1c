"""JSONL files read by line number: an index of where lines begin, and samples that fail without stopping anything.

Only the offsets of lines stay in memory, 8 bytes a sample; a line is read when its turn comes, in a data worker.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Feature = dict[str, Tensor]
Transform = Callable[[Mapping[str, Any], Path], Feature]
SCAN_BYTES = 2**24


@dataclass(frozen=True)
class BadSample:
    """A line that gave no feature, and why."""

    file: str
    line: int
    cause: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.cause}"


def line_starts(path: Path) -> Tensor:
    """(lines, 3) int64 for the lines that are not blank: offset, bytes, number in the file counted from 1."""
    rows: list[tuple[int, int, int]] = []
    with path.open("rb", buffering=SCAN_BYTES) as file:
        offset = 0
        for number, line in enumerate(file, start=1):
            if line.strip():
                rows.append((offset, len(line), number))
            offset += len(line)
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 3)


def _check_no_array(path: Path) -> None:
    """Raise a ValueError for a file that is one JSON array of samples."""
    with path.open("rb") as file:
        begin = file.read(256).removeprefix(b"\xef\xbb\xbf").split()
    if begin and (begin[0] == b"[" or begin[0].startswith(b"[{")):
        raise ValueError(f"{path} is one JSON array; write its samples as JSONL, one object a line.")


def fingerprint(paths: Sequence[Path]) -> str:
    """Tells one list of files from another by their sizes, beginnings and ends; their names do not matter."""
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        with path.open("rb") as file:
            digest.update(f"{size} ".encode() + file.read(4096))
            file.seek(max(0, size - 4096))
            digest.update(file.read())
    return digest.hexdigest()[:16]


class JsonlFiles:
    """Samples of several JSONL files under one running number, file after file, line after line.

    Raises:
        ValueError: a file that does not exist, or no sample in any of them.
    """

    def __init__(self, paths: Sequence[str | Path]) -> None:
        self.paths = [Path(path) for path in paths]
        missing = [str(path) for path in self.paths if not path.is_file()]
        if missing or not self.paths:
            raise ValueError(f"data files that do not exist or are folders: {', '.join(missing) or 'none were named'}.")
        self.starts = [line_starts(path) for path in self.paths]  # tensors: spawned workers share their memory
        for path in self.paths:
            _check_no_array(path)
        self.fingerprint = fingerprint(self.paths)
        self.bounds = torch.tensor([0, *map(len, self.starts)]).cumsum(0).tolist()
        if not len(self):
            raise ValueError(f"{', '.join(map(str, self.paths))} hold 0 samples; each line is one JSON object.")

    def __len__(self) -> int:
        return self.bounds[-1]

    def locate(self, number: int) -> tuple[Path, int]:
        """File and line (from 1) of a sample."""
        which = next(i for i, end in enumerate(self.bounds[1:]) if number < end)
        return self.paths[which], int(self.starts[which][number - self.bounds[which], 2])

    def read(self, number: int) -> Any:
        """The JSON value of a sample's line.

        Raises:
            ValueError: not JSON, or not UTF-8.
        """
        which = next(i for i, end in enumerate(self.bounds[1:]) if number < end)
        offset, size, _ = self.starts[which][number - self.bounds[which]].tolist()
        with self.paths[which].open("rb") as file:
            file.seek(offset)
            try:
                return json.loads(file.read(size).decode("utf-8-sig"))
            except ValueError as error:
                raise ValueError(f"not JSON: {error}") from error


class JsonlFeatures(torch.utils.data.Dataset):
    """Features by sample number; a sample that is broken becomes a `BadSample` in its place.

    Args:
        transform: picklable; (sample, the folder of its file) -> feature, a ValueError for what is wrong with it.
    """

    def __init__(self, files: JsonlFiles, transform: Transform) -> None:
        self.files = files
        self.transform = transform

    def __getitem__(self, number: int) -> Feature | BadSample:
        path, line = self.files.locate(number)
        try:
            sample = self.files.read(number)
            if not isinstance(sample, dict):
                raise ValueError(f"a line holds one JSON object, got {type(sample).__name__}")
            return self.transform(sample, path.parent)
        except (ValueError, OSError) as error:
            return BadSample(str(path), line, f"{error}")
