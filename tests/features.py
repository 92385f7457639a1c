"""Training features from processor inputs, and packed batches, for tests of packing and parallelism."""

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import torch

from modeling.data.collator import SequenceParallelCollator


def feature_of(inputs: Mapping[str, torch.Tensor], model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """One sample's processor inputs (batch of one) as a feature: ids with placeholders replaced by 0, labels, masks,
    positions (3, L)."""
    config = model.config
    ids = inputs["input_ids"][0]
    image_mask, video_mask = ids == config.image_token_id, ids == config.video_token_id
    marked = ids.masked_fill(image_mask, -200).masked_fill(video_mask, -300)
    positions = model.get_position_id_func()(
        input_ids=marked[None],
        image_grid_thw=inputs.get("image_grid_thw"),
        video_grid_thw=inputs.get("video_grid_thw"),
    )["position_ids"]
    feature = {
        "input_ids": ids.masked_fill(image_mask | video_mask, 0),
        "labels": ids.masked_fill(image_mask | video_mask, -100),
        "attention_mask": torch.ones_like(ids),
        "position_ids": positions[:, 0],
        "image_mask": image_mask,
        "video_mask": video_mask,
    }
    visual = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")
    return feature | {key: inputs[key] for key in visual if key in inputs}


def pack(
    features: list[dict[str, torch.Tensor]], model: torch.nn.Module, pad_to_length: int | None = None
) -> dict[str, Any]:
    """The features as one packed batch of one process."""
    collator = SequenceParallelCollator(
        metadata_collate_func=model.get_metadata_collate_func(),
        pad_to_length=pad_to_length,
        spatial_merge_size=model.config.vision_config.spatial_merge_size,
    )
    return collator(features)


def segments(batch: Mapping[str, Any]) -> list[slice]:
    """Where each sample lies in the packed row, padding left out."""
    bounds = batch["cu_seq_lens_q"].tolist()
    whole = [slice(start, stop) for start, stop in pairwise(bounds)]
    return whole[: len(whole) - bool(batch["tail_padding_length"])]


InputsOf = Callable[..., dict[str, torch.Tensor]]
