"""A checkpoint folder opened: its files, its stored tensors, its config and its layout, all checked before use."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conversion.cast import FLOATS
from conversion.errors import InputError
from conversion.inventory import ModelDims, expected_tensors, model_dims, read_config
from conversion.layout import LAYOUTS, Stamp, StoredTensor, detect_layout, logical_name, read_stamp, stored_tensors
from conversion.shard_io import ShardHeader, TensorInfo, read_header

HF_INDEX = "model.safetensors.index.json"
EP_INDEX = "model.ep.index.json"
MANIFEST = "veomni_manifest.json"
JOURNAL = "veomni_journal.jsonl"


@dataclass(frozen=True)
class Location:
    """Where a stored tensor lies."""

    path: Path
    info: TensorInfo


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint folder.

    `stored` maps (stored name, ep_rank) to its place; ep_rank is None except for the experts of ep-sharded folders.
    `logical` are the model's tensors and their shapes, `unknown` the stored ones that the model does not have.
    """

    folder: Path
    config: dict[str, Any]
    dims: ModelDims
    headers: tuple[ShardHeader, ...]
    layout: Stamp
    stored: dict[tuple[str, int | None], Location]
    logical: dict[str, tuple[int, ...]]
    unknown: tuple[str, ...]

    def parts(self, name: str) -> list[StoredTensor]:
        """The stored tensors of logical tensor `name`; for any tensor but the experts that is the tensor itself."""
        return _parts(name, self.logical[name], self.layout)


def _parts(name: str, shape: tuple[int, ...], layout: Stamp) -> list[StoredTensor]:
    if logical_name(name) is None:
        return [StoredTensor(name, shape, (0, 1), (0, 1))]
    assert len(shape) == 3
    return list(stored_tensors(layout.layout, name, shape, layout.ep_size))


def open_checkpoint(folder: Path, source_layout: str | None = None) -> Checkpoint:
    """Open and check the checkpoint in `folder`.

    Raises InputError for a damaged, incomplete or foreign checkpoint, UsageError where `source_layout` is needed and
    missing, or contradicts what the checkpoint records.
    """
    if (folder / JOURNAL).exists():
        raise InputError(f"{folder} is an unfinished conversion; finish it first: the same command with --resume")
    config = read_config(folder)
    dims = model_dims(config)
    weight_map = _read_index(folder)
    paths = _weight_files(folder, weight_map)
    headers = tuple(read_header(path) for path in paths)
    stamps = {header.path.name: read_stamp(header.metadata, str(header.path)) for header in headers}
    stored = _collect(headers, stamps)
    if (manifest := _manifest_stamp(folder)) is not None:
        stamps[MANIFEST] = manifest
    if weight_map is not None:
        _check_index(folder, weight_map, stored)
    shapes = {name: location.info.shape for (name, _), location in stored.items()}
    layout = detect_layout(shapes, dims.hidden, dims.expert_intermediate, stamps, source_layout)
    logical, unknown = _check_inventory(dims, layout, stored)
    return Checkpoint(folder, config, dims, headers, layout, stored, logical, unknown)


def _read_index(folder: Path) -> dict[str, str] | None:
    """weight_map of the folder's index, None where there is no index."""
    path = folder / HF_INDEX
    try:
        index = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {error}") from None
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{path}: weight_map is missing, empty or not an object")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise InputError(f"{path}: {name!r} lies in {str(file)[:100]!r}, expected a .safetensors file beside it")
    return weight_map


def _manifest_stamp(folder: Path) -> Stamp | None:
    """The layout that the folder's manifest records, None where there is no manifest."""
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_bytes())
        layout, ep_size = content["layout"], content["ep_size"]
        if layout not in LAYOUTS or type(ep_size) is not int or ep_size < 1:
            raise ValueError(f"layout {layout!r}, ep_size {ep_size!r}")
        return Stamp(layout, ep_size)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path} cannot be understood: {error!r}") from None


def _weight_files(folder: Path, weight_map: dict[str, str] | None) -> list[Path]:
    if weight_map is not None:
        paths = [folder / file for file in sorted(set(weight_map.values()))]
        missing = [path.name for path in paths if not os.path.lexists(path)]
        if missing:
            raise InputError(f"{folder}: {len(missing)} file(s) that the index names are missing: {_some(missing)}")
        return paths
    try:
        paths = sorted(path for path in folder.iterdir() if path.suffix == ".safetensors")
        other = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth"))
    except OSError as error:
        raise InputError(f"{folder} cannot be read: {error.strerror}") from None
    if not paths and other:
        raise InputError(
            f"{folder} holds {other[0]}, pickled weights; only safetensors files are read. Load and save it once with "
            "transformers, which writes safetensors"
        )
    if not paths:
        raise InputError(f"{folder} holds no .safetensors file")
    return paths


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (" …" if names[5:] else "")


def _collect(
    headers: tuple[ShardHeader, ...], stamps: dict[str, Stamp | None]
) -> dict[tuple[str, int | None], Location]:
    stored: dict[tuple[str, int | None], Location] = {}
    for header in headers:
        stamp = stamps[header.path.name]
        ep_rank = stamp.ep_rank if stamp is not None else None
        for name, info in header.tensors.items():
            key = (name, ep_rank)
            if key in stored:
                raise InputError(f"tensor {name!r} is in both {stored[key].path} and {header.path.name}")
            stored[key] = Location(header.path, info)
    return stored


def _check_index(folder: Path, weight_map: dict[str, str], stored: dict[tuple[str, int | None], Location]) -> None:
    for name, file in weight_map.items():
        location = stored.get((name, None))
        if location is None or location.path.name != file:
            raise InputError(f"{folder / HF_INDEX} says {name!r} is in {file}, which does not hold it")
    for name, _ in stored:
        if name not in weight_map:
            raise InputError(f"{stored[name, None].path} holds {name!r}, which {HF_INDEX} does not name")


def _check_inventory(
    dims: ModelDims, layout: Stamp, stored: dict[tuple[str, int | None], Location]
) -> tuple[dict[str, tuple[int, ...]], tuple[str, ...]]:
    """Every tensor of the model is there with its shape; returns logical tensors and the names beyond them."""
    logical = expected_tensors(dims)
    if dims.tied and ("lm_head.weight", None) not in stored:
        del logical["lm_head.weight"]
    known: set[tuple[str, int | None]] = set()
    missing: list[str] = []
    for name, shape in logical.items():
        for part in _parts(name, shape, layout):
            known.add((part.name, part.ep_rank))
            location = stored.get((part.name, part.ep_rank))
            if location is None:
                missing.append(part.name if part.ep_rank is None else f"{part.name} (expert rank {part.ep_rank})")
            elif location.info.shape != part.shape:
                raise InputError(
                    f"{location.path}: {part.name} has shape {location.info.shape}, the config asks for {part.shape}"
                )
    if missing:
        raise InputError(f"{len(missing)} tensor(s) of the model are missing: {_some(missing)}")
    for (name, rank), location in stored.items():
        if location.info.dtype not in FLOATS and (name, rank) in known:
            raise InputError(
                f"{location.path}: {name} is {location.info.dtype}, not a floating-point weight of 16 or more bits; "
                "take the checkpoint in bfloat16, or write a quantised one in it first"
            )
    unknown = sorted(name for name, rank in stored if (name, rank) not in known)
    stray = [name for name in unknown if (name, None) not in stored]
    if stray:
        raise InputError(f"the files of single expert ranks hold what is not of experts: {_some(stray)}")
    return logical, tuple(unknown)
