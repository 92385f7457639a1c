"""accelerate places the model by a device map, parts of it on the disk, and the logits stay what they were."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights, load_checkpoint_and_dispatch

from modeling.qwen3_vl_moe import Qwen3VLMoeConfig, Qwen3VLMoeForCausalLM
from tests.media import case_inputs

LAYERS = "model.language_model.layers"
SPLIT = {
    "model.visual": "disk",
    "model.language_model.embed_tokens": "cpu",
    "model.language_model.rotary_emb": "cpu",
    **{f"{LAYERS}.{i}": "disk" if i % 2 else "cpu" for i in range(5)},
    "model.language_model.norm": "cpu",
    "lm_head": "disk",
}
MAPS: dict[str, dict[str, str]] = {"cpu": {"": "cpu"}, "split": SPLIT}


@pytest.fixture(scope="module")
def inputs(tiny_processor: Any) -> Any:
    return case_inputs(tiny_processor, "mixed")


@pytest.fixture(scope="module")
def expected(tiny_hub: Path, inputs: Any) -> torch.Tensor:
    model = Qwen3VLMoeForCausalLM.from_pretrained(tiny_hub, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("device_map", MAPS)
@pytest.mark.parametrize("layout", ["hub", "fused"])
def test_device_map(
    request: pytest.FixtureRequest, inputs: Any, expected: torch.Tensor, tmp_path: Path, layout: str, device_map: str
) -> None:
    folder = request.getfixturevalue(f"tiny_{layout}")
    model = Qwen3VLMoeForCausalLM.from_pretrained(
        folder, dtype=torch.float32, device_map=MAPS[device_map], offload_folder=tmp_path
    ).eval()
    if device_map == "split":
        assert model.model.language_model.layers[1].mlp.experts.down_proj.is_meta
        assert model.lm_head.weight.is_meta and model.model.visual.pos_embed.weight.is_meta
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, expected)
        model.generate(**inputs, max_new_tokens=2, do_sample=False, temperature=None, top_k=None, top_p=None)


def test_load_checkpoint_and_dispatch(tiny_fused: Path, inputs: Any, expected: torch.Tensor, tmp_path: Path) -> None:
    """accelerate's own loader, which knows no layouts, on the layout of the model in memory."""
    with init_empty_weights():
        model = Qwen3VLMoeForCausalLM(Qwen3VLMoeConfig.from_pretrained(tiny_fused))
    model = load_checkpoint_and_dispatch(model, str(tiny_fused), device_map=SPLIT, offload_folder=str(tmp_path))
    with torch.no_grad():
        assert torch.equal(model.eval()(**inputs).logits, expected)
