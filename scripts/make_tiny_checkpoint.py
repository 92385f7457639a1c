"""python scripts/make_tiny_checkpoint.py OUT [--layout hub|fused] [--dtype float32] [--seed 0]

A Qwen3-VL-MoE checkpoint of 20 million parameters with the published one's files, names and layout. The weights are
random; the rest is real: Qwen's tokenizer, the image and video processors, a chat template, the generation settings.

The config keeps what the published sizes have in common (vocabulary, patch and merge sizes, interleaved mrope,
deepstack inside the ViT's depth, grouped key/value heads) and makes every dimension a different number, so that a
tensor taken for another, or read transposed, cannot fit. One of the decoder layers is dense. What "not degenerate"
means in numbers stands in tests/unit/test_tiny_checkpoint.py.
"""

import argparse
import json
import math
import re
import shutil
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # from a checkout, installed or not

from conversion.layout import stamp_metadata
from scripts.qwen_tokenizer import save_qwen_tokenizer

LAYOUTS = ("hub", "fused")
MAX_SHARD_BYTES = 2 * 2**20
# The processors work on squares of patch_size * merge_size = 32 pixels a side; one is one visual token.
TOKEN_PIXELS = 32 * 32

TINY_TEXT_CONFIG: dict[str, Any] = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "head_dim": 24,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 144,
    "max_position_embeddings": 262144,
    "mlp_only_layers": [3],
    "model_type": "qwen3_vl_moe_text",
    "moe_intermediate_size": 40,
    "norm_topk_prob": True,
    "num_attention_heads": 8,
    "num_experts": 16,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 5,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {"mrope_interleaved": True, "mrope_section": [6, 3, 3], "rope_type": "default"},
    "rope_theta": 5000000,
    "use_cache": True,
    "vocab_size": 151936,
}
TINY_VISION_CONFIG: dict[str, Any] = {
    "deepstack_visual_indexes": [0, 1, 2],
    "depth": 4,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_size": 128,
    "in_channels": 3,
    "initializer_range": 0.02,
    "intermediate_size": 176,
    "model_type": "qwen3_vl_moe",
    "num_heads": 4,
    "num_position_embeddings": 2304,
    "out_hidden_size": 64,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
TINY_CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3VLMoeForConditionalGeneration"],
    "image_token_id": 151655,
    "model_type": "qwen3_vl_moe",
    "text_config": TINY_TEXT_CONFIG,
    "tie_word_embeddings": False,
    "transformers_version": "4.57.1",
    "video_token_id": 151656,
    "vision_config": TINY_VISION_CONFIG,
    "vision_end_token_id": 151653,
    "vision_start_token_id": 151652,
}
GENERATION_CONFIG: dict[str, Any] = {
    "bos_token_id": 151643,
    "do_sample": True,
    "eos_token_id": [151645, 151643],
    "pad_token_id": 151643,
    "repetition_penalty": 1.0,
    "temperature": 0.7,
    "top_k": 20,
    "top_p": 0.8,
}

# First match wins: (name, mean, standard deviation, whether that is divided by the square root of the fan-in).
INITIALIZERS: tuple[tuple[str, float, float, bool], ...] = (
    (r"\.bias$", 0.0, 0.1, False),
    (r"self_attn\.[qk]_norm\.weight$", 1.2, 0.1, False),  # attention neither uniform nor one-hot
    (r"norm\d?\.weight$", 1.0, 0.1, False),
    (r"embed_tokens\.weight$", 0.0, 1.0, False),
    (r"pos_embed\.weight$", 0.0, 0.5, False),
    (r"lm_head\.weight$", 0.0, 2.5, True),
    (r"mlp\.gate\.weight$", 0.0, 1.5, True),  # the router
    (r"patch_embed\.proj\.weight$", 0.0, 1.5, True),
    # What a block adds to the residual stream: enough to matter, little enough that rounding is not amplified.
    (r"(o_proj|attn\.proj)\.weight$", 0.0, 0.5, True),
    (r"experts\.down_proj$", 0.0, 1.0, True),
    (r"mlp\.down_proj\.weight$", 0.0, 0.7, True),
    (r"mlp\.linear_fc2\.weight$", 0.0, 0.7, True),
    (r"deepstack_merger_list\.\d+\.linear_fc2\.weight$", 0.0, 0.5, True),
    (r"\.merger\.linear_fc2\.weight$", 0.0, 1.4, True),
    (r"", 0.0, 1.0, True),
)


def tiny_config(dtype: torch.dtype, overrides: dict[str, Any]) -> dict[str, Any]:
    """`config.json` as a dict: the tiny settings with `overrides` laid over them, one level into the sub-configs.

    Raises:
        ValueError: a key that the tiny config does not have.
    """
    config = json.loads(json.dumps(TINY_CONFIG))
    for key, value in overrides.items():
        if key not in config:
            raise ValueError(f"config has no field {key!r}; it has {sorted(config)}")
        if not isinstance(value, dict):
            config[key] = value
            continue
        unknown = sorted(value.keys() - config[key].keys())
        if unknown:
            raise ValueError(f"{key} has no fields {unknown}; it has {sorted(config[key])}")
        config[key].update(value)
    config["dtype"] = config["text_config"]["dtype"] = str(dtype).removeprefix("torch.")
    return config


