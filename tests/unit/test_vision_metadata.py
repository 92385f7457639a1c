"""Vision metadata against upstream's functions, and what the collator's hook writes."""

import pickle

import pytest
import torch
from transformers import vision_utils

from modeling.qwen3_vl_moe.vision_metadata import make_metadata_collate_func, unpack_metadata, vision_metadata

GRIDS = torch.tensor([[1, 4, 6], [3, 2, 8], [1, 10, 2]])
SIDE = 7


@pytest.mark.parametrize("merge", [1, 2])
def test_equals_upstream(merge: int) -> None:
    metadata = vision_metadata(GRIDS, table_side=SIDE, merge=merge)
    assert torch.equal(metadata.cu_seqlens, vision_utils.get_vision_cu_seqlens(GRIDS))
    assert torch.equal(metadata.position_ids, vision_utils.get_vision_position_ids(GRIDS, merge))
    indices, weights = vision_utils.get_vision_bilinear_indices_and_weights(GRIDS, SIDE, merge)
    if indices.shape[0] == 4:
        indices, weights = indices.T, weights.T
    # Where a fraction is 0, any right neighbour will do: compare what the pairs select, densely.
    table = torch.eye(SIDE * SIDE)
    ours = (table[metadata.interp_indices] * metadata.interp_weights[..., None]).sum(1)
    theirs = (table[indices] * weights[..., None]).sum(1)
    # Upstream rounds positions up to 6 in fp32 before it takes their fraction.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)
    assert metadata.max_seqlen == 24 and metadata.num_patches == len(metadata.position_ids)


def test_weights_sum_to_one_and_reach_the_corners() -> None:
    metadata = vision_metadata(torch.tensor([[1, 4, 6]]), table_side=SIDE, merge=2)
    torch.testing.assert_close(metadata.interp_weights.sum(1), torch.ones(24))
    rows, cols = metadata.position_ids.T
    corner = ((rows == 3) & (cols == 5)).nonzero().item()
    picked = metadata.interp_indices[corner][metadata.interp_weights[corner] > 0]
    assert set(picked.tolist()) == {SIDE * SIDE - 1}


def test_a_frame_of_one_row() -> None:
    metadata = vision_metadata(torch.tensor([[1, 1, 3]]), table_side=SIDE, merge=1)
    assert metadata.interp_weights.isfinite().all() and int(metadata.interp_indices.max()) < SIDE * SIDE


def test_padding_is_a_segment_of_its_own() -> None:
    metadata = vision_metadata(torch.tensor([[2, 2, 2]]), table_side=SIDE, merge=2, padding=6)
    assert metadata.cu_seqlens.tolist() == [0, 4, 8, 14] and metadata.max_seqlen == 6
    assert metadata.num_patches == len(metadata.position_ids) == 8
    assert metadata.cu_seqlens.dtype == torch.int32


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ([[1, 3, 4]], r"image_grid_thw\[0\] is 1 x 3 x 4 .* spatial_merge_size 2"),
        ([[1, 4, 4], [0, 4, 4]], r"image_grid_thw\[1\] is 0 x 4 x 4"),
        ([1, 4, 4], r"shape \(n, 3\).* got \(3,\)"),
    ],
)
def test_bad_grids(grid: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vision_metadata(torch.tensor(grid), table_side=SIDE, merge=2, name="image_grid_thw")


def test_collate_hook() -> None:
    """VeOmni's names and types, the token indices of the whole row, and their counts per rank; picklable."""
    hook = pickle.loads(pickle.dumps(make_metadata_collate_func(SIDE * SIDE, 2, vocab_size=100)))
    image_mask = torch.tensor([[0, 1, 1, 1, 0, 1, 0, 0]]).bool()
    batch = {
        "input_ids": torch.zeros(1, 4, dtype=torch.long),
        "attention_mask": torch.ones(1, 8, dtype=torch.long),
        "image_mask": image_mask,
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
    }
    hook(batch, {"pixel_values": 8, "pixel_values_videos": 0})
    entries = batch["multimodal_metadata"]
    assert entries["image_grid_thw_list"] == [[1, 4, 4]]
    assert entries["vit_image_cu_seqlens"].tolist() == [0, 16, 24]
    assert entries["vit_image_max_seqlen"] == 16 and type(entries["vit_image_max_seqlen"]) is int
    assert entries["image_token_indices"].tolist() == [1, 2, 3, 5]
    assert entries["image_token_counts"] == [3, 1]
    # No mask for videos: no tokens, and nothing left for the forward to look for.
    assert entries["video_token_counts"] == [0, 0] and entries["video_token_indices"].numel() == 0
    assert unpack_metadata("image", entries).num_patches == 16
    assert unpack_metadata("video", entries) is None


def test_collate_hook_checks_token_ids() -> None:
    hook = make_metadata_collate_func(SIDE * SIDE, 2, vocab_size=100)
    with pytest.raises(ValueError, match="run from -200 to 0, but the vocabulary has ids 0 to 99"):
        hook({"input_ids": torch.tensor([[0, -200]])}, {})
