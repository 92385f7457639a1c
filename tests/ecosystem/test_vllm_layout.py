"""What vLLM takes out of a checkpoint folder, asked of the folders that this project writes; vLLM itself is not needed.

vLLM's loader of Qwen3-VL-MoE (read at 0.11.2 and 0.33.0), in our words:

- files: those that model.safetensors.index.json names; config.json names the class;
- names begin with model.visual., model.language_model. or lm_head.; one that fits no parameter is an error;
- q_proj, k_proj and v_proj become the rows of one matrix, in this order; a dense layer's gate_proj and up_proj too;
- experts.gate_up_proj is (E, H, 2I) in the file; transposed, its first I rows are the gate, its last I rows up;
- experts.down_proj is (E, I, H) in the file, and transposed;
- everything else keeps its shape.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

from conversion.hf_to_veomni import main as hf_to_veomni
from conversion.veomni_to_hf import main as veomni_to_hf
from modeling.distributed.checkpoint import export_checkpoint
from modeling.qwen3_vl_moe import Qwen3VLMoeForCausalLM

PREFIXES = {
    "model.visual.": "visual.",
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
}
# Suffix in the file -> the parameter it is a part of, and which.
STACKED = {
    "self_attn.q_proj.weight": ("self_attn.qkv_proj.weight", 0),
    "self_attn.k_proj.weight": ("self_attn.qkv_proj.weight", 1),
    "self_attn.v_proj.weight": ("self_attn.qkv_proj.weight", 2),
    "mlp.gate_proj.weight": ("mlp.gate_up_proj.weight", 0),
    "mlp.up_proj.weight": ("mlp.gate_up_proj.weight", 1),
}
Parameters = dict[str, torch.Tensor]


def linear(name: str, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def norm(name: str, size: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (size,), f"{name}.bias": (size,)}


def tower_shapes(vision: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, inner, patch = vision["hidden_size"], vision["intermediate_size"], vision["patch_size"]
    merged = hidden * vision["spatial_merge_size"] ** 2
    kernel = (vision["in_channels"], vision["temporal_patch_size"], patch, patch)
    shapes: dict[str, tuple[int, ...]] = {
        "visual.patch_embed.proj.weight": (hidden, *kernel),
        "visual.patch_embed.proj.bias": (hidden,),
        "visual.pos_embed.weight": (vision["num_position_embeddings"], hidden),
    }
    for i in range(vision["depth"]):
        block = f"visual.blocks.{i}"
        shapes |= norm(f"{block}.norm1", hidden) | norm(f"{block}.norm2", hidden)
        shapes |= linear(f"{block}.attn.qkv", 3 * hidden, hidden) | linear(f"{block}.attn.proj", hidden, hidden)
        shapes |= linear(f"{block}.mlp.linear_fc1", inner, hidden) | linear(f"{block}.mlp.linear_fc2", hidden, inner)
    deepstack = [f"visual.deepstack_merger_list.{i}" for i in range(len(vision["deepstack_visual_indexes"]))]
    for merger in ("visual.merger", *deepstack):
        shapes |= norm(f"{merger}.norm", hidden if merger == "visual.merger" else merged)
        shapes |= linear(f"{merger}.linear_fc1", merged, merged)
        shapes |= linear(f"{merger}.linear_fc2", vision["out_hidden_size"], merged)
    return shapes


def engine_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The parameters that vLLM's model has, on one device."""
    text = config["text_config"]
    hidden, size = text["hidden_size"], text["head_dim"]
    heads, kv = text["num_attention_heads"], text["num_key_value_heads"]
    experts, inner = text.get("num_experts") or text["num_local_experts"], text["moe_intermediate_size"]
    shapes = tower_shapes(config["vision_config"])
    shapes["language_model.model.embed_tokens.weight"] = (text["vocab_size"], hidden)
    shapes["language_model.model.norm.weight"] = (hidden,)
    shapes["language_model.lm_head.weight"] = (text["vocab_size"], hidden)
    for i in range(text["num_hidden_layers"]):
        layer = f"language_model.model.layers.{i}"
        shapes |= {f"{layer}.{name}.weight": (hidden,) for name in ("input_layernorm", "post_attention_layernorm")}
        shapes |= {f"{layer}.self_attn.{name}.weight": (size,) for name in ("q_norm", "k_norm")}
        shapes[f"{layer}.self_attn.qkv_proj.weight"] = ((heads + 2 * kv) * size, hidden)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (hidden, heads * size)
        if i in text["mlp_only_layers"]:
            shapes[f"{layer}.mlp.gate_up_proj.weight"] = (2 * text["intermediate_size"], hidden)
            shapes[f"{layer}.mlp.down_proj.weight"] = (hidden, text["intermediate_size"])
        else:
            shapes[f"{layer}.mlp.gate.weight"] = (experts, hidden)
            shapes[f"{layer}.mlp.experts.w13_weight"] = (experts, 2 * inner, hidden)
            shapes[f"{layer}.mlp.experts.w2_weight"] = (experts, hidden, inner)
    return shapes


