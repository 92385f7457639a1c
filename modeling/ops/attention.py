"""Attention over packed sequences of different lengths, one function over several kernels.

Packed rows never form an S x S mask: the boundaries (`cu_seqlens`) go to a variable-length kernel, and where none fits
(CPU, float32) the segments are attended one run of equal lengths at a time. Which kernel runs follows from the model's
`attn_implementation`, the device and what is installed:

    flash_attention_4, flash_attention_2   that package
    sdpa on CUDA in half precision         the fastest installed: flash-attn 4 (Hopper and newer), flash-attn 2, torch
    sdpa elsewhere                         scaled_dot_product_attention per segment
    eager                                  softmax(Q K^T) V per segment, the readable reference

"""

import inspect
from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from modeling.distributed.sequence_parallel import gather_heads_scatter_seq, gather_seq_scatter_heads, group_size
from modeling.ops import attention_operator, flash_attention_4

HALF_PRECISION = (torch.float16, torch.bfloat16)


@cache
def _installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


@cache
def flash_attention_4_available() -> bool:
    """flash-attn 4 (`flash_attn.cute`) is installed and the GPU is Hopper or newer."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0):
        return False
    return find_spec("flash_attn") is not None and find_spec("flash_attn.cute") is not None


@cache
def flash_attention_2_available() -> bool:
    """The flash-attn 2 package is installed (flash-attn 4 alone shares its import name, not its functions)."""
    return torch.cuda.is_available() and _installed("flash-attn")


@torch.compiler.assume_constant_result
def select_varlen_backend(implementation: str, device: torch.device, dtype: torch.dtype) -> str:
    """The name of the kernel that `varlen_attention` runs; see the table at the top of the file.

    Raises:
        ValueError: `implementation` names a package that is not installed or does not run on this device and dtype.
    """
    if implementation == "eager":
        return "eager"
    half_on_cuda = device.type == "cuda" and dtype in HALF_PRECISION
    wanted = {"flash_attention_4": flash_attention_4_available, "flash_attention_2": flash_attention_2_available}
    if implementation in wanted:
        if not half_on_cuda:
            raise ValueError(
                f"attn_implementation={implementation!r} needs float16 or bfloat16 on a CUDA device, got {dtype} on "
                f"{device.type}; use attn_implementation='sdpa'."
            )
        if not wanted[implementation]():
            raise ValueError(
                f"attn_implementation={implementation!r} is not available here: install the 'hopper' extra for "
                "flash_attention_4 (Hopper or newer) or the 'flash-attn' extra for flash_attention_2, or use 'sdpa'."
            )
        return implementation
    if half_on_cuda:
        if flash_attention_4_available():
            return "flash_attention_4"
        return "flash_attention_2" if flash_attention_2_available() else "torch_varlen"
    return "sdpa"


def _equal_runs(cu_seqlens: Tensor) -> list[tuple[int, int]]:
    """[(segments, length)] of neighbouring segments of equal length, so that they go through one batched call."""
    lengths = cu_seqlens.diff().tolist()
    return [(sum(1 for _ in run), length) for length, run in groupby(lengths) if length > 0]


def _per_segment(attend: Callable, query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Apply `attend` on (segments, N, L, D) blocks of equal length. (T, N, D) in and out."""
    outputs, start = [], 0
    for segments, length in _equal_runs(cu_seqlens):
        stop = start + segments * length
        blocks = (x[start:stop].unflatten(0, (segments, length)).transpose(1, 2) for x in (query, key, value))
        outputs.append(attend(*blocks).transpose(1, 2).flatten(0, 1))
        start = stop
    return torch.cat(outputs) if outputs else torch.zeros_like(query)


def _sdpa_segments(
    query: Tensor, key: Tensor, value: Tensor, *, cu_seqlens: Tensor, max_seqlen: int, causal: bool, scale: float
) -> Tensor:
    grouped = query.shape[1] != key.shape[1]
    return _per_segment(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=grouped),
        query,
        key,
        value,
        cu_seqlens,
    )


def _eager_segments(
    query: Tensor, key: Tensor, value: Tensor, *, cu_seqlens: Tensor, max_seqlen: int, causal: bool, scale: float
) -> Tensor:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)  # (n, N, L, D)
        scores = q @ k.transpose(2, 3) * scale  # (n, N, L, L)
        if causal:
            future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(future, torch.finfo(scores.dtype).min)
        return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v

    return _per_segment(attend, query, key, value, cu_seqlens)


def segments_backward(
    d_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    *,
    cu_seqlens: Tensor,
    max_seqlen: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The adjoint of attention per segment, written out: dS = P * (dP - rowsum(dO * O)) (Dao et al., 2022, eq. 4)."""
    groups = query.shape[1] // key.shape[1]
    d_query, d_key, d_value = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    start = 0
    for segments, length in _equal_runs(cu_seqlens):
        part = slice(start, start + segments * length)
        q, k, v, o, d_o = (
            x[part].unflatten(0, (segments, length)).transpose(1, 2) for x in (query, key, value, out, d_out)
        )
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)  # (n, N, L, D)
        scores = q @ k.transpose(2, 3) * scale
        if causal:
            future = torch.ones(length, length, dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(future, float("-inf"))
        weights = scores.softmax(-1, dtype=torch.float32)
        d_weights = (d_o @ v.transpose(2, 3)).float()
        d_scores = (weights * (d_weights - (d_o * o).float().sum(-1, keepdim=True)) * scale).to(q.dtype)
        shared = (segments, -1, groups, length, q.shape[-1])
        for target, grad in (
            (d_query, d_scores @ k),
            (d_key, (d_scores.transpose(2, 3) @ q).view(shared).sum(2)),
            (d_value, (weights.to(q.dtype).transpose(2, 3) @ d_o).view(shared).sum(2)),
        ):
            target[part] = grad.transpose(1, 2).flatten(0, 1)
        start = part.stop
    return d_query, d_key, d_value


@cache
def _varlen_options() -> frozenset[str]:
    """The keywords that the installed torch's varlen_attn takes; they grew between torch 2.11 and 2.14."""
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)


