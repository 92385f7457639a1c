"""Every setting of a training run: a dataclass, its command line, and the YAML or JSON file that can stand for it.

What a run was started with is written into its folder as `config.yaml`, which is itself a config file.
"""

import argparse
import dataclasses
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from modeling.ops.experts import BACKENDS

PARTS = ("vit", "merger", "lm")
_LEAST = {
    1: "max_steps pack_tokens pack_buffer accumulation log_every router_every keep sp ep dp_replicate lora_rank",
    0: "lr clip balancing weight_decay eps warmup_steps save_every epochs workers prefetch dp_shard loss_chunk_size "
    "keep_qkv_blocks max_length peak_tflops",
}


def _option(default: Any, text: str, choices: tuple[str, ...] | None = None, section: str = "") -> Any:
    return field(default=default, metadata={"help": text, "choices": choices, "section": section})


@dataclass
class TrainOptions:
    """One field an option: `max_length` is `--max-length` on the command line and `max_length:` in a config file."""

    model: str = _option("", "checkpoint folder in any layout, with config, tokenizer and processors", section="run")
    out: str = _option("", "folder of the run: checkpoints, logs, plots, export")
    seed: int = _option(0, "of the data order, adapter weights and dropout")
    max_steps: int = _option(1000, "optimizer steps; the schedule ends there")
    epochs: int = _option(0, "passes over the data, after which training ends too; 0 for as many as max_steps take")
    resume: bool = _option(True, "go on from the run's newest checkpoint, if there is one")
    export_only: bool = _option(False, "write the export of the newest checkpoint and stop")

    data: list[str] = dataclasses.field(
        default_factory=list, metadata={"help": "JSONL files of chats", "section": "data"}
    )
    max_length: int = _option(0, "tokens of a sample at most; 0 for pack_tokens")
    on_cut_image: str = _option("drop", "an image that this limit falls into", ("drop", "error"))
    on_bad_sample: str = _option("skip", "broken samples: leave out and count, or stop", ("skip", "fail"))
    shuffle: bool = _option(True, "a new order in every epoch")
    pack_tokens: int = _option(8192, "tokens that samples are packed to, per data rank and micro-batch")
    pad: bool = _option(True, "pad packs to pack_tokens, so that every batch has one shape")
    pack_buffer: int = _option(64, "samples that wait to be packed; more leave less padding")
    workers: int = _option(2, "data processes of each rank")
    prefetch: int = _option(2, "packs made ahead of the training loop")

    dp_shard: int = _option(
        0, "data ranks that share one copy of the parameters; 0 for all that are left", section="mesh"
    )
    dp_replicate: int = _option(1, "copies of the parameters (HSDP)")
    sp: int = _option(1, "ranks that share a sequence (Ulysses)")
    ep: int = _option(1, "ranks that share the experts")
    device: str = _option("", "cuda, npu or cpu; empty for what torch finds")
    recompute: str = _option("none", "activations to recompute in backward", ("none", "full", "selective"))
    reshard_after_forward: bool = _option(True, "free gathered parameters between forward and backward")
    balance_encoder: bool = _option(False, "move images between data ranks so that each ViT has equal work")
    param_dtype: str = _option("float32", "parameters and optimizer state are kept in", ("float32", "bfloat16"))
    compute_dtype: str = _option(
        "", "parameters are gathered in; empty for bfloat16 on an accelerator", ("", "float32", "bfloat16")
    )
    attention: str = _option("", "attn_implementation of the model; empty for its own choice")
    moe_backend: str = _option("", "kernel of the experts; empty for the model's own choice", ("", *BACKENDS))
    loss_chunk_size: int = _option(0, "tokens whose logits exist at a time; 0 for the model's own choice")
    keep_qkv_blocks: int = _option(
        0, "last blocks of the vision tower that keep query, key and value for backward, more memory for less time"
    )

    lr: float = _option(1e-5, "peak learning rate", section="optimizer")
    lr_vit: float = _option(-1.0, "of the vision tower; negative for lr")
    lr_merger: float = _option(-1.0, "of the mergers, deepstack's included; negative for lr")
    lr_lm: float = _option(-1.0, "of the language model; negative for lr")
    freeze: list[str] = dataclasses.field(
        default_factory=list, metadata={"help": "parts that are not trained", "choices": PARTS}
    )
    schedule: str = _option("cosine", "after the warm-up", ("cosine", "constant"))
    warmup_steps: int = _option(0, "steps over which the rate rises linearly")
    min_lr_ratio: float = _option(0.1, "of the peak, where the cosine ends")
    weight_decay: float = _option(0.0, "on matrices; norms and biases have none")
    beta1: float = _option(0.9, "AdamW")
    beta2: float = _option(0.95, "AdamW")
    eps: float = _option(1e-8, "AdamW")
    optimizer: str = _option(
        "", "AdamW's implementation; empty for fused on CUDA, else foreach", ("", "fused", "foreach")
    )
    accumulation: int = _option(1, "micro-batches of an optimizer step")
    clip: float = _option(1.0, "norm that gradients are clipped to; 0 for no limit")
    balancing: float = _option(1e-3, "coefficient of the load-balancing loss; 0 for none")

    lora: str = _option("none", "train adapters only", ("none", "attention", "attention+experts"), section="adapters")
    lora_rank: int = _option(16, "rank of each adapter")
    lora_alpha: int = _option(32, "adapters are scaled by alpha / rank")

    log_every: int = _option(1, "steps between lines of metrics", section="output")
    router_every: int = _option(10, "steps between router statistics")
    save_every: int = _option(200, "steps between checkpoints; 0 for the end alone")
    keep: int = _option(2, "newest checkpoints that are kept")
    async_save: bool = _option(True, "go on training while a checkpoint is written")
    export: bool = _option(True, "write the trained model at the end")
    export_layout: str = _option("hub", "layout of the export", ("hub", "fused", "per-expert"))
    export_dtype: str = _option("", "dtype of the export; empty for the checkpoint's", ("", "float32", "bfloat16"))
    tensorboard: bool = _option(True, "write TensorBoard events")
    plots: bool = _option(True, "draw loss, experts' load and throughput at the end")
    peak_tflops: float = _option(0.0, "a device's peak, for MFU; 0 for what is known of it")

    def __post_init__(self) -> None:
        for name in ("model", "out"):
            if not getattr(self, name):
                raise ValueError(f"--{name} is missing.")
        if not self.data and not self.export_only:
            raise ValueError("--data is missing: name one or more JSONL files.")
        self.max_length = self.max_length or self.pack_tokens
        if self.max_length > self.pack_tokens:
            raise ValueError(
                f"max_length={self.max_length} exceeds pack_tokens={self.pack_tokens}; no pack could hold that sample."
            )
        for least, names in _LEAST.items():
            for name in names.split():
                if getattr(self, name) < least:
                    raise ValueError(f"{name}={getattr(self, name)}; it is at least {least}.")
        for name in ("beta1", "beta2", "min_lr_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}; it is between 0 and 1.")
        if self.lora != "none" and self.freeze:
            raise ValueError(f"lora={self.lora!r} freezes everything but adapters; leave out freeze={self.freeze}.")
        if set(self.freeze) == set(PARTS):
            raise ValueError("every part is frozen; nothing is left to train.")

    def lr_of(self, part: str) -> float:
        """Peak learning rate of a part, one of PARTS."""
        own = {"vit": self.lr_vit, "merger": self.lr_merger, "lm": self.lr_lm}[part]
        return self.lr if own < 0 else own

    def to_yaml(self) -> str:
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False, allow_unicode=True)


