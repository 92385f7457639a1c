"""Checkpoints of a sharded model: loading any layout, saving and resuming a run, exporting one folder.

    load_checkpoint(model, folder, dtype=torch.bfloat16)       weights; each rank reads its own slices, nothing else
    save_training_state / load_training_state                  model and optimizer by torch.distributed.checkpoint
    export_checkpoint(model, folder, layout="hub")             what transformers and inference engines read

All are collectives. What goes wrong on one rank is raised on every rank, with the list of everything that is wrong.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from conversion.layout import Stamp, detect_layout, fused_reads, logical_name, pack, read_stamp, stamp_metadata

from .failures import fail_together
from .parallel_state import ParallelState, get_parallel_state

INDEX = "model.safetensors.index.json"
EXPORT_LAYOUTS = ("hub", "fused", "per-expert")
NOT_COMPANIONS = (".safetensors", ".bin", ".pt", ".pth", ".index.json", "_manifest.json")
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
# Optimizer settings by parameter, not by group: how parameters are grouped differs between meshes.
STATE_OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)
Key = tuple[str, int | None]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, known from the file's header."""

    path: Path
    shape: tuple[int, ...]
    dtype: str


def load_checkpoint(
    model: nn.Module,
    folder: str | os.PathLike,
    *,
    dtype: torch.dtype | None = None,
    source_layout: str | None = None,
    parallel_state: ParallelState | None = None,
) -> int:
    """Fill the model's parameters from a checkpoint folder, whatever its layout and the model's mesh.

    Args:
        model: on the meta device or not, parallelized or not.
        folder: hub, fused, ep-sharded or per-expert layout, told by the files' stamps, else by shapes.
        dtype: of the parameters from now on; None keeps theirs, and files of another dtype are refused.
        source_layout: settles the layout where neither stamp nor shape can (square experts).

    Returns: the bytes that this rank read.

    Raises:
        ValueError: missing or unexpected names, wrong shapes or dtypes, with the list; an unreadable folder. With
            several ranks `RankFailure`, on all of them, with the same text.
    """
    state = parallel_state or get_parallel_state()
    parameters = dict(model.named_parameters())
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    with fail_together(state.world_group):
        stored, stamp = _open(Path(folder), shapes, source_layout)
        wanted = {name: dtype or parameter.dtype for name, parameter in parameters.items()}
        known = set(model.state_dict().keys())  # a tied head has a second name
        _check(stored, stamp, shapes, wanted, known, free_dtype=dtype is not None)
    tied = _is_tied(model)
    if dtype is not None:
        model.to(dtype)
    if any(parameter.is_meta for parameter in model.parameters()):
        model.to_empty(device=state.device_type)
        if tied:
            model.tie_weights()  # type: ignore[operator]
    with fail_together(state.world_group), _Reader(stored) as reader, torch.no_grad():
        for name, parameter in model.named_parameters():
            _fill(parameter, name, reader, stamp)
    return reader.bytes_read


def _is_tied(model: nn.Module) -> bool:
    return len(dict(model.named_parameters(remove_duplicate=False))) > len(dict(model.named_parameters()))


