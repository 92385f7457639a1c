"""Every tensor a Qwen3-VL-MoE checkpoint must hold, with its shape, from its config.json.

The names and shapes are those of transformers' `Qwen3VLMoeForConditionalGeneration`. The experts appear as their two
logical tensors per MoE layer (see `conversion.layout`).
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conversion.errors import InputError

MODEL_TYPE = "qwen3_vl_moe"


@dataclass(frozen=True)
class ModelDims:
    """The sizes that decide names and shapes; letters as in the field: H hidden, I expert intermediate, E experts."""

    hidden: int
    expert_intermediate: int
    num_experts: int
    text: dict[str, Any]
    vision: dict[str, Any]
    tied: bool

    @property
    def moe_layers(self) -> list[int]:
        """Decoder layers whose MLP is a mixture of experts."""
        step, dense = self.text["decoder_sparse_step"], self.text["mlp_only_layers"]
        layers = range(self.text["num_hidden_layers"])
        return [i for i in layers if self.num_experts > 0 and i not in dense and (i + 1) % step == 0]


_TEXT_SIZES = ("hidden_size", "moe_intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
               "num_key_value_heads", "intermediate_size")  # fmt: skip
_VISION_SIZES = ("depth", "hidden_size", "intermediate_size", "out_hidden_size", "patch_size", "temporal_patch_size",
                 "in_channels", "spatial_merge_size", "num_position_embeddings")  # fmt: skip
# No real model comes near; a config beyond it would only make the tables below endless.
_MAX_LAYERS, _MAX_EXPERTS, _MAX_SIZE = 4096, 65536, 2**32


def read_config(folder: Path) -> dict[str, Any]:
    """The parsed config.json of `folder`. Raises InputError when it is missing, unreadable or of another model."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path} is missing: a checkpoint folder needs the model's config.json") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {error}") from None
    model_type = config.get("model_type") if isinstance(config, dict) else None
    if model_type != MODEL_TYPE:
        raise InputError(f"{path} is of model_type {model_type!r}; this tool converts {MODEL_TYPE!r}")
    return config


def model_dims(config: dict[str, Any]) -> ModelDims:
    """The sizes in a parsed config. Raises InputError naming the first key that is missing or senseless."""
    text, vision = dict(_section(config, "text_config")), dict(_section(config, "vision_config"))
    # Published configs say num_experts, transformers 5 writes num_local_experts.
    text.setdefault("num_experts", text.get("num_local_experts"))
    text.setdefault("decoder_sparse_step", 1)
    text.setdefault("attention_bias", False)
    text["mlp_only_layers"] = text.get("mlp_only_layers") or []
    for key in _TEXT_SIZES + ("num_experts", "decoder_sparse_step"):
        _check_size(text, "text_config", key)
    if text.get("head_dim") is None:
        text["head_dim"] = text["hidden_size"] // text["num_attention_heads"]
    _check_size(text, "text_config", "head_dim")
    for key in _VISION_SIZES:
        _check_size(vision, "vision_config", key)
    deepstack = vision.get("deepstack_visual_indexes")
    for where, value in (("deepstack_visual_indexes", deepstack), ("mlp_only_layers", text["mlp_only_layers"])):
        if not isinstance(value, list) or not all(type(i) is int and 0 <= i <= _MAX_LAYERS for i in value):
            raise InputError(f"config.json: {where} is {value!r}, expected a list of layer numbers")
    if max(text["num_hidden_layers"], vision["depth"]) > _MAX_LAYERS or text["num_experts"] > _MAX_EXPERTS:
        raise InputError(
            f"config.json: {text['num_hidden_layers']} layers, ViT depth {vision['depth']}, {text['num_experts']} "
            f"experts; at most {_MAX_LAYERS} layers and {_MAX_EXPERTS} experts are supported"
        )
    # The joint model ties by the top-level flag; the text model's own is a fallback for configs without it.
    tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
    return ModelDims(text["hidden_size"], text["moe_intermediate_size"], text["num_experts"], text, vision, bool(tied))


def _section(config: dict[str, Any], key: str) -> dict[str, Any]:
    section = config.get(key)
    if not isinstance(section, dict):
        raise InputError(f"config.json: {key} is {type(section).__name__}, expected an object")
    return section


