"""Experts spread over ranks give the same outputs and gradients as experts in one place; recompute costs no counts."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from modeling.distributed.expert_parallel import plan_exchange, recompute_context_fn
from modeling.ops.experts import fused_moe_forward
from modeling.ops.experts.routing import route_by_expert

EXPERTS, H, I, K = 8, 24, 20, 3
ROUTES = ["random", "skewed", "one expert", "empty ranks", "duplicates"]


def tokens_of(routes: str, rank: int) -> int:
    """Every rank has another number of tokens; with "empty ranks", even ranks have none."""
    return 0 if routes == "empty ranks" and rank % 2 == 0 else 11 + 5 * rank


def make_inputs(routes: str, rank: int, world: int) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """This rank's tokens, routing weights, all expert weights (the same on every rank); choices; output gradient."""
    shared = torch.Generator().manual_seed(1)
    own = torch.Generator().manual_seed(100 + rank)
    tokens = tokens_of(routes, rank)
    likelihood = torch.rand(tokens, EXPERTS, generator=own)
    if routes == "skewed":
        likelihood = likelihood * torch.arange(1, EXPERTS + 1) ** -1.0
    index = likelihood.topk(K, dim=-1).indices
    if routes == "one expert":
        index = torch.full((tokens, K), EXPERTS - 1)
    if routes == "duplicates":
        index = index[:, :1].expand(-1, K).contiguous()
    inputs = [
        torch.randn(tokens, H, generator=own),
        torch.rand(tokens, K, generator=own),
        torch.randn(EXPERTS, 2 * I, H, generator=shared) * 0.3,
        torch.randn(EXPERTS, H, I, generator=shared) * 0.3,
    ]
    return inputs, index, torch.randn(tokens, H, generator=own)


def run_alone(routes: str, world: int) -> list[list[torch.Tensor]]:
    """Per rank: output, gradients of tokens and routing weights, and of all experts summed over ranks, without EP."""
    results = []
    for rank in range(world):
        inputs, index, gradient = make_inputs(routes, rank, world)
        x, w, gate_up, down = leaves = [t.requires_grad_() for t in inputs]
        out = fused_moe_forward(x, index, w, gate_up, down, backend="eager")
        results.append([out.detach(), *torch.autograd.grad(out, leaves, gradient)])
    sums = [sum(result[i] for result in results) for i in (3, 4)]
    return [[*result[:3], *sums] for result in results]


def local(weight: torch.Tensor) -> torch.Tensor:
    """This rank's experts of a whole weight, as a leaf."""
    return weight.chunk(dist.get_world_size())[dist.get_rank()].detach().clone().requires_grad_()


def run_spread(routes: str, frozen: str = "") -> list[torch.Tensor | None]:
    """On each rank: output and gradients with the experts spread over all ranks."""
    rank, world = dist.get_rank(), dist.get_world_size()
    (x, w, gate_up, down), index, gradient = make_inputs(routes, rank, world)
    x, w, gate_up, down = x.requires_grad_(), w.requires_grad_(), local(gate_up), local(down)
    if frozen == "experts":
        gate_up.requires_grad_(False), down.requires_grad_(False)
    if frozen == "tokens of odd ranks" and rank % 2:
        x.requires_grad_(False), w.requires_grad_(False)
    out = fused_moe_forward(x, index, w, gate_up, down, ep_group=dist.group.WORLD, backend="grouped_mm")
    out.backward(gradient)
    return [out.detach(), x.grad, w.grad, gate_up.grad, down.grad]


def assert_spread_equals_alone(spread: list[list[Any]], routes: str, world: int) -> None:
    for rank, (got, expected) in enumerate(zip(spread, run_alone(routes, world), strict=True)):
        for name, a, b in zip(("output", "tokens", "weights", "gate_up", "down"), got, expected, strict=True):
            if name in ("gate_up", "down"):
                b = b.chunk(world)[rank]
            if a is not None:
                error = float((a - b).norm() / b.norm().clamp_min(1e-30))
                # fp32; an expert's rows are summed in another order than in one process: some 1e-7 by norm.
                assert error <= (2e-6 if name == "output" else 5e-6), f"{name} on rank {rank}: {error:.1e}"


@pytest.mark.parametrize("routes", ROUTES)
@pytest.mark.parametrize("world", [2, 4])
def test_outputs_and_gradients_equal_those_without_ep(pools: Callable, world: int, routes: str) -> None:
    spread = pools(world).run(run_spread, routes)
    assert_spread_equals_alone(spread, routes, world)
    # An expert that no rank's tokens chose gets zeros, not None.
    assert all(gradient is not None for result in spread for gradient in result)


@pytest.mark.parametrize("frozen", ["experts", "tokens of odd ranks"])
def test_frozen_parts_leave_the_collectives_alone(pools: Callable, frozen: str) -> None:
    spread = pools(2).run(run_spread, "random", frozen)
    assert_spread_equals_alone(spread, "random", 2)
    missing = {"experts": [(3, 4), (3, 4)], "tokens of odd ranks": [(), (1, 2)]}[frozen]
    assert [tuple(i for i, g in enumerate(result) if g is None) for result in spread] == missing


