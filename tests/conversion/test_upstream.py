"""The converter against transformers itself: a way there and back hides a mistake made the same both ways."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

from conversion import hf_to_veomni, veomni_to_hf
from conversion.inventory import expected_tensors, model_dims, read_config
from modeling.qwen3_vl_moe import Qwen3VLMoeForCausalLM
from tests.conversion.synthetic import read_logical, toy_config

GATE_UP, DOWN = ".mlp.experts.gate_up_proj", ".mlp.experts.down_proj"


def upstream_model(**text: Any) -> Qwen3VLMoeForConditionalGeneration:
    torch.manual_seed(0)
    model = Qwen3VLMoeForConditionalGeneration(Qwen3VLMoeConfig.from_dict(toy_config(**text)))
    for name, parameter in model.named_parameters():  # what the experts do must show in the logits
        torch.nn.init.normal_(parameter, std=1.0 if name.endswith((GATE_UP, DOWN)) else 0.2)
    return model.eval()


def inputs() -> dict[str, torch.Tensor]:
    """Text around an image of 4 x 4 patches, 2 x 2 tokens after the merge."""
    config = toy_config()
    ids = [
        5,
        config["vision_start_token_id"],
        *[config["image_token_id"]] * 4,
        config["vision_end_token_id"],
        17,
        250,
        3,
    ]
    generator = torch.Generator().manual_seed(1)
    patch = config["vision_config"]["patch_size"]
    return {
        "input_ids": torch.tensor([ids]),
        "mm_token_type_ids": torch.tensor([[int(i == config["image_token_id"]) for i in ids]]),
        "pixel_values": torch.randn(16, 3 * 2 * patch * patch, generator=generator),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
    }


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs()).logits


def write_published(model: torch.nn.Module, folder: Path) -> Path:
    """The checkpoint as it is published, written without the converter: each expert's matrices transposed."""
    folder.mkdir()
    tensors = {}
    for name, value in model.state_dict().items():
        tensors[name] = value.transpose(1, 2).contiguous() if name.endswith((GATE_UP, DOWN)) else value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model.config.save_pretrained(folder)
    return folder


def convert(source: Path, output: Path, target: str, *options: str) -> Path:
    command = veomni_to_hf if target in ("hub", "per-expert") else hf_to_veomni
    assert command.main([str(source), str(output), "--target", target, "--quiet", *options]) == 0
    return output


@pytest.mark.parametrize(
    "text", [{}, {"attention_bias": True, "mlp_only_layers": []}, {"decoder_sparse_step": 2}], ids=str
)
def test_inventory_is_upstreams(tmp_path, text):
    model = upstream_model(**text)
    model.config.save_pretrained(tmp_path)
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert expected_tensors(model_dims(read_config(tmp_path))) == expected


def test_what_upstream_saves_is_read(tmp_path):
    """Whichever layout this version of transformers writes, unstamped."""
    model = upstream_model()
    model.save_pretrained(tmp_path / "saved")
    fused = convert(tmp_path / "saved", tmp_path / "fused", "fused")
    state = model.state_dict()
    for name, value in read_logical(fused).items():
        torch.testing.assert_close(value, state[name], rtol=0, atol=0)


def test_hub_output_gives_upstream_its_own_logits(tmp_path):
    """Through every other layout and back; upstream loads it with its own transpose."""
    model = upstream_model()
    expected = logits(model)
    source = write_published(model, tmp_path / "published")
    for target, options in (("fused", []), ("per-expert", []), ("ep-sharded", ["--ep-size", "4"])):
        middle = convert(source, tmp_path / target, target, *options)
        exported = convert(middle, tmp_path / f"hub-from-{target}", "hub")
        again = Qwen3VLMoeForConditionalGeneration.from_pretrained(exported).eval()
        torch.testing.assert_close(logits(again), expected, rtol=0, atol=0)


def test_converted_model_is_upstreams_model(tmp_path):
    """Asymmetric: from the published layout, which upstream reads, to fused, which this project's model reads."""
    source = write_published(upstream_model(), tmp_path / "published")
    expected = logits(Qwen3VLMoeForConditionalGeneration.from_pretrained(source).eval())
    ours = Qwen3VLMoeForCausalLM.from_pretrained(convert(source, tmp_path / "fused", "fused")).eval()
    error = (logits(ours) - expected).norm() / expected.norm()
    assert error < 2e-6  # other kernels, the same sums in fp32; a swapped half or a lost transpose is above 0.1


def test_a_mistake_would_be_seen(tmp_path):
    """The same comparison on weights with gate and up swapped, as a converter wrong in both directions would have."""
    model = upstream_model()
    source = write_published(model, tmp_path / "published")
    expected = logits(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(GATE_UP):
                parameter.copy_(torch.cat(parameter.chunk(2, dim=1)[::-1], dim=1))
    (tmp_path / "swapped").mkdir()
    swapped = write_published(model, tmp_path / "swapped" / "published")
    ours = Qwen3VLMoeForCausalLM.from_pretrained(convert(swapped, tmp_path / "fused", "fused")).eval()
    assert (logits(ours) - expected).norm() / expected.norm() > 0.1
    assert source.exists()


def test_cast_output_loads_with_its_dtype(tmp_path):
    source = write_published(upstream_model(), tmp_path / "published")
    output = convert(source, tmp_path / "hub", "hub", "--dtype", "bfloat16")
    model = Qwen3VLMoeForConditionalGeneration.from_pretrained(output, dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert json.loads((output / "config.json").read_text())["dtype"] == "bfloat16"
