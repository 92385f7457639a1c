"""Token dispatch and combine for expert parallelism (EP): rows travel to the rank that holds their expert, and back.

EP rank r of `group` holds experts [r * e, (r + 1) * e), e = E / ep. The rows that a rank sends are sorted by expert,
hence by destination; they arrive sorted by (sender, expert) and are read in (expert, sender) order through an index, so
no second copy is made. Per layer and forward:

    counts    all-to-all of E integers; the only thing the host ever waits for, because the row exchanges need the sizes
    dispatch  all-to-all of rows, sender -> expert's rank
    collect   all-to-all of rows, expert's rank -> sender

dispatch and collect are each other's inverse, and as linear maps each other's adjoint: the backward of one is the
other. The expert layer (`ops/experts/`) calls them on gradients in its own backward, with the same sizes.

Recomputed forwards need no counts: `recompute_context_fn` makes activation checkpointing hand the first forward's plan
to the second one, so a recomputed layer neither exchanges counts nor waits for the host:

    checkpoint(layer, x, use_reentrant=False, context_fn=recompute_context_fn)
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from contextvars import ContextVar, Token
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

Plan = TypeVar("Plan")


@dataclass(frozen=True)
class ExpertExchange:
    """The sizes and orders of one layer's row exchange. R rows leave this rank, A arrive, e experts live here."""

    group: dist.ProcessGroup
    send_sizes: list[int]
    """Rows for each rank of the group, CPU ints; sum R."""
    receive_sizes: list[int]
    """Rows from each rank of the group, CPU ints; sum A."""
    source: torch.Tensor
    """(A,) int32: which arrived row stands at each place of the expert order."""
    place: torch.Tensor
    """(A,) int32: the place of each arrived row in the expert order; the inverse of `source`."""
    offsets: torch.Tensor
    """(e + 1,) int32: bounds of each local expert's rows in the expert order."""

    def dispatch(self, rows: torch.Tensor) -> torch.Tensor:
        """(R, ...) sorted by expert -> (A, ...) as they arrive. Backward: `collect`."""
        return _all_to_all(rows, self.send_sizes, self.receive_sizes, self.group)

    def collect(self, rows: torch.Tensor) -> torch.Tensor:
        """(A, ...) in expert order -> (R, ...) as `dispatch` took them. Backward: `dispatch`."""
        return _all_to_all(rows[self.place], self.receive_sizes, self.send_sizes, self.group)


def plan_exchange(offsets: torch.Tensor, group: dist.ProcessGroup) -> ExpertExchange:
    """Exchange counts and derive the sizes of this layer's row exchanges. A collective; the host waits once.

    Args: offsets (E + 1,) int32, bounds of each expert's rows among the rows this rank sends.
    Raises ValueError when the experts do not divide evenly over the group.
    """
    ep_size = dist.get_world_size(group)
    num_experts = offsets.numel() - 1
    if num_experts % ep_size:
        raise ValueError(
            f"{num_experts} experts cannot be divided over an expert-parallel group of {ep_size} ranks; choose an "
            f"ep_size that divides {num_experts}"
        )
    send = offsets.diff().view(ep_size, -1)  # (ep, e) rows for each destination and its expert
    receive = torch.empty_like(send)  # (ep, e) rows from each sender for each of our experts
    dist.all_to_all_single(receive, send.contiguous(), group=group)
    send_sizes, receive_sizes = torch.stack([send.sum(1), receive.sum(1)]).tolist()  # the wait

    zero = offsets.new_zeros(1)
    by_expert = receive.t().flatten().cumsum(0, dtype=torch.int32)  # (e * ep,) ends of blocks in expert order
    arrived = receive.flatten().cumsum(0, dtype=torch.int32)  # (ep * e,) ends of blocks as they arrive
    start_by_expert = torch.cat([zero, by_expert])[:-1].view(-1, ep_size).t().flatten()  # (ep * e,) in arrival order
    start_arrived = torch.cat([zero, arrived])[:-1]
    total = sum(receive_sizes)
    shift = torch.repeat_interleave(start_by_expert - start_arrived, receive.flatten(), output_size=total)
    rank = torch.arange(total, dtype=torch.int32, device=offsets.device)
    place = rank + shift  # (A,)
    return ExpertExchange(
        group=group,
        send_sizes=send_sizes,
        receive_sizes=receive_sizes,
        source=torch.empty_like(rank).scatter_(0, place.long(), rank),
        place=place,
        offsets=torch.cat([zero, by_expert[ep_size - 1 :: ep_size]]),
    )


def local_experts(weight: torch.Tensor) -> torch.Tensor:
    """This rank's rows of an expert weight that may still be a DTensor over the EP mesh; differentiable."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


def _all_to_all(
    rows: torch.Tensor, send_sizes: list[int], receive_sizes: list[int], group: dist.ProcessGroup
) -> torch.Tensor:
    arrived = rows.new_empty(sum(receive_sizes), *rows.shape[1:])
    dist.all_to_all_single(arrived, rows.contiguous(), receive_sizes, send_sizes, group=group)
    return arrived


class _Tape:
    """Plans of one checkpointed region in the order its layers made them."""

    def __init__(self) -> None:
        self.plans: list[Any] = []
        self.next = 0
        self.replaying = False


# A context variable, because a recomputed forward runs in autograd's thread for the device, not in the main one.
_TAPE: ContextVar[_Tape | None] = ContextVar("expert_parallel_tape", default=None)


class _TapeContext(AbstractContextManager[None]):
    """Makes `tape` the current one, recording or replaying; re-enterable, for a graph that runs backward twice."""

    def __init__(self, tape: _Tape, replaying: bool, inner: AbstractContextManager[Any] | None) -> None:
        self.tape, self.replaying, self.inner = tape, replaying, inner
        self.token: Token[_Tape | None] | None = None
        self.stack = ExitStack()

    def __enter__(self) -> None:
        if self.inner is not None:
            self.stack.enter_context(self.inner)
        if not self.replaying:
            self.tape.plans.clear()
        self.tape.next, self.tape.replaying = 0, self.replaying
        self.token = _TAPE.set(self.tape)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        assert self.token is not None
        _TAPE.reset(self.token)
        return self.stack.__exit__(kind, error, trace)


ContextFn = Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]


def recompute_context_fn(
    inner: ContextFn | None = None,
) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """`context_fn` for `torch.utils.checkpoint.checkpoint(..., use_reentrant=False)`: a plan is made once.

    A layer that runs again inside the checkpointed region takes the routing order and exchange sizes that it had the
    first time: no sort, no counts, no wait for the host, and no way for a rounding difference to send rows elsewhere.

    Args: inner: another `context_fn` to run inside, for example a selective-checkpoint policy; bind it with
    `functools.partial(recompute_context_fn, inner)`.
    """
    tape = _Tape()
    first, second = inner() if inner is not None else (None, None)
    return _TapeContext(tape, replaying=False, inner=first), _TapeContext(tape, replaying=True, inner=second)


def planned(make: Callable[[], Plan]) -> Plan:
    """`make()`, unless a recomputed forward is running: then what the same call gave in the first forward."""
    tape = _TAPE.get()
    if tape is None:
        return make()
    if tape.replaying:
        plan = tape.plans[tape.next]
        tape.next += 1
        return plan
    plan = make()
    tape.plans.append(plan)
    return plan