def compare_bitwise() -> list[bool]:
    """The same routes with EP and without, one rank's tokens at a time: which results carry the same bits."""
    rank, world = dist.get_rank(), dist.get_world_size()
    (x, w, gate_up, down), index, gradient = make_inputs("random", rank, world)
    dtype = torch.bfloat16  # rounding would show a routing weight or a sum applied elsewhere
    x, gradient, gate_up, down = (t.to(dtype) for t in (x, gradient, gate_up, down))
    alone = [t.clone().requires_grad_() for t in (x, w, gate_up, down)]
    out = fused_moe_forward(alone[0], index, *alone[1:], backend="grouped_mm")
    expected = [out, *torch.autograd.grad(out, alone[:2], gradient)]
    spread = [x.clone().requires_grad_(), w.clone().requires_grad_(), local(gate_up), local(down)]
    out = fused_moe_forward(spread[0], index, *spread[1:], ep_group=dist.group.WORLD, backend="grouped_mm")
    got = [out, *torch.autograd.grad(out, spread[:2], gradient)]
    return [torch.equal(a, b) for a, b in zip(got, expected, strict=True)]


def test_arithmetic_is_the_same_bit_for_bit(pools: Callable) -> None:
    assert all(all(result) for result in pools(2).run(compare_bitwise))


class Counter:
    """Counts all-to-alls and what they carry while it is active."""

    def __init__(self) -> None:
        self.original = dist.all_to_all_single
        self.elements: list[int] = []

    def __enter__(self) -> "Counter":
        def counted(output: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.elements.append(output.numel())
            return self.original(output, *args, **kwargs)

        dist.all_to_all_single = counted
        return self

    def __exit__(self, *_: object) -> None:
        dist.all_to_all_single = self.original

    def take(self) -> list[int]:
        taken, self.elements = self.elements, []
        return taken


def keep_nothing(*_: Any, **__: Any) -> CheckpointPolicy:
    return CheckpointPolicy.PREFER_RECOMPUTE


def count_exchanges(kind: str) -> tuple[list[int], list[int], list[torch.Tensor], list[torch.Tensor], list[int]]:
    """What each all-to-all of two layers carried, forward and backward; gradients with and without recompute."""
    (x, w, gate_up, down), index, gradient = make_inputs("random", dist.get_rank(), dist.get_world_size())
    gate_up, down = local(gate_up), local(down)

    def two_layers(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        layer = partial(fused_moe_forward, ep_group=dist.group.WORLD, backend="grouped_mm")
        return layer(layer(x, index, w, gate_up, down).tanh(), index.flip(0), w, gate_up, down).tanh()

    context_fns = {
        "recompute": recompute_context_fn,
        "selective": partial(recompute_context_fn, partial(create_selective_checkpoint_contexts, keep_nothing)),
    }
    leaves = [x.requires_grad_(), w.requires_grad_(), gate_up, down]
    expected = torch.autograd.grad(two_layers(x, w), leaves, gradient)
    with Counter() as counter:
        if kind == "none":
            out = two_layers(x, w)
        else:
            out = checkpoint(two_layers, x, w, use_reentrant=False, context_fn=context_fns[kind])
        forward = counter.take()
        got = torch.autograd.grad(out, leaves, gradient, retain_graph=True)
        backward = counter.take()
        again = torch.autograd.grad(out, leaves, gradient)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
    arrivals = [
        plan_exchange(route_by_expert(choices, EXPERTS).offsets, dist.group.WORLD).source.numel()
        for choices in (index, index.flip(0))
    ]
    return forward, backward, list(got), list(expected), arrivals


@pytest.mark.parametrize("kind", ["none", "recompute", "selective"])
def test_exchanges_per_layer_and_recompute_without_counts(pools: Callable, kind: str) -> None:
    for rank, (forward, backward, got, expected, arrivals) in enumerate(pools(2).run(count_exchanges, kind)):
        sent = tokens_of("random", rank) * K

        def layer(arrived: int, sent: int = sent) -> list[int]:
            return [EXPERTS, arrived * H, sent * H]  # counts, dispatch, collect

        def adjoint(arrived: int, sent: int = sent) -> list[int]:
            return [arrived * H, arrived, sent * H, sent]  # gradient, routing weight; back: tokens', weights' gradient

        first, second = arrivals
        assert forward == layer(first) + layer(second)
        recomputed = [] if kind == "none" else layer(first)[1:] + layer(second)[1:]
        assert backward == recomputed + adjoint(second) + adjoint(first)
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a, b)


def refuse() -> str:
    x, index = torch.zeros(2, H), torch.zeros(2, K, dtype=torch.int64)
    weights = torch.zeros(2, K), torch.zeros(4, 2 * I, H), torch.zeros(4, H, I)
    try:
        fused_moe_forward(x, index, *weights, ep_group=dist.group.WORLD, backend="eager")
    except ValueError as error:
        message = str(error)
    try:
        plan_exchange(torch.zeros(8, dtype=torch.int32), dist.group.WORLD)
    except ValueError as error:
        message += "\n" + str(error)
    return message


def test_eager_and_uneven_experts_are_refused_on_every_rank(pools: Callable) -> None:
    for message in pools(2).run(refuse):
        assert "EP group of 2" in message and "7 experts cannot be divided" in message
