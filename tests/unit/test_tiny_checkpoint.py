"""scripts/make_tiny_checkpoint.py: everything but the weights is real, and the weights exercise the model.

"Not degenerate" in numbers: the hidden states keep an rms near 1, every expert gets tokens and none gets most, the
attention is neither uniform nor one-hot, the logits tell tokens apart.
"""

import errno
import json
import math
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiktoken
import tokenizers
import torch
from safetensors import safe_open

from conversion.layout import read_stamp
from scripts import make_tiny_checkpoint as script
from scripts.make_tiny_checkpoint import make_tiny_checkpoint
from scripts.qwen_tokenizer import PRETOKENIZE_PATTERN, find_qwen_tiktoken, load_ranks
from tests import media

TEXTS = (
    "Hello, world! It's 12345 o'clock, we'll see.",
    "你好，世界！日本語のテキスト 한국어 문장",
    "emoji 😀 👩‍👩‍👧 🏳️‍🌈 and accents: naïve café, Ünïcödé",
    "    def f(x):\n\treturn x ** 2\r\n\r\n   \n  # end",
    "العربية עברית हिन्दी ไทย",
)
# The ids Qwen3-VL is published with.
PUBLISHED_IDS = {
    "<|endoftext|>": 151643,
    "<|im_start|>": 151644,
    "<|im_end|>": 151645,
    "<|object_ref_start|>": 151646,
    "<|box_start|>": 151648,
    "<|quad_end|>": 151651,
    "<|vision_start|>": 151652,
    "<|vision_end|>": 151653,
    "<|vision_pad|>": 151654,
    "<|image_pad|>": 151655,
    "<|video_pad|>": 151656,
    "<tool_call>": 151657,
    "<|fim_prefix|>": 151659,
    "<tool_response>": 151665,
    "</think>": 151668,
}


