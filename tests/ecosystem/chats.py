"""Features and padded batches of a few chats with answers, for the trainers of other packages."""

from typing import Any

import torch

from tests.features import feature_of
from tests.media import assistant, chat_inputs, load_photo, user

CHATS = (
    [user(load_photo("coffee", 96), "What stands on the table?"), assistant("A cup of coffee.")],
    [user(load_photo("chelsea", 96), "Who is this?"), assistant("Chelsea, a cat.")],
    [user("Why is the sky blue?"), assistant("Air scatters short waves more.")],
    [user(load_photo("rocket", 64), "What is it?"), assistant("A rocket.")],
)


def features(processor: Any, model: torch.nn.Module) -> list[dict[str, torch.Tensor]]:
    """One feature a chat; every token is a target but the placeholders and the first, which nothing predicts."""
    found = [feature_of(chat_inputs(processor, [chat], add_generation_prompt=False), model) for chat in CHATS]
    for feature in found:
        feature["labels"][0] = -100
    return found


def padded_batch(processor: Any) -> dict[str, torch.Tensor]:
    """All chats as the processor pads them, with labels."""
    batch = dict(chat_inputs(processor, list(CHATS), add_generation_prompt=False))
    ids = batch["input_ids"]
    ignored = (batch["attention_mask"] == 0) | (ids == processor.image_token_id)
    return batch | {"labels": ids.masked_fill(ignored, -100)}
