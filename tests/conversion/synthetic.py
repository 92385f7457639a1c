"""Checkpoints made for the converter's tests: right names and shapes, small, in any layout, written by safetensors.

Built from `conversion.inventory`'s shapes and the reference `pack` of `conversion.layout`; that those are the real
model's is proven against transformers in test_upstream.py.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from conversion.inventory import expected_tensors, model_dims
from conversion.layout import logical_name, pack, stamp_metadata

Tensors = dict[str, torch.Tensor]


def toy_config(**text: Any) -> dict[str, Any]:
    """A config.json whose dims are all distinct; layer 1 is dense."""
    text_config = {
        "model_type": "qwen3_vl_moe_text", "hidden_size": 48, "intermediate_size": 44, "moe_intermediate_size": 20,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_experts": 8,
        "num_experts_per_tok": 3, "vocab_size": 300, "mlp_only_layers": [1], "decoder_sparse_step": 1,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0,
                            "mrope_interleaved": True},
    }  # fmt: skip
    vision_config = {
        "model_type": "qwen3_vl_moe_vision", "depth": 4, "hidden_size": 32, "intermediate_size": 56, "num_heads": 2,
        "out_hidden_size": text.get("hidden_size", 48), "deepstack_visual_indexes": [1, 2], "in_channels": 3,
        "num_position_embeddings": 16, "patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2,
    }  # fmt: skip
    return {
        "architectures": ["Qwen3VLMoeForConditionalGeneration"], "model_type": "qwen3_vl_moe",
        "tie_word_embeddings": text.get("tie_word_embeddings", False), "image_token_id": 290, "video_token_id": 291,
        "vision_start_token_id": 292, "vision_end_token_id": 293,
        "text_config": text_config | text, "vision_config": vision_config,
    }  # fmt: skip


def random_tensors(config: dict[str, Any], dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensors:
    """Every logical tensor of the model, experts in fused form."""
    generator = torch.Generator().manual_seed(seed)
    shapes = expected_tensors(model_dims(config))
    if config["tie_word_embeddings"]:
        del shapes["lm_head.weight"]
    return {name: (torch.randn(shape, generator=generator) * 0.2).to(dtype) for name, shape in shapes.items()}


def store(layout: str, logical: Tensors, ep_size: int = 1) -> dict[int | None, Tensors]:
    """Stored tensors by ep_rank (None: outside expert file sets)."""
    stored: dict[int | None, Tensors] = {None: {}}
    for name, tensor in logical.items():
        if logical_name(name) is None:
            stored[None][name] = tensor
            continue
        for (part, rank), value in pack(layout, name, tensor, ep_size).items():
            stored.setdefault(rank, {})[part] = value.contiguous()
    return stored


def write_checkpoint(
    folder: Path,
    layout: str,
    config: dict[str, Any] | None = None,
    logical: Tensors | None = None,
    ep_size: int = 1,
    stamped: bool = False,
    shards: int = 2,
    order: Callable[[list[str]], list[str]] = list,
) -> Tensors:
    """Write a checkpoint folder with companions and return its logical tensors.

    `order` arranges the stored names before they are dealt out to `shards` files.
    """
    config = config or toy_config()
    logical = random_tensors(config) if logical is None else logical
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 4096}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    weight_map: dict[str, str] = {}
    for rank, tensors in store(layout, logical, ep_size).items():
        names = order(list(tensors))
        stem = "model" if rank is None else f"experts-{rank}"
        for shard in range(shards):
            file = f"{stem}-{shard + 1:05d}-of-{shards:05d}.safetensors"
            chosen = {
                name: tensors[name] for name in names[shard * len(names) // shards : (shard + 1) * len(names) // shards]
            }
            metadata = stamp_metadata(layout, ep_size, rank) if stamped or rank is not None else {"format": "pt"}
            if layout == "ep-sharded":
                metadata = stamp_metadata(layout, ep_size, rank)
            save_file(chosen, folder / file, metadata=metadata)
            weight_map |= dict.fromkeys(chosen, file)
    if layout != "ep-sharded":
        total = sum(tensor.nbytes for tensor in logical.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return logical


def read_logical(folder: Path) -> Tensors:
    """Every logical tensor of a folder of any stamped layout, by the reference `unpack`, read with safetensors."""
    from safetensors import safe_open

    from conversion.checkpoint import open_checkpoint
    from conversion.layout import unpack

    checkpoint = open_checkpoint(folder)
    stored = {}
    for (name, rank), location in checkpoint.stored.items():
        with safe_open(location.path, "pt") as file:
            stored[name, rank] = file.get_tensor(name)
    logical: Tensors = {}
    for name, shape in checkpoint.logical.items():
        if logical_name(name) is None:
            logical[name] = stored[name, None]
            continue
        first = checkpoint.parts(name)[0]
        out = torch.empty(shape, dtype=stored[first.name, first.ep_rank].dtype)
        logical[name] = unpack(checkpoint.layout.layout, name, stored, out, checkpoint.layout.ep_size)
    return logical


def assert_same(actual: Tensors, expected: Tensors) -> None:
    """Same names, dtypes and bits."""
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=0, atol=0, equal_nan=True, msg=name)
