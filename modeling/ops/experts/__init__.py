"""The routed expert MLP behind one function: out[t] = sum over k of weight[t, k] * expert_{index[t, k]}(x[t]).

    backend      where                         what
    eager        anywhere, no EP               the readable loop that the others are tested against
    grouped_mm   anywhere                      torch's grouped matrix product; Triton for the element-wise steps on GPUs
    quack        Hopper, 16 bits               gather and SwiGLU inside the GEMMs (package quack-kernels)

The fast backends share everything but the matrix products (`autograd.py`). torch.compile sees the layer as one
operator (`compiled.py`); under expert parallelism, whose exchanges have sizes that only a run knows, it breaks the
graph here.

Letters: T tokens, K routes per token, E experts, e experts on this rank, H hidden, I intermediate.
"""

from __future__ import annotations

import functools
import logging

import torch
import torch.distributed as dist

from modeling.distributed.expert_parallel import local_experts
from modeling.ops.experts import autograd, compiled
from modeling.ops.experts.reference import eager_experts
from modeling.ops.launch import why_not_quack

logger = logging.getLogger(__name__)

BACKENDS = ("eager", "grouped_mm", "quack")


def fused_moe_forward(
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    ep_group: dist.ProcessGroup | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """The weighted sum of each token's experts.

    Args:
        hidden_states: (T, H).
        top_k_index: (T, K) integer, global expert numbers in [0, E); an expert may occur twice in a row.
        top_k_weights: (T, K), used in fp32; differentiable.
        gate_up_proj: (e, 2I, H), gate rows first; this rank's experts, all E without `ep_group`.
        down_proj: (e, H, I).
        ep_group: ranks that share the experts, rank r holding [r * e, (r + 1) * e). None: all are here. With a group
            the call is a collective, in forward and in backward, whatever T is.
        backend: one of `BACKENDS`; None takes `default_backend`.

    Returns: (T, H) in hidden_states' dtype. Gradients of all four tensors; an expert without tokens gets zeros.
    Raises: ValueError for shapes or dtypes that do not fit each other, an unknown backend, or eager with an EP group.
    """
    if ep_group is not None and dist.get_world_size(ep_group) == 1:
        ep_group = None
    gate_up_proj, down_proj = local_experts(gate_up_proj), local_experts(down_proj)
    device_type = hidden_states.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        out_dtype, hidden_states = hidden_states.dtype, hidden_states.to(dtype)
        gate_up_proj, down_proj = gate_up_proj.to(dtype), down_proj.to(dtype)
    else:
        out_dtype = hidden_states.dtype
    _check(hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj)
    if backend is None:
        backend = default_backend(hidden_states.device, hidden_states.dtype, *down_proj.shape[1:])
    if backend == "eager":
        if ep_group is not None:
            raise ValueError(
                f"the eager backend cannot reach experts on other ranks (EP group of {dist.get_world_size(ep_group)}); "
                "use moe_implementation='fused'"
            )
        out = eager_experts(hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj)
    else:
        if backend not in BACKENDS:
            raise ValueError(f"unknown expert backend {backend!r}; choose one of {', '.join(BACKENDS)}")
        arguments = hidden_states, top_k_index, top_k_weights.float(), gate_up_proj, down_proj, backend
        if torch.compiler.is_compiling() and ep_group is None:
            out = compiled.experts(*arguments)
        else:
            out = autograd.experts(*arguments, ep_group)
    return out.to(out_dtype)


@torch.compiler.assume_constant_result
def default_backend(device: torch.device, dtype: torch.dtype, hidden_size: int, intermediate_size: int) -> str:
    """The fastest backend that runs experts of this size on `device` in `dtype`. Decided and logged once for each."""
    return _decide(device, dtype, hidden_size, intermediate_size)


@functools.cache
def _decide(device: torch.device, dtype: torch.dtype, hidden_size: int, intermediate_size: int) -> str:
    reason = why_not_quack(device, dtype, hidden_size, intermediate_size)
    backend, why = ("quack", "Hopper, with quack-kernels installed") if reason is None else ("grouped_mm", reason)
    logger.info("expert backend on %s in %s: %s (%s)", device, dtype, backend, why)
    return backend


def _check(
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
) -> None:
    if hidden_states.dim() != 2:
        raise ValueError(f"hidden_states must be (T, H), got {tuple(hidden_states.shape)}; flatten batch and sequence")
    tokens, hidden = hidden_states.shape
    if top_k_index.dim() != 2 or top_k_index.shape[0] != tokens or top_k_weights.shape != top_k_index.shape:
        raise ValueError(
            f"top_k_index and top_k_weights must both be (T={tokens}, K), got {tuple(top_k_index.shape)} and "
            f"{tuple(top_k_weights.shape)}; pass the compact top-k choices, not a scattered (T, E) tensor"
        )
    experts, two_intermediate = gate_up_proj.shape[:2]
    if gate_up_proj.shape != (experts, two_intermediate, hidden) or two_intermediate % 2:
        raise ValueError(
            f"gate_up_proj must be (E, 2I, H={hidden}), got {tuple(gate_up_proj.shape)}; a checkpoint in the Hub "
            "layout (E, H, 2I) goes through conversion/hf_to_veomni.py first"
        )
    if down_proj.shape != (experts, hidden, two_intermediate // 2):
        raise ValueError(
            f"down_proj must be (E={experts}, H={hidden}, I={two_intermediate // 2}) to fit gate_up_proj "
            f"{tuple(gate_up_proj.shape)}, got {tuple(down_proj.shape)}"
        )
    if not hidden_states.dtype == gate_up_proj.dtype == down_proj.dtype:
        raise ValueError(
            f"hidden_states are {hidden_states.dtype}, gate_up_proj {gate_up_proj.dtype}, down_proj {down_proj.dtype}; "
            "cast them to one dtype or run under torch.autocast"
        )
