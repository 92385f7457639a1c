"""Multimodal rotary positions (M-RoPE) as free functions that data workers can pickle.

Every token has three positions (temporal, height, width). Text advances all three by one; a visual grid holds the
temporal position of its frame and counts rows and columns from the position where it starts, and text goes on after
the larger of its sides. Qwen3-VL puts a timestamp before each video frame, so that a video is a series of one-frame
grids whose time is
told by text: hence frames are laid out one at a time.

The grids say how many tokens each image or frame takes. So two images need no separator, and a sequence whose
placeholders do not match its grids is an error here rather than a wrong position.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

TEXT, IMAGE, VIDEO = 0, 1, 2
MODALITY_NAMES = {IMAGE: "image", VIDEO: "video"}

# What VeOmni's process_sample puts in place of the model's own placeholder tokens.
IMAGE_INPUT_INDEX = -200
VIDEO_INPUT_INDEX = -300


def frame_grids(grid_thw: torch.Tensor | None) -> list[tuple[int, int]]:
    """(height, width) in patches of every frame, in order. grid_thw (n, 3) on the CPU, or None for none."""
    if grid_thw is None:
        return []
    return [(h, w) for t, h, w in grid_thw.tolist() for _ in range(t)]


def image_grids(grid_thw: torch.Tensor | None) -> list[tuple[int, int, int]]:
    """(t, height, width) of every image; an image keeps its own temporal extent."""
    return [] if grid_thw is None else [tuple(grid) for grid in grid_thw.tolist()]


def _grid_positions(t: int, h: int, w: int, start: int) -> torch.Tensor:
    """Positions of a merged grid of t x h x w tokens whose first token stands at `start`: (3, t*h*w)."""
    axes = torch.meshgrid(torch.arange(t), torch.arange(h), torch.arange(w), indexing="ij")
    return torch.stack(axes).reshape(3, -1) + start


def _sample_positions(
    token_types: torch.Tensor, grids: dict[int, list[tuple[int, int, int]]], spatial_merge_size: int
) -> tuple[torch.Tensor, int]:
    """Positions (3, L) of one sample without padding, and the next free position. Takes its grids off the lists."""
    types, counts = torch.unique_consecutive(token_types, return_counts=True)
    pieces, position = [], 0
    for modality, run in zip(types.tolist(), counts.tolist(), strict=True):
        if modality == TEXT:
            pieces.append(torch.arange(run).expand(3, -1) + position)
            position += run
            continue
        while run > 0:
            if not grids[modality]:
                name = MODALITY_NAMES[modality]
                raise ValueError(
                    f"{run} {name} placeholder tokens have no grid: {name}_grid_thw lists fewer {name}s than the token "
                    "ids hold. Pass the grids of every sample in the batch, in order."
                )
            t, h, w = grids[modality].pop(0)
            h, w = h // spatial_merge_size, w // spatial_merge_size
            if t * h * w > run:
                raise ValueError(
                    f"a {MODALITY_NAMES[modality]} grid of {t} x {h} x {w} merged tokens needs {t * h * w} placeholder "
                    f"tokens, but only {run} are left in its run. Was the sample truncated inside it?"
                )
            pieces.append(_grid_positions(t, h, w, position))
            position += max(h, w)
            run -= t * h * w
    if not pieces:
        return torch.zeros(3, 0, dtype=torch.long), 0
    return torch.cat(pieces, dim=1), int(torch.stack([piece.max() for piece in pieces]).max()) + 1


def get_rope_index(
    input_ids: torch.Tensor,
    image_grid_thw: torch.Tensor | None = None,
    video_grid_thw: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    mm_token_type_ids: torch.Tensor | None = None,
    *,
    spatial_merge_size: int,
    image_token_id: int,
    video_token_id: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Three-dimensional rotary positions of a batch.

    Args:
        input_ids: (B, L) int64, any device.
        image_grid_thw, video_grid_thw: (n, 3) patches in time, height and width, all samples' in order; or None.
        attention_mask: (B, L), 0 for padding on either side; None for no padding.
        mm_token_type_ids: (B, L), 0 text, 1 image, 2 video; derived from the placeholder ids when None.
        spatial_merge_size: patches merged into a token along each side.

    Returns:
        position_ids (3, B, L) int64, 0 at padding, and rope_deltas (B, 1) int64: what to add to the number of a
        sample's tokens to get the position of its next one. Both on input_ids' device.

    Raises:
        ValueError: placeholders and grids do not match, or a mask is not shaped like input_ids.
    """
    device = input_ids.device
    for name, given in (("attention_mask", attention_mask), ("mm_token_type_ids", mm_token_type_ids)):
        if given is not None and given.shape != input_ids.shape:
            raise ValueError(f"{name} has shape {tuple(given.shape)}, expected {tuple(input_ids.shape)} as input_ids.")
    if mm_token_type_ids is None:
        is_image, is_video = input_ids == image_token_id, input_ids == video_token_id
        mm_token_type_ids = is_image * IMAGE + is_video * VIDEO
    token_types = mm_token_type_ids.cpu()
    keep = torch.ones_like(token_types, dtype=torch.bool) if attention_mask is None else attention_mask.bool().cpu()

    grids = {IMAGE: image_grids(image_grid_thw), VIDEO: [(1, h, w) for h, w in frame_grids(video_grid_thw)]}
    position_ids = torch.zeros(3, *input_ids.shape, dtype=torch.long)  # (3, B, L)
    rope_deltas = torch.zeros(input_ids.shape[0], 1, dtype=torch.long)
    for row in range(input_ids.shape[0]):
        positions, next_position = _sample_positions(token_types[row, keep[row]], grids, spatial_merge_size)
        position_ids[:, row, keep[row]] = positions
        rope_deltas[row] = next_position - positions.shape[1]
    for modality, name in MODALITY_NAMES.items():
        if grids[modality]:
            raise ValueError(
                f"{len(grids[modality])} grids of {name}_grid_thw have no placeholder tokens: the token ids hold fewer "
                f"{name}s (or video frames) than the grids. Drop the grids that were cut off, or keep their tokens."
            )
    return position_ids.to(device), rope_deltas.to(device)


def _position_id_dict(index_func: Callable, **kwargs: Any) -> dict[str, torch.Tensor]:
    position_ids, rope_deltas = index_func(**kwargs)
    return {"position_ids": position_ids, "rope_deltas": rope_deltas}


def make_position_id_func(spatial_merge_size: int) -> Callable[..., dict[str, torch.Tensor]]:
    """A picklable function of (input_ids, image_grid_thw, video_grid_thw, attention_mask, ...) whose ids carry VeOmni's
    placeholders (-200 image, -300 video); it returns {"position_ids": (3, B, L), "rope_deltas": (B, 1)}."""
    # PATCH(veomni-position-id-func): data workers need it picklable, and process_sample has replaced the token ids
    index_func = partial(
        get_rope_index,
        spatial_merge_size=spatial_merge_size,
        image_token_id=IMAGE_INPUT_INDEX,
        video_token_id=VIDEO_INPUT_INDEX,
    )
    return partial(_position_id_dict, index_func)