def parameter_shapes(config: dict[str, Any]) -> dict[str, torch.Size]:
    """Name -> shape of every parameter, in upstream's order and in its in-memory (`fused`) layout."""
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

    with torch.device("meta"):
        model = Qwen3VLMoeForConditionalGeneration(Qwen3VLMoeConfig(**json.loads(json.dumps(config))))
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def random_parameter(name: str, shape: torch.Size, seed: int) -> torch.Tensor:
    """fp32 values that depend on `seed` and the name alone, not on which other parameters exist."""
    mean, std, by_fan_in = next(rule[1:] for rule in INITIALIZERS if re.search(rule[0], name))
    if by_fan_in:
        fan_in = shape[-1] if ".experts." in name else shape[1:].numel()
        std /= math.sqrt(fan_in)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed)
    return torch.randn(shape, generator=generator).mul_(std).add_(mean)


def iter_parameters(
    config: dict[str, Any], layout: str, dtype: torch.dtype, seed: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) as they stand on disk. `hub` holds the expert tensors transposed: (E,H,2I) and (E,I,H)."""
    for name, shape in parameter_shapes(config).items():
        tensor = random_parameter(name, shape, seed).to(dtype)
        if layout == "hub" and ".experts." in name:
            tensor = tensor.transpose(1, 2)
        yield name, tensor.contiguous()


def write_shards(out: Path, parameters: Iterator[tuple[str, torch.Tensor]], metadata: dict[str, str]) -> None:
    """`model-0000i-of-0000n.safetensors` of at most MAX_SHARD_BYTES where tensors allow; the index is written last."""
    shards: list[dict[str, torch.Tensor]] = [{}]
    filled = 0
    for name, tensor in parameters:
        if shards[-1] and filled + tensor.nbytes > MAX_SHARD_BYTES:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += tensor.nbytes
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, out / file, metadata=metadata)
        weight_map.update(dict.fromkeys(shard, file))
    total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
    write_json(out / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_processors(out: Path, config: dict[str, Any]) -> None:
    """Tokenizer, chat template and both pixel processors with Qwen3-VL's settings.

    Published are sizes of 65,536 to 16,777,216 pixels for an image and 4,096 to 25,165,824 for a clip. Here a photo
    becomes at most 100 visual tokens and a clip at most 96, so that a forward takes a moment on one core.
    """
    vision = config["vision_config"]
    shared = {
        "patch_size": vision["patch_size"],
        "temporal_patch_size": vision["temporal_patch_size"],
        "merge_size": vision["spatial_merge_size"],
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "Qwen3VLProcessor",
    }
    image = {
        "size": {"longest_edge": 100 * TOKEN_PIXELS, "shortest_edge": 4 * TOKEN_PIXELS},
        **shared,
        "image_processor_type": "Qwen2VLImageProcessorFast",
    }
    video = {
        "size": {"longest_edge": 96 * TOKEN_PIXELS * vision["temporal_patch_size"], "shortest_edge": 4 * TOKEN_PIXELS},
        **shared,
        "cap_pixels_per_frame": False,  # what an absent key means today, said aloud because that is to change
        "video_processor_type": "Qwen3VLVideoProcessor",
    }
    write_json(out / "preprocessor_config.json", image)
    write_json(out / "video_preprocessor_config.json", video)
    save_qwen_tokenizer(out, max_length=config["text_config"]["max_position_embeddings"])
    template = Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8")
    (out / "chat_template.jinja").write_text(template, encoding="utf-8")


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def make_tiny_checkpoint(
    out: str | Path,
    layout: str = "hub",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **config_overrides: Any,
) -> Path:
    """Writes the checkpoint into the new or empty folder `out`, whole or not at all, and returns that path.

    The same seed gives the same model in either layout: `hub` (expert tensors (E,H,2I) and (E,I,H), no stamp, as
    published) or `fused` ((E,2I,H) and (E,H,I), stamped). `config_overrides` are fields of `config.json`; dicts for
    `text_config` and `vision_config` change single fields: `make_tiny_checkpoint(out, text_config={"num_experts": 8})`.

    Raises:
        ValueError: an unknown layout or config field, or a folder that holds files already.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {LAYOUTS}, got {layout!r}")
    out = Path(out)
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty ({len(list(out.iterdir()))} entries): name another folder or remove it")
    config = tiny_config(dtype, config_overrides)
    # The published files carry no stamp, so neither does `hub` here: a reader must tell it by shape, as with those.
    metadata = {"format": "pt"} if layout == "hub" else stamp_metadata(layout)
    partial = out.resolve().with_name(out.resolve().name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        write_processors(partial, config)
        write_json(partial / "generation_config.json", GENERATION_CONFIG)
        write_shards(partial, iter_parameters(config, layout, dtype, seed), metadata)
        write_json(partial / "config.json", config)
        partial.replace(out)  # an empty folder gives way
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="new or empty folder")
    parser.add_argument("--layout", choices=LAYOUTS, default="hub")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        make_tiny_checkpoint(args.out, args.layout, getattr(torch, args.dtype), args.seed)
    except (OSError, SafetensorError, ValueError) as error:
        parser.error(str(error))
    files = sorted(args.out.iterdir())
    print(
        f"{args.out}: {len(files)} files, {sum(file.stat().st_size for file in files) / 2**20:.0f} MiB, {args.layout}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