def _torch_varlen(
    query: Tensor, key: Tensor, value: Tensor, *, cu_seqlens: Tensor, max_seqlen: int, causal: bool, scale: float
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    accepted = _varlen_options()
    options: dict[str, Any] = {"scale": scale}
    if "window_size" in accepted:
        options["window_size"] = (-1, 0) if causal else (-1, -1)
    else:
        options["is_causal"] = causal
    if query.shape[1] != key.shape[1]:
        if "enable_gqa" in accepted:
            options["enable_gqa"] = True
        else:
            groups = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    out = varlen_attn(query, key, value, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, **options)
    return out[0] if isinstance(out, tuple) else out


def _flash_attention(
    function: Callable,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    cu_seqlens: Tensor,
    max_seqlen: int,
    causal: bool,
    scale: float,
) -> Tensor:
    out = function(
        query,
        key,
        value,
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        max_seqlen_q=max_seqlen,
        max_seqlen_k=max_seqlen,
        softmax_scale=scale,
        causal=causal,
    )
    return out[0] if isinstance(out, tuple) else out


def _flash_attention_4(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    return _FlashAttention4.apply(query, key, value, options)


class _FlashAttention4(torch.autograd.Function):
    """The package's kernels, its own autograd function left out: see `flash_attention_4`."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> Tensor:
        query, key, value = query.detach(), key.detach(), value.detach()
        out, lse = flash_attention_4.forward(query, key, value, **options)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.options = options
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        return *flash_attention_4.backward(d_out.contiguous(), *ctx.saved_tensors, **ctx.options), None


def _flash_attention_2(query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    return _flash_attention(flash_attn_varlen_func, query, key, value, **kwargs)


VARLEN_BACKENDS: dict[str, Callable] = {
    "eager": _eager_segments,
    "sdpa": _sdpa_segments,
    "torch_varlen": _torch_varlen,
    "flash_attention_2": _flash_attention_2,
    "flash_attention_4": _flash_attention_4,
}


def exchange_heads(query: Tensor, key: Tensor, value: Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """From all heads of a slice to the whole sequence of this rank's heads: (t, N, D) each to (T, N / ranks, D).

    The three travel together, in one exchange. Key/value heads are repeated only where there are fewer than ranks; a
    rank's query heads find their own key heads among its own, because both are cut in order.

    forward: all-to-all; backward: the all-to-all back, summed over the copies of a repeated head.
    """
    ranks = group_size(group)
    if key.shape[1] < ranks:
        copies = ranks // key.shape[1]
        key, value = key.repeat_interleave(copies, dim=1), value.repeat_interleave(copies, dim=1)
    heads = [x.shape[1] // ranks for x in (query, key, value)]
    rows = torch.cat([x.unflatten(1, (ranks, -1)) for x in (query, key, value)], dim=2).flatten(1, 2)
    query, key, value = gather_seq_scatter_heads(rows, seq_dim=0, head_dim=1, group=group).split(heads, dim=1)
    return query, key, value


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    cu_seqlens: Tensor,
    max_seqlen: int,
    causal: bool,
    scale: float,
    implementation: str = "sdpa",
    group: ProcessGroup | None = None,
) -> Tensor:
    """Self-attention inside each segment of packed rows.

    Args:
        query: (T, N, D). key, value: (T, N_kv, D) with N divisible by N_kv; query head n reads key head n // (N /
            N_kv).
        cu_seqlens: (segments + 1,) int32 on the rows' device, from 0 to T.
        max_seqlen: the longest segment, a Python int.
        causal: whether a row sees only rows before it in its segment.
        scale: factor on the scores, usually 1 / sqrt(D).
        implementation: the model's `attn_implementation`.
        group: ranks that hold the other slices of the rows (Ulysses): query, key and value are then this rank's (t, N,
            D), cu_seqlens and max_seqlen still describe all T rows, and each rank attends with its share of the heads.

    Returns:
        (T, N, D), or (t, N, D) with a group; rows of one segment independent of every other segment, bit for bit.
    """
    backend = select_varlen_backend(implementation, query.device, query.dtype)
    if group is not None and group_size(group) > 1:
        query, key, value = exchange_heads(query, key, value, group)
    options: dict[str, Any] = {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen, "causal": causal, "scale": scale}
    if torch.compiler.is_compiling() and backend in attention_operator.OPAQUE:
        out = attention_operator.varlen_attention(query, key, value, **options, backend=backend)
    else:
        out = VARLEN_BACKENDS[backend](query, key, value, **options)
    return gather_heads_scatter_seq(out, head_dim=1, seq_dim=0, group=group)
