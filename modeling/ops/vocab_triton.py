"""Triton kernels for the output head: rows of a block of logits, and a weight gradient summed over blocks.

Rows (`vocab_softmax.py` has the reference): a program owns a row. It walks over it once for the softmax statistics,
keeping a running maximum and sum per lane, and a second time for the gradient, while the row is still in the L2 cache.
At V = 151,936 a block of logits is moved about once in and once out.

Sum: `add_product_` keeps the sum of products as 24-bit floats, the top 16 bits rounded to bf16 and 8 more beside them,
so that the running sum is also the result, and takes 3 bytes where fp32 and the bf16 result take 6.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK_V = 4096
_NUM_WARPS = 16
PREFETCH = True
_PRODUCT_BLOCKS = (128, 128, 64, 8, 4)  # vocabulary, hidden, rows; warps, stages


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
            z = tl.load(base + begin + lane, mask=begin + lane < V, other=-1e30).to(tl.float32)
            # One exponential serves both ways: either the sum so far shrinks to a new peak, or the new term to the old.
            rise = z - peak
            e = tl.exp(-tl.abs(rise))
            if ENTROPY:
                # moment = sum exp(z - peak) * (z - peak), moved to the new peak with total.
                moment = tl.where(rise > 0, e * (moment - total * rise), moment + e * rise)
            total = tl.where(rise > 0, total * e + 1.0, total + e)
            peak = tl.maximum(peak, z)
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


def _launch(
    logits: torch.Tensor,
    labels: torch.Tensor,
    ignore_index: int,
    **pointers: torch.Tensor | None,
) -> None:
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


@triton.jit
def _prefetch(pointers):
    """Ask for the cache lines of `pointers` to be brought from memory to L2; nobody waits for them here."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _add_product_kernel(
    high,
    low,
    left,
    right,
    V,
    H,
    C,
    FIRST: tl.constexpr,
    PREFETCH: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # All blocks of a vocabulary range run side by side, so that the range of `left` is read from memory once.
    blocks_h = tl.cdiv(H, BLOCK_H)
    row = (tl.program_id(0) // blocks_h) * BLOCK_V + tl.arange(0, BLOCK_V)
    column = (tl.program_id(0) % blocks_h) * BLOCK_H + tl.arange(0, BLOCK_H)
    inner = tl.arange(0, BLOCK_C)
    left_at = left + inner[:, None].to(tl.int64) * V + (row % V)[None, :]
    right_at = right + inner[:, None] * H + (column % H)[None, :]
    at = row[:, None].to(tl.int64) * H + column[None, :]
    if PREFETCH and not FIRST:
        # The sum so far is needed when the product is done; a line is 128 bytes, 64 of `high` or 128 of `low`.
        line = (row % V)[:, None].to(tl.int64) * H + (tl.program_id(0) % blocks_h) * BLOCK_H
        last = H - 1 - (tl.program_id(0) % blocks_h) * BLOCK_H
        _prefetch(high + line + tl.minimum(64 * tl.arange(0, BLOCK_H // 64), last)[None, :])
        _prefetch(low + line + tl.minimum(128 * tl.arange(0, BLOCK_H // 128), last)[None, :])
    total = tl.zeros([BLOCK_V, BLOCK_H], dtype=tl.float32)
    for begin in range(0, C, BLOCK_C):
        mask = inner[:, None] < C - begin
        a = tl.load(left_at, mask=mask, other=0.0)
        b = tl.load(right_at, mask=mask, other=0.0)
        total = tl.dot(tl.trans(a), b, total)
        left_at += BLOCK_C * V
        right_at += BLOCK_C * H
    mask = (row[:, None] < V) & (column[None, :] < H)
    if not FIRST:
        bits = (tl.load(high + at, mask=mask, other=0).to(tl.int32) << 16) + (
            tl.load(low + at, mask=mask, other=0).to(tl.int32) << 8
        )
        total += bits.to(tl.float32, bitcast=True)
    bits = total.to(tl.int32, bitcast=True)
    rounded = (bits + 0x8000) >> 16
    rest = tl.minimum((bits - (rounded << 16) + 0x80) >> 8, 127)
    tl.store(high + at, rounded.to(tl.int16), mask=mask)
    tl.store(low + at, rest.to(tl.int8), mask=mask)


def add_product_(high: torch.Tensor, low: torch.Tensor, left: torch.Tensor, right: torch.Tensor, first: bool) -> None:
    """high + low (+)= left.T @ right, where `first` starts the sum.

    Args: high (V, H) bf16, the sum rounded; low (V, H) int8, the next 8 bits of its fp32 pattern, signed; left (C, V)
    and right (C, H) bf16, contiguous.
    """
    assert left.is_contiguous() and right.is_contiguous() and high.is_contiguous()
    (rows, vocabulary), hidden = left.shape, right.shape[1]
    block_v, block_h, block_c, warps, stages = _PRODUCT_BLOCKS
    grid = (triton.cdiv(vocabulary, block_v) * triton.cdiv(hidden, block_h),)
    _add_product_kernel[grid](
        high.view(torch.int16),
        low,
        left,
        right,
        vocabulary,
        hidden,
        rows,
        FIRST=first,
        PREFETCH=PREFETCH,
        BLOCK_V=block_v,
        BLOCK_H=block_h,
        BLOCK_C=block_c,
        num_warps=warps,
        num_stages=stages,
    )