def read_all(folder: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, str]]]:
    """Every tensor of every shard, and each shard's metadata."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    tensors, metadata = {}, []
    for name in sorted(set(index["weight_map"].values())):
        with safe_open(folder / name, framework="pt") as shard:
            metadata.append(shard.metadata())
            for key in shard.keys():
                assert index["weight_map"][key] == name
                tensors[key] = shard.get_tensor(key)
    assert tensors.keys() == index["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    return tensors, metadata


@pytest.fixture(scope="module")
def upstream(tiny_hub: Path) -> Any:
    from transformers import Qwen3VLMoeForConditionalGeneration

    model, report = Qwen3VLMoeForConditionalGeneration.from_pretrained(
        tiny_hub, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    return model.eval()


def test_tokenizer_is_qwens(tiny_processor: Any) -> None:
    tokenizer = tiny_processor.tokenizer
    reference = tiktoken.Encoding(
        "qwen", pat_str=PRETOKENIZE_PATTERN, mergeable_ranks=load_ranks(find_qwen_tiktoken()), special_tokens={}
    )
    for text in TEXTS:
        ids = tokenizer(text).input_ids
        assert ids == reference.encode(text)
        assert tokenizer.decode(ids) == text
    # Known from the published tokenizer, so that a vocabulary of another family would be noticed.
    assert tokenizer("Hello world").input_ids == [9707, 1879]
    assert len(tokenizer) == 151_669


def test_special_tokens_have_their_published_ids(tiny_processor: Any) -> None:
    tokenizer = tiny_processor.tokenizer
    for token, expected in PUBLISHED_IDS.items():
        assert tokenizer.convert_tokens_to_ids(token) == expected, token
        assert tokenizer(f"a{token}b").input_ids == [64, expected, 65], token
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == ("<|im_end|>", "<|endoftext|>", None)
    ids = tokenizer("<|im_start|>a<|image_pad|><think>").input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a<think>"


def test_tokenizer_json_stands_alone(tiny_hub: Path, tiny_processor: Any) -> None:
    """transformers puts its own normalizer and splitting around the vocabulary; other readers of the file do not."""
    plain = tokenizers.Tokenizer.from_file(str(tiny_hub / "tokenizer.json"))
    decomposed = "cafe\u0301"
    assert plain.encode(decomposed).ids == plain.encode("caf\u00e9").ids
    for text in (*TEXTS, decomposed, *(f"a{token}b" for token in PUBLISHED_IDS)):
        ids = plain.encode(text).ids
        assert ids == tiny_processor.tokenizer(text).input_ids
        assert plain.decode(ids, skip_special_tokens=False) == unicodedata.normalize("NFC", text)


def test_chat_template_renders_every_role_and_part(tiny_processor: Any) -> None:
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, {"type": "video"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
        {"role": "user", "content": "Sure?"},
    ]
    expected = (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|><|vision_start|><|video_pad|><|vision_end|>What?"
        "<|im_end|>\n<|im_start|>assistant\nA cat.<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n"
    )
    render = tiny_processor.apply_chat_template
    assert render(chat, tokenize=False) == expected
    assert render(chat, tokenize=False, add_generation_prompt=True) == expected + "<|im_start|>assistant\n"
    numbered = render(chat, tokenize=False, add_vision_id=True)
    assert "Picture 1: <|vision_start|><|image_pad|>" in numbered and "Video 1: <|vision_start|>" in numbered


@pytest.mark.parametrize(
    ("chat", "options", "message"),
    [
        ([{"role": "tool", "content": "4"}], {}, "role"),
        ([{"role": "user", "content": "a"}, {"role": "system", "content": "b"}], {}, "first message"),
        ([{"role": "user", "content": [{"type": "audio"}]}], {}, "audio"),
        ([{"role": "user", "content": "a"}], {"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    ],
)
def test_chat_template_refuses_what_it_cannot_render(
    tiny_processor: Any, chat: list[Any], options: dict[str, Any], message: str
) -> None:
    from jinja2.exceptions import TemplateError

    with pytest.raises(TemplateError, match=message):
        tiny_processor.apply_chat_template(chat, tokenize=False, **options)


@pytest.mark.parametrize("case", media.CASES)
def test_processor_turns_chats_into_tensors(tiny_processor: Any, case: str) -> None:
    inputs = media.case_inputs(tiny_processor, case)
    batch, length = inputs["input_ids"].shape
    assert batch == 1 and length < 256
    for pixels, grid, token in (
        ("pixel_values", "image_grid_thw", "<|image_pad|>"),
        ("pixel_values_videos", "video_grid_thw", "<|video_pad|>"),
    ):
        expected_tokens = 0
        if grid in inputs:
            patches = int(inputs[grid].prod(-1).sum())
            assert inputs[pixels].shape == (patches, 3 * 2 * 16 * 16)
            assert -1 <= inputs[pixels].min() < 0 < inputs[pixels].max() <= 1
            assert inputs[pixels].std() > 0.1, "a photo is not a flat surface"
            expected_tokens = patches // 4
        token_id = tiny_processor.tokenizer.convert_tokens_to_ids(token)
        assert int((inputs["input_ids"] == token_id).sum()) == expected_tokens
    assert ("image_grid_thw" in inputs) == (case in ("image", "mixed", "two_images"))
    assert ("video_grid_thw" in inputs) == (case in ("video", "mixed"))


def test_clip_frames_carry_their_timestamps(tiny_processor: Any) -> None:
    clip = media.load_clip()
    assert clip.fps == 25 and clip.total_frames == 250 and len(clip.indices) == len(clip.frames) == 6
    assert all(np.abs(a.astype(int) - b).mean() > 1 for a, b in zip(clip.frames[:-1], clip.frames[1:], strict=True))
    inputs = media.case_inputs(tiny_processor, "video")
    text = tiny_processor.tokenizer.decode(inputs["input_ids"][0])
    for first, second in zip(clip.indices[::2], clip.indices[1::2], strict=True):
        assert f"<{(first + second) / 2 / clip.fps:.1f} seconds><|vision_start|><|video_pad|>" in text


def test_largest_photo_and_clip_stay_small(tiny_processor: Any) -> None:
    chat = [media.user(media.load_photo("rocket", None), media.load_clip(8, 10.0, None), "?")]
    inputs = media.chat_inputs(tiny_processor, [chat])
    assert 50 < int(inputs["image_grid_thw"].prod()) // 4 <= 100
    assert 50 < int(inputs["video_grid_thw"].prod()) // 4 <= 96


def test_padding_side(tiny_processor: Any) -> None:
    left = media.case_inputs(tiny_processor, "text", "two_images", padding_side="left")
    right = media.case_inputs(tiny_processor, "text", "two_images", padding_side="right")
    assert left["attention_mask"].sum(-1).equal(right["attention_mask"].sum(-1))
    assert left["attention_mask"][1, 0] == 0 and left["attention_mask"][1, -1] == 1
    assert right["attention_mask"][1, 0] == 1 and right["attention_mask"][1, -1] == 0


def test_config_dimensions_are_all_distinct(tiny_hub: Path) -> None:
    config = json.loads((tiny_hub / "config.json").read_text())
    text, vision = config["text_config"], config["vision_config"]
    heads, kv_heads, head_dim = text["num_attention_heads"], text["num_key_value_heads"], text["head_dim"]
    widths = [
        text["hidden_size"],
        text["moe_intermediate_size"],
        2 * text["moe_intermediate_size"],
        text["intermediate_size"],
        heads * head_dim,
        kv_heads * head_dim,
        vision["hidden_size"],
        4 * vision["hidden_size"],
        vision["intermediate_size"],
        text["num_experts"],
        text["num_experts_per_tok"],
        head_dim,
        vision["hidden_size"] // vision["num_heads"],
        heads,
        kv_heads,
        vision["num_heads"],
    ]
    assert not [size for size, count in Counter(widths).items() if count > 1]
    assert vision["out_hidden_size"] == text["hidden_size"]
    assert max(vision["deepstack_visual_indexes"]) < vision["depth"] - 1
    assert len(vision["deepstack_visual_indexes"]) < text["num_hidden_layers"]
    assert len(text["mlp_only_layers"]) == 1 and 0 < text["mlp_only_layers"][0] < text["num_hidden_layers"] - 1
    assert sum(text["rope_scaling"]["mrope_section"]) == head_dim // 2
    assert heads % 4 == vision["num_heads"] % 4 == text["hidden_size"] % 4 == vision["hidden_size"] % 4 == 0
    assert text["num_experts"] % 8 == 0 and kv_heads < 4 < heads


def test_layouts_hold_the_same_model(tiny_hub: Path, tiny_fused: Path) -> None:
    hub, hub_metadata = read_all(tiny_hub)
    fused, fused_metadata = read_all(tiny_fused)
    assert len(hub_metadata) > 4, "the converter needs several shards to read"
    assert all(read_stamp(metadata) is None for metadata in hub_metadata)
    assert all(stamp is not None and stamp.layout == "fused" for stamp in map(read_stamp, fused_metadata))
    assert hub.keys() == fused.keys()
    for name, tensor in hub.items():
        if ".experts." in name:
            assert tensor.shape != fused[name].shape
            assert tensor.transpose(1, 2).equal(fused[name]), name
        else:
            assert tensor.equal(fused[name]), name
    gate_up = "model.language_model.layers.0.mlp.experts.gate_up_proj"
    assert hub[gate_up].shape == (16, 64, 80) and fused[gate_up].shape == (16, 80, 64)


def test_seed_dtype_and_overrides(tiny_hub: Path, tmp_path: Path) -> None:
    small = {"num_hidden_layers": 4, "num_experts": 8}
    make_tiny_checkpoint(tmp_path / "a", dtype=torch.bfloat16, text_config=small)
    make_tiny_checkpoint(tmp_path / "b", dtype=torch.bfloat16, seed=1, text_config=small)
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["text_config"]["num_experts"] == 8 and config["text_config"]["hidden_size"] == 64
    default, (a, _), (b, _) = read_all(tiny_hub)[0], read_all(tmp_path / "a"), read_all(tmp_path / "b")
    assert len(a) < len(default) and all(tensor.dtype is torch.bfloat16 for tensor in a.values())
    embedding = "model.language_model.embed_tokens.weight"
    assert a[embedding].equal(default[embedding].bfloat16()) and not a[embedding].equal(b[embedding])
    with pytest.raises(ValueError, match="num_expert"):
        make_tiny_checkpoint(tmp_path / "c", text_config={"num_expert": 8})
    with pytest.raises(ValueError, match="not empty"):
        make_tiny_checkpoint(tmp_path / "a")
    with pytest.raises(ValueError, match="per-expert"):
        make_tiny_checkpoint(tmp_path / "d", layout="per-expert")


def test_a_checkpoint_that_cannot_be_finished_leaves_nothing(tmp_path: Path, monkeypatch, capsys) -> None:
    """As on a full disk, met at the last file."""

    def full(out: Path, *_: Any) -> None:
        (out / "model-00001-of-00002.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(script, "write_shards", full)
    with pytest.raises(SystemExit):
        script.main([str(tmp_path / "new" / "tiny")])
    assert "No space left" in capsys.readouterr().err
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize("case", media.CASES)
def test_activations_are_not_degenerate(upstream: Any, tiny_processor: Any, case: str) -> None:
    with torch.no_grad():
        out = upstream(**media.case_inputs(tiny_processor, case), output_hidden_states=True, output_attentions=True)
    for hidden in out.hidden_states:
        assert 0.5 < hidden.square().mean().sqrt() < 2.5
    tokens = out.logits.shape[1]
    for attention in out.attentions:
        entropy = -torch.special.xlogy(attention, attention).sum(-1)[..., tokens // 2 :].mean()
        assert 0.3 < entropy < 0.95 * math.log(tokens)
    top = out.logits.softmax(-1).amax(-1).mean()
    assert 100 / out.logits.shape[-1] < top < 0.9


def test_routing_is_spread_over_the_experts(upstream: Any, tiny_processor: Any) -> None:
    chosen: dict[str, Counter[int]] = {}
    hooks = []
    top_k = upstream.config.text_config.num_experts_per_tok
    for name, module in upstream.named_modules():
        if name.endswith("mlp.gate"):
            counts = chosen.setdefault(name, Counter())
            hooks.append(
                module.register_forward_hook(
                    lambda _module, _args, out, counts=counts: counts.update(
                        out[0].topk(top_k).indices.flatten().tolist()
                    )
                )
            )
    with torch.no_grad():
        for case in media.CASES:
            upstream(**media.case_inputs(tiny_processor, case))
    for hook in hooks:
        hook.remove()
    assert len(chosen) == upstream.config.text_config.num_hidden_layers - 1
    for name, counts in chosen.items():
        assert len(counts) == upstream.config.text_config.num_experts, f"{name}: experts without a token"
        assert max(counts.values()) < 0.25 * counts.total(), f"{name}: {counts}"