def _open(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], source_layout: str | None
) -> tuple[dict[Key, StoredTensor], Stamp]:
    """Every tensor of the folder by (stored name, expert rank), and the layout they are in."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; download or convert the checkpoint first.")
    paths = sorted(folder.glob("*.safetensors"))
    index = folder / INDEX
    if index.exists():
        paths = sorted({folder / file for file in json.loads(index.read_text())["weight_map"].values()})
    if not paths:
        raise ValueError(f"{folder} holds no .safetensors file.")
    stored: dict[Key, StoredTensor] = {}
    stamps: dict[str, Stamp | None] = {}
    for path in paths:
        with safe_open(path, framework="pt") as file:
            stamp = stamps[path.name] = read_stamp(file.metadata() or {}, str(path))
            for name in file.keys():
                key = (name, stamp.ep_rank if stamp else None)
                if key in stored:
                    raise ValueError(f"{name} is in both {stored[key].path.name} and {path.name}.")
                piece = file.get_slice(name)
                stored[key] = StoredTensor(path, tuple(piece.get_shape()), piece.get_dtype())
    # gate_up_proj is (E, 2I, H)
    gate_up = next(
        (shape for name, shape in shapes.items() if (logical_name(name) or "").endswith("gate_up_proj")), (0,) * 3
    )
    by_name = {name: tensor.shape for (name, _), tensor in stored.items()}
    return stored, detect_layout(by_name, gate_up[2], gate_up[1] // 2, stamps, source_layout)


def _sources(name: str, shape: tuple[int, ...], stamp: Stamp) -> dict[Key, tuple[int, ...] | None]:
    """The stored tensors that a parameter is made of, and the shape each must have."""
    if logical_name(name) is None:
        return {(name, None): shape}
    whole = torch.empty(shape, device="meta")
    parts = pack(stamp.layout, name, whole, stamp.ep_size)
    return {key: tuple(part.shape) for key, part in parts.items()}


def _check(
    stored: Mapping[Key, StoredTensor],
    stamp: Stamp,
    shapes: Mapping[str, tuple[int, ...]],
    wanted: Mapping[str, torch.dtype],
    known: set[str],
    free_dtype: bool,
) -> None:
    """Raise a ValueError that lists everything in which the files and the model differ."""
    problems, used = [], set()
    for name, shape in shapes.items():
        for key, expected in _sources(name, shape, stamp).items():
            used.add(key)
            label = key[0] if key[1] is None else f"{key[0]} (expert rank {key[1]})"
            tensor = stored.get(key)
            if tensor is None:
                problems.append(f"missing: {label}")
            elif tensor.shape != expected:
                problems.append(
                    f"wrong shape: {label} is {tensor.shape} in {tensor.path.name}, the model has {expected}"
                )
            elif tensor.dtype not in DTYPES:
                problems.append(f"wrong dtype: {label} is {tensor.dtype}, not a floating-point weight")
            elif not free_dtype and DTYPES[tensor.dtype] != wanted[name]:
                problems.append(
                    f"wrong dtype: {label} is {tensor.dtype}, the model has {wanted[name]}; pass dtype= to convert"
                )
    problems += [f"unexpected: {key[0]}" for key in stored if key not in used and key[0] not in known]
    if problems:
        raise ValueError(
            f"the checkpoint does not fit the model, {len(problems)} problems:\n  " + "\n  ".join(problems)
        )


class _Reader:
    """Slices of stored tensors. A context: it keeps one file open, and that not for long, because the pages of a mapped
    file count as this process's memory until the map goes."""

    REOPEN_AFTER = 64 * 2**20

    def __init__(self, stored: Mapping[Key, StoredTensor]) -> None:
        self.stored = stored
        self.path: Path | None = None
        self.file = ExitStack()
        self.mapped = 0
        self.bytes_read = 0

    def __enter__(self) -> "_Reader":
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def read(self, key: Key, index: tuple[slice, ...]) -> Tensor:
        """A view into the file; good until the next read."""
        path = self.stored[key].path
        if path != self.path or self.mapped > self.REOPEN_AFTER:
            self.file.close()
            self.open = self.file.enter_context(safe_open(path, framework="pt"))
            self.path, self.mapped = path, 0
        piece = self.open.get_slice(key[0])[index]
        self.mapped += piece.nbytes
        self.bytes_read += piece.nbytes
        return piece


def _local_part(parameter: Tensor) -> tuple[Tensor, list[tuple[int, int]]]:
    """What this rank holds of a parameter, and where that lies in the whole: [start, stop) per dimension."""
    if not isinstance(parameter, DTensor):
        return parameter, [(0, size) for size in parameter.shape]
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return parameter.to_local(), [(start, start + size) for start, size in zip(offset, shape, strict=True)]


def _fill(parameter: Tensor, name: str, reader: _Reader, stamp: Stamp) -> None:
    local, block = _local_part(parameter)
    if local.numel() == 0:
        return
    if logical_name(name) is None:
        local.copy_(reader.read((name, None), tuple(slice(*bounds) for bounds in block)))
        return
    shape = (parameter.shape[0], parameter.shape[1], parameter.shape[2])
    experts, rows, columns = block
    for read in fused_reads(stamp.layout, name, shape, experts, rows, columns, stamp.ep_size):
        piece = reader.read((read.name, read.ep_rank), read.index)
        local[read.dest].copy_(piece.transpose(-1, -2) if read.transposed else piece)


def save_training_state(
    folder: str | os.PathLike,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    extra: Mapping[str, Any] | None = None,
    *,
    parallel_state: ParallelState | None = None,
) -> None:
    """Write model, optimizer and `extra` (what JSON can hold: step, data position). Complete or absent, never half.

    Each rank writes its own part. Resuming works on any mesh.
    """
    state = parallel_state or get_parallel_state()
    folder = Path(folder)
    partial = folder.with_name(folder.name + ".partial")
    weights, moments = get_state_dict(model, optimizer, options=STATE_OPTIONS)
    content = {"model": weights, "optimizer": moments, "extra": json.dumps(dict(extra or {}))}
    with fail_together(state.world_group):
        if state.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
    dcp.save(content, checkpoint_id=partial)
    with fail_together(state.world_group):
        if state.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)


def load_training_state(
    folder: str | os.PathLike,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    parallel_state: ParallelState | None = None,
) -> dict[str, Any]:
    """Resume: fill model and optimizer from `save_training_state`, on the same mesh bitwise, on another resharded.

    Returns: `extra`, as it was saved.
    Raises: `ValueError` (`RankFailure` with several ranks) where there is no complete state.
    """
    state = parallel_state or get_parallel_state()
    with fail_together(state.world_group):
        if not (Path(folder) / ".metadata").exists():
            raise ValueError(f"{folder} holds no complete training state; check the path, or start from a checkpoint.")
    weights, moments = get_state_dict(model, optimizer, options=STATE_OPTIONS)
    content: dict[str, Any] = {"model": weights, "optimizer": moments, "extra": ""}
    dcp.load(content, checkpoint_id=folder)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=content["model"],
        optim_state_dict=content["optimizer"],
        options=STATE_OPTIONS,
    )
    return json.loads(content["extra"])


