"""Multimodal positions: written-out goldens, and upstream's own function on the same layouts."""

import pickle
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeModel as UpstreamModel

from modeling.qwen3_vl_moe.position_ids import get_rope_index, make_position_id_func

IMAGE, VIDEO, TEXT, PAD = 901, 902, 7, 0


@dataclass
class Layout:
    """Token ids of a batch, their grids, and the positions (t, h, w) of every token, written by hand."""

    ids: list[list[int]]
    golden: list[list[tuple[int, int, int]]]
    deltas: list[int]
    images: list[list[int]] = field(default_factory=list)
    videos: list[list[int]] = field(default_factory=list)
    mask: list[list[int]] | None = None


def text(*positions: int) -> list[tuple[int, int, int]]:
    return [(p, p, p) for p in positions]


# A 4 x 6 grid of patches is 2 x 3 tokens, a 4 x 4 grid 2 x 2, a 2 x 4 grid 1 x 2.
GRID_2x3 = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
GRID_2x2 = [(0, 0), (0, 1), (1, 0), (1, 1)]


def visual(start: int, grid: list[tuple[int, int]]) -> list[tuple[int, int, int]]:
    return [(start, start + h, start + w) for h, w in grid]


LAYOUTS = {
    "text": Layout([[TEXT] * 4], [text(0, 1, 2, 3)], [0]),
    # The image is as long as its longer side, 3; seven tokens after it: 6 + 2 tokens stand at positions up to 4.
    "image_first": Layout([[IMAGE] * 6 + [TEXT] * 2], [visual(0, GRID_2x3) + text(3, 4)], [-3], images=[[1, 4, 6]]),
    "text_image_text": Layout(
        [[TEXT] * 2 + [IMAGE] * 4 + [TEXT]], [text(0, 1) + visual(2, GRID_2x2) + text(4)], [-2], images=[[1, 4, 4]]
    ),
    "separated_images": Layout(
        [[TEXT] + [IMAGE] * 4 + [TEXT] * 2 + [IMAGE] * 6 + [TEXT]],
        [text(0) + visual(1, GRID_2x2) + text(3, 4) + visual(5, GRID_2x3) + text(8)],
        [-5],
        images=[[1, 4, 4], [1, 4, 6]],
    ),
    # Two frames, a timestamp of two tokens before each; the frames are grids of their own.
    "video_with_timestamps": Layout(
        [[TEXT] * 2 + [VIDEO] * 4 + [TEXT] * 2 + [VIDEO] * 4 + [TEXT]],
        [text(0, 1) + visual(2, GRID_2x2) + text(4, 5) + visual(6, GRID_2x2) + text(8)],
        [-4],
        videos=[[2, 4, 4]],
    ),
    "image_and_video": Layout(
        [[IMAGE] * 4 + [TEXT] + [VIDEO] * 6 + [TEXT] + [VIDEO] * 6],
        [visual(0, GRID_2x2) + text(2) + visual(3, GRID_2x3) + text(6) + visual(7, GRID_2x3)],
        [-8],
        images=[[1, 4, 4]],
        videos=[[2, 4, 6]],
    ),
    "left_padding": Layout(
        [[PAD, PAD, TEXT] + [IMAGE] * 4, [TEXT] * 7],
        [[(0, 0, 0)] * 2 + text(0) + visual(1, GRID_2x2), text(*range(7))],
        [-2, 0],
        images=[[1, 4, 4]],
        mask=[[0, 0, 1, 1, 1, 1, 1], [1] * 7],
    ),
    "right_padding": Layout(
        [[IMAGE] * 4 + [TEXT, PAD], [TEXT, IMAGE, IMAGE, IMAGE, IMAGE, TEXT]],
        [visual(0, GRID_2x2) + text(2) + [(0, 0, 0)], text(0) + visual(1, GRID_2x2) + text(3)],
        [-2, -2],
        images=[[1, 4, 4], [1, 4, 4]],
        mask=[[1, 1, 1, 1, 1, 0], [1] * 6],
    ),
    "thin_image": Layout(
        [[TEXT] + [IMAGE] * 2 + [TEXT]], [text(0) + [(1, 1, 1), (1, 1, 2)] + text(3)], [0], images=[[1, 2, 4]]
    ),
}