def _check_size(section: dict[str, Any], where: str, key: str) -> None:
    value = section.get(key)
    if type(value) is not int or not 0 < value <= _MAX_SIZE:
        raise InputError(f"config.json: {where}.{key} is {value!r}, expected a positive integer")


def expected_tensors(dims: ModelDims) -> dict[str, tuple[int, ...]]:
    """Logical tensor name -> shape for the whole model, in the order the model defines them.

    `lm_head.weight` is included; a tied checkpoint may leave it out.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    shapes.update(_vision_tensors(dims.vision))
    text, h = dims.text, dims.hidden
    shapes["model.language_model.embed_tokens.weight"] = (text["vocab_size"], h)
    moe_layers = set(dims.moe_layers)
    for layer in range(text["num_hidden_layers"]):
        prefix = f"model.language_model.layers.{layer}."
        for name, shape in _decoder_layer(dims, layer in moe_layers).items():
            shapes[prefix + name] = shape
    shapes["model.language_model.norm.weight"] = (h,)
    shapes["lm_head.weight"] = (text["vocab_size"], h)
    return shapes


def _decoder_layer(dims: ModelDims, moe: bool) -> dict[str, tuple[int, ...]]:
    text, h, i, e = dims.text, dims.hidden, dims.expert_intermediate, dims.num_experts
    queries = text["num_attention_heads"] * text["head_dim"]
    keys = text["num_key_value_heads"] * text["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (n_out, n_in) in {"q": (queries, h), "k": (keys, h), "v": (keys, h), "o": (h, queries)}.items():
        shapes[f"self_attn.{name}_proj.weight"] = (n_out, n_in)
        if text["attention_bias"]:
            shapes[f"self_attn.{name}_proj.bias"] = (n_out,)
    shapes["self_attn.q_norm.weight"] = shapes["self_attn.k_norm.weight"] = (text["head_dim"],)
    if moe:
        shapes |= {"mlp.experts.gate_up_proj": (e, 2 * i, h), "mlp.experts.down_proj": (e, h, i)}
        shapes["mlp.gate.weight"] = (e, h)
    else:
        dense = text["intermediate_size"]
        shapes |= {"mlp.gate_proj.weight": (dense, h), "mlp.up_proj.weight": (dense, h)}
        shapes["mlp.down_proj.weight"] = (h, dense)
    shapes["input_layernorm.weight"] = shapes["post_attention_layernorm.weight"] = (h,)
    return shapes


def _vision_tensors(vision: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    h, i, out = vision["hidden_size"], vision["intermediate_size"], vision["out_hidden_size"]
    merged = h * vision["spatial_merge_size"] ** 2
    patch = (vision["in_channels"], vision["temporal_patch_size"], vision["patch_size"], vision["patch_size"])
    shapes: dict[str, tuple[int, ...]] = {"patch_embed.proj.weight": (h, *patch), "patch_embed.proj.bias": (h,)}
    shapes["pos_embed.weight"] = (vision["num_position_embeddings"], h)
    for block in range(vision["depth"]):
        for name in ("norm1", "norm2"):
            shapes |= {f"blocks.{block}.{name}.weight": (h,), f"blocks.{block}.{name}.bias": (h,)}
        linears = {"attn.qkv": (3 * h, h), "attn.proj": (h, h), "mlp.linear_fc1": (i, h), "mlp.linear_fc2": (h, i)}
        shapes |= _linears(f"blocks.{block}.", linears)
    mergers = {"merger.": h}  # the main merger normalises before the merge, the deepstack ones after
    mergers |= {f"deepstack_merger_list.{k}.": merged for k in range(len(vision["deepstack_visual_indexes"]))}
    for prefix, norm in mergers.items():
        shapes |= {f"{prefix}norm.weight": (norm,), f"{prefix}norm.bias": (norm,)}
        shapes |= _linears(prefix, {"linear_fc1": (merged, merged), "linear_fc2": (out, merged)})
    return {f"model.visual.{name}": shape for name, shape in shapes.items()}


def _linears(prefix: str, sizes: dict[str, tuple[int, int]]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (n_out, n_in) in sizes.items():
        shapes |= {f"{prefix}{name}.weight": (n_out, n_in), f"{prefix}{name}.bias": (n_out,)}
    return shapes
