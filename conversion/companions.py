"""The files of a checkpoint folder that are not weights: config, tokenizer, processors, chat template, licence."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conversion.checkpoint import EP_INDEX, HF_INDEX, JOURNAL, MANIFEST
from conversion.errors import InputError
from conversion.manifest import FileRecord, copy_atomically, dump, write_atomically

# Weights in other formats would be large, and a second, unconverted copy of the model beside the converted one.
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack", ".tmp")
NOT_CARRIED = (HF_INDEX, EP_INDEX, MANIFEST, JOURNAL, "pytorch_model.bin.index.json")
TORCH_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


@dataclass(frozen=True)
class Companions:
    """Relative paths: `carried` are copied; `left_out` are weights in other formats, an adapter's settings and linked
    folders."""

    carried: tuple[str, ...]
    left_out: tuple[str, ...]
    nbytes: int


def find_companions(folder: Path) -> Companions:
    """The companion files of `folder` and its subfolders, hidden ones apart. Raises InputError for unreadable ones."""
    carried, left_out, total = [], [], 0

    def fail(error: OSError) -> None:
        raise InputError(f"{error.filename} cannot be read: {error.strerror}")

    for root, folders, files in os.walk(folder, onerror=fail):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        left_out += [os.path.relpath(Path(root, name), folder) for name in folders if Path(root, name).is_symlink()]
        for name in sorted(files):
            path = Path(root, name)
            relative = os.path.relpath(path, folder)
            if name.startswith(".") or (root == str(folder) and name in NOT_CARRIED) or name.endswith(".safetensors"):
                continue
            # An adapter's settings without its weights would make a model that cannot be loaded.
            if path.suffix in WEIGHT_SUFFIXES or name == "adapter_config.json":
                left_out.append(relative)
                continue
            try:
                with open(path, "rb") as file:
                    total += os.fstat(file.fileno()).st_size
            except OSError as error:
                raise InputError(f"{path} cannot be read: {error.strerror}") from None
            carried.append(relative)
    return Companions(tuple(carried), tuple(left_out), total)


def write_companions(
    companions: Companions, folder: Path, output: Path, config: dict[str, Any], dtype: str | None, algorithm: str
) -> dict[str, FileRecord]:
    """Copy them; config.json gets the new dtype where the weights were cast. Returns their records by relative path."""
    records = {}
    for relative in companions.carried:
        records[relative] = copy_atomically(folder / relative, output / relative, algorithm)
    if dtype is not None:
        write_atomically(output / "config.json", dump(with_dtype(config, TORCH_DTYPES[dtype])))
        records["config.json"] = FileRecord.of_file(output / "config.json", algorithm)
    return records


def with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """A copy of `config` that names `dtype` wherever it names one, and at least at the top."""
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    changed = dict(config) | {key: dtype}
    for section in ("text_config", "vision_config"):
        changed[section] = {
            name: dtype if name in ("dtype", "torch_dtype") and value is not None else value
            for name, value in config[section].items()
        }
    return json.loads(json.dumps(changed))