def arguments(layout: Layout) -> dict[str, torch.Tensor | None]:
    return {
        "input_ids": torch.tensor(layout.ids),
        "image_grid_thw": torch.tensor(layout.images) if layout.images else None,
        "video_grid_thw": torch.tensor(layout.videos) if layout.videos else None,
        "attention_mask": torch.tensor(layout.mask) if layout.mask else None,
    }


def positions_of(layout: Layout, merge: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    return get_rope_index(**arguments(layout), spatial_merge_size=merge, image_token_id=IMAGE, video_token_id=VIDEO)


def upstream_positions(layout: Layout, merge: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Upstream's method on a stand-in for the model, which it only asks for the merge size."""
    given = arguments(layout)
    ids = given["input_ids"]
    stand_in = SimpleNamespace(config=SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=merge)))
    stand_in.get_vision_position_ids = lambda *a, **k: UpstreamModel.get_vision_position_ids(stand_in, *a, **k)
    types = (ids == IMAGE) * 1 + (ids == VIDEO) * 2
    return UpstreamModel.get_rope_index(stand_in, mm_token_type_ids=types, **given)


@pytest.mark.parametrize("name", LAYOUTS)
def test_golden(name: str) -> None:
    layout = LAYOUTS[name]
    positions, deltas = positions_of(layout)
    assert positions.permute(1, 2, 0).tolist() == [[list(p) for p in row] for row in layout.golden]
    assert deltas.flatten().tolist() == layout.deltas


@pytest.mark.parametrize("name", LAYOUTS)
def test_equals_upstream(name: str) -> None:
    positions, deltas = positions_of(LAYOUTS[name])
    expected, expected_deltas = upstream_positions(LAYOUTS[name])
    assert torch.equal(positions, expected) and torch.equal(deltas, expected_deltas)


def test_images_without_a_separator() -> None:
    """The grids tell where one image ends; a separator is not needed."""
    layout = Layout([[IMAGE] * 10], [visual(0, GRID_2x2) + visual(2, GRID_2x3)], [], images=[[1, 4, 4], [1, 4, 6]])
    assert positions_of(layout)[0].permute(1, 2, 0).tolist() == [[list(p) for p in layout.golden[0]]]


def test_merge_size_one() -> None:
    layout = Layout([[TEXT] + [IMAGE] * 6 + [TEXT]], [], [], images=[[1, 2, 3]])
    expected, expected_deltas = upstream_positions(layout, merge=1)
    positions, deltas = positions_of(layout, merge=1)
    assert torch.equal(positions, expected) and torch.equal(deltas, expected_deltas)


def test_position_id_func_takes_veomnis_placeholders_and_pickles() -> None:
    function = pickle.loads(pickle.dumps(make_position_id_func(2)))
    layout = LAYOUTS["image_and_video"]
    given = arguments(layout)
    ids = given.pop("input_ids")
    found = function(input_ids=ids.masked_fill(ids == IMAGE, -200).masked_fill(ids == VIDEO, -300), **given)
    positions, deltas = positions_of(layout)
    assert torch.equal(found["position_ids"], positions) and torch.equal(found["rope_deltas"], deltas)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (Layout([[IMAGE] * 4], [], []), "4 image placeholder tokens have no grid"),
        (Layout([[IMAGE] * 3], [], [], images=[[1, 4, 4]]), "needs 4 placeholder tokens, but only 3"),
        (Layout([[TEXT]], [], [], images=[[1, 4, 4]]), "1 grids of image_grid_thw have no placeholder"),
        (Layout([[VIDEO] * 4], [], [], videos=[[2, 4, 4]]), "1 grids of video_grid_thw have no placeholder"),
    ],
)
def test_placeholders_and_grids_that_do_not_match(layout: Layout, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        positions_of(layout)
