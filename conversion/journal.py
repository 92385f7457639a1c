"""The journal of an unfinished output: which files are done, and what --resume may believe of it.

`veomni_journal.jsonl` is one line that tells what is being written (the plan's fingerprint), then one line per file,
appended after that file was synced and renamed. It exists from before the first weight is written until after the
manifest is, so a folder that has one is not finished. What it says is believed only after the file was hashed again.
"""

import json
import os
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conversion.checkpoint import JOURNAL, MANIFEST
from conversion.errors import UsageError
from conversion.hashing import hash_file
from conversion.manifest import FileRecord, parse_manifest, write_atomically


@dataclass(frozen=True)
class History:
    """What an output folder records: the fingerprint of the plan it was begun with, and the files said to be done."""

    fingerprint: str
    algorithm: str
    records: dict[str, FileRecord]


def start(output: Path, fingerprint: str, algorithm: str, records: list[FileRecord]) -> None:
    """Begin a journal that already holds `records`."""
    lines = [{"fingerprint": fingerprint, "hash_algorithm": algorithm}, *(record.to_json() for record in records)]
    write_atomically(output / JOURNAL, b"".join(_line(line) for line in lines))


def append(output: Path, record: FileRecord) -> None:
    """Add a finished file, durably."""
    with open(output / JOURNAL, "ab") as file:
        file.write(_line(record.to_json()))
        file.flush()
        os.fsync(file.fileno())


def _line(content: dict[str, Any]) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode() + b"\n"


def read_history(output: Path) -> History | None:
    """What `output` records, None where it records nothing. A journal outranks a manifest: the run it is of came later.

    Raises UsageError when the records cannot be understood.
    """
    try:
        lines = (output / JOURNAL).read_bytes().split(b"\n")
        finished = False
    except FileNotFoundError:
        if not (output / MANIFEST).exists():
            return None
        lines, finished = [], True
    try:
        if finished:
            content = parse_manifest((output / MANIFEST).read_bytes())
            return History(content.fingerprint, content.algorithm, {r.name: r for r in content.weights})
        first = json.loads(lines[0])
        # Whatever follows the last newline is the torn end of a line whose file will be written again.
        entries = (FileRecord.from_json(json.loads(line)) for line in lines[1:-1])
        return History(first["fingerprint"], first["hash_algorithm"], {e.name: e for e in entries})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        name = MANIFEST if finished else JOURNAL
        raise UsageError(f"{output / name} cannot be understood ({error!r}); --overwrite starts anew") from None


def proven(output: Path, history: History, pool: Executor) -> dict[str, FileRecord]:
    """The records of `history` whose files are there with the recorded size and hash."""

    def holds(record: FileRecord) -> bool:
        path = output / record.name
        if not path.is_file() or path.stat().st_size != record.size:
            return False
        return hash_file(path, history.algorithm) == record.hash

    records = list(history.records.values())
    return {record.name: record for record, ok in zip(records, pool.map(holds, records)) if ok}
