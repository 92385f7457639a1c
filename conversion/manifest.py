"""veomni_manifest.json and the index files: what a finished output says about itself."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from conversion.checkpoint import EP_INDEX, HF_INDEX, MANIFEST, Checkpoint
from conversion.layout import FORMAT_VERSION, Stamp
from conversion.plan import Plan

TOOL_VERSION = "0.1.0"


@dataclass(frozen=True)
class TensorRecord:
    """A written tensor: `hash` is of its bytes, `source_hash` of the source bytes it was made from, as read."""

    name: str
    ep_rank: int | None
    dtype: str
    shape: tuple[int, ...]
    hash: str
    source_hash: str


@dataclass(frozen=True)
class FileRecord:
    """A written file; `hash` is of the whole file."""

    name: str
    size: int
    hash: str
    tensors: tuple[TensorRecord, ...]


def write_atomically(path: Path, data: bytes) -> None:
    """Write a small file so that a reader sees the whole of it or nothing."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` durable."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def index_file(plan: Plan) -> tuple[str, dict[str, Any]]:
    """Name and content of the output's index. An ep-sharded one lists, per expert tensor, one file per rank."""
    weight_map: dict[str, Any] = {}
    for file in plan.files:
        for tensor in file.tensors:
            if tensor.part.ep_rank is None:
                weight_map[tensor.part.name] = file.name
            else:
                weight_map.setdefault(tensor.part.name, []).append(file.name)
    metadata: dict[str, Any] = {"total_size": plan.data_bytes}
    if plan.target.layout != "ep-sharded":
        return HF_INDEX, {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    metadata |= {"layout": plan.target.layout, "ep_size": plan.target.ep_size}
    return EP_INDEX, {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}


def source_record(source: Checkpoint) -> dict[str, Any]:
    """Where the output came from. Each tensor's `source_hash` proves the data, these the headers."""
    return {
        "path": str(source.folder),
        "layout": asdict(source.layout),
        "files": {header.path.name: {"size": header.size} for header in source.headers},
    }


def manifest(
    target: Stamp, source: Mapping[str, Any], options: Mapping[str, Any], algorithm: str, files: list[FileRecord]
) -> dict[str, Any]:
    """The manifest of an output with `files`."""
    tensors = []
    for file in files:
        for tensor in file.tensors:
            tensors.append({"file": file.name} | {k: v for k, v in asdict(tensor).items() if v is not None})
    return {
        "format_version": FORMAT_VERSION,
        "tool": f"qwen3-vl-moe-veomni {TOOL_VERSION}",
        "layout": target.layout,
        "ep_size": target.ep_size,
        "hash_algorithm": algorithm,
        "source": dict(source),
        "options": dict(options),
        "files": {file.name: {"size": file.size, "hash": file.hash} for file in files},
        "tensors": tensors,
    }


def dump(content: Mapping[str, Any]) -> bytes:
    """JSON as it is written to disk."""
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()


__all__ = ["MANIFEST", "FileRecord", "TensorRecord", "dump", "index_file", "manifest", "source_record",
           "sync_folder", "write_atomically"]  # fmt: skip
