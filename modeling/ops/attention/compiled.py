"""Packed attention as a registered operator, so that torch.compile takes a block with it whole.

Kernels that PyTorch cannot trace (flash-attn 4), and the per-segment loops that read the boundaries on the host, would
break the graph of a compiled block. Eager mode does not come here. An operator runs below autograd, so its backward is
written out: flash-attn 4's own kernel, and the formula for the loops.
"""

from typing import Any

import torch
from torch import Tensor

from modeling.ops.attention import flash_attention_4, reference

_SEGMENTS = {"sdpa": reference.sdpa_segments, "eager": reference.eager_segments}
OPAQUE = ("flash_attention_4", *_SEGMENTS)


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    causal: bool,
    scale: float,
    backend: str,
) -> Tensor:
    """`attention.varlen_attention` by one of the `OPAQUE` backends, for code that is being compiled."""
    return _forward(query, key, value, cu_seqlens, max_seqlen, causal, scale, backend)[0]


@torch.library.custom_op("qwen3_vl_moe::varlen_attention", mutates_args=())
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    causal: bool,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    options: dict[str, Any] = {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen, "causal": causal, "scale": scale}
    if backend == "flash_attention_4":
        return flash_attention_4.forward(query, key, value, **options)
    out = _SEGMENTS[backend](query, key, value, **options)
    return out.contiguous(), query.new_empty(0, dtype=torch.float32)


@_forward.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    causal: bool,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    rows, heads, _ = query.shape
    lse = (heads, rows) if backend == "flash_attention_4" else (0,)
    return query.new_empty(query.shape), query.new_empty(lse, dtype=torch.float32)


@torch.library.custom_op("qwen3_vl_moe::varlen_attention_backward", mutates_args=())
def _backward(
    d_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    causal: bool,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    options: dict[str, Any] = {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen, "causal": causal, "scale": scale}
    if backend == "flash_attention_4":
        return flash_attention_4.backward(d_out, query, key, value, out, lse, **options)
    return reference.segments_backward(d_out, query, key, value, out, **options)


@_backward.register_fake
def _(
    d_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    causal: bool,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    query, key, value, cu_seqlens, *ctx.options = inputs
    ctx.save_for_backward(query, key, value, *output, cu_seqlens)


def _backward_of_forward(ctx: Any, d_out: Tensor, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    gradients = _backward(d_out.contiguous(), *ctx.saved_tensors, *ctx.options)
    return *gradients, None, None, None, None, None


_forward.register_autograd(_backward_of_forward, setup_context=_setup_context)
