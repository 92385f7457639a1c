"""What the vision tower needs to know about the images of a batch, worked out on the CPU from grid_thw.

Upstream derives these tensors inside the forward, from grids that are already on the GPU, and waits for the device at
each `.tolist()`. Here the collator does it in its worker (`collate_vision_metadata`) and the forward only reads the
result; a forward without a collator computes the same thing once. Free functions and plain data, so that spawned
workers can pickle them.

Patches come in the image processor's order: frame by frame, and inside a frame one merge block (merge x merge patches)
after the other, so that the merger reads its inputs as consecutive rows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

MODALITIES = (("image", "image_grid_thw", "pixel_values"), ("video", "video_grid_thw", "pixel_values_videos"))


@dataclass(frozen=True)
class VisionMetadata:
    """Patch-level facts of one modality's images, each tensor unsliced over all P patches of the batch.

    grid_thw: [(t, h, w)] in patches, Python ints.
    cu_seqlens: (frames + 1,) int32, where each frame starts; attention stays inside a frame. With padded patches
        (sequence parallelism) one more entry makes the padding a segment of its own.
    max_seqlen: longest segment, a Python int.
    position_ids: (P, 2) int64, row and column of each patch, for the rotary embedding.
    interp_indices: (P, 4) int64, rows of the learned position table around each patch.
    interp_weights: (P, 4) float32, their bilinear weights.
    """

    grid_thw: list[tuple[int, int, int]]
    cu_seqlens: torch.Tensor
    max_seqlen: int
    position_ids: torch.Tensor
    interp_indices: torch.Tensor
    interp_weights: torch.Tensor

    @property
    def num_patches(self) -> int:
        return sum(t * h * w for t, h, w in self.grid_thw)

    def to(self, device: torch.device) -> "VisionMetadata":
        """The same with its tensors on `device`, copied without waiting for it."""
        tensors = (self.cu_seqlens, self.position_ids, self.interp_indices, self.interp_weights)
        cu_seqlens, position_ids, indices, weights = (x.to(device, non_blocking=True) for x in tensors)
        return VisionMetadata(self.grid_thw, cu_seqlens, self.max_seqlen, position_ids, indices, weights)


def merge_order(h: int, w: int, merge: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and column of each patch of an h x w frame, in the processor's order of merge blocks: two (h*w,) int64."""
    block_row, block_col, row, col = torch.meshgrid(
        torch.arange(h // merge), torch.arange(w // merge), torch.arange(merge), torch.arange(merge), indexing="ij"
    )
    return (block_row * merge + row).flatten(), (block_col * merge + col).flatten()


def _axis_interpolation(length: int, table_side: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Neighbours and fraction of `length` points spread over the table's side, corners aligned (Qwen3-VL's resampling).

    Point i lies at i * (side - 1) / (length - 1). In integers, so that the fraction carries no rounding of the
    position.
    """
    numerator, denominator = torch.arange(length) * (table_side - 1), max(length - 1, 1)
    low = numerator // denominator
    return low, (low + 1).clamp(max=table_side - 1), (numerator % denominator) / denominator


def _frame_interpolation(h: int, w: int, table_side: int, merge: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices (h*w, 4) into the flattened position table and bilinear weights (h*w, 4) float32, in merge order."""
    rows, cols = merge_order(h, w, merge)
    top, bottom, down = (x[rows] for x in _axis_interpolation(h, table_side))
    left, right, across = (x[cols] for x in _axis_interpolation(w, table_side))
    corners = [
        top * table_side + left,
        top * table_side + right,
        bottom * table_side + left,
        bottom * table_side + right,
    ]
    weights = [(1 - down) * (1 - across), (1 - down) * across, down * (1 - across), down * across]
    return torch.stack(corners, dim=1), torch.stack(weights, dim=1)


def check_grid(grid_thw: list[tuple[int, int, int]], merge: int, name: str) -> None:
    """Raise a ValueError unless every grid is positive and divisible into merge blocks."""
    for number, (t, h, w) in enumerate(grid_thw):
        if min(t, h, w) < 1 or h % merge or w % merge:
            raise ValueError(
                f"{name}[{number}] is {t} x {h} x {w} patches; each must be positive, and height and width divisible "
                f"by spatial_merge_size {merge}. Resize to a multiple of patch_size x spatial_merge_size pixels."
            )


def vision_metadata(
    grid_thw: torch.Tensor, *, table_side: int, merge: int, padding: int = 0, name: str = "grid_thw"
) -> VisionMetadata:
    """Metadata of the images (or videos) of a batch, on the CPU.

    Args:
        grid_thw: (n, 3) patches in time, height and width.
        table_side: side of the square table of learned positions, sqrt(num_position_embeddings).
        merge: spatial_merge_size.
        padding: patches appended to the batch, which form a segment of their own.
        name: what to call grid_thw in errors.

    Raises:
        ValueError: grid_thw has another shape, or a grid does not divide into merge blocks.
    """
    if grid_thw.ndim != 2 or grid_thw.shape[1] != 3:
        raise ValueError(f"{name} must have shape (n, 3), one row of (t, h, w) per image; got {tuple(grid_thw.shape)}.")
    grids = [(int(t), int(h), int(w)) for t, h, w in grid_thw.tolist()]
    check_grid(grids, merge, name)
    # PATCH(vit-sp-cu-seqlens): one more entry covers the padded tail; the boundaries are extended, never sliced
    segments = [h * w for t, h, w in grids for _ in range(t)] + ([padding] if padding else [])
    cu_seqlens = torch.zeros(len(segments) + 1, dtype=torch.int32)
    cu_seqlens[1:] = torch.tensor(segments).cumsum(0)
    positions, indices, weights = [], [], []
    for t, h, w in grids:
        positions.append(torch.stack(merge_order(h, w, merge), dim=1).repeat(t, 1))
        frame_indices, frame_weights = _frame_interpolation(h, w, table_side, merge)
        indices.append(frame_indices.repeat(t, 1))
        weights.append(frame_weights.repeat(t, 1))
    # PATCH(vit-max-seqlen): a Python int from the CPU, once per batch instead of a device-host sync in every block
    max_seqlen = max(segments)
    return VisionMetadata(grids, cu_seqlens, max_seqlen, torch.cat(positions), torch.cat(indices), torch.cat(weights))


def pack_metadata(modality: str, metadata: VisionMetadata) -> dict[str, Any]:
    """The entries of `multimodal_metadata` for one modality; the first three are VeOmni's, by its names."""
    return {
        f"{modality}_grid_thw_list": [list(grid) for grid in metadata.grid_thw],
        f"vit_{modality}_cu_seqlens": metadata.cu_seqlens,
        f"vit_{modality}_max_seqlen": metadata.max_seqlen,
        f"vit_{modality}_position_ids": metadata.position_ids,
        f"vit_{modality}_interp_indices": metadata.interp_indices,
        f"vit_{modality}_interp_weights": metadata.interp_weights,
    }


def unpack_metadata(modality: str, entries: dict[str, Any]) -> VisionMetadata | None:
    """The inverse of `pack_metadata`; None where the entries are missing (another collator made the batch)."""
    if f"vit_{modality}_interp_weights" not in entries:
        return None
    return VisionMetadata(
        [tuple(grid) for grid in entries[f"{modality}_grid_thw_list"]],
        entries[f"vit_{modality}_cu_seqlens"],
        entries[f"vit_{modality}_max_seqlen"],
        entries[f"vit_{modality}_position_ids"],
        entries[f"vit_{modality}_interp_indices"],
        entries[f"vit_{modality}_interp_weights"],
    )


def _token_entries(modality: str, mask: torch.Tensor, slice_length: int) -> dict[str, Any]:
    """Where a modality's tokens stand in the flattened sequence, and how many fall into each rank's slice."""
    flat = mask.flatten()
    counts = [int(part.sum()) for part in flat.split(slice_length)]
    return {f"{modality}_token_indices": flat.nonzero().squeeze(1), f"{modality}_token_counts": counts}


def check_token_ids(input_ids: torch.Tensor, vocab_size: int) -> None:
    """Raise a ValueError for token ids outside the vocabulary. Waits for the device, so the collator calls it on the
    CPU and the model only for batches that do not come from there."""
    if input_ids.numel() == 0 or input_ids.device.type == "meta":
        return
    low, high = torch.stack(input_ids.aminmax()).tolist()
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"input_ids run from {low} to {high}, but the vocabulary has ids 0 to {vocab_size - 1}. Use this model's "
            "own tokenizer; placeholders such as -200 and -300 are for position_id_func and must be replaced before."
        )