def place(name: str) -> tuple[str, int]:
    """A file's name -> the engine's parameter, and which of its stacked parts."""
    prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), None)
    if prefix is None:
        raise ValueError(f"{name} belongs to no part of the model")
    name = PREFIXES[prefix] + name.removeprefix(prefix)
    for suffix, (stacked, part) in STACKED.items():
        if name.endswith(suffix):
            return name.removesuffix(suffix) + stacked, part
    name = name.replace("experts.gate_up_proj", "experts.w13_weight").replace("experts.down_proj", "experts.w2_weight")
    return name, 0


def read_as_vllm(folder: Path) -> Parameters:
    """The engine's parameters from a folder.

    Raises:
        ValueError: a name that fits nothing, a shape that does not fit, a parameter that gets nothing.
    """
    config = json.loads((folder / "config.json").read_text())
    if config["architectures"] != ["Qwen3VLMoeForConditionalGeneration"]:
        raise ValueError(f"config.json names {config['architectures']}")
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    parts: dict[str, dict[int, torch.Tensor]] = {}
    for file in sorted(set(index.values())):
        with safe_open(folder / file, framework="pt") as tensors:
            for name in tensors.keys():
                value = tensors.get_tensor(name)
                target, part = place(name)
                transposed = target.endswith(("w13_weight", "w2_weight"))
                parts.setdefault(target, {})[part] = value.transpose(-1, -2) if transposed else value
    found = {name: torch.cat([stack[i] for i in sorted(stack)]) for name, stack in parts.items()}
    wanted = engine_shapes(config)
    if found.keys() != wanted.keys():
        raise ValueError(f"these differ: {sorted(found.keys() ^ wanted.keys())}")
    wrong = [name for name, value in found.items() if tuple(value.shape) != wanted[name]]
    if wrong:
        raise ValueError(f"{wrong[0]} is {tuple(found[wrong[0]].shape)}, the engine has {wanted[wrong[0]]}")
    return found


def engine_experts(parameters: Parameters, layer: int, top_k: int, hidden_states: torch.Tensor) -> torch.Tensor:
    """The MoE block as the engine computes it: (T, H) -> (T, H)."""
    prefix = f"language_model.model.layers.{layer}.mlp"
    w13, w2 = parameters[f"{prefix}.experts.w13_weight"], parameters[f"{prefix}.experts.w2_weight"]
    probabilities = (hidden_states @ parameters[f"{prefix}.gate.weight"].T).softmax(-1)
    weights, chosen = probabilities.topk(top_k)
    weights = weights / weights.sum(-1, keepdim=True)
    rows = []
    for state, experts, shares in zip(hidden_states, chosen, weights, strict=True):
        row = torch.zeros_like(state)
        for expert, share in zip(experts.tolist(), shares, strict=True):
            gate, up = (w13[expert] @ state).chunk(2)
            row += share * (w2[expert] @ (F.silu(gate) * up))
        rows.append(row)
    return torch.stack(rows)


@pytest.fixture(scope="module")
def model(tiny_hub: Path) -> Any:
    return Qwen3VLMoeForCausalLM.from_pretrained(tiny_hub, dtype=torch.float32).eval()


def by_the_trainer(model: Any, source: Path, out: Path) -> None:
    export_checkpoint(model, out, layout="hub", companions=source)


def by_save_pretrained(model: Any, source: Path, out: Path) -> None:
    model.save_pretrained(out, layout="hub", max_shard_size="20MB")


def by_the_converter(model: Any, source: Path, out: Path) -> None:
    fused = out.with_name("fused")
    assert hf_to_veomni([str(source), str(fused), "--quiet"]) == 0
    assert veomni_to_hf([str(fused), str(out), "--quiet"]) == 0


WRITERS = (by_the_trainer, by_save_pretrained, by_the_converter)


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
@torch.no_grad()
def test_every_tensor_has_its_place(model: Any, tiny_hub: Path, tmp_path: Path, write: Callable[..., None]):
    """Names and shapes by `read_as_vllm`; the experts, read so, compute what this model computes."""
    write(model, tiny_hub, tmp_path / "export")
    parameters = read_as_vllm(tmp_path / "export")
    text = model.config.text_config
    hidden_states = torch.randn(1, 11, text.hidden_size, generator=torch.Generator().manual_seed(3))
    for i, layer in enumerate(model.model.language_model.layers):
        if i in text.mlp_only_layers:
            continue
        output = layer.mlp(hidden_states)
        output = output[0] if isinstance(output, tuple) else output
        got = engine_experts(parameters, i, text.num_experts_per_tok, hidden_states[0])
        torch.testing.assert_close(got, output.reshape(got.shape), rtol=1e-4, atol=1e-5)
    attention = model.model.language_model.layers[1].self_attn
    expected = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
    assert torch.equal(parameters["language_model.model.layers.1.self_attn.qkv_proj.weight"], expected)
    assert torch.equal(parameters["visual.blocks.2.attn.qkv.weight"], model.model.visual.blocks[2].attn.qkv.weight)


def test_other_layouts_do_not_fit(model: Any, tmp_path: Path):
    """The check can fail: weights in the order of memory have the right names and the wrong shapes."""
    export_checkpoint(model, tmp_path / "fused", layout="fused")
    with pytest.raises(ValueError, match=r"w\w+_weight is \(16, .*, the engine has"):
        read_as_vllm(tmp_path / "fused")
    with pytest.raises(ValueError, match="belongs to no part"):
        place("language_model.layers.0.mlp.gate.weight")
