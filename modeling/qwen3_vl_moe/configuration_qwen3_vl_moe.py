"""Configuration: upstream's three config classes plus the fields that training needs.

Everything that describes the architecture is inherited from transformers, so a `config.json` of a published checkpoint
loads here and one saved here loads there. The fork's own fields live on the text config, next to the layers they act
on.
"""

import os
from pathlib import Path
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.models.qwen3_vl_moe import configuration_qwen3_vl_moe as upstream

MOE_IMPLEMENTATIONS = ("eager", "fused")


def check_moe_implementation(value: str) -> None:
    """Raise a ValueError unless `value` names an implementation of the expert layer."""
    if value not in MOE_IMPLEMENTATIONS:
        raise ValueError(
            f"moe_implementation={value!r} is unknown; expected one of {', '.join(map(repr, MOE_IMPLEMENTATIONS))}: "
            "'fused' for training and speed, 'eager' for the readable reference loop."
        )


def check_checkpoint_folder(folder: Path) -> None:
    """Raise a ValueError that says what is there instead, unless `folder` can hold a whole model's checkpoint."""
    if (folder / "config.json").is_file():
        return
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; give one that holds config.json and the .safetensors files.")
    exports = sorted(path.name for path in folder.glob("export-*") if (path / "config.json").is_file())
    if (folder / "adapter_config.json").exists():
        found = "is an adapter; give the model beside it, export-STEP"
    elif exports:
        found = f"holds no config.json, but {', '.join(exports)}; give one of these"
    else:
        found = "holds no config.json; give the folder of a whole checkpoint"
    raise ValueError(f"{folder} {found}.")


@strict
class Qwen3VLMoeTextConfig(upstream.Qwen3VLMoeTextConfig):
    """Upstream's text config and:

    moe_implementation: "fused" (grouped matrix products, default) or "eager" (a loop over experts, the reference).
    moe_backend: kernel behind "fused": "quack", "grouped_mm" or "eager"; None lets the device and the installed
        packages decide, once, with a log line.
    loss_chunk_size: rows of hidden states whose logits exist at a time in training. More rows, less time, more memory:
        2 bytes times the vocabulary each, at the moment when no gradient but the head's exists yet.
    output_router_logits: upstream's, declared here too because its older releases leave it out.
    """

    moe_implementation: str = "fused"
    moe_backend: str | None = None
    loss_chunk_size: int = 1536
    output_router_logits: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        check_moe_implementation(self.moe_implementation)
        if self.loss_chunk_size < 1:
            raise ValueError(f"loss_chunk_size must be at least 1 row of hidden states, got {self.loss_chunk_size}.")


@strict
class Qwen3VLMoeVisionConfig(upstream.Qwen3VLMoeVisionConfig):
    """Upstream's vision config; the base of the rotary angles is written out where transformers keeps it in its code;
    and:

    keep_qkv_blocks: how many blocks, counted from the last, keep query, key and value for backward where they would
        otherwise make them again (fused blocks over flash-attn 4): 6 bytes times patches and width each, in 16 bits.
    """

    rope_parameters: dict | None = None
    keep_qkv_blocks: int = 0

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.rope_parameters is None or self.rope_parameters["rope_type"] == "default":
            self.rope_parameters = {"rope_type": "axial", "rope_theta": 10000.0}
        if not 0 <= self.keep_qkv_blocks <= self.depth:
            raise ValueError(f"keep_qkv_blocks={self.keep_qkv_blocks} must be between 0 and depth={self.depth}.")


@strict
class Qwen3VLMoeConfig(upstream.Qwen3VLMoeConfig):
    """Upstream's joint config over this fork's text and vision configs."""

    # transformers names this mapping `sub_configs` up to some release and `sub_configs_defaults` after it.
    sub_configs = {"vision_config": Qwen3VLMoeVisionConfig, "text_config": Qwen3VLMoeTextConfig}
    sub_configs_defaults = {"vision_config": Qwen3VLMoeVisionConfig, "text_config": Qwen3VLMoeTextConfig}

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """transformers' own, but for a folder without a config.json: it takes that for the default model's."""
        folder = Path(pretrained_model_name_or_path)
        if folder.is_dir() and "_configuration_file" not in kwargs:
            check_checkpoint_folder(folder / (kwargs.get("subfolder") or ""))
        return super().get_config_dict(pretrained_model_name_or_path, **kwargs)

    def to_diff_dict(self) -> dict[str, Any]:
        """What `save_pretrained` writes: the number of experts and the rotary angles also by the names of published
        checkpoints. Releases before transformers 5 know no others, and would take their defaults without a word."""
        written = super().to_diff_dict()
        rope = dict(self.text_config.rope_parameters)
        theta = rope.pop("rope_theta")
        older = {"rope_theta": theta, "rope_scaling": rope, "num_experts": self.text_config.num_experts}
        written["text_config"] = written.get("text_config", {}) | older
        return written


def own_config(config: Any) -> Any:
    """`config`, or where it is transformers' own (a model's of theirs, AutoConfig's) the same as this fork's."""
    if not isinstance(config, upstream.Qwen3VLMoeConfig) or isinstance(config, Qwen3VLMoeConfig):
        return config
    own = Qwen3VLMoeConfig.from_dict(config.to_dict())
    own._attn_implementation = config._attn_implementation
    return own


__all__ = ["Qwen3VLMoeConfig", "Qwen3VLMoeTextConfig", "Qwen3VLMoeVisionConfig"]