def collate_vision_metadata(
    batch: dict[str, Any], sp_pad: dict[str, int], *, table_side: int, merge: int, vocab_size: int
) -> None:
    """Write `batch["multimodal_metadata"]`: everything the forward would otherwise ask the GPU for.

    Args:
        batch: a packed, padded and sliced batch, changed in place. Reads input_ids (1, s), attention_mask (1, S), the
            grids, and image_mask and video_mask (1, S), which may be missing where there are no such tokens.
        sp_pad: patches that were appended to pixel_values and pixel_values_videos (VeOmni's interface).

    Raises:
        ValueError: grids or token ids that the model cannot take.
    """
    check_token_ids(batch["input_ids"], vocab_size)
    entries: dict[str, Any] = {}
    for modality, grid_key, pixel_key in MODALITIES:
        grid_thw = batch.get(grid_key)
        if grid_thw is not None and len(grid_thw):
            padding = sp_pad.get(pixel_key, 0)
            metadata = vision_metadata(grid_thw, table_side=table_side, merge=merge, padding=padding, name=grid_key)
            entries |= pack_metadata(modality, metadata)
        mask = batch.get(f"{modality}_mask")
        if mask is None:  # none of its tokens anywhere
            mask = torch.zeros_like(batch["attention_mask"], dtype=torch.bool)
        entries |= _token_entries(modality, mask, batch["input_ids"].shape[-1])
    batch["multimodal_metadata"] = entries


def make_metadata_collate_func(
    num_position_embeddings: int, spatial_merge_size: int, vocab_size: int
) -> Callable[[dict[str, Any], dict[str, int]], None]:
    """`collate_vision_metadata` bound to a model's numbers: picklable, for the collator."""
    table_side = int(num_position_embeddings**0.5)
    return partial(collate_vision_metadata, table_side=table_side, merge=spatial_merge_size, vocab_size=vocab_size)
