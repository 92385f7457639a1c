"""What a forward is given, brought into one form and checked: positions, masks, packing, images against placeholders.

Every check compares shapes and CPU values: none waits for the device.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from modeling.qwen3_vl_moe.vision_metadata import VisionMetadata, unpack_metadata


def normalize_position_ids(
    position_ids: torch.Tensor, batch_size: int, length: int, collated: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rotary positions (3, B, S) and, where they came along, text positions (B, S), by whose new beginnings
    transformers' masks tell samples of a row apart.

    Args:
        position_ids: (B, S), (3, B, S), (4, B, S) whose first row is the text position, or a collator's (B, 3, S).
        collated: the batch carries cu_seq_lens_q, so (B, 3, S) is meant where shapes alone cannot tell.

    Raises:
        ValueError: any other shape.
    """
    shape = tuple(position_ids.shape)
    # PATCH(veomni-position-ids): a collator stacks samples first, (B, 3, S); turned around here, once
    if shape == (batch_size, 3, length) and (collated or batch_size not in (3, 4)):
        position_ids = position_ids.transpose(0, 1).contiguous()
    elif shape == (batch_size, length):
        return position_ids[None].expand(3, -1, -1), position_ids
    elif shape not in ((3, batch_size, length), (4, batch_size, length), (3, 1, length), (4, 1, length)):
        raise ValueError(
            f"position_ids have shape {shape}; for a batch of {batch_size} x {length} tokens expected one of "
            f"{(batch_size, length)}, {(3, batch_size, length)}, {(4, batch_size, length)} or, from a collator, "
            f"{(batch_size, 3, length)}."
        )
    if position_ids.shape[0] == 4:
        return position_ids[1:], position_ids[0]
    return position_ids, None


def check_tokens(input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> None:
    """Raise a ValueError unless exactly one is given, of shape (B, S) or (B, S, H)."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("pass exactly one of input_ids and inputs_embeds.")
    for name, tensor, shape in (("input_ids", input_ids, "(B, S)"), ("inputs_embeds", inputs_embeds, "(B, S, H)")):
        if tensor is not None and tensor.ndim != 1 + shape.count(","):
            raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}.")


def check_packing(batch_size: int, length: int, cached: bool, cu_seqlens: torch.Tensor, max_seqlen: int) -> None:
    """Raise a ValueError unless a packed batch is one row of `length` tokens (of all ranks), without a cache, with its
    longest segment as an int. Boundaries that lie on a GPU are taken as they are."""
    if batch_size != 1 or cached:
        raise ValueError(
            f"cu_seq_lens_q describes samples packed into one row; got a batch of {batch_size}"
            f"{' and a cache of keys and values' if cached else ''}. Pack the samples into shape (1, S) with "
            "use_cache=False, or pass attention_mask instead of cu_seq_lens_q."
        )
    if cu_seqlens.ndim != 1 or not isinstance(max_seqlen, int) or max_seqlen < 1:
        raise ValueError(
            "cu_seq_lens_q must have shape (segments + 1,) and max_length_q be a Python int (no device sync); got "
            f"shape {tuple(cu_seqlens.shape)} and {max_seqlen!r}."
        )
    if cu_seqlens.device.type == "cpu":
        _check_boundaries(cu_seqlens.tolist(), length, max_seqlen)


def _check_boundaries(bounds: list[int], length: int, max_seqlen: int) -> None:
    sizes = [end - begin for begin, end in pairwise(bounds)]
    if not sizes or bounds[0] != 0 or bounds[-1] != length or min(sizes) < 0 or max(sizes) > max_seqlen:
        raise ValueError(
            f"cu_seq_lens_q must rise from 0 to the row's {length} tokens, in steps of at most max_length_q="
            f"{max_seqlen}; got {bounds[:8]}{' ...' if len(bounds) > 8 else ''}."
        )


def check_attention_mask(attention_mask: torch.Tensor | None, batch_size: int, length: int) -> None:
    """Raise a ValueError for a 2-d mask that does not cover the batch's tokens, cached ones included."""
    if attention_mask is not None and attention_mask.ndim == 2 and attention_mask.shape != (batch_size, length):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, expected {(batch_size, length)}: one column for "
            "each token, cached tokens included."
        )


@dataclass
class VisualInput:
    """One modality of a batch, images or videos: what arrived under its names."""

    name: str
    token_id: int
    pixel_values: torch.Tensor | None
    grid_thw: torch.Tensor | None
    mask: torch.Tensor | None
    metadata: VisionMetadata | None
    token_indices: torch.Tensor | None
    token_counts: list[int] | None

    @classmethod
    def of(
        cls,
        name: str,
        token_id: int,
        pixel_values: torch.Tensor | None,
        grid_thw: torch.Tensor | None,
        mask: torch.Tensor | None,
        entries: dict[str, Any],
    ) -> "VisualInput":
        """With what the collator worked out, where `entries` (multimodal_metadata) has it."""
        indices, counts = entries.get(f"{name}_token_indices"), entries.get(f"{name}_token_counts")
        return cls(name, token_id, pixel_values, grid_thw, mask, unpack_metadata(name, entries), indices, counts)

    def slice_of(self, sp_rank: int) -> tuple[int, int]:
        """Of the M tokens, in order, the first one in a rank's slice of the sequence, and how many are there."""
        assert self.token_counts is not None
        return sum(self.token_counts[:sp_rank]), self.token_counts[sp_rank]

    def check(self, num_tokens: int, merge_unit: int) -> None:
        """Raise a ValueError unless placeholders, pixels and grids describe the same images."""
        if self.pixel_values is None:
            if num_tokens:
                raise ValueError(
                    f"the input holds {num_tokens} {self.name} placeholder tokens but no {self.name} features: pass "
                    f"the processor's pixel values of these {self.name}s, or remove the placeholders."
                )
            return
        if self.metadata is None:
            raise ValueError(f"pixel values of {self.name}s came without {self.name}_grid_thw; pass the processor's.")
        num_features = self.metadata.num_patches // merge_unit
        if num_tokens != num_features:
            raise ValueError(
                f"the input holds {num_tokens} {self.name} placeholder tokens, but its pixel values make "
                f"{num_features} {self.name} features. Was the text truncated inside one {self.name}, or one left out?"
            )
