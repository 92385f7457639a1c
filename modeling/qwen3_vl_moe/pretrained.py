"""`from_pretrained` and `save_pretrained` that know which way round the expert weights lie.

The published checkpoints store them transposed, transformers 5 saves them as they are in memory, and both use the same
names. transformers tells them apart by shape, which cannot work for square weights and then loads them silently
transposed; and it leaves code outside its own package to itself. So the layout is decided here, from the stamp in the
files, then by shape, and never guessed; what is saved carries the stamp.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers.core_model_loading import Transpose, WeightConverter
from transformers.modeling_utils import PreTrainedModel

from conversion.checkpoint import EP_INDEX, MANIFEST
from conversion.layout import Stamp, detect_layout, logical_name, pack, read_stamp, stamp_metadata

LOADABLE = ("hub", "fused")
NOT_READ = (
    "the {layout} layout, which from_pretrained does not read. modeling.distributed.checkpoint.load_checkpoint(model, "
    "folder) fills a model from it; `python conversion/veomni_to_hf.py INPUT OUTPUT` converts it."
)


def layout_of_files(files: list[str], hidden_size: int, expert_intermediate: int) -> str:
    """The layout that a set of safetensors files stores its experts in.

    Raises:
        ValueError: stamps and shapes contradict each other or cannot tell, or the files are no safetensors.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    stamps: dict[str, Stamp | None] = {}
    for path in files:
        if not path.endswith(".safetensors"):
            raise ValueError(f"{path} is not a safetensors file; save the checkpoint as safetensors first.")
        try:
            with safe_open(path, framework="pt") as file:
                names = [name for name in file.keys() if logical_name(name) is not None]
                shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in names}
                stamps[path] = read_stamp(file.metadata() or {}, path)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}); download or write it again.") from error
    return detect_layout(shapes, hidden_size, expert_intermediate, stamps).layout


def expert_conversions(layout: str) -> list[WeightConverter]:
    """What turns expert tensors of `layout` into this model's, for transformers' loader."""
    if layout not in LOADABLE:
        raise ValueError(f"the checkpoint has {NOT_READ.format(layout=layout)}")
    if layout == "fused":
        return []
    names = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
    return [WeightConverter(source_patterns=n, target_patterns=n, operations=[Transpose(1, 2)]) for n in names]


def check_loading(missing: set, unexpected: set, mismatched: set) -> None:
    """Raise a ValueError that lists every key of a checkpoint that did not find its place."""
    problems = [
        f"{len(keys)} {what}: {', '.join(sorted(map(str, keys))[:8])}{' ...' if len(keys) > 8 else ''}"
        for what, keys in (
            ("missing from the checkpoint", missing),
            ("unknown to the model", unexpected),
            ("of another shape", mismatched),
        )
        if keys
    ]
    if problems:
        raise ValueError(
            "the checkpoint does not fit the model; nothing is left at random values silently. " + "; ".join(problems)
        )


