"""Encoder balancing: gives every data rank's vision encoder the same work, whoever the images belong to.

Packing evens out tokens, not pixels: one rank may hold all the images of a step while the others wait for its encoder.
Before the encoder `balance_data` moves images between the data ranks; after it `data_bridge` brings their embeddings
back, and gradients retrace both ways exactly. VeOmni's balancer has the same two calls; this one also

- counts attention, which is quadratic in a frame and not in a video (`EncoderDataBalancer.cost`);
- works under sequence parallelism, where an image may straddle ranks: rows move between all ranks, from the slice they
  are in to the slice they belong in;
- works with fewer images than data ranks, and on ranks that have none;
- keeps an image at home where that costs no balance.

Every rank of the world calls both functions in every step, whatever its data. The plan needs the grids of all data
ranks on the host; they travel as CPU tensors where the process group can carry those (gloo beside NCCL), otherwise
through the accelerator, which then costs a synchronisation.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from .parallel_state import ParallelState, get_parallel_state
from .sequence_parallel import all_gather_single, all_to_all_rows, padded_length

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Exchange:
    """One rank's part in moving rows from one layout to another; `reverse()` is the way back."""

    send: list[int]
    """Rows for each rank."""
    receive: list[int]
    """Rows from each rank."""
    pick: Tensor
    """Local row of each row sent, in sending order; int64 on the CPU."""
    place: Tensor
    """Local row that each received row goes to, in receiving order; int64 on the CPU."""
    rows_before: int
    rows_after: int

    def reverse(self) -> "Exchange":
        return Exchange(self.receive, self.send, self.place, self.pick, self.rows_after, self.rows_before)

    def move(self, rows: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        """(rows_before or more, C) -> (rows_after, C); rows that nobody sends are zero.

        forward: all-to-all of rows; backward: the rows go back (sum).
        """
        outgoing = rows.index_select(0, self.pick.to(rows.device, non_blocking=True))
        incoming = all_to_all_rows(outgoing, self.send, self.receive, group)
        place = self.place.to(rows.device, non_blocking=True)
        return rows.new_zeros(self.rows_after, rows.size(1)).index_copy(0, place, incoming)


def plan_exchange(
    tokens: Sequence[int], home: Sequence[int], target: Sequence[int], dp_size: int, sp_size: int, rank: int
) -> Exchange:
    """How `rank` moves the tokens of every image from the data rank `home[i]` to `target[i]`.

    On both sides a data rank's images stand in the order given, padded to a multiple of sp_size and cut into sp_size
    slices; rank = data rank x sp_size + place in the sequence. Both ends of a pair of ranks find the same order.

    Args:
        tokens: rows of each image, over all data ranks.
    """
    before, after = [0] * dp_size, [0] * dp_size
    starts = []
    for length, source, destination in zip(tokens, home, target, strict=True):
        starts.append((before[source], after[destination]))
        before[source] += length
        after[destination] += length
    slice_before = [padded_length(length, sp_size) // sp_size for length in before]
    slice_after = [padded_length(length, sp_size) // sp_size for length in after]

    mine = rank // sp_size
    legs: list[list[Tensor]] = [[torch.zeros(0, dtype=torch.int64)] for _ in range(4)]
    for i, (length, source, destination) in enumerate(zip(tokens, home, target, strict=True)):
        if length == 0 or mine not in (source, destination):
            continue
        here = torch.arange(starts[i][0], starts[i][0] + length)
        there = torch.arange(starts[i][1], starts[i][1] + length)
        legs[0].append(source * sp_size + here // slice_before[source])
        legs[1].append(here % slice_before[source])
        legs[2].append(destination * sp_size + there // slice_after[destination])
        legs[3].append(there % slice_after[destination])
    rank_before, row_before, rank_after, row_after = (torch.cat(leg) for leg in legs)

    out, come = rank_before == rank, rank_after == rank
    world = dp_size * sp_size
    return Exchange(
        send=torch.bincount(rank_after[out], minlength=world).tolist(),
        receive=torch.bincount(rank_before[come], minlength=world).tolist(),
        pick=row_before[out][rank_after[out].argsort(stable=True)],
        place=row_after[come][rank_before[come].argsort(stable=True)],
        rows_before=slice_before[mine],
        rows_after=slice_after[mine],
    )


class EncoderDataBalancer:
    """Moves images between data ranks before the vision encoder, and their embeddings back after it.

    Args:
        spatial_merge_size: patches along a side of a merged token; a token's patches stay together.
        hidden_size, intermediate_size: of the encoder's blocks; they weigh linear layers against attention.
        parallel_state: None takes the current one.
    """

    def __init__(
        self,
        spatial_merge_size: int,
        hidden_size: int,
        intermediate_size: int,
        parallel_state: ParallelState | None = None,
    ) -> None:
        self.merge_unit = spatial_merge_size**2
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.parallel_state = parallel_state or get_parallel_state()
        self._exchanges: dict[str, Exchange] = {}

    def cost(self, grid: Grid) -> int:
        """Multiplications of one encoder block on one image or video: linear in patches, quadratic within a frame.

        Per patch: query, key, value and output projections 4·C², MLP 2·C·I, scores and weighted sum 2·C·(h·w).
        """
        t, h, w = grid
        per_patch = 4 * self.hidden_size**2 + 2 * self.hidden_size * (self.intermediate_size + h * w)
        return t * h * w * per_patch

    def assign(self, grids: Sequence[Sequence[Grid]]) -> list[list[int]]:
        """Data rank of every image, per home rank: the costliest image first, to the rank with the least work so far.

        Ties go home, then to the lower number, so that all ranks find the same plan.
        """
        load = [0] * len(grids)
        queue = sorted((-self.cost(grid), home, i) for home, own in enumerate(grids) for i, grid in enumerate(own))
        placed = [[0] * len(own) for own in grids]
        for negative_cost, home, i in queue:
            target = min(range(len(load)), key=lambda rank, home=home: (load[rank], rank != home, rank))  # type: ignore[misc]
            load[target] -= negative_cost
            placed[home][i] = target
        return placed

    def balance_data(
        self, pixel_values: Tensor, grid_thw: Tensor | None, data_type: str = "image"
    ) -> tuple[Tensor, Tensor]:
        """The patches and grids that this rank's encoder is to work on. All ranks call it, with or without images.

        Args:
            pixel_values: (p, C) this rank's slice of its data rank's patches, padded as the collator pads; (0, C) where
                there are none.
            grid_thw: (n, 3) integers, whole, or None for none.
            data_type: name under which the plan waits for `data_bridge`: "image" or "video".

        Returns:
            pixel_values (q, C), sliced and padded the same way, no rows where this rank is left without images, and
            grid_thw (m, 3) int64 on the CPU, whole.

        forward: all-gather of grids, all-to-all of rows; backward: the rows go back (sum).
        """
        state = self.parallel_state
        grids = self._gather_grids(grid_thw, pixel_values.device)
        placed = self.assign(grids)
        images = [(grid, home, placed[home][i]) for home, own in enumerate(grids) for i, grid in enumerate(own)]
        exchange = plan_exchange(
            [self._tokens(grid) for grid, _, _ in images],
            [home for _, home, _ in images],
            [target for _, _, target in images],
            state.dp_size,
            state.sp_size,
            state.rank,
        )
        if pixel_values.size(0) != exchange.rows_before * self.merge_unit:
            raise ValueError(
                f"balance_data: rank {state.rank} has {pixel_values.size(0)} {data_type} patches, but its grids and "
                f"sp_size={state.sp_size} make {exchange.rows_before * self.merge_unit}; pad to a multiple of "
                f"spatial_merge_size² x sp_size and slice, as the collator does."
            )
        self._exchanges[data_type] = exchange
        tokens = pixel_values.reshape(exchange.rows_before, self.merge_unit * pixel_values.size(1))
        moved = exchange.move(tokens, state.world_group)
        own = [grid for grid, _, target in images if target == state.dp_rank]
        return moved.reshape(-1, pixel_values.size(1)), torch.tensor(own, dtype=torch.int64).reshape(-1, 3)

    def data_bridge(
        self, hidden_states: Tensor, deepstack: Sequence[Tensor] = (), data_type: str = "image"
    ) -> tuple[Tensor, list[Tensor]]:
        """Bring the encoder's outputs home: the inverse of the last `balance_data(data_type=...)`.

        Args:
            hidden_states: (q / merge², H) this rank's slice of what its encoder made; rows of a dummy image stay.
            deepstack: more outputs of the same shape; they travel in the same exchange.

        Returns:
            The same as (p / merge², H), in the layout that `balance_data` was given. Rows of padding are zero.

        forward: all-to-all of rows; backward: the rows go back (sum).
        """
        exchange = self._exchanges.pop(data_type).reverse()
        outputs = torch.cat([hidden_states, *deepstack], dim=-1)
        first, *rest = exchange.move(outputs, self.parallel_state.world_group).split(hidden_states.size(-1), dim=-1)
        return first, rest

    def _gather_grids(self, grid_thw: Tensor | None, device: torch.device) -> list[list[Grid]]:
        """Every data rank's grids, on the host: one exchange of counts, one of grids padded to the longest list."""
        own = torch.zeros(0, 3, dtype=torch.int64) if grid_thw is None else grid_thw.to("cpu", torch.int64)
        group, ranks = self.parallel_state.dp_group, self.parallel_state.dp_size
        if group is None:
            return [[(t, h, w) for t, h, w in own.tolist()]]
        carrier = torch.device("cpu") if "cpu:" in str(dist.get_backend_config(group)) else device
        counts = torch.empty(ranks, dtype=torch.int64, device=carrier)
        all_gather_single(counts, torch.tensor([own.size(0)], device=carrier), group=group)
        longest = int(counts.max())
        padded = torch.zeros(longest, 3, dtype=torch.int64, device=carrier)
        padded[: own.size(0)] = own.to(carrier)
        gathered = padded.new_empty(ranks * longest, 3)
        all_gather_single(gathered, padded, group=group)
        table = gathered.view(ranks, longest, 3).tolist()
        return [[(t, h, w) for t, h, w in rows[:count]] for rows, count in zip(table, counts.tolist(), strict=True)]

    def _tokens(self, grid: Grid) -> int:
        t, h, w = grid
        if t * h * w % self.merge_unit:
            raise ValueError(
                f"A grid of {t} x {h} x {w} = {t * h * w} patches is not a multiple of spatial_merge_size² = "
                f"{self.merge_unit}; resize the image so that its sides are multiples of patch size x merge size."
            )
        return t * h * w // self.merge_unit
