"""What a run tells: the dry run's plan, the findings in the values, the summary."""

import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from conversion.budget import Budget, peak_bytes
from conversion.companions import Companions
from conversion.convert import Disk, Outcome
from conversion.hashing import PREFERRED, new_hasher
from conversion.manifest import FileRecord
from conversion.plan import Plan
from conversion.progress import duration
from conversion.shard_io import byte_view, read_into
from conversion.transpose import Kernel

# What the disk takes is not measured, since a dry run writes nothing: one consumer SSD, or one cloud disk.
ASSUMED_WRITE_RATE = 0.5e9
_SAMPLE_BYTES = 16 * 2**20


def describe_plan(plan: Plan, companions: Companions, budget: Budget, kernel: Kernel, disk: Disk, workers: int) -> str:
    """The table that --dry-run prints."""
    source = plan.source
    read = sum(header.size for header in source.headers)
    ep = f" (ep size {plan.target.ep_size})" if plan.target.layout == "ep-sharded" else ""
    rows = [f"{source.folder}: {source.layout.layout}, {len(source.headers)} file(s), {read / 1e9:.2f} GB",
            f"to {plan.target.layout}{ep}: {len(plan.files)} file(s), {plan.data_bytes / 1e9:.2f} GB, "
            f"{len(companions.carried)} companion file(s)", ""]  # fmt: skip
    width = max(len(file.name) for file in plan.files)
    rows.append(f"{'file':{width}}  tensors   bytes")
    rows += [f"{file.name:{width}}  {len(file.tensors):7d}   {file.size:,}" for file in plan.files]
    seconds, by = estimate_seconds(plan, kernel, workers)
    rows += [
        "",
        f"disk:   {disk.needed / 1e9:.2f} GB to write, {disk.free / 1e9:.2f} GB free",
        f"memory: at most {budget.peak / 1e6:.0f} MB, {budget.slots} pieces of {budget.arena_bytes / 1e6:.0f} MB",
        f"time:   about {duration(seconds)}, {by}",
    ]
    if companions.left_out:
        rows.append(f"left out: {', '.join(companions.left_out)}")
    return "\n".join(rows)


def estimate_seconds(plan: Plan, kernel: Kernel, workers: int) -> tuple[float, str]:
    """Seconds a run will take, and what that rests on: a sample of the source read, transposed and hashed here."""
    largest = max(plan.source.headers, key=lambda header: header.size)
    sample = np.ones(min(_SAMPLE_BYTES, largest.size) // 8 * 8, np.uint8)
    matrix, out = np.ones((2048, 1536), np.uint16), np.ones((1536, 2048), np.uint16)

    def work() -> None:
        if plan.transposed_bytes:
            kernel(out, matrix)
        for _ in range(3):  # the source, the tensor, the file
            new_hasher(PREFERRED).update(byte_view(out))

    rates = {
        "reading": sample.size / _best_time(lambda: read_into(largest.path, 0, sample)),
        "transposing and hashing": out.nbytes / _best_time(work) * min(workers, os.cpu_count() or 1),
        "writing": ASSUMED_WRITE_RATE,
    }
    slowest = min(rates, key=lambda name: rates[name])
    shown = ", ".join(f"{name} {rate / 1e9:.1f}" for name, rate in rates.items())
    return plan.data_bytes / rates[slowest], f"bound by {slowest} ({shown} GB/s; the disk's writing is assumed)"


def _best_time(call: Callable[[], None]) -> float:
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - started)
    return best


def findings_lines(records: list[FileRecord]) -> list[str]:
    """One line per tensor that holds NaN or infinite values or got some by the cast."""
    lines = []
    for record in records:
        for tensor in record.tensors:
            found = tensor.findings
            if found.first is None:
                continue
            place = tuple(int(i) for i in np.unravel_index(found.first, tensor.shape))
            counts = {"NaN": found.nan, "infinite": found.inf, f"too large for {tensor.dtype}": found.overflow}
            what = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
            lines.append(f"{tensor.name} {tuple(tensor.shape)} in {record.name}: {what}; first at {place}")
    return lines


def summary(plan: Plan, outcome: Outcome, seconds: float, output: str) -> dict[str, Any]:
    """The JSON summary; `summary_line` is its short form."""
    tensors = [tensor for record in outcome.records for tensor in record.tensors]
    return {
        "source_layout": plan.source.layout.layout,
        "target_layout": plan.target.layout,
        "ep_size": plan.target.ep_size,
        "output": output,
        "files": len(outcome.records),
        "files_reused": outcome.reused,
        "tensors": len(tensors),
        "data_bytes": plan.data_bytes,
        "written_bytes": outcome.written_bytes,
        "seconds": round(seconds, 3),
        "peak_memory_bytes": peak_bytes(),
        "nan_values": sum(tensor.findings.nan for tensor in tensors),
        "infinite_values": sum(tensor.findings.inf for tensor in tensors),
        "overflow_values": sum(tensor.findings.overflow for tensor in tensors),
    }


def summary_line(content: dict[str, Any]) -> str:
    """'hub -> fused: 2 files, 9.13 GB in 15 s, 0.61 GB/s, peak memory 312 MB: /out'."""
    reused = f" ({content['files_reused']} reused)" if content["files_reused"] else ""
    rate = content["written_bytes"] / 1e9 / max(content["seconds"], 1e-3)
    return (
        f"{content['source_layout']} -> {content['target_layout']}: {content['files']} file(s){reused}, "
        f"{content['written_bytes'] / 1e9:.2f} GB written in {duration(content['seconds'])}, {rate:.2f} GB/s, "
        f"peak memory {content['peak_memory_bytes'] / 1e6:.0f} MB: {content['output']}"
    )
