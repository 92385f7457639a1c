"""Packing, padding and slicing: from samples to the one packed row that a rank's model runs on.

Keys and meanings are those of VeOmni's collators, in one class that also works without sequence parallelism. It differs
where theirs would train something else:

- sample boundaries come from the samples' lengths; positions that are 0 also occur inside a sample that opens with an
  image;
- padding is one attention segment of its own, whatever it comes from, and its length is in the batch;
- features are never modified, and vision patches are padded to spatial_merge_size² x sp_size.

Runs in data workers: it imports no model, holds only plain values, and can be pickled if the metadata function can.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..distributed.sequence_parallel import pad_to, padded_length

IGNORE_INDEX = -100

MetadataCollateFunc = Callable[[dict[str, Any], dict[str, int]], None]

# Keys along the sequence, and what padding holds. attention_mask is padded with 1 for VeOmni's models, which take a
# packed mask only if it is all ones; `tail_padding_length` says what is padding.
SEQUENCE_KEYS = {
    "input_ids": 0,
    "labels": IGNORE_INDEX,
    "attention_mask": 1,
    "position_ids": 0,
    "image_mask": 0,
    "video_mask": 0,
}
SLICED_KEYS = ("input_ids", "labels", "position_ids")
PATCH_KEYS = ("pixel_values", "pixel_values_videos")
GRID_KEYS = ("image_grid_thw", "video_grid_thw")


@dataclass(frozen=True)
class SequenceParallelCollator:
    """Packs features into one row, pads it, and keeps this rank's slice.

    Args:
        sp_size: ranks that share the row.
        sp_rank: this rank among them.
        metadata_collate_func: `fn(batch, sp_pad)` writes batch["multimodal_metadata"]; `sp_pad` counts the patches of
            padding per pixel key. From `model.get_metadata_collate_func()`.
        pad_to_length: pack to this many tokens, rounded up to a multiple of sp_size; None packs without spare room.
        spatial_merge_size: of the vision encoder; the patches of a merged token stay on one rank.

    A call takes features (ARCHITECTURE: "Feature and batch contract") and returns CPU tensors:

        input_ids (1, s), labels (1, s), position_ids (1, 3, s)
        attention_mask, image_mask, video_mask (1, S), whole
        pixel_values, pixel_values_videos (p, C), image_grid_thw, video_grid_thw (n, 3), whole
        cu_seq_lens_q, cu_seq_lens_k (samples + 1 or, with padding, + 2) int32; max_length_q, max_length_k int
        tail_padding_length int: how many of the S tokens, at the end, are padding
        num_valid_labels int: how many predictions of this rank's slice count
        labels_shifted True, where they are
        multimodal_metadata dict, where there is a metadata function

    With sp_size > 1 labels are shifted before they are sliced: labels[t] is what token t predicts, and no rank needs
    its neighbour's first token. With sp_size 1 they are left for the model to shift, as it does for any other batch.
    Either way the last token of a sample never predicts the next sample's first.
    """

    sp_size: int = 1
    sp_rank: int = 0
    metadata_collate_func: MetadataCollateFunc | None = None
    pad_to_length: int | None = None
    spatial_merge_size: int = 2

    def __post_init__(self) -> None:
        if self.sp_size < 1 or not 0 <= self.sp_rank < self.sp_size:
            raise ValueError(f"sp_rank={self.sp_rank} is not one of sp_size={self.sp_size} ranks.")

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        if not features:
            raise ValueError("The collator got 0 features; a batch needs at least one sample.")
        lengths = [int(feature["input_ids"].size(-1)) for feature in features]
        batch = self._pack_sequence(features, lengths)
        sp_pad = self._pack_vision(features, batch)
        if self.metadata_collate_func is not None:
            self.metadata_collate_func(batch, sp_pad)
        return batch

    def _pack_sequence(self, features: Sequence[Mapping[str, Any]], lengths: list[int]) -> dict[str, Any]:
        packed = sum(lengths)
        if self.pad_to_length is not None and packed > self.pad_to_length:
            raise ValueError(
                f"{packed} tokens were packed, but pad_to_length={self.pad_to_length}; pack fewer samples or raise it."
            )
        whole = padded_length(max(packed, self.pad_to_length or 0), self.sp_size)  # S
        batch: dict[str, Any] = {}
        for key, padding in SEQUENCE_KEYS.items():
            pieces = _pieces(key, features, lengths)
            if pieces is not None:
                batch[key] = pad_to(torch.cat(pieces, dim=-1), -1, whole, padding).unsqueeze(0)
        if "labels" in batch and self.sp_size > 1:
            batch["labels"] = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE_INDEX)
            batch["labels_shifted"] = True
        for key in SLICED_KEYS:
            if key in batch:
                batch[key] = self._slice(batch[key], -1)

        boundaries = [0]
        for length in [*lengths, whole - packed]:
            if length:
                boundaries.append(boundaries[-1] + length)
        cu_seq_lens = torch.tensor(boundaries, dtype=torch.int32)
        max_length = max([*lengths, whole - packed])
        batch.update(cu_seq_lens_q=cu_seq_lens, cu_seq_lens_k=cu_seq_lens)
        batch.update(max_length_q=max_length, max_length_k=max_length, tail_padding_length=whole - packed)
        if "labels" in batch:
            predicted = batch["labels"] if self.sp_size > 1 else batch["labels"][:, 1:]
            batch["num_valid_labels"] = int((predicted != IGNORE_INDEX).sum())
        return batch

    def _pack_vision(self, features: Sequence[Mapping[str, Any]], batch: dict[str, Any]) -> dict[str, int]:
        sp_pad = dict.fromkeys(PATCH_KEYS, 0)
        for key in (*PATCH_KEYS, *GRID_KEYS):
            pieces = [feature[key] for feature in features if feature.get(key) is not None]
            if not pieces or not sum(piece.size(0) for piece in pieces):
                continue
            batch[key] = torch.cat(pieces)
            if key in PATCH_KEYS:
                patches = batch[key].size(0)
                padded = padded_length(patches, self.spatial_merge_size**2 * self.sp_size)
                sp_pad[key] = padded - patches
                batch[key] = self._slice(pad_to(batch[key], 0, padded), 0)  # (p, C)
        return sp_pad

    def _slice(self, x: Tensor, dim: int) -> Tensor:
        part = x.size(dim) // self.sp_size
        return x.narrow(dim, self.sp_rank * part, part).contiguous()


def _default(key: str, length: int) -> Tensor | None:
    """What a sample without the key means by that; None where nothing can stand in."""
    if key == "position_ids":
        return torch.arange(length).expand(3, -1)
    if key == "attention_mask":
        return torch.ones(length, dtype=torch.int64)
    if key in ("image_mask", "video_mask"):
        return torch.zeros(length, dtype=torch.bool)
    return None


def _pieces(key: str, features: Sequence[Mapping[str, Any]], lengths: list[int]) -> list[Tensor] | None:
    """One tensor (…, L) a sample; None where no sample has the key and the batch can do without."""
    if key not in ("position_ids", "attention_mask") and all(feature.get(key) is None for feature in features):
        return None
    pieces = []
    for i, (feature, length) in enumerate(zip(features, lengths, strict=True)):
        value = feature.get(key)
        piece = _default(key, length) if value is None else value
        if piece is None or piece.size(-1) != length:
            found = "missing" if piece is None else f"{piece.size(-1)} long"
            raise ValueError(f"Sample {i}: {key} is {found}, but its input_ids has {length} tokens; they go together.")
        if key == "position_ids" and piece.ndim == 1:
            piece = piece.expand(3, -1)
        if key == "labels" and i > 0:
            # The token before it belongs to another sample.
            piece = torch.cat([piece.new_full((1,), IGNORE_INDEX), piece[1:]])
        pieces.append(piece)
    return pieces
