"""Wrong input is a ValueError that says what came, what was expected and what to do."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from modeling.qwen3_vl_moe import Qwen3VLMoeConfig, Qwen3VLMoeForCausalLM
from tests.features import InputsOf, feature_of, pack

Inputs = dict[str, Any]


def drop_image_token(inputs: Inputs) -> None:
    where = (inputs["input_ids"][0] == 151655).nonzero()[0]
    inputs["input_ids"][0, where] = 42
    inputs.pop("mm_token_type_ids", None)
    inputs["position_ids"] = torch.arange(inputs["input_ids"].shape[1])[None]


def odd_grid(inputs: Inputs) -> None:
    inputs["image_grid_thw"] = inputs["image_grid_thw"] + torch.tensor([[0, 1, 0]])


def fewer_pixels(inputs: Inputs) -> None:
    inputs["pixel_values"] = inputs["pixel_values"][:-4]


def replace(**values: Any) -> Callable[[Inputs], None]:
    def change(inputs: Inputs) -> None:
        inputs |= values

    change.__name__ = "_".join(values)
    return change


def wide_mask(inputs: Inputs) -> None:
    inputs["attention_mask"] = torch.ones(1, inputs["input_ids"].shape[1] + 3)


def id_too_large(inputs: Inputs) -> None:
    inputs["input_ids"][0, 0] = 200_000


def placeholder_id(inputs: Inputs) -> None:
    inputs["input_ids"][0, 0] = -200


CASES: list[tuple[Callable[[Inputs], None], str]] = [
    (drop_image_token, r"holds 14 image placeholder tokens.* make 15 image features"),
    (replace(pixel_values=None), r"holds 15 image placeholder tokens but no image features"),
    (replace(image_grid_thw=None), r"pixel values of images came without image_grid_thw"),
    (odd_grid, r"image_grid_thw\[0\] is 1 x 7 x 10 .* divisible by spatial_merge_size 2"),
    (fewer_pixels, r"pixel values hold 56 patches, but the grids describe 60"),
    (wide_mask, r"attention_mask has shape .* expected \(1, \d+\)"),
    (replace(position_ids=torch.zeros(3, 1, 5, dtype=torch.long)), r"position_ids have shape \(3, 1, 5\)"),
    (replace(position_ids=torch.zeros(7, dtype=torch.long)), r"position_ids have shape \(7,\)"),
    (id_too_large, r"run from \d+ to 200000, but the vocabulary has ids 0 to 151935"),
    (placeholder_id, r"run from -200 to"),
    (replace(input_ids=None), "exactly one of input_ids and inputs_embeds"),
    (replace(labels=torch.zeros(1, 3, dtype=torch.long)), r"labels have shape \(1, 3\), expected"),
]


@pytest.mark.parametrize(("change", "message"), CASES, ids=[change.__name__ for change, _ in CASES])
def test_forward(ours: torch.nn.Module, inputs_of: InputsOf, change: Callable, message: str) -> None:
    inputs = {key: value.clone() for key, value in inputs_of("image").items()}
    change(inputs)
    with pytest.raises(ValueError, match=message):
        ours(**inputs)


def test_packed_batches(ours: torch.nn.Module, inputs_of: InputsOf) -> None:
    batch = pack([feature_of(inputs_of("text"), ours), feature_of(inputs_of("image"), ours)], ours)
    two_rows = {"input_ids": batch["input_ids"].repeat(2, 1), "cu_seq_lens_q": batch["cu_seq_lens_q"]}
    with pytest.raises(ValueError, match="packed into one row; got a batch of 2"):
        ours(**two_rows, max_length_q=batch["max_length_q"])
    with pytest.raises(ValueError, match="max_length_q be a Python int"):
        ours(**batch | {"max_length_q": torch.tensor(3)})
    length = batch["input_ids"].shape[1]
    for bounds in ([0, 4, length - 1], [1, 4, length], [4, length], [0, 4, length + 1], [0, 9, 4, length], [length]):
        with pytest.raises(ValueError, match=rf"must rise from 0 to the row's {length} tokens"):
            ours(**batch | {"cu_seq_lens_q": torch.tensor(bounds).int(), "max_length_q": length})
    with pytest.raises(ValueError, match=rf"in steps of at most max_length_q={batch['max_length_q'] - 1}"):
        ours(**batch | {"max_length_q": batch["max_length_q"] - 1})
    for cache in ({"use_cache": True}, {"past_key_values": DynamicCache()}):
        with pytest.raises(ValueError, match="a batch of 1 and a cache of keys and values"):
            ours(**batch, **cache)


def test_a_row_without_its_batch(ours: torch.nn.Module) -> None:
    with pytest.raises(ValueError, match=r"input_ids must have shape \(B, S\), got \(7,\)"):
        ours(input_ids=torch.arange(7))
    with pytest.raises(ValueError, match=r"inputs_embeds must have shape \(B, S, H\), got \(7, 5\)"):
        ours(inputs_embeds=torch.zeros(7, 5))


def test_unknown_moe_implementation(ours: torch.nn.Module) -> None:
    with pytest.raises(ValueError, match="moe_implementation='triton' is unknown; expected one of 'eager', 'fused'"):
        Qwen3VLMoeConfig(text_config={"moe_implementation": "triton"})
    config = Qwen3VLMoeConfig.from_dict(ours.config.to_dict())
    config.text_config.moe_implementation = "triton"
    with torch.device("meta"), pytest.raises(ValueError, match="is unknown"):
        Qwen3VLMoeForCausalLM(config)


def test_what_the_architecture_cannot_do(ours: torch.nn.Module) -> None:
    for section, change, message in (
        ("text_config", {"hidden_act": "gelu"}, "hidden_act='gelu' must be 'silu'"),
        ("text_config", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type"),
    ):
        settings = ours.config.to_dict()
        settings[section] |= change
        with torch.device("meta"), pytest.raises(ValueError, match=message):
            Qwen3VLMoeForCausalLM(Qwen3VLMoeConfig.from_dict(settings))
