"""The four checkpoint layouts, as one declarative table, and how a checkpoint's layout is told.

Only the experts differ between layouts; every other tensor has one name and one form. The experts of one decoder layer
are two logical tensors, named and shaped as the model holds them:

    …mlp.experts.gate_up_proj   (E, 2I, H)   gate rows first
    …mlp.experts.down_proj      (E, H, I)

`EXPERT_TABLE` says for each layout which stored tensors hold which part of them. Both directions of every conversion
follow from it: what a stored tensor *is* does not depend on whether it is read or written, so each row is its own
inverse, and `overlap` pairs any two rows. `pack` and `unpack` are the same table applied to whole arrays: the readable
reference that the streaming converter is tested against.

Standard library only, nothing from `modeling`: the converter and the model's loader both stand on it.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from conversion.errors import InputError, UsageError

FORMAT_VERSION = "1"
LAYOUTS = ("hub", "fused", "ep-sharded", "per-expert")


@dataclass(frozen=True)
class ExpertRule:
    """How one layout stores (a part of) a logical expert tensor.

    `suffix` is the stored name below `…mlp.experts.`; with `{expert}` in it there is one tensor per expert, else one
    for all, experts stacked on dim 0. `rows` are the halves of each expert's matrix it holds (gate is half 0, up is
    half 1; (0, 2) is the whole). `transposed` tells that each matrix is stored as (columns, rows).
    """

    suffix: str
    rows: tuple[int, int] = (0, 2)
    transposed: bool = False

    @property
    def stacked(self) -> bool:
        """Whether all experts share one stored tensor."""
        return "{expert}" not in self.suffix


EXPERT_TABLE: dict[str, dict[str, tuple[ExpertRule, ...]]] = {
    "hub": {
        "gate_up_proj": (ExpertRule("gate_up_proj", transposed=True),),
        "down_proj": (ExpertRule("down_proj", transposed=True),),
    },
    "fused": {
        "gate_up_proj": (ExpertRule("gate_up_proj"),),
        "down_proj": (ExpertRule("down_proj"),),
    },
    # As fused; `stored_tensors` cuts dim 0 into ep_size equal parts, each in the file set of its rank.
    "ep-sharded": {
        "gate_up_proj": (ExpertRule("gate_up_proj"),),
        "down_proj": (ExpertRule("down_proj"),),
    },
    "per-expert": {
        "gate_up_proj": (
            ExpertRule("{expert}.gate_proj.weight", rows=(0, 1)),
            ExpertRule("{expert}.up_proj.weight", rows=(1, 2)),
        ),
        "down_proj": (ExpertRule("{expert}.down_proj.weight"),),
    },
}

_EXPERT_NAME = re.compile(r"^(?P<prefix>.*\.mlp\.experts\.)(?:(?P<expert>\d+)\.)?(?P<tail>[a-z_]+(?:\.weight)?)$")
_STACKED_TAILS = ("gate_up_proj", "down_proj")
_EXPERT_TAILS = {"gate_proj.weight": "gate_up_proj", "up_proj.weight": "gate_up_proj", "down_proj.weight": "down_proj"}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in a file, and the part of a logical tensor of shape (E, R, C) that it holds.

    `experts` and `rows` are half-open ranges into E and R; columns are always whole. `ep_rank` is None outside
    ep-sharded file sets.
    """

    name: str
    shape: tuple[int, ...]
    experts: tuple[int, int]
    rows: tuple[int, int]
    transposed: bool = False
    stacked: bool = True
    ep_rank: int | None = None


def logical_name(stored_name: str) -> str | None:
    """The logical expert tensor that `stored_name`, of any layout, belongs to; None for every other tensor."""
    match = _EXPERT_NAME.match(stored_name)
    if match is None:
        return None
    tail, expert = match["tail"], match["expert"]
    if expert is None:
        return stored_name if tail in _STACKED_TAILS else None
    return match["prefix"] + _EXPERT_TAILS[tail] if tail in _EXPERT_TAILS else None


def is_per_expert(stored_name: str) -> bool:
    """Whether `stored_name` holds a single expert's matrix."""
    match = _EXPERT_NAME.match(stored_name)
    return match is not None and match["expert"] is not None