def export_checkpoint(
    model: Any,
    folder: str | os.PathLike,
    *,
    layout: str = "hub",
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * 10**9,
    companions: str | os.PathLike | None = None,
    replace: bool = False,
    parallel_state: ParallelState | None = None,
) -> None:
    """Write the whole model as one folder that transformers reads. Rank 0 writes; one tensor is whole at a time.

    Args:
        folder: must not exist yet, unless `replace`; appears complete.
        layout: "hub" as published, "fused" as in memory, or "per-expert".
        dtype: of the files; None keeps the parameters'.
        max_shard_bytes: size after which a file is closed; a larger tensor gets a file of its own.
        companions: a folder whose tokenizer, processor and other small files come along.
        replace: whether what is in `folder` goes when all of the new one is written.
    """
    state = parallel_state or get_parallel_state()
    folder = Path(folder)
    partial = folder.with_name(folder.name + ".partial")
    with fail_together(state.world_group):
        if layout not in EXPORT_LAYOUTS:
            raise ValueError(f"layout={layout!r} cannot be exported; choose one of {', '.join(EXPORT_LAYOUTS)}.")
        if folder.exists() and not replace:
            raise ValueError(f"{folder} exists; export to a new folder, or remove it.")
        if state.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            _write_config(model, partial, dtype, companions)
    files: list[list[str]] = []
    total = 0
    for shard in _shards(model.named_parameters(), layout, dtype, max_shard_bytes, keep=state.rank == 0):
        total += sum(tensor.nbytes for tensor in shard.values())
        with fail_together(state.world_group):
            if state.rank == 0:
                save_file(shard, partial / f"{len(files)}.safetensors", metadata=stamp_metadata(layout))
        files.append(list(shard))
    with fail_together(state.world_group):
        if state.rank == 0:
            _finish(partial, files, total)
            old = folder.with_name(folder.name + ".old")
            if folder.exists():
                shutil.rmtree(old, ignore_errors=True)
                folder.rename(old)
            partial.rename(folder)
            shutil.rmtree(old, ignore_errors=True)


def _shards(
    parameters: Iterable[tuple[str, nn.Parameter]],
    layout: str,
    dtype: torch.dtype | None,
    max_bytes: int,
    keep: bool,
) -> Iterator[dict[str, Tensor]]:
    """Files' contents, in order; on ranks that do not keep them the same on the meta device, so that all agree."""
    shard: dict[str, Tensor] = {}
    size = 0
    for name, parameter in parameters:
        whole = parameter.detach()
        whole = whole.full_tensor() if isinstance(whole, DTensor) else whole
        whole = whole.to(device="cpu" if keep else "meta", dtype=dtype or whole.dtype)
        parts = pack(layout, name, whole) if logical_name(name) is not None else {(name, None): whole}
        for (stored_name, _), part in parts.items():
            if shard and size + part.nbytes > max_bytes:
                yield shard
                shard, size = {}, 0
            shard[stored_name] = part.contiguous()
            size += part.nbytes
    yield shard


def _write_config(model: Any, folder: Path, dtype: torch.dtype | None, companions: str | os.PathLike | None) -> None:
    for file in Path(companions).iterdir() if companions is not None else ():
        if file.is_file() and not file.name.endswith(NOT_COMPANIONS):
            shutil.copyfile(file, folder / file.name)
    written = str(dtype or next(model.parameters()).dtype).removeprefix("torch.")
    model.config.dtype = written
    model.config.architectures = [type(model).__name__.removeprefix("FSDP")]
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    if companions is not None and (original := Path(companions) / "config.json").exists():
        _keep_spelling(model.config, original, written, folder / "config.json")


def _keep_spelling(config: Any, original: Path, dtype: str, path: Path) -> None:
    """Write the config as `original` spells it, if that says the same.

    transformers 5 renames fields (num_experts, rope_scaling), and older releases take what they do not find at its
    default, so that they would read another model.
    """
    read = type(config).from_pretrained(original.parent)
    read.architectures = config.architectures
    if _described(read) != _described(config):
        return
    content = json.loads(original.read_text(encoding="utf-8"))
    for fields in (content, *(value for value in content.values() if isinstance(value, dict))):
        fields |= {key: dtype for key in ("dtype", "torch_dtype") if key in fields}
    content |= {"architectures": config.architectures, "dtype": dtype}
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _described(config: Any) -> str:
    """What a config says about its model: all but the precision of its weights and who wrote it."""
    content = config.to_dict()
    for part in (content, *(value for value in content.values() if isinstance(value, dict))):
        for key in ("dtype", "transformers_version", "_name_or_path"):
            part.pop(key, None)
    return json.dumps(content, sort_keys=True)


def _finish(folder: Path, files: list[list[str]], total: int) -> None:
    """Give the files their names, and write the index last."""
    weight_map: dict[str, str] = {}
    for number, names in enumerate(files):
        file = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        (folder / f"{number}.safetensors").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2))
