"""Options of the config that trade memory for time: they reach the place they are about, and wrong ones are told."""

import pytest
import torch

from modeling.qwen3_vl_moe import Qwen3VLMoeConfig, Qwen3VLMoeForCausalLM
from modeling.qwen3_vl_moe import modeling_qwen3_vl_moe as model_file
from tests.distributed.toy import toy_config


@pytest.mark.parametrize("chunk", [3, 1536])
def test_loss_chunk_size_reaches_the_loss(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Qwen3VLMoeForCausalLM(toy_config(loss_chunk_size=chunk)).train()
    seen = []
    real = model_file.linear_cross_entropy
    monkeypatch.setattr(
        model_file,
        "linear_cross_entropy",
        lambda *args, **kwargs: (seen.append(kwargs["chunk_size"]), real(*args, **kwargs))[1],
    )
    ids = torch.arange(8)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    assert seen == [chunk]


@pytest.mark.parametrize("kept", [0, 1])
def test_the_last_blocks_keep_their_projection(kept: int) -> None:
    config = toy_config()
    config.vision_config.keep_qkv_blocks = kept
    blocks = Qwen3VLMoeForCausalLM(config).model.visual.blocks
    assert [block.keep_qkv for block in blocks] == [False] * (len(blocks) - kept) + [True] * kept


def test_wrong_values() -> None:
    with pytest.raises(ValueError, match=r"loss_chunk_size must be at least 1 .* got 0"):
        Qwen3VLMoeConfig(text_config={"loss_chunk_size": 0})
    for kept in (-1, 28):
        with pytest.raises(ValueError, match=f"keep_qkv_blocks={kept} must be between 0 and depth=27"):
            Qwen3VLMoeConfig(vision_config={"keep_qkv_blocks": kept})
