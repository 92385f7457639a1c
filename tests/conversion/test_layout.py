"""The layout table: every row against its own inverse, the reads of any block, the stamp, and detection."""

import pytest
import torch

from conversion.errors import InputError, UsageError
from conversion.layout import (
    LAYOUTS,
    Stamp,
    detect_layout,
    fused_reads,
    logical_name,
    pack,
    read_stamp,
    stamp_metadata,
    unpack,
)

PREFIX = "model.language_model.layers.3.mlp.experts."
GATE_UP, DOWN = PREFIX + "gate_up_proj", PREFIX + "down_proj"
E, I, H = 8, 5, 7


def fused(name: str) -> torch.Tensor:
    shape = (E, 2 * I, H) if name == GATE_UP else (E, H, I)
    return torch.arange(E * shape[1] * shape[2], dtype=torch.int32).reshape(shape)


@pytest.mark.parametrize("name", [GATE_UP, DOWN])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_pack_and_unpack_are_inverses(layout, name):
    ep_size = 4 if layout == "ep-sharded" else 1
    stored = pack(layout, name, fused(name), ep_size)
    out = unpack(layout, name, stored, torch.full_like(fused(name), -1), ep_size)
    torch.testing.assert_close(out, fused(name), rtol=0, atol=0)


def test_stored_forms_are_the_documented_ones():
    gate_up, down = fused(GATE_UP), fused(DOWN)
    torch.testing.assert_close(pack("hub", GATE_UP, gate_up)[GATE_UP, None], gate_up.transpose(1, 2))
    torch.testing.assert_close(pack("hub", DOWN, down)[DOWN, None], down.transpose(1, 2))
    torch.testing.assert_close(pack("fused", DOWN, down)[DOWN, None], down)
    per_expert = pack("per-expert", GATE_UP, gate_up)
    assert len(per_expert) == 2 * E
    torch.testing.assert_close(per_expert[PREFIX + "6.gate_proj.weight", None], gate_up[6, :I])
    torch.testing.assert_close(per_expert[PREFIX + "6.up_proj.weight", None], gate_up[6, I:])
    torch.testing.assert_close(pack("ep-sharded", DOWN, down, 4)[DOWN, 3], down[6:8])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "block", [((0, E), (0, 2 * I), (0, H)), ((3, 6), (2, 9), (1, 4)), ((5, 6), (I, 2 * I), (0, 2))]
)
def test_fused_reads_cover_any_block(layout, block):
    ep_size = 2 if layout == "ep-sharded" else 1
    whole = fused(GATE_UP)
    stored = pack(layout, GATE_UP, whole, ep_size)
    (e0, e1), (r0, r1), (c0, c1) = block
    out = torch.full((e1 - e0, r1 - r0, c1 - c0), -1, dtype=whole.dtype)
    for read in fused_reads(layout, GATE_UP, tuple(whole.shape), *block, ep_size=ep_size):
        value = stored[read.name, read.ep_rank][read.index]
        out[read.dest] = value.transpose(-1, -2) if read.transposed else value
    torch.testing.assert_close(out, whole[e0:e1, r0:r1, c0:c1], rtol=0, atol=0)


def test_ep_size_must_divide():
    with pytest.raises(UsageError, match=r"--ep-size 3 does not divide the 8 experts.*\[1, 2, 4, 8\]"):
        pack("ep-sharded", DOWN, fused(DOWN), 3)


@pytest.mark.parametrize(
    ("stored", "logical"),
    [
        (GATE_UP, GATE_UP),
        (PREFIX + "12.up_proj.weight", GATE_UP),
        (PREFIX + "0.down_proj.weight", DOWN),
        ("model.language_model.layers.3.mlp.down_proj.weight", None),
        ("model.language_model.layers.3.mlp.gate.weight", None),
        (PREFIX + "12.extra.weight", None),
        (PREFIX + "up_proj.weight", None),
    ],
)
def test_logical_name(stored, logical):
    assert logical_name(stored) == logical


def test_stamp_round_trip():
    for stamp in (Stamp("hub"), Stamp("fused"), Stamp("per-expert"), Stamp("ep-sharded", 8), Stamp("ep-sharded", 8, 5)):
        assert read_stamp(stamp_metadata(stamp.layout, stamp.ep_size, stamp.ep_rank)) == stamp
    assert read_stamp({"format": "pt"}) is None
    with pytest.raises(InputError, match="ep_rank '9' of ep_size '8'"):
        read_stamp(stamp_metadata("ep-sharded", 8) | {"veomni_ep_rank": "9"})
    with pytest.raises(InputError, match="format version '99'"):
        read_stamp(stamp_metadata("hub") | {"veomni_format_version": "99"})


def shapes(layout: str, h: int = H, i: int = I) -> dict[str, tuple[int, ...]]:
    gate_up, down = torch.zeros(E, 2 * i, h), torch.zeros(E, h, i)
    parts = pack(layout, GATE_UP, gate_up) | pack(layout, DOWN, down)
    return {name: tuple(tensor.shape) for (name, _), tensor in parts.items()}


@pytest.mark.parametrize("layout", ["hub", "fused", "per-expert"])
def test_shape_decides_without_provenance(layout):
    assert detect_layout(shapes(layout), H, I, {"a": None}) == Stamp(layout)


@pytest.mark.parametrize(("h", "i"), [(10, 5), (5, 5)])
def test_square_experts_are_asked_about_not_guessed(h, i):
    for layout in ("hub", "fused"):
        with pytest.raises(UsageError, match="add --source-layout hub"):
            detect_layout(shapes(layout, h, i), h, i, {"a": None})
        assert detect_layout(shapes(layout, h, i), h, i, {"a": None}, declared=layout) == Stamp(layout)
        assert detect_layout(shapes(layout, h, i), h, i, {"a": Stamp(layout)}) == Stamp(layout)
    assert detect_layout(shapes("per-expert", h, i), h, i, {"a": None}) == Stamp("per-expert")


def test_contradictions_are_errors():
    with pytest.raises(UsageError, match="contradicts the checkpoint, whose files are stamped fused"):
        detect_layout(shapes("fused"), H, I, {"a": Stamp("fused")}, declared="hub")
    with pytest.raises(UsageError, match="contradicts the expert tensors"):
        detect_layout(shapes("fused"), H, I, {"a": None}, declared="hub")
    with pytest.raises(InputError, match="stamped hub, but their expert tensors have the shapes of"):
        detect_layout(shapes("fused"), H, I, {"a": Stamp("hub")})
    with pytest.raises(InputError, match="mixes two checkpoints"):
        detect_layout(shapes("fused"), H, I, {"a": Stamp("fused"), "b": Stamp("ep-sharded", 2)})
    with pytest.raises(InputError, match="b carries no stamp"):
        detect_layout(shapes("fused"), H, I, {"a": Stamp("fused"), "b": None})
    with pytest.raises(InputError, match="the checkpoint mixes layouts"):
        detect_layout({**shapes("fused"), DOWN: (E, I, H)}, H, I, {"a": None})
    with pytest.raises(InputError, match="no layout stores with the config's hidden_size 9"):
        detect_layout(shapes("fused"), 9, I, {"a": None})
