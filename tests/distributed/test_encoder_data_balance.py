"""Encoder balancer: the plan, and that images go out and come back with exact values and gradients on every mesh."""

import pytest
import torch
import torch.distributed as dist

from modeling.distributed.encoder_data_balance import EncoderDataBalancer, plan_exchange
from modeling.distributed.parallel_state import ParallelState
from modeling.distributed.sequence_parallel import padded_length
from tests.distributed.ranks import Mesh, state_of

MERGE, CHANNELS = 2, 6
# Grids per data rank. With one data rank only the first list is used, with two the first two.
CASES = {
    "everything on one rank": [[(1, 4, 4), (1, 2, 6), (1, 8, 4), (2, 2, 2)], [], [], []],
    "fewer images than ranks": [[], [(1, 4, 6)], [], []],
    "no images": [[], [], [], []],
    "unequal": [[(1, 2, 2)], [(3, 4, 4), (1, 6, 6)], [(1, 8, 8)], [(1, 2, 2), (1, 2, 4), (1, 4, 2)]],
}
MESHES = [(4, 1), (2, 2), (1, 4)]


def balancer(state: ParallelState | None = None) -> EncoderDataBalancer:
    return EncoderDataBalancer(MERGE, hidden_size=8, intermediate_size=20, parallel_state=state or ParallelState())


def test_cost_counts_attention_per_frame():
    """A video of four frames costs four images, not one image of four times the patches."""
    image, video, large = (balancer().cost(grid) for grid in ((1, 4, 4), (4, 4, 4), (1, 8, 8)))
    assert video == 4 * image
    assert large > 4 * image


def test_assignment_balances_and_stays_home():
    plan = balancer().assign([[(1, 8, 8), (1, 8, 8)], [(1, 2, 2)], []])
    assert sorted(plan[0] + plan[1]) == [0, 1, 2]
    assert plan[0][0] == 0
    even = [[(1, 4, 4)], [(1, 4, 4)], [(1, 4, 4)]]
    assert balancer().assign(even) == [[0], [1], [2]]


def test_plans_of_all_ranks_fit_together():
    tokens, home, target = [5, 0, 3, 8], [0, 0, 1, 1], [1, 0, 0, 1]
    plans = [plan_exchange(tokens, home, target, dp_size=2, sp_size=2, rank=rank) for rank in range(4)]
    for r, plan in enumerate(plans):
        assert [plan.send[q] for q in range(4)] == [plans[q].receive[r] for q in range(4)]
        assert len(plan.pick) == sum(plan.send)
        assert len(plan.place) == sum(plan.receive)
    assert sum(sum(plan.send) for plan in plans) == 16
    assert [plan.rows_before for plan in plans] == [3, 3, 6, 6]
    assert [plan.rows_after for plan in plans] == [2, 2, 7, 7]


def pixels_of(data_rank: int, grids: list[tuple[int, int, int]], sp_size: int) -> torch.Tensor:
    """All padded patches of a data rank; each row is unlike any other."""
    patches = sum(t * h * w for t, h, w in grids)
    rows = torch.arange(patches * CHANNELS, dtype=torch.float64).view(patches, CHANNELS) + 1 + 10_000 * data_rank
    return torch.nn.functional.pad(rows, (0, 0, 0, padded_length(patches, MERGE**2 * sp_size) - patches))


def encoder(patches: torch.Tensor) -> list[torch.Tensor]:
    """Three outputs a merged token, each a function of its own patches alone."""
    tokens = patches.reshape(-1, MERGE**2 * CHANNELS)
    return [tokens.sin(), tokens.square() * 1e-6, tokens.cos()]


def round_trip(mesh: tuple[int, int], grids: list[list[tuple[int, int, int]]]) -> dict:
    state = state_of(Mesh(mesh[0], sp=mesh[1]))
    own = grids[state.dp_rank]
    rows = pixels_of(state.dp_rank, own, state.sp_size).chunk(state.sp_size)[state.sp_rank] if own else None
    pixels = torch.zeros(0, CHANNELS, dtype=torch.float64) if rows is None else rows.clone()
    pixels.requires_grad_()
    balance = balancer(state)
    moved, grid = balance.balance_data(pixels, torch.tensor(own) if own else None)
    patches = int(grid.prod(1).sum())
    assert moved.size(0) * state.sp_size == padded_length(patches, MERGE**2 * state.sp_size)
    outputs = encoder(moved)
    if not len(grid):  # what the model does on a rank that is left without images: a dummy whose output goes nowhere
        outputs = [torch.cat([o, torch.full((2, o.size(1)), 3.0, dtype=o.dtype)]) for o in outputs]
    main, deepstack = balance.data_bridge(outputs[0], outputs[1:])
    weights = [torch.linspace(0.5, 2, o.numel(), dtype=torch.float64).view_as(o) for o in (main, *deepstack)]
    sum((o * w).sum() for o, w in zip((main, *deepstack), weights, strict=True)).backward()

    reference = pixels.detach().clone().requires_grad_()
    real = min(max(sum(t * h * w for t, h, w in own) // MERGE**2 - state.sp_rank * main.size(0), 0), main.size(0))
    loss = torch.zeros((), dtype=torch.float64)
    for o, w, r in zip((main, *deepstack), weights, encoder(reference), strict=True):
        torch.testing.assert_close(o[:real], r[:real], rtol=0, atol=0)
        assert not o[real:].any()
        loss = loss + (r[:real] * w[:real]).sum()
    if reference.numel():
        loss.backward()
        torch.testing.assert_close(pixels.grad, reference.grad, rtol=0, atol=0)
    cost = sum(balance.cost(tuple(g)) for g in grid.tolist())
    return {"cost": cost, "order": dist.get_rank(), "images": len(grid)}


@pytest.mark.parametrize("mesh", MESHES, ids=lambda mesh: f"dp{mesh[0]}-sp{mesh[1]}")
@pytest.mark.parametrize("case", CASES)
def test_round_trip_is_exact(pools, mesh: tuple[int, int], case: str):
    grids = CASES[case][: mesh[0]]
    results = pools(4).run(round_trip, mesh, grids)
    per_data_rank = results[:: mesh[1]]
    assert sum(r["images"] for r in per_data_rank) == sum(map(len, grids))
    costs = [balancer().cost(grid) for own in grids for grid in own]
    # Greedy by falling cost never leaves a rank with more than the mean and one largest image.
    bound = sum(costs) / mesh[0] + max(costs, default=0)
    assert max(r["cost"] for r in per_data_rank) <= bound


def raise_on_wrong_patches() -> None:
    state = state_of(Mesh(2, sp=2))
    grid = torch.tensor([[1, 4, 4]])
    with pytest.raises(ValueError, match=r"has 12 image patches.* make 8"):
        balancer(state).balance_data(torch.zeros(12, CHANNELS), grid)
    with pytest.raises(ValueError, match=r"1 x 3 x 2 = 6 patches.* 4"):
        balancer(state).balance_data(torch.zeros(8, CHANNELS), torch.tensor([[1, 3, 2]]))


def test_wrong_patches_are_refused(pools):
    pools(4).run(raise_on_wrong_patches)
