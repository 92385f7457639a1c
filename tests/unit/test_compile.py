"""Blocks compile without a graph break, packed attention included, and give what they give uncompiled."""

from typing import Any

import pytest
import torch

from modeling.qwen3_vl_moe.configuration_qwen3_vl_moe import Qwen3VLMoeTextConfig, Qwen3VLMoeVisionConfig
from modeling.qwen3_vl_moe.modeling_qwen3_vl_moe import (
    Qwen3VLMoeTextDecoderLayer,
    Qwen3VLMoeTextRotaryEmbedding,
    Qwen3VLMoeVisionBlock,
)

CU_SEQLENS = torch.tensor([0, 5, 12], dtype=torch.int32)


def text_layer() -> tuple[torch.nn.Module, torch.Tensor, dict[str, Any]]:
    config = Qwen3VLMoeTextConfig(
        hidden_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=16, intermediate_size=40,
        moe_intermediate_size=20, num_experts=8, num_experts_per_tok=3,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]},
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    layer = Qwen3VLMoeTextDecoderLayer(config, 0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    hidden = torch.randn(1, 12, 48)
    tables = Qwen3VLMoeTextRotaryEmbedding(config)(hidden, torch.arange(12).expand(3, 1, -1))
    return layer, hidden, {"position_embeddings": tables, "cu_seqlens": CU_SEQLENS, "max_seqlen": 7}


def vision_block() -> tuple[torch.nn.Module, torch.Tensor, dict[str, Any]]:
    config = Qwen3VLMoeVisionConfig(hidden_size=32, num_heads=2, intermediate_size=44)
    config._attn_implementation = "sdpa"
    angles = torch.rand(12, 8).repeat(1, 2)
    given = {"position_embeddings": (angles.cos(), angles.sin()), "cu_seqlens": CU_SEQLENS, "max_seqlen": 7}
    return Qwen3VLMoeVisionBlock(config), torch.randn(12, 32), given


def outputs(layer: torch.nn.Module, hidden: torch.Tensor, given: dict[str, Any]) -> list[torch.Tensor]:
    hidden = hidden.detach().requires_grad_()
    out = layer(hidden, **given)
    out = out[0] if isinstance(out, tuple) else out
    parameters = list(layer.parameters())
    return [
        out,
        *torch.autograd.grad((out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum(), [hidden, *parameters]),
    ]


@pytest.mark.parametrize("make", [text_layer, vision_block], ids=["decoder layer", "vision block"])
def test_whole_graph(make: Any) -> None:
    """`fullgraph=True` raises at a break; the backend traces forward and backward and runs them as they are."""
    torch.manual_seed(0)
    layer, hidden, given = make()
    expected = outputs(layer, hidden, given)
    torch._dynamo.reset()
    layer.compile(fullgraph=True, backend="aot_eager")
    found = outputs(layer, hidden, given)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
