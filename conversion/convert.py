"""A whole conversion, from an opened source to a finished output folder that can be resumed until it is one."""

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conversion import journal
from conversion.budget import Budget
from conversion.checkpoint import EP_INDEX, HF_INDEX, JOURNAL, MANIFEST
from conversion.companions import Companions, write_companions
from conversion.errors import InputError, UsageError
from conversion.hashing import PREFERRED
from conversion.manifest import FileRecord, dump, index_file, manifest, write_atomically
from conversion.plan import Plan
from conversion.progress import Progress
from conversion.transpose import Kernel
from conversion.write import TEMPORARY, Writer

SAFETENSORS = ".safetensors"


@dataclass(frozen=True)
class Settings:
    """How to run. `allow_overflow` accepts values that become infinite by a cast."""

    workers: int = 2
    resume: bool = False
    overwrite: bool = False
    allow_overflow: bool = False
    quiet: bool = True
    log: Callable[[str], None] = lambda message: None


@dataclass(frozen=True)
class Outcome:
    """`records` of all files; `reused` of them were there already, proven."""

    records: list[FileRecord]
    reused: int
    written_bytes: int


def check_folders(source: Path, output: Path, settings: Settings) -> None:
    """Raise UsageError unless `output` is apart from `source`, and empty, resumed or to be overwritten."""
    a, b = Path(os.path.realpath(source)), Path(os.path.realpath(output))
    if a == b or a in b.parents or b in a.parents:
        raise UsageError(f"the output {output} and the input {source} overlap; choose a folder apart from the input")
    if output.exists() and not output.is_dir():
        raise UsageError(f"the output {output} is not a folder")
    if not output.exists() or settings.overwrite:
        return
    there = [path.name for path in output.iterdir()]
    if there and not settings.resume:
        raise UsageError(f"the output {output} is not empty; --resume goes on with it, --overwrite replaces it")
    recorded = JOURNAL in there or MANIFEST in there
    if settings.resume and not recorded and not all(name.endswith(TEMPORARY) for name in there):
        raise UsageError(
            f"the output {output} is not empty and not of a conversion: --resume has nothing to go on with"
        )


@dataclass(frozen=True)
class Disk:
    """Bytes to write, and bytes free for them on the disk of `folder`."""

    needed: int
    free: int
    folder: Path

    def check(self) -> None:
        """Raise InputError when it will not fit."""
        if self.needed > self.free:
            raise InputError(
                f"the output takes {self.needed / 1e9:.2f} GB, the disk of {self.folder} has {self.free / 1e9:.2f} GB "
                f"free; free {(self.needed - self.free) / 1e9:.2f} GB or choose another disk"
            )


def measure_disk(plan: Plan, companions: Companions, output: Path) -> Disk:
    """What the output takes, and what there is; weights in the output folder count free, since they are replaced."""
    existing = output
    while not existing.exists():
        existing = existing.parent
    status = os.statvfs(existing)
    free = status.f_bavail * status.f_frsize
    if output.is_dir():
        free += sum(path.stat().st_blocks * 512 for path in output.iterdir() if SAFETENSORS in path.suffixes)
    return Disk(sum(file.size for file in plan.files) + companions.nbytes, free, existing)


def run_plan(
    plan: Plan,
    companions: Companions,
    output: Path,
    budget: Budget,
    kernel: Kernel,
    settings: Settings,
    origin: str,
    options: dict[str, Any],
) -> Outcome:
    """Write `plan` and `companions` to `output`; index and manifest come last.

    Raises InputError when reading or writing fails, or a cast overflows and that is not allowed; what is done until
    then stays for --resume. Raises UsageError when what is there is of another conversion, or another run is at it.
    """
    output.mkdir(parents=True, exist_ok=True)
    with _only_run(output):
        history = journal.read_history(output) if settings.resume else None
        algorithm = history.algorithm if history else PREFERRED
        done = _proven_files(plan, output, history, settings)
        journal.start(output, plan.fingerprint, algorithm, list(done.values()))
        _remove_all_but(output, set(done))
        copied = write_companions(companions, plan.source.folder, output, plan.source.config, plan.dtype, algorithm)
        missing = [file for file in plan.files if file.name not in done]
        kept = sum(file.data_bytes for file in plan.files if file.name in done)
        with Progress(plan.data_bytes, settings.quiet, kept) as progress:
            writer = Writer(plan.source, output, budget, settings.workers, algorithm, kernel, progress.advance)
            written = writer.write(missing)
        by_name = done | {record.name: record for record in written}
        records = [by_name[file.name] for file in plan.files]
        if not settings.allow_overflow:
            _refuse_overflow(records)
        name, index = index_file(plan)
        write_atomically(output / name, dump(index))
        write_atomically(output / MANIFEST, dump(manifest(plan, origin, options, algorithm, records, copied)))
        (output / JOURNAL).unlink()
    return Outcome(records, len(done), sum(file.size for file in missing))


def _proven_files(
    plan: Plan, output: Path, history: journal.History | None, settings: Settings
) -> dict[str, FileRecord]:
    """The files of an earlier run that hold what they should."""
    if history is None:
        return {}
    if history.fingerprint != plan.fingerprint:
        raise UsageError(
            f"{output} was begun from another source, or with another target, --ep-size, --dtype or --max-shard-size, "
            "or the source has changed since; run with the same ones, or start anew with --overwrite"
        )
    with ThreadPoolExecutor(settings.workers) as pool:
        done = journal.proven(output, history, pool)
    for name in history.records:
        if name not in done:
            settings.log(f"{name} is not what it was when it was finished; it is written again")
    settings.log(f"{len(done)} of {len(plan.files)} files are done and proven")
    return done


def _remove_all_but(output: Path, keep: set[str]) -> None:
    """Remove weights of earlier runs, indexes and manifest first: what is left must never look like a whole."""
    for name in (MANIFEST, HF_INDEX, EP_INDEX):
        (output / name).unlink(missing_ok=True)
    for path in output.iterdir():
        if path.name not in keep and (path.suffix == SAFETENSORS or path.name.endswith(TEMPORARY)):
            path.unlink()


def _refuse_overflow(records: list[FileRecord]) -> None:
    overflown = [tensor for record in records for tensor in record.tensors if tensor.findings.overflow]
    if overflown:
        first = overflown[0]
        total = sum(tensor.findings.overflow for tensor in overflown)
        raise InputError(
            f"{total} finite value(s) in {len(overflown)} tensor(s), first {first.findings.overflow} of {first.name}, "
            f"are too large for {first.dtype} and would be infinite; the output stays unfinished. Choose a --dtype of "
            "greater range, or accept it: --resume --allow-overflow"
        )


@contextlib.contextmanager
def _only_run(output: Path) -> Iterator[None]:
    """Hold a lock on the folder, which the system lets go of however the process ends."""
    fd = os.open(output, os.O_RDONLY)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"another conversion is writing to {output}") from None
        yield
    finally:
        os.close(fd)
