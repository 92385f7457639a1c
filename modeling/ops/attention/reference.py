"""Attention per segment in torch's own operations: any device, any dtype, and what the kernels are tested against.

Segments of equal length that stand side by side go through one batched call. The lengths are read on the host.
"""

from collections.abc import Callable
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor


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


def sdpa_segments(
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


def eager_segments(
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
