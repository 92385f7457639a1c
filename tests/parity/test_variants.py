"""Architectures the published checkpoints do not use but the configuration allows."""

from typing import Any

import pytest
import torch
from transformers import Qwen3VLMoeConfig as UpstreamConfig
from transformers import Qwen3VLMoeForConditionalGeneration as Upstream

from modeling.qwen3_vl_moe import Qwen3VLMoeConfig, Qwen3VLMoeForCausalLM
from tests.parity.harness import GRADIENT_BOUND, LOGITS_BOUND, gradients, relative_error

IMAGE, VIDEO = 90, 91


def settings(**changes: Any) -> dict[str, Any]:
    text = {"vocab_size": 96, "hidden_size": 48, "intermediate_size": 52, "num_hidden_layers": 4, "head_dim": 16,
            "num_attention_heads": 4, "num_key_value_heads": 2, "moe_intermediate_size": 20, "num_experts": 8,
            "num_experts_per_tok": 3, "rope_parameters": {"rope_type": "default", "rope_theta": 5e6,
            "mrope_section": [4, 2, 2], "mrope_interleaved": True}}  # fmt: skip
    vision = {"depth": 3, "hidden_size": 32, "intermediate_size": 44, "num_heads": 2, "out_hidden_size": 48,
              "num_position_embeddings": 25, "deepstack_visual_indexes": [0, 2], "patch_size": 4}  # fmt: skip
    text |= changes.get("text", {})
    vision |= changes.get("vision", {})
    return {"text_config": text, "vision_config": vision, "image_token_id": IMAGE, "video_token_id": VIDEO}


def inputs(merge: int) -> dict[str, torch.Tensor]:
    """An image of 4 x 6 patches and a video of two 4 x 4 frames among text."""
    generator = torch.Generator().manual_seed(0)
    image, frame = 24 // merge**2, 16 // merge**2
    parts = [3, -image, 2, -frame, 1, -frame, 4]
    ids, video = [], False
    for part in parts:
        if part > 0:
            ids.append(torch.randint(0, 80, (part,), generator=generator))
        else:
            ids.append(torch.full((-part,), VIDEO if video else IMAGE))
            video = True
    ids = torch.cat(ids)[None]
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == IMAGE) * 1 + (ids == VIDEO) * 2,
        "pixel_values": torch.randn(24, 96, generator=generator),
        "image_grid_thw": torch.tensor([[1, 4, 6]]),
        "pixel_values_videos": torch.randn(32, 96, generator=generator),
        "video_grid_thw": torch.tensor([[2, 4, 4]]),
    }


VARIANTS = {
    "merge size 1": {"vision": {"spatial_merge_size": 1}},
    "all layers dense": {"text": {"mlp_only_layers": [0, 1, 2, 3]}},
    "every second layer sparse": {"text": {"decoder_sparse_step": 2}},
    "one key head": {"text": {"num_key_value_heads": 1}},
    "attention bias": {"text": {"attention_bias": True}},
    "linear rope scaling": {
        "text": {
            "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
        }
    },
    "no deepstack": {"vision": {"deepstack_visual_indexes": []}},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_equals_upstream(name: str) -> None:
    given = settings(**VARIANTS[name])
    torch.manual_seed(0)
    upstream = Upstream(UpstreamConfig(**given))
    for parameter in upstream.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    ours = Qwen3VLMoeForCausalLM(Qwen3VLMoeConfig(**given))
    ours.load_state_dict(upstream.state_dict())
    batch = inputs(given["vision_config"].get("spatial_merge_size", 2))
    labels = batch["input_ids"].masked_fill(batch["mm_token_type_ids"] > 0, -100)
    with torch.no_grad():
        ours.eval(), upstream.eval()
        assert relative_error(ours(**batch).logits, upstream(**batch).logits) <= LOGITS_BOUND
    loss, found = gradients(ours, batch, labels)
    expected_loss, expected = gradients(upstream, batch, labels)
    assert abs(loss - expected_loss) <= LOGITS_BOUND * expected_loss
    for parameter, reference in expected.items():
        assert relative_error(found[parameter], reference) <= GRADIENT_BOUND, parameter
