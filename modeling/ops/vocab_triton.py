"""Triton kernel for the rows of a block of logits; `vocab_softmax.py` has its reference.

A program owns a row. It walks over it once for the softmax statistics, keeping a running maximum and sum per lane, and
a second time for the gradient, while the row is still in the L2 cache. At V = 151,936 a block of logits is moved about
once in and once out.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK_V = 8192
_NUM_WARPS = 16


@triton.jit
def _rows_kernel(
    logits,
    labels,
    log_sum,
    label_logit,
    entropy,
    d_log_prob,
    d_entropy,
    V,
    ignore_index,
    STATISTICS: tl.constexpr,
    ENTROPY: tl.constexpr,
    GRADIENT: tl.constexpr,
    D_ENTROPY: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    base = logits + row * V
    label = tl.load(labels + row)
    valid = label != ignore_index
    lane = tl.arange(0, BLOCK_V)
    if STATISTICS:
        # Ahead of the reductions below, whose barriers keep it ahead of other threads' writes to the row.
        tl.store(label_logit + row, tl.load(base + label, mask=valid, other=0.0).to(tl.float32))
        peak = tl.full([BLOCK_V], -1e30, dtype=tl.float32)
        total = tl.zeros([BLOCK_V], dtype=tl.float32)
        moment = tl.zeros([BLOCK_V], dtype=tl.float32)
        for begin in range(0, V, BLOCK_V):
            z = tl.load(base + begin + lane, mask=begin + lane < V, other=-float("inf")).to(tl.float32)
            higher = tl.maximum(peak, z)
            shrink = tl.exp(peak - higher)
            e = tl.exp(z - higher)
            if ENTROPY:
                # moment = sum exp(z - peak) * (z - peak), moved to the new peak; a masked lane adds 0, not 0 * inf.
                centred = tl.where(e > 0, z - higher, 0.0)
                moment = shrink * (moment + total * (peak - higher)) + e * centred
            total = total * shrink + e
            peak = higher
        top = tl.max(peak, axis=0)
        shrink = tl.exp(peak - top)
        sum_exp = tl.sum(total * shrink, axis=0)
        lse = top + tl.log(sum_exp)
        tl.store(log_sum + row, lse)
        if ENTROPY:
            mean = tl.sum(shrink * (moment + total * (peak - top)), axis=0) / sum_exp
            tl.store(entropy + row, tl.log(sum_exp) - mean)
    else:
        lse = tl.load(log_sum + row)
    if GRADIENT:
        d_label = tl.where(valid, tl.load(d_log_prob + row), 0.0)
        if D_ENTROPY:
            h = tl.load(entropy + row)
            d_h = tl.load(d_entropy + row)
        for begin in range(0, V, BLOCK_V):
            column = begin + lane
            mask = column < V
            log_p = tl.load(base + column, mask=mask, other=-float("inf")).to(tl.float32) - lse
            p = tl.exp(log_p)
            gradient = tl.where(column == label, d_label, 0.0) - d_label * p
            if D_ENTROPY:
                gradient -= d_h * p * tl.where(mask, log_p + h, 0.0)
            tl.store(base + column, gradient, mask=mask)


def _launch(logits: torch.Tensor, labels: torch.Tensor, ignore_index: int, **pointers: torch.Tensor | None) -> None:
    """One program per row of contiguous logits (C, V); the pointers that are given decide what it does."""
    assert logits.is_contiguous()
    unused = labels
    _rows_kernel[(logits.shape[0],)](
        logits,
        labels,
        pointers["log_sum"],
        *(unused if pointers[name] is None else pointers[name] for name in _OPTIONAL),
        logits.shape[1],
        ignore_index,
        STATISTICS=pointers["label_logit"] is not None,
        ENTROPY=pointers["label_logit"] is not None and pointers["entropy"] is not None,
        GRADIENT=pointers["d_log_prob"] is not None,
        D_ENTROPY=pointers["d_entropy"] is not None,
        BLOCK_V=min(_BLOCK_V, triton.next_power_of_2(logits.shape[1])),
        num_warps=_NUM_WARPS,
    )


_OPTIONAL = ("label_logit", "entropy", "d_log_prob", "d_entropy")


def row_statistics(
    logits: torch.Tensor, labels: torch.Tensor, ignore_index: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `vocab_softmax.row_statistics`."""
    log_sum, label_logit, entropy = torch.empty(3, logits.shape[0], dtype=torch.float32, device=logits.device)
    _launch(
        logits, labels, ignore_index,
        log_sum=log_sum, label_logit=label_logit, entropy=entropy, d_log_prob=None, d_entropy=None,
    )  # fmt: skip
    return log_sum, label_logit, entropy


def statistics_and_gradient_(
    logits: torch.Tensor, labels: torch.Tensor, d_log_prob: torch.Tensor, ignore_index: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `vocab_softmax.statistics_and_gradient_`."""
    log_sum, label_logit = torch.empty(2, logits.shape[0], dtype=torch.float32, device=logits.device)
    _launch(
        logits, labels, ignore_index,
        log_sum=log_sum, label_logit=label_logit, entropy=None, d_log_prob=d_log_prob, d_entropy=None,
    )  # fmt: skip
    return log_sum, label_logit


def logits_gradient_(
    logits: torch.Tensor,
    labels: torch.Tensor,
    log_sum: torch.Tensor,
    d_log_prob: torch.Tensor,
    ignore_index: int,
    entropy: torch.Tensor | None,
    d_entropy: torch.Tensor | None,
) -> torch.Tensor:
    """See `vocab_softmax.logits_gradient_`."""
    _launch(
        logits, labels, ignore_index,
        log_sum=log_sum, label_logit=None, entropy=entropy, d_log_prob=d_log_prob, d_entropy=d_entropy,
    )  # fmt: skip
    return logits
