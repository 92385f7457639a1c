"""veomni_manifest.json and the index files: what a finished output says about itself."""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from conversion.cast import NOTHING, Findings
from conversion.checkpoint import EP_INDEX, HF_INDEX, Checkpoint
from conversion.hashing import hash_file, new_hasher
from conversion.layout import FORMAT_VERSION
from conversion.plan import Plan

TOOL_VERSION = "0.1.0"


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """A written tensor: `hash` is of its bytes, `source_hash` of the source bytes it was made from, as read."""

    name: str
    ep_rank: int | None
    dtype: str
    shape: tuple[int, ...]
    hash: str
    source_hash: str
    findings: Findings = NOTHING


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A written file; `hash` is of the whole file."""

    name: str
    size: int
    hash: str
    tensors: tuple[TensorRecord, ...] = ()

    @classmethod
    def of_file(cls, path: Path, algorithm: str) -> "FileRecord":
        """The record of a file as it lies there. Raises InputError when it cannot be read."""
        return cls(path.name, path.stat().st_size, hash_file(path, algorithm))

    def to_json(self) -> dict[str, Any]:
        """As one journal line; `from_json` is its inverse. Fields that say nothing are left out."""
        tensors = []
        for tensor in self.tensors:
            entry = {key: value for key, value in asdict(tensor).items() if value is not None}
            if tensor.findings == NOTHING:
                del entry["findings"]
            tensors.append(entry)
        return {"name": self.name, "size": self.size, "hash": self.hash, "tensors": tensors}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> "FileRecord":
        """Raises KeyError, TypeError or ValueError when `entry` is not what `to_json` gives."""
        tensors = []
        for tensor in entry["tensors"]:
            findings = Findings(**tensor.get("findings", {}))
            _check_types(asdict(findings), nan=int, inf=int, overflow=int)
            _check_types(tensor, name=str, dtype=str, shape=list, hash=str, source_hash=str)
            if not all(type(size) is int for size in tensor["shape"]) or type(tensor.get("ep_rank", 0)) is not int:
                raise TypeError(f"shape {tensor['shape']!r}, ep_rank {tensor.get('ep_rank')!r}")
            fields: dict[str, Any] = {"ep_rank": None} | dict(tensor)
            tensors.append(TensorRecord(**fields | {"shape": tuple(tensor["shape"]), "findings": findings}))
        _check_types(entry, name=str, size=int, hash=str)
        if not entry["name"].isprintable() or entry["name"].startswith("/") or ".." in Path(entry["name"]).parts:
            raise ValueError(f"{entry['name']!r} is no name of a file in the folder")
        return cls(entry["name"], entry["size"], entry["hash"], tuple(tensors))


def _check_types(entry: Mapping[str, Any], /, **types: type) -> None:
    for key, expected in types.items():
        if type(entry[key]) is not expected:
            raise TypeError(f"{key} is {entry[key]!r}, expected {expected.__name__}")


def write_atomically(path: Path, data: bytes) -> None:
    """Write a small file so that a reader sees the whole of it or nothing."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def copy_atomically(source: Path, target: Path, algorithm: str) -> FileRecord:
    """Copy a companion file as `write_atomically` writes; returns its size and hash."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(target.name + ".tmp")
    shutil.copyfile(source, temporary)
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, target)
    sync_folder(target.parent)
    return FileRecord.of_file(target, algorithm)


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


def source_record(source: Checkpoint, origin: str) -> dict[str, Any]:
    """Where the output came from. Each tensor's `source_hash` proves the data, these the headers."""
    files = {}
    for header in source.headers:
        hasher = new_hasher("sha256")
        hasher.update(header.raw)
        files[header.path.name] = {"size": header.size, "header_sha256": hasher.hexdigest()}
    return {"origin": origin, "layout": source.layout.layout, "ep_size": source.layout.ep_size, "files": files}


def manifest(
    plan: Plan,
    origin: str,
    options: Mapping[str, Any],
    algorithm: str,
    records: list[FileRecord],
    companions: Mapping[str, FileRecord],
) -> dict[str, Any]:
    """The manifest of a finished output."""
    tensors = []
    for record in records:
        for tensor in record.to_json()["tensors"]:
            tensors.append({"name": tensor.pop("name"), "file": record.name} | tensor)
    return {
        "format_version": FORMAT_VERSION,
        "tool": f"qwen3-vl-moe-veomni {TOOL_VERSION}",
        "layout": plan.target.layout,
        "ep_size": plan.target.ep_size,
        "hash_algorithm": algorithm,
        "fingerprint": plan.fingerprint,
        "source": source_record(plan.source, origin),
        "options": dict(options),
        "files": {record.name: {"size": record.size, "hash": record.hash} for record in records},
        "companions": {name: {"size": record.size, "hash": record.hash} for name, record in companions.items()},
        "tensors": tensors,
    }


@dataclass(frozen=True)
class Manifest:
    """A manifest read back: `weights` and `companions` are what it says of each file."""

    layout: str
    fingerprint: str
    algorithm: str
    weights: tuple[FileRecord, ...]
    companions: tuple[FileRecord, ...]


def parse_manifest(data: bytes) -> Manifest:
    """The inverse of `manifest`. Raises KeyError, TypeError, ValueError or RecursionError when `data` is not one."""
    content = json.loads(data)
    _check_types({"manifest": content}, manifest=dict)
    _check_types(content, layout=str, fingerprint=str, hash_algorithm=str, files=dict, companions=dict, tensors=list)
    by_file: dict[str, list[dict[str, Any]]] = {name: [] for name in content["files"]}
    for tensor in content["tensors"]:
        _check_types({"tensor": tensor}, tensor=dict)
        entry = dict(tensor)
        by_file[entry.pop("file")].append(entry)
    files: dict[str, list[FileRecord]] = {"files": [], "companions": []}
    for kind, records in files.items():
        for name, entry in content[kind].items():
            _check_types({"entry": entry}, entry=dict)
            tensors = by_file[name] if kind == "files" else []
            records.append(FileRecord.from_json({"name": name, "size": entry["size"], "hash": entry["hash"],
                                                 "tensors": tensors}))  # fmt: skip
    return Manifest(content["layout"], content["fingerprint"], content["hash_algorithm"],
                    tuple(files["files"]), tuple(files["companions"]))  # fmt: skip


def dump(content: Mapping[str, Any]) -> bytes:
    """JSON as it is written to disk."""
    return (json.dumps(content, indent=1) + "\n").encode()