def _argument_type(annotation: Any) -> type:
    if isinstance(annotation, types.GenericAlias):
        return typing.get_args(annotation)[0]
    return annotation


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """One argument a field; none has a default, so that what the user named can be told from what not."""
    parser = argparse.ArgumentParser(
        description=description,
        usage="%(prog)s --model CHECKPOINT --data FILE [FILE ...] --out RUN [--config FILE] [options; see --help]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML or JSON file of the options below")
    group = parser.add_argument_group("run")
    hints = typing.get_type_hints(TrainOptions)
    for option in dataclasses.fields(TrainOptions):
        text, choices = option.metadata["help"], option.metadata.get("choices")
        if section := option.metadata.get("section"):
            group = parser.add_argument_group(section)
        kind = hints[option.name]
        shown = "" if kind in (str, list[str]) and not option.default else f" (default: {option.default})"
        arguments: dict[str, Any] = {"help": (text + shown).replace("%", "%%")}
        if kind is bool:
            arguments["action"] = argparse.BooleanOptionalAction
        else:
            arguments |= {"type": _argument_type(kind), "choices": choices}
            arguments |= {"metavar": option.name.upper()} if choices is None else {}
            arguments |= {"nargs": "+"} if kind == list[str] else {}
        group.add_argument("--" + option.name.replace("_", "-"), **arguments)
    return parser


def read_config_file(path: Path) -> dict[str, Any]:
    """Options of a config file; names may have dashes or underscores.

    Raises:
        ValueError: not a mapping, an unknown option, a value of another type or not among the choices.
    """
    if not path.is_file():
        raise ValueError(f"config file {path} does not exist.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold option: value lines.")
    hints = typing.get_type_hints(TrainOptions)
    options = {option.name: option for option in dataclasses.fields(TrainOptions)}
    read = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in options:
            raise ValueError(f"{path}: unknown option {key!r}; python scripts/train.py --help lists them.")
        kind, choices = hints[name], options[name].metadata.get("choices")
        if kind is float and isinstance(value, str | int):  # YAML reads 1e-4, without a point, as a string
            try:
                value = float(value)
            except ValueError:
                raise ValueError(f"{path}: {key} is a number, got {value!r}.") from None
        if (kind is not bool and isinstance(value, bool)) or not isinstance(value, list if kind == list[str] else kind):
            raise ValueError(f"{path}: {key} is a {_argument_type(kind).__name__}, got {value!r}.")
        for one in value if isinstance(value, list) else [value]:
            if choices is not None and one not in choices:
                raise ValueError(f"{path}: {key}={one!r}; choose among {', '.join(map(repr, choices))}.")
        read[name] = value
    return read


def parse_options(arguments: list[str] | None, description: str | None) -> TrainOptions:
    """The command line over the config file over the defaults. What is wrong ends the program with a usage error."""
    parser = make_parser(description)
    named = vars(parser.parse_args(arguments))
    config = named.pop("config", None)
    try:
        return TrainOptions(**((read_config_file(config) if config else {}) | named))
    except ValueError as error:
        parser.error(str(error))
