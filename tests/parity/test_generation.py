"""`generate`: token for token what upstream generates."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from modeling.qwen3_vl_moe.cache_name import CACHE
from tests.features import InputsOf
from tests.media import assistant, chat_inputs, load_photo, user
from tests.parity.harness import relative_error

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 64, "min_new_tokens": 64}


@pytest.mark.parametrize("case", ["text", "image", "video", "mixed", "two_images"])
def test_greedy(pair: tuple, inputs_of: InputsOf, case: str) -> None:
    ours, upstream = (model.generate(**inputs_of(case), **GREEDY) for model in pair)
    assert torch.equal(ours, upstream)


def test_greedy_batched_with_left_padding(pair: tuple, inputs_of: InputsOf) -> None:
    inputs = inputs_of("image", "text", "video", padding_side="left")
    ours, upstream = (model.generate(**inputs, **GREEDY) for model in pair)
    assert torch.equal(ours, upstream)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False, "num_beams": 3},
        {"do_sample": True, "num_return_sequences": 2, "temperature": 0.8, "top_k": 20},
        {"do_sample": False, "num_beams": 2, "num_return_sequences": 2},
    ],
    ids=["beams", "sampling", "beams-returned"],
)
def test_beams_and_sampling(pair: tuple, inputs_of: InputsOf, options: dict[str, Any]) -> None:
    """A sample's images are repeated with it, also where another sample has none."""
    inputs = inputs_of("two_images", "text", "mixed", padding_side="left")
    found = []
    for model in pair:
        torch.manual_seed(0)
        found.append(model.generate(**inputs, max_new_tokens=12, min_new_tokens=12, **options))
    assert torch.equal(*found)


def test_without_a_cache(ours: torch.nn.Module, inputs_of: InputsOf) -> None:
    options = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}
    cached, plain = (ours.generate(**inputs_of("image"), use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached, plain)


def test_generation_leaves_nothing_behind(ours: torch.nn.Module, inputs_of: InputsOf) -> None:
    """A forward after a generation is the forward before it: remembered rope_deltas are of the prefill's batch."""
    with torch.no_grad():
        before = ours(**inputs_of("text")).logits
        ours.generate(**inputs_of("image", "two_images", padding_side="left"), do_sample=False, max_new_tokens=3)
        assert torch.equal(ours(**inputs_of("text")).logits, before)


def second_turn(processor: Any) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The inputs of a first turn with an image, and of the whole conversation when a second image was asked about."""
    first = [user(load_photo("coffee", 96), "What stands on the table?")]
    whole = [*first, assistant("A cup."), user(load_photo("rocket", 128), "And what flies here?")]
    return dict(chat_inputs(processor, [first])), dict(chat_inputs(processor, [whole]))


def test_second_turn_with_a_new_image(pair: tuple, tiny_processor: Any) -> None:
    _, whole = second_turn(tiny_processor)
    ours, upstream = (model.generate(**whole, **GREEDY) for model in pair)
    assert torch.equal(ours, upstream)


def test_second_turn_continues_the_cache(pair: tuple, tiny_processor: Any) -> None:
    """With the first turn's cache, only the new image is encoded, and the reply is that of a fresh start."""
    ours, upstream = pair
    first, whole = second_turn(tiny_processor)
    length = first["input_ids"].shape[1]
    assert torch.equal(whole["input_ids"][:, :length], first["input_ids"])
    cache = DynamicCache(config=ours.config.text_config)
    with torch.no_grad():
        ours(**first, past_key_values=cache, use_cache=True)
    encoded: list[int] = []
    hook = ours.model.visual.register_forward_pre_hook(lambda module, args: encoded.append(args[0].shape[0]))
    try:
        continued = ours.generate(**whole, **{CACHE: cache}, **GREEDY)
    finally:
        hook.remove()
    assert encoded == [int(whole["image_grid_thw"][1].prod())]
    assert torch.equal(continued, upstream.generate(**whole, **GREEDY))


def test_decoding_positions_follow_the_images(ours: torch.nn.Module, inputs_of: InputsOf) -> None:
    """A step with a cache gives the logits of the whole sequence at once, without generate's help."""
    inputs = inputs_of("image")
    ids = inputs["input_ids"]
    cache = DynamicCache(config=ours.config.text_config)
    with torch.no_grad():
        whole = ours(**inputs).logits
        prefix = {**inputs, "input_ids": ids[:, :-2], "attention_mask": inputs["attention_mask"][:, :-2]}
        prefix.pop("mm_token_type_ids", None)
        filled = ours(**prefix, past_key_values=cache, use_cache=True)
        step = ours(input_ids=ids[:, -2:], attention_mask=inputs["attention_mask"], cache=cache).logits
    assert getattr(filled, CACHE) is cache
    with pytest.raises(ValueError, match="two names of one argument"):
        ours(**prefix, past_key_values=cache, cache=DynamicCache(config=ours.config.text_config))
    assert relative_error(step, whole[:, -2:]) <= 5e-6


def test_from_the_fused_layout(tiny_hub: Path, tiny_fused: Path, inputs_of: InputsOf) -> None:
    from modeling.qwen3_vl_moe import Qwen3VLMoeForCausalLM

    replies = [
        Qwen3VLMoeForCausalLM.from_pretrained(folder).generate(**inputs_of("image"), **GREEDY)
        for folder in (tiny_hub, tiny_fused)
    ]
    assert torch.equal(*replies)


def test_from_embeddings(pair: tuple, inputs_of: InputsOf) -> None:
    """Text alone, or with images where the token ids stand beside; without them images have no place."""
    options = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}
    text, image = inputs_of("text"), inputs_of("image")
    found: list[list[torch.Tensor]] = []
    for model in pair:
        embed = model.get_input_embeddings()
        alone = {"inputs_embeds": embed(text["input_ids"]), "attention_mask": text["attention_mask"]}
        both = {**image, "inputs_embeds": embed(image["input_ids"])}
        found.append([model.generate(**given, **options) for given in (alone, both)])
    assert all(map(torch.equal, *found))
    ours = pair[0]
    given = {key: value for key, value in image.items() if key not in ("input_ids", "mm_token_type_ids")}
    with pytest.raises(ValueError, match="pass input_ids beside them"):
        ours.generate(inputs_embeds=ours.get_input_embeddings()(image["input_ids"]), **given, **options)


def test_images_behind_a_cache_want_positions(ours: torch.nn.Module, inputs_of: InputsOf) -> None:
    """A forward by hand: without the whole conversation it cannot know where the new image stands."""
    with torch.no_grad():
        first = ours(**inputs_of("text"), use_cache=True)
        inputs = inputs_of("image")
        inputs.pop("attention_mask")
        with pytest.raises(ValueError, match=r"behind a cache of \d+ tokens need position_ids"):
            ours(**inputs, past_key_values=getattr(first, CACHE))