def stored_tensors(layout: str, name: str, shape: tuple[int, int, int], ep_size: int = 1) -> Iterator[StoredTensor]:
    """The stored tensors that together hold the logical expert tensor `name` of `shape` (E, R, C), in expert order.

    Raises UsageError when the experts do not divide into `ep_size` parts.
    """
    experts, n_rows, n_cols = shape
    prefix, _, proj = name.rpartition(".")
    rules = EXPERT_TABLE[layout][proj]
    parts = ep_size if layout == "ep-sharded" else 1
    check_ep_size(parts, experts)
    for part in range(parts):
        first, last = experts * part // parts, experts * (part + 1) // parts
        ep_rank = part if layout == "ep-sharded" else None
        if rules[0].stacked:
            for rule in rules:
                matrix = (n_cols, n_rows) if rule.transposed else (n_rows, n_cols)
                full = (last - first, *matrix)
                yield StoredTensor(f"{prefix}.{rule.suffix}", full, (first, last), (0, n_rows), rule.transposed,
                                   ep_rank=ep_rank)  # fmt: skip
            continue
        for expert in range(first, last):
            for rule in rules:
                rows = (n_rows * rule.rows[0] // 2, n_rows * rule.rows[1] // 2)
                yield StoredTensor(f"{prefix}.{rule.suffix.format(expert=expert)}", (rows[1] - rows[0], n_cols),
                                   (expert, expert + 1), rows, rule.transposed, stacked=False)  # fmt: skip


def check_ep_size(ep_size: int, num_experts: int) -> None:
    """Raise UsageError unless `ep_size` is positive and divides `num_experts`."""
    if ep_size < 1 or num_experts % ep_size:
        raise UsageError(
            f"--ep-size {ep_size} does not divide the {num_experts} experts into equal parts; "
            f"use one of {[n for n in range(1, num_experts + 1) if num_experts % n == 0]}"
        )


def overlap(a: StoredTensor, b: StoredTensor) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """The ranges of experts and of rows that both stored tensors hold; None where they have nothing in common."""
    experts = max(a.experts[0], b.experts[0]), min(a.experts[1], b.experts[1])
    rows = max(a.rows[0], b.rows[0]), min(a.rows[1], b.rows[1])
    return (experts, rows) if experts[0] < experts[1] and rows[0] < rows[1] else None


@dataclass(frozen=True)
class FusedRead:
    """`out[dest] = stored[index]`, its last two dims swapped first where `transposed`.

    `index` indexes the stored tensor as it lies in the file (`safe_open(...).get_slice(name)[index]`), `dest` the
    wanted block of the fused tensor. `ep_rank` names the file set for ep-sharded sources, else None.
    """

    name: str
    ep_rank: int | None
    index: tuple[slice, ...]
    dest: tuple[slice, ...]
    transposed: bool


def fused_reads(
    layout: str,
    name: str,
    shape: tuple[int, int, int],
    experts: tuple[int, int] | None = None,
    rows: tuple[int, int] | None = None,
    cols: tuple[int, int] | None = None,
    ep_size: int = 1,
) -> list[FusedRead]:
    """The slices to read from a checkpoint of `layout` for one block of the logical tensor `name` in fused form.

    `shape` is the whole logical shape (E, R, C); `experts`, `rows` and `cols` are half-open ranges (default: all).
    `dest` slices count from the block's own origin. Together the reads cover the block exactly once.
    """
    experts, rows, cols = experts or (0, shape[0]), rows or (0, shape[1]), cols or (0, shape[2])
    wanted = StoredTensor(name, shape, experts, rows)
    reads = []
    for stored in stored_tensors(layout, name, shape, ep_size):
        common = overlap(wanted, stored)
        if common is None:
            continue
        (e0, e1), (r0, r1) = common
        matrix = (slice(r0 - stored.rows[0], r1 - stored.rows[0]), slice(*cols))
        matrix = matrix[::-1] if stored.transposed else matrix
        stack = (slice(e0 - stored.experts[0], e1 - stored.experts[0]),)
        dest = (slice(e0 - experts[0], e1 - experts[0]), slice(r0 - rows[0], r1 - rows[0]), slice(0, cols[1] - cols[0]))
        index = stack + matrix if stored.stacked else matrix
        reads.append(FusedRead(stored.name, stored.ep_rank, index, dest, stored.transposed))
    return reads


def pack(layout: str, name: str, fused: Any, ep_size: int = 1) -> dict[tuple[str, int | None], Any]:
    """The stored tensors of `layout`, by (name, ep_rank), of one fused (E, R, C) array or tensor. Views, no copies."""
    stored = {}
    for part in stored_tensors(layout, name, tuple(fused.shape), ep_size):
        block = fused[slice(*part.experts), slice(*part.rows)]
        block = block.swapaxes(1, 2) if part.transposed else block
        stored[part.name, part.ep_rank] = block if part.stacked else block[0]
    return stored


def unpack(layout: str, name: str, stored: Mapping[tuple[str, int | None], Any], out: Any, ep_size: int = 1) -> Any:
    """The inverse of `pack`: fills `out`, a fused (E, R, C) array or tensor, and returns it."""
    for part in stored_tensors(layout, name, tuple(out.shape), ep_size):
        block = stored[part.name, part.ep_rank]
        block = block if part.stacked else block[None]
        out[slice(*part.experts), slice(*part.rows)] = block.swapaxes(1, 2) if part.transposed else block
    return out


@dataclass(frozen=True)
class Stamp:
    """What a safetensors file's metadata records about its layout."""

    layout: str
    ep_size: int = 1
    ep_rank: int | None = None


def stamp_metadata(layout: str, ep_size: int = 1, ep_rank: int | None = None) -> dict[str, str]:
    """The metadata to write into every safetensors file of `layout`. `read_stamp` is its inverse.

    `ep_rank` is the rank whose experts the file holds, None for files of dense tensors.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}; one of {', '.join(LAYOUTS)}")
    stamp = {"format": "pt", "veomni_format_version": FORMAT_VERSION, "veomni_layout": layout}
    if layout == "ep-sharded":
        stamp["veomni_ep_size"] = str(ep_size)
        if ep_rank is not None:
            stamp["veomni_ep_rank"] = str(ep_rank)
    return stamp


def read_stamp(metadata: Mapping[str, str], where: str = "the file") -> Stamp | None:
    """The stamp in a file's metadata, None where there is none. Raises InputError on a stamp that cannot be."""
    layout = metadata.get("veomni_layout")
    if layout is None:
        return None
    version = metadata.get("veomni_format_version")
    if layout not in LAYOUTS or version != FORMAT_VERSION:
        raise InputError(
            f"{where}: stamped with layout {layout!r}, format version {version!r}; this tool knows "
            f"{', '.join(LAYOUTS)} in version {FORMAT_VERSION}"
        )
    size, rank = metadata.get("veomni_ep_size", "1"), metadata.get("veomni_ep_rank")
    if not size.isdecimal() or int(size) < 1 or not (rank is None or (rank.isdecimal() and int(rank) < int(size))):
        raise InputError(f"{where}: stamped with ep_rank {rank!r} of ep_size {size!r}, which cannot be")
    return Stamp(layout, int(size), None if rank is None else int(rank))


def layouts_by_shape(stored_name: str, shape: tuple[int, ...], hidden: int, expert_intermediate: int) -> set[str]:
    """The layouts in which a tensor of this name and shape could be stored; empty where none fits.

    Only stacked expert tensors tell `hub` from `fused`, and only where their matrices are not square: H != 2I for
    gate_up_proj, H != I for down_proj. Each tensor speaks for itself alone: transformers has written files where one
    of the two was transposed and the other not (its issue 47031), so a decided down_proj says nothing of a square
    gate_up_proj.
    """
    logical = logical_name(stored_name)
    if logical is None:
        return set(LAYOUTS)
    proj = logical.rpartition(".")[2]
    rows, cols = (2 * expert_intermediate, hidden) if proj == "gate_up_proj" else (hidden, expert_intermediate)
    if is_per_expert(stored_name):
        return {"per-expert"}
    fits = set()
    if tuple(shape[1:]) == (cols, rows):
        fits.add("hub")
    if tuple(shape[1:]) == (rows, cols):
        fits.update(("fused", "ep-sharded"))
    return fits


def detect_layout(
    shapes: Mapping[str, tuple[int, ...]],
    hidden: int,
    expert_intermediate: int,
    provenance: Mapping[str, Stamp | None],
    declared: str | None = None,
) -> Stamp:
    """The layout of a checkpoint: by recorded provenance, then by shape; asks instead of guessing.

    `shapes` are the stored tensors', `provenance` what each file (and the manifest or index, where there is one)
    records, None where it records nothing, `declared` the user's --source-layout.

    Raises InputError where records contradict each other, the shapes, or the config; UsageError where `declared`
    contradicts them, or where it is needed and missing.
    """
    recorded = _agreed_provenance(provenance)
    fits = _fitting_layouts(shapes, hidden, expert_intermediate)
    if recorded is not None:
        if declared not in (None, recorded.layout):
            raise UsageError(
                f"--source-layout {declared} contradicts the checkpoint, whose files are stamped {recorded.layout}; "
                "leave the option out"
            )
        if recorded.layout not in fits:
            raise InputError(
                f"the files are stamped {recorded.layout}, but their expert tensors have the shapes of "
                f"{' or '.join(sorted(fits))}; the stamp or config.json is wrong"
            )
        return recorded
    if declared is not None:
        if declared == "ep-sharded":
            raise UsageError("--source-layout ep-sharded: these files carry no stamp that says which rank each is of")
        if declared not in fits:
            raise UsageError(
                f"--source-layout {declared} contradicts the expert tensors, whose shapes are those of "
                f"{' or '.join(sorted(fits))}"
            )
        return Stamp(declared)
    candidates = fits - {"ep-sharded"}
    square = [name for name, shape in shapes.items() if _is_square_stack(name, shape)]
    if square and candidates != {"per-expert"}:
        raise UsageError(
            f"{square[0]} is square, {tuple(shapes[square[0]])}: no shape or stamp tells hub from fused; "
            "add --source-layout hub (published checkpoints) or --source-layout fused (saved by transformers 5)"
        )
    # Without experts all layouts are the same.
    return Stamp(candidates.pop() if len(candidates) == 1 else "fused")


def _agreed_provenance(provenance: Mapping[str, Stamp | None]) -> Stamp | None:
    """The one layout (and ep_size) that every record names; None where nothing is recorded."""
    first: tuple[str, Stamp] | None = None
    for where, stamp in provenance.items():
        if stamp is None:
            continue
        if first is None:
            first = where, stamp
        elif (stamp.layout, stamp.ep_size) != (first[1].layout, first[1].ep_size):
            raise InputError(
                f"{where} is stamped {stamp.layout} (ep_size {stamp.ep_size}), {first[0]} is stamped "
                f"{first[1].layout} (ep_size {first[1].ep_size}): the folder mixes two checkpoints"
            )
    bare = [where for where, stamp in provenance.items() if stamp is None]
    if first is not None and bare:
        raise InputError(
            f"{first[0]} is stamped {first[1].layout}, {bare[0]} carries no stamp: the folder mixes two checkpoints"
        )
    return None if first is None else Stamp(first[1].layout, first[1].ep_size)


def _fitting_layouts(shapes: Mapping[str, tuple[int, ...]], hidden: int, expert_intermediate: int) -> set[str]:
    """The layouts that every expert tensor's name and shape allow. Raises InputError where there is none."""
    fits = set(LAYOUTS)
    decided_by: str | None = None
    for name, shape in shapes.items():
        own = layouts_by_shape(name, shape, hidden, expert_intermediate)
        if not own:
            raise InputError(
                f"{name} has shape {tuple(shape)}, which no layout stores with the config's hidden_size {hidden} and "
                f"moe_intermediate_size {expert_intermediate}"
            )
        if not fits & own:
            raise InputError(
                f"{name} {tuple(shape)} is stored as {' or '.join(sorted(own))}, {decided_by} as "
                f"{' or '.join(sorted(fits))}: the checkpoint mixes layouts"
            )
        if fits & own != fits:
            fits, decided_by = fits & own, f"{name} {tuple(shape)}"
    return fits


def _is_square_stack(name: str, shape: tuple[int, ...]) -> bool:
    """Whether this is a stacked expert tensor whose shape does not tell its orientation."""
    return logical_name(name) is not None and not is_per_expert(name) and tuple(shape[1:2]) == tuple(shape[2:3])