def write_shards(tensors: dict[str, Any], folder: Path, max_shard_size: str | int, metadata: dict[str, str]) -> None:
    """Write tensors as safetensors files of at most `max_shard_size`, each with `metadata`, and their index.

    An earlier save in the folder gives way only when every new file is written, and the index comes last: a reader
    never takes half for whole.
    """
    split = split_torch_state_dict_into_shards(tensors, max_shard_size=max_shard_size)
    for filename, names in split.filename_to_tensors.items():
        values = {name: tensors[name].detach().contiguous() for name in names}
        save_file(values, folder / f"{filename}.partial", metadata=metadata)
    for index_of_old in ("model.safetensors.index.json", EP_INDEX, MANIFEST):
        (folder / index_of_old).unlink(missing_ok=True)
    for old in folder.glob("model*.safetensors"):
        old.unlink()
    for filename in split.filename_to_tensors:
        (folder / f"{filename}.partial").rename(folder / filename)
    if split.is_sharded:
        index = {"metadata": split.metadata | metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


class LayoutAwareModel(PreTrainedModel):
    """PreTrainedModel whose loading and saving know the experts' layout."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """transformers' own, for checkpoints in the hub and fused layouts.

        Raises:
            ValueError: a folder in another layout, with the way to read it; weights that do not fit the model.
        """
        if pretrained_model_name_or_path is not None and not kwargs.get("state_dict"):
            folder = Path(pretrained_model_name_or_path) / (kwargs.get("subfolder") or "")
            if (folder / EP_INDEX).exists():  # its files have other names than transformers looks for
                raise ValueError(f"{folder} has {NOT_READ.format(layout='ep-sharded')}")
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    @staticmethod
    def _load_pretrained_model(
        model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """transformers' loader with this project's word on the experts' layout in place of its guess."""
        is_adapter = any(Path(file).name.startswith("adapter_model") for file in checkpoint_files or ())
        if checkpoint_files and state_dict is None and not is_adapter:
            text_config = model.config.get_text_config()
            layout = layout_of_files(checkpoint_files, text_config.hidden_size, text_config.moe_intermediate_size)
            load_config = replace(load_config, weight_mapping=expert_conversions(layout))
        return PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args, **kwargs)

    @staticmethod
    def _finalize_model_loading(model: Any, load_config: Any, loading_info: Any) -> Any:
        """transformers' own, then no missing, unexpected or misshapen key is tolerated."""
        info = PreTrainedModel._finalize_model_loading(model, load_config, loading_info)
        if not load_config.ignore_mismatched_sizes:
            check_loading(info.missing_keys, info.unexpected_keys, info.mismatched_keys)
        return info

    def save_pretrained(  # type: ignore[override]  # fewer positional arguments than transformers', by keyword alike
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: dict[str, Any] | None = None,
        max_shard_size: str | int = "5GB",
        layout: str = "fused",
        **kwargs: Any,
    ) -> None:
        """Write the model as safetensors that carry their layout.

        Args:
            layout: "fused", as in memory (what a trainer reads back), or "hub", as published (what other tools expect).
                transformers loads both.
            kwargs: transformers' own; they matter for adapters, which are saved by transformers.

        Raises:
            ValueError: unknown layout, or parameters sharded over ranks (export those with modeling.distributed).
        """
        if layout not in LOADABLE:
            raise ValueError(f"layout={layout!r} cannot be saved here; expected one of {', '.join(LOADABLE)}.")
        if ignored := [name for name in ("push_to_hub", "variant") if kwargs.get(name)]:
            raise ValueError(f"{', '.join(ignored)}: not done here; save to a folder, then use huggingface_hub.")
        if self._hf_peft_config_loaded:
            kwargs |= {"is_main_process": is_main_process, "state_dict": state_dict, "max_shard_size": max_shard_size}
            super().save_pretrained(save_directory, **kwargs)
            return
        if not is_main_process:
            return
        state_dict = self.state_dict() if state_dict is None else state_dict
        if any(isinstance(value, DTensor) for value in state_dict.values()):
            raise ValueError(
                "the parameters are sharded over ranks; use modeling.distributed.checkpoint to export them."
            )
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        self.config.dtype = str(self.dtype).removeprefix("torch.")
        self.config.architectures = [type(self).__name__]
        self.config.save_pretrained(save_directory)
        if self.can_generate():
            self.generation_config.save_pretrained(save_directory)
        tied = self.all_tied_weights_keys if getattr(self.config, "tie_word_embeddings", False) else {}
        stored: dict[str, Any] = {}
        for name, value in state_dict.items():
            if logical_name(name) is not None:
                stored |= {key: part for (key, _), part in pack(layout, name, value).items()}
            elif name not in tied:
                stored[name] = value
        write_shards(stored, Path(save_directory), max_shard_size, stamp_metadata(layout))
