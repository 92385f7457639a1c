"""The expert layer as a pair of registered operators, so that torch.compile takes it whole.

Without them a compiled decoder layer would break its graph at the sort, at the Triton kernels' launchers and inside
quack. The operators run the very functions that eager mode runs (`autograd.py`).
"""

from __future__ import annotations

from typing import Any

import torch

from modeling.ops.experts.autograd import layer_backward, layer_forward
from modeling.ops.experts.routing import Routing, route_by_expert

Tensor = torch.Tensor


def experts(
    hidden_states: Tensor,
    top_k_index: Tensor,
    weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    backend: str,
) -> Tensor:
    """As `autograd.experts`, for code that is being compiled; experts all on this rank."""
    return _forward(hidden_states, top_k_index, weights, gate_up_proj, down_proj, backend)[0]


@torch.library.custom_op("qwen3_vl_moe::experts", mutates_args=())
def _forward(
    hidden_states: Tensor, top_k_index: Tensor, weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    routing = route_by_expert(top_k_index, gate_up_proj.shape[0])
    out, _, pre = layer_forward(hidden_states, weights, gate_up_proj, down_proj, routing, None, backend)
    return out, pre, routing.route, routing.token, routing.position, routing.offsets


@_forward.register_fake
def _(
    hidden_states: Tensor, top_k_index: Tensor, weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows = top_k_index.numel()
    return (
        hidden_states.new_empty(hidden_states.shape),
        hidden_states.new_empty(rows, gate_up_proj.shape[1]),
        top_k_index.new_empty(rows, dtype=torch.int32),
        top_k_index.new_empty(rows, dtype=torch.int32),
        top_k_index.new_empty(top_k_index.shape, dtype=torch.int32),
        top_k_index.new_empty(gate_up_proj.shape[0] + 1, dtype=torch.int32),
    )


@torch.library.custom_op("qwen3_vl_moe::experts_backward", mutates_args=())
def _backward(
    d_out: Tensor,
    hidden_states: Tensor,
    pre: Tensor,
    weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    routing: list[Tensor],
    backend: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    need_x, need_weights, need_gate_up, need_down = needs
    gradients = layer_backward(
        d_out, hidden_states, pre, weights, gate_up_proj, down_proj, Routing(*routing), None, backend,
        (need_x, need_weights, need_gate_up, need_down),
    )  # fmt: skip
    # An operator returns tensors only: an empty one stands for a gradient that nobody wants.
    d_x, d_weights, d_gate_up, d_down = (d_out.new_empty(0) if g is None else g for g in gradients)
    return d_x, d_weights, d_gate_up, d_down


@_backward.register_fake
def _(
    d_out: Tensor,
    hidden_states: Tensor,
    pre: Tensor,
    weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    routing: list[Tensor],
    backend: str,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    inputs = (hidden_states, weights, gate_up_proj, down_proj)
    return tuple(t.new_empty(t.shape) if need else d_out.new_empty(0) for t, need in zip(inputs, needs, strict=True))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden_states, _, weights, gate_up_proj, down_proj, backend = inputs
    _, pre, *routing = output
    ctx.save_for_backward(hidden_states, pre, weights, gate_up_proj, down_proj, *routing)
    ctx.backend = backend


def _differentiate(ctx: Any, d_out: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    hidden_states, pre, weights, gate_up_proj, down_proj, *routing = ctx.saved_tensors
    needs = [ctx.needs_input_grad[i] for i in (0, 2, 3, 4)]
    gradients = _backward(d_out, hidden_states, pre, weights, gate_up_proj, down_proj, routing, ctx.backend, needs)
    d_x, d_weights, d_gate_up, d_down = (g if need else None for g, need in zip(gradients, needs, strict=True))
    return d_x, None, d_weights, d_gate_up, d_down, None


_forward.register_autograd(_differentiate, setup_context=_setup_context)
