"""Triton kernels for the output head: rows of a block of logits, a weight gradient summed over blocks, its factor.

Rows (`vocab_softmax.py` has the reference): a program owns a row. It walks over it once for the softmax statistics,
keeping a running maximum and sum per lane, and a second time for the gradient, while the row is still in the L2 cache.
At V = 151,936 a block of logits is moved about once in and once out.

Sum: `add_product_` keeps a running sum of products as 24-bit floats, the top 16 bits rounded to bf16 and 8 more beside
them, so that the sum is also the result, and takes 3 bytes where fp32 and the bf16 result take 6.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

_BLOCK_V = 4096
_NUM_WARPS = 16
_SCALE_BLOCK = 8192
_PRODUCT_BLOCKS = (128, 256, 64, 8, 3)  # vocabulary, hidden, rows; warps, stages


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
def _scale_kernel(values, factor, count, BLOCK: tl.constexpr):
    f = tl.load(factor).to(tl.float32)
    if f != 1.0:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(values + at, mask=at < count, other=0.0).to(tl.float32)
        tl.store(values + at, value * f, mask=at < count)


def scale_(gradient: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """See `vocab_softmax.scale_`. Usually a training loss is the end of its graph, and the factor 1."""
    count = gradient.numel()
    _scale_kernel[(triton.cdiv(count, _SCALE_BLOCK),)](gradient, factor, count, BLOCK=_SCALE_BLOCK, num_warps=8)
    return gradient


@triton.jit
def _split(total):
    """fp32 -> its pattern rounded to 16 bits (bf16), and the rest rounded to 8 signed bits."""
    bits = total.to(tl.int32, bitcast=True)
    rounded = (bits + 0x8000) >> 16
    rest = tl.minimum((bits - (rounded << 16) + 0x80) >> 8, 127)
    return rounded.to(tl.int16), rest.to(tl.int8)


@triton.jit
def _add_half(high, low, v, h, product, FIRST: tl.constexpr):
    if not FIRST:
        bits = (high.load([v, h]).to(tl.int32) << 16) + (low.load([v, h]).to(tl.int32) << 8)
        product += bits.to(tl.float32, bitcast=True)
    rounded, rest = _split(product)
    high.store([v, h], rounded)
    low.store([v, h], rest)


@triton.jit
def _add_product_kernel(
    high,
    low,
    left,
    right,
    H,
    C,
    FIRST: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # All blocks of a vocabulary range run side by side, so that the range of `left` is read from memory once.
    blocks_h = tl.cdiv(H, BLOCK_H)
    v = (tl.program_id(0) // blocks_h) * BLOCK_V
    h = (tl.program_id(0) % blocks_h) * BLOCK_H
    total = tl.zeros([BLOCK_V, BLOCK_H], dtype=tl.float32)
    for c in range(0, C, BLOCK_C):
        total = tl.dot(left.load([c, v]).T, right.load([c, h]), total)
    # In halves: the sum so far would not fit into shared memory beside the blocks in flight.
    first_half, second_half = tl.split(tl.permute(tl.reshape(total, (BLOCK_V, 2, BLOCK_H // 2)), (0, 2, 1)))
    _add_half(high, low, v, h, first_half, FIRST)
    _add_half(high, low, v, h + BLOCK_H // 2, second_half, FIRST)


def takes_product(weight: torch.Tensor) -> bool:
    """Whether `add_product_` can sum the gradient of weight (V, H): bf16, Hopper or newer, rows of whole 16 bytes."""
    return (
        weight.dtype == torch.bfloat16
        and torch.cuda.get_device_capability(weight.device) >= (9, 0)
        and weight.shape[0] % 8 == 0
        and weight.shape[1] % 16 == 0
    )


def add_product_(high: torch.Tensor, low: torch.Tensor, left: torch.Tensor, right: torch.Tensor, first: bool) -> None:
    """high + low (+)= left.T @ right, where `first` starts the sum.

    Args: high (V, H) bf16, the sum rounded; low (V, H) int8, the next 8 bits of its fp32 pattern, signed; left (C, V)
    and right (C, H) bf16. All contiguous, with rows of whole 16 bytes: blocks move by the tensor memory accelerator.
    """
    (rows, vocabulary), hidden = left.shape, right.shape[1]
    block_v, block_h, block_c, warps, stages = _PRODUCT_BLOCKS

    def blocks(tensor: torch.Tensor, *shape: int) -> TensorDescriptor:
        return TensorDescriptor.from_tensor(tensor, list(shape))

    grid = (triton.cdiv(vocabulary, block_v) * triton.cdiv(hidden, block_h),)
    _add_product_kernel[grid](
        blocks(high.view(torch.int16), block_v, block_h // 2),
        blocks(low, block_v, block_h // 2),
        blocks(left, block_c, block_v),
        blocks(right, block_c, block_h),
        hidden,
        rows,
        FIRST=first,
        BLOCK_V=block_v,
        BLOCK_H=block_h,
        BLOCK_C=block_c,
        num_warps=warps,
        num_stages=stages,
    )
