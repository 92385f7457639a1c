"""The expert layer around a backend's matrix products, with its adjoint written out.

Routes are sorted by expert (`routing.py`); under expert parallelism the rows then travel
(`distributed/expert_parallel.py`); the backend's two functions run the MLP and its adjoint on rows sorted by expert; a
token's rows are summed in fp32 in the order of its routes. With and without expert parallelism the arithmetic is the
same, step by step: routing weights are fp32 and act once, in that last sum. Only the rows that the MLP read and the
pre-activation are kept for backward.

Letters: T tokens, K routes per token, R = T * K rows, N rows that the MLP reads (T, or those that arrived from other
ranks), e experts on this rank, H hidden, I expert intermediate.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from modeling.distributed.expert_parallel import ExpertExchange, plan_exchange, planned
from modeling.ops.experts import grouped
from modeling.ops.experts.pointwise import gather_sum
from modeling.ops.experts.routing import Routing, route_by_expert

Gradients = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


def experts(
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    weights: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    backend: str,
    ep_group: dist.ProcessGroup | None,
) -> torch.Tensor:
    """The layer as an autograd function. Arguments as `fused_moe_forward`, checked by it; weights fp32."""
    ep_size = 1 if ep_group is None else dist.get_world_size(ep_group)
    # Outside autograd: the choice of experts has no gradient, and a recomputed forward takes it from its first run.
    routing, exchange = planned(lambda: _plan(top_k_index, gate_up_proj.shape[0] * ep_size, ep_group))
    return _Experts.apply(hidden_states, weights, gate_up_proj, down_proj, routing, exchange, backend)


def _plan(
    top_k_index: torch.Tensor, num_experts: int, ep_group: dist.ProcessGroup | None
) -> tuple[Routing, ExpertExchange | None]:
    with torch.no_grad():
        routing = route_by_expert(top_k_index, num_experts)
        return routing, None if ep_group is None else plan_exchange(routing.offsets, ep_group)


def backend_module(backend: str) -> ModuleType:
    """The module whose `forward` and `backward` run the MLP on rows sorted by expert."""
    if backend == "quack":
        from modeling.ops.experts import quack  # quack-kernels is an optional dependency

        return quack
    return grouped


def layer_forward(
    hidden_states: torch.Tensor,
    weights: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    routing: Routing,
    exchange: ExpertExchange | None,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """rows = dispatch(x[token]);  pre, y = MLP(rows);  out = sum_k weight * collect(y).  -> out (T, H), rows, pre.

    Without an exchange dispatch and collect vanish, and rows (N, H) are the hidden states themselves.
    """
    rows, source, offsets = hidden_states, routing.token, routing.offsets
    if exchange is not None:
        rows, source, offsets = exchange.dispatch(hidden_states[routing.token]), exchange.source, exchange.offsets
    pre, y = backend_module(backend).forward(rows, source, offsets, gate_up_proj, down_proj)
    if exchange is not None:
        y = exchange.collect(y)
    return gather_sum(y, routing.position, weights), rows, pre


def layer_backward(
    d_out: torch.Tensor,
    rows: torch.Tensor,
    pre: torch.Tensor,
    weights: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    routing: Routing,
    exchange: ExpertExchange | None,
    backend: str,
    needs: tuple[bool, bool, bool, bool],
    reuse_pre: bool = False,
) -> Gradients:
    """d_rows_out = dispatch(d_out[token]), weights likewise;  the MLP's adjoint;  d_x = sum_k collect(d_rows);
    d_weight = collect(d_row_weight).  Sums throughout.

    needs: which gradients are wanted, of hidden states, routing weights, gate_up_proj and down_proj. reuse_pre: this is
    the last use of pre, whose memory its gradient takes.
    """
    need_x, need_weights, need_gate_up, need_down = needs
    source, offsets = routing.token, routing.offsets
    row_weight = weights.flatten().index_select(0, routing.route)  # (R,)
    if exchange is not None:
        d_out, row_weight = exchange.dispatch(d_out[routing.token]), exchange.dispatch(row_weight)[exchange.source]
        source, offsets = exchange.source, exchange.offsets
        # Which gradients are wanted may differ between ranks (one without images, say); the collectives may not.
        need_x = need_weights = True

    def sum_over_routes(d_rows: torch.Tensor) -> torch.Tensor:
        return gather_sum(d_rows if exchange is None else exchange.collect(d_rows), routing.position)

    d_x, d_row_weight, d_gate_up, d_down = backend_module(backend).backward(
        d_out, rows, source, offsets, pre, row_weight, gate_up_proj, down_proj,
        take_rows=sum_over_routes if need_x else None, need_gate_up=need_gate_up, need_down=need_down,
        reuse_pre=reuse_pre,
    )  # fmt: skip
    if exchange is not None:
        d_row_weight = exchange.collect(d_row_weight)
    d_weights = d_row_weight.index_select(0, routing.position.flatten()).view_as(weights) if need_weights else None
    return d_x, d_weights, d_gate_up, d_down


def _graph_is_kept() -> bool:
    """Whether the backward that is running was told to retain its graph, or PyTorch does not say."""
    told = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return told is None or told()


class _Experts(torch.autograd.Function):
    """forward: `layer_forward`; backward: `layer_backward`, its exact adjoint (sums)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: torch.Tensor,
        weights: torch.Tensor,
        gate_up_proj: torch.Tensor,
        down_proj: torch.Tensor,
        routing: Routing,
        exchange: ExpertExchange | None,
        backend: str,
    ) -> torch.Tensor:
        out, rows, pre = layer_forward(hidden_states, weights, gate_up_proj, down_proj, routing, exchange, backend)
        ctx.save_for_backward(rows, pre, weights, gate_up_proj, down_proj)
        ctx.rest = routing, exchange, backend
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, pre, weights, gate_up_proj, down_proj = ctx.saved_tensors
        routing, exchange, backend = ctx.rest
        gradients = layer_backward(
            d_out, rows, pre, weights, gate_up_proj, down_proj, routing, exchange, backend, ctx.needs_input_grad[:4],
            reuse_pre=not _graph_is_kept(),
        )  # fmt: skip
        return *gradients, None, None, None
