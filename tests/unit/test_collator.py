"""SequenceParallelCollator: what it packs, where it pads, what each rank gets; no model involved."""

import pickle
from functools import partial
from typing import Any

import pytest
import torch

from modeling.data.collator import IGNORE_INDEX, SequenceParallelCollator

PATCH_DIM = 12


def feature(length: int, *, first_token: int, grid: tuple[int, int, int] | None = None) -> dict[str, Any]:
    """Tokens count up from `first_token`; an image's tokens follow the first token."""
    tokens = torch.arange(first_token, first_token + length)
    image_mask = torch.zeros(length, dtype=torch.bool)
    made: dict[str, Any] = {
        "input_ids": tokens,
        "labels": tokens.clone(),
        "attention_mask": torch.ones(length, dtype=torch.int64),
        "position_ids": torch.arange(length).expand(3, -1).clone(),
        "image_mask": image_mask,
        "video_mask": torch.zeros(length, dtype=torch.bool),
    }
    if grid is not None:
        t, h, w = grid
        image_mask[1 : 1 + t * h * w // 4] = True
        made["pixel_values"] = (
            torch.arange(t * h * w * PATCH_DIM, dtype=torch.float32).view(-1, PATCH_DIM) + first_token
        )
        made["image_grid_thw"] = torch.tensor([grid])
    return made


def samples() -> list[dict[str, Any]]:
    return [
        feature(7, first_token=100, grid=(1, 4, 4)),
        feature(5, first_token=200),
        feature(9, first_token=300, grid=(1, 2, 6)),
    ]


def note_padding(batch: dict[str, Any], sp_pad: dict[str, int]) -> None:
    batch["multimodal_metadata"] = dict(sp_pad)


def join(sp_size: int, key: str, dim: int, features: list[dict[str, Any]], **options: Any) -> torch.Tensor:
    """The slices of all ranks, put together."""
    return torch.cat([SequenceParallelCollator(sp_size, r, **options)(features)[key] for r in range(sp_size)], dim=dim)


def test_one_rank_packs_without_padding():
    batch = SequenceParallelCollator()(samples())
    assert batch["input_ids"].shape == (1, 21)
    assert batch["position_ids"].shape == (1, 3, 21)
    assert batch["cu_seq_lens_q"].tolist() == [0, 7, 12, 21]
    assert batch["cu_seq_lens_q"].dtype == torch.int32
    assert (batch["max_length_q"], batch["max_length_k"], batch["tail_padding_length"]) == (9, 9, 0)
    assert type(batch["max_length_q"]) is int
    assert batch["pixel_values"].shape == (28, PATCH_DIM)
    assert batch["image_grid_thw"].tolist() == [[1, 4, 4], [1, 2, 6]]
    assert "pixel_values_videos" not in batch
    assert "video_grid_thw" not in batch
    # Unshifted, as any model that shifts by itself takes them; no token predicts the next sample.
    assert batch["labels"][0, [0, 7, 12]].tolist() == [100, IGNORE_INDEX, IGNORE_INDEX]
    assert batch["num_valid_labels"] == (7 - 1) + (5 - 1) + (9 - 1)


@pytest.mark.parametrize("sp_size", [2, 4])
def test_slices_join_to_the_padded_row(sp_size: int):
    whole = SequenceParallelCollator()(samples())
    padded = -(-21 // sp_size) * sp_size
    for key, padding in (("input_ids", 0), ("position_ids", 0)):
        joined = join(sp_size, key, -1, samples())
        torch.testing.assert_close(joined[..., :21], whole[key], rtol=0, atol=0)
        assert joined.size(-1) == padded
        assert (joined[..., 21:] == padding).all()
    labels = join(sp_size, "labels", -1, samples())
    expected = whole["labels"][0, 1:].tolist() + [IGNORE_INDEX] * (padded - 20)
    assert labels[0].tolist() == expected
    counts = [SequenceParallelCollator(sp_size, r)(samples())["num_valid_labels"] for r in range(sp_size)]
    assert sum(counts) == whole["num_valid_labels"]


def test_padding_is_one_segment():
    batch = SequenceParallelCollator(4, 1, pad_to_length=30)(samples())
    assert batch["cu_seq_lens_q"].tolist() == [0, 7, 12, 21, 32]
    assert batch["max_length_q"] == 11
    assert batch["tail_padding_length"] == 11
    assert batch["input_ids"].shape == (1, 8)
    assert batch["attention_mask"].shape == (1, 32)
    assert batch["image_mask"].shape == (1, 32)
    assert batch["image_mask"].sum() == 4 + 3


@pytest.mark.parametrize(("sp_size", "merge", "padded"), [(2, 2, 32), (4, 2, 32), (2, 1, 28), (8, 1, 32), (2, 3, 36)])
def test_patches_are_padded_to_merged_tokens_times_ranks(sp_size: int, merge: int, padded: int):
    options = {"spatial_merge_size": merge, "metadata_collate_func": note_padding}
    joined = join(sp_size, "pixel_values", 0, samples(), **options)
    assert joined.shape == (padded, PATCH_DIM)
    whole = SequenceParallelCollator()(samples())["pixel_values"]
    torch.testing.assert_close(joined[:28], whole, rtol=0, atol=0)
    assert not joined[28:].any()
    batch = SequenceParallelCollator(sp_size, 0, **options)(samples())
    assert batch["multimodal_metadata"] == {"pixel_values": padded - 28, "pixel_values_videos": 0}
    assert batch["image_grid_thw"].tolist() == [[1, 4, 4], [1, 2, 6]]


def test_boundaries_come_from_lengths_not_positions():
    """A sample that opens with an image has several tokens at position 0."""
    opening = feature(6, first_token=10)
    opening["position_ids"][0, :3] = 0
    batch = SequenceParallelCollator()([opening, feature(4, first_token=50)])
    assert batch["cu_seq_lens_q"].tolist() == [0, 6, 10]


def test_features_are_left_alone():
    features = samples()
    before = [{key: value.clone() for key, value in f.items()} for f in features]
    SequenceParallelCollator(2, 0)(features)
    for f, b in zip(features, before, strict=True):
        for key in b:
            torch.testing.assert_close(f[key], b[key], rtol=0, atol=0)


def test_missing_keys_have_their_natural_value():
    bare = {"input_ids": torch.arange(4), "labels": torch.arange(4)}
    batch = SequenceParallelCollator()([feature(6, first_token=10, grid=(1, 2, 4)), bare])
    assert batch["image_mask"][0].tolist() == [False, True, True] + [False] * 7
    assert batch["position_ids"][0, :, 6:].tolist() == [[0, 1, 2, 3]] * 3
    text_only = SequenceParallelCollator()([bare])
    assert "image_mask" not in text_only
    assert "pixel_values" not in text_only


def test_picklable():
    collator = SequenceParallelCollator(2, 1, metadata_collate_func=partial(note_padding), pad_to_length=24)
    again = pickle.loads(pickle.dumps(collator))
    ours, theirs = collator(samples()), again(samples())
    assert ours.keys() == theirs.keys()
    torch.testing.assert_close(ours["input_ids"], theirs["input_ids"], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: SequenceParallelCollator(2, 2), r"sp_rank=2 .* sp_size=2"),
        (lambda: SequenceParallelCollator()([]), "0 features"),
        (lambda: SequenceParallelCollator(pad_to_length=20)(samples()), r"21 tokens .* pad_to_length=20"),
        (
            lambda: SequenceParallelCollator()([{"input_ids": torch.arange(4), "labels": torch.arange(3)}]),
            r"Sample 0: labels is 3 long.* 4 tokens",
        ),
        (
            lambda: SequenceParallelCollator()([feature(3, first_token=1), {"input_ids": torch.arange(4)}]),
            r"Sample 1: labels is missing",
        ),
    ],
)
def test_wrong_input(build: Any, words: str):
    with pytest.raises(ValueError, match=words):
        build()
