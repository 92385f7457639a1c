"""Output head and loss in one step, so that the (T, V) logits never exist as a whole.

`linear_cross_entropy` is the training loss: it walks over chunks of tokens, and while a chunk's logits are at hand it
also takes their gradient, writes the hidden states' gradient and adds to the head weight's. Backward then only scales.
`linear_log_probs` gives each token's log-probability and the entropy of its distribution, as policy gradient methods
need them; its backward makes the logits again, chunk by chunk.

Labels come aligned: labels[t] is what row t should predict, the caller has shifted them.

Letters: T tokens, H hidden, V vocabulary, C rows of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from modeling.ops.launch import use_triton
from modeling.ops.loss.vocab_softmax import logits_gradient_, row_statistics, scale_, statistics_and_gradient_

IGNORE_INDEX = -100
CHUNK_SIZE = 1536
"""Rows whose logits exist at a time: 0.47 GB of bf16 at V = 151,936."""


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    num_items: float | torch.Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    chunk_size: int = CHUNK_SIZE,
    num_valid: int | None = None,
) -> torch.Tensor:
    """Cross-entropy of softmax(hidden @ weight.T) against labels, summed and divided by `num_items`.

    Args:
        hidden: (T, H).
        weight: (V, H), hidden's dtype.
        labels: (T,) integer in [0, V), or `ignore_index`; already aligned with hidden.
        num_items: the divisor, a number or a 0-d tensor (the global count of label tokens, say). None: the number of
            labels here that are not ignored.
        chunk_size: rows whose logits exist at a time.
        num_valid: how many labels are not ignored, if the host knows: then ignored rows leave before the matrix
            product, without a wait for the device. It must be the exact count. Labels on the CPU are counted here.

    Returns: a 0-d fp32 tensor; 0 with zero gradients where no label is valid or num_items is 0.
    Raises: ValueError for shapes or dtypes that do not fit, labels out of range (on the CPU), a wrong `num_valid`.
    """
    hidden, weight = _cast_for_autocast(hidden, weight)
    _check(hidden, weight, labels, ignore_index, chunk_size)
    valid = labels != ignore_index  # (T,)
    num_valid = _check_num_valid(valid, num_valid)
    if num_items is None:
        num_items = valid.sum() if num_valid is None else num_valid
    scale = _reciprocal(num_items, hidden.device)
    if num_valid is not None and num_valid < labels.numel():
        # A stable sort keeps the order of the rows; unlike nonzero it has a size that the host knows beforehand.
        rows = torch.argsort((~valid).to(torch.uint8), stable=True)[:num_valid]
        hidden, labels = hidden.index_select(0, rows), labels.index_select(0, rows)
    loss = _LinearCrossEntropy.apply(hidden, weight, labels, scale, ignore_index, chunk_size)
    return loss


def linear_log_probs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    ignore_index: int = IGNORE_INDEX,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each label and entropy of each row's distribution, without the full logits.

    Args: hidden (T, H), weight (V, H), labels (T,) as in `linear_cross_entropy`.
    Returns: log_probs (T,) fp32, 0 where the label is ignored, and entropy (T,) fp32 in nats, for every row. Both are
    differentiable.
    """
    hidden, weight = _cast_for_autocast(hidden, weight)
    _check(hidden, weight, labels, ignore_index, chunk_size)
    return _LinearLogProbs.apply(hidden, weight, labels, ignore_index, chunk_size)


class _LinearCrossEntropy(torch.autograd.Function):
    """forward: loss = -scale * sum_t log_prob[t], and the gradients for d_loss = 1; backward: scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        scale: torch.Tensor,
        ignore_index: int,
        chunk_size: int,
    ) -> torch.Tensor:
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        loss, d_hidden, d_weight = _loss_and_gradients(
            hidden, weight, labels, scale, ignore_index, chunk_size, need_hidden, need_weight
        )
        ctx.save_for_backward(hidden, weight, labels, scale)
        ctx.ignore_index, ctx.chunk_size = ignore_index, chunk_size
        ctx.gradients = (d_hidden, d_weight)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.gradients is None:
            # Second backward through a retained graph: the first one gave its tensors away.
            hidden, weight, labels, scale = ctx.saved_tensors
            need_hidden, need_weight = ctx.needs_input_grad[:2]
            _, *gradients = _loss_and_gradients(
                hidden, weight, labels, scale, ctx.ignore_index, ctx.chunk_size, need_hidden, need_weight
            )
        else:
            gradients, ctx.gradients = ctx.gradients, None
        # In place, on tensors that only this function has seen: a copy of the head's gradient would be 0.6 GB.
        d_hidden, d_weight = (None if g is None else scale_(g, d_loss) for g in gradients)
        return d_hidden, d_weight, None, None, None, None


def _loss_and_gradients(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    scale: torch.Tensor,
    ignore_index: int,
    chunk_size: int,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Loss () fp32, d_hidden (T, H) and d_weight (V, H) in their tensors' dtypes, None where not needed."""
    loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
    d_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if need_hidden else None
    d_weight = _WeightGradient(weight, hidden.shape[0] <= chunk_size) if need_weight else None
    d_log_prob = (-scale).expand(hidden.shape[0]).contiguous()  # (T,)
    logits = None
    for begin in range(0, hidden.shape[0], chunk_size):
        chunk = slice(begin, begin + chunk_size)
        target = labels[chunk]
        logits = None  # frees the last chunk's before this one's are made
        logits = hidden[chunk] @ weight.T  # (C, V)
        if need_hidden or need_weight:
            log_sum, label_logit = statistics_and_gradient_(logits, target, d_log_prob[chunk], ignore_index)
            if d_hidden is not None:
                d_hidden[chunk] = _product(logits, weight)
            if d_weight is not None:
                d_weight.add(logits, hidden[chunk])
        else:
            log_sum, label_logit, _ = row_statistics(logits, target, ignore_index)
        loss -= (label_logit - log_sum).where(target != ignore_index, 0).sum()
    return loss * scale, d_hidden, None if d_weight is None else d_weight.finish()


class _LinearLogProbs(torch.autograd.Function):
    """forward: log-probabilities and entropies; backward: the logits again, and their gradient, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, ignore_index: int, chunk_size: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        log_sum, label_logit, entropy = (
            torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device) for _ in range(3)
        )
        for begin in range(0, hidden.shape[0], chunk_size):
            chunk = slice(begin, begin + chunk_size)
            statistics = row_statistics(hidden[chunk] @ weight.T, labels[chunk], ignore_index)
            log_sum[chunk], label_logit[chunk], entropy[chunk] = statistics
        ctx.save_for_backward(hidden, weight, labels, log_sum, entropy)
        ctx.ignore_index, ctx.chunk_size = ignore_index, chunk_size
        return (label_logit - log_sum).where(labels != ignore_index, 0), entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_log_prob: torch.Tensor, d_entropy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, labels, log_sum, entropy = ctx.saved_tensors
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        d_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if need_hidden else None
        d_weight = _WeightGradient(weight, hidden.shape[0] <= ctx.chunk_size) if need_weight else None
        d_logits = None
        for begin in range(0, hidden.shape[0], ctx.chunk_size):
            chunk = slice(begin, begin + ctx.chunk_size)
            d_logits = None
            d_logits = logits_gradient_(
                hidden[chunk] @ weight.T,
                labels[chunk],
                log_sum[chunk],
                d_log_prob[chunk].contiguous(),
                ctx.ignore_index,
                entropy[chunk],
                d_entropy[chunk].contiguous(),
            )
            if d_hidden is not None:
                d_hidden[chunk] = _product(d_logits, weight)
            if d_weight is not None:
                d_weight.add(d_logits, hidden[chunk])
        return d_hidden, None if d_weight is None else d_weight.finish(), None, None, None


class _WeightGradient:
    """The sum over chunks of d_logits.T @ hidden, without rounding each chunk's part to 16 bits.

    A single chunk on a GPU: one product. bf16 on Hopper: the result itself and 8 more bits beside it
    (`triton.add_product_`). Otherwise fp32.
    """

    def __init__(self, weight: torch.Tensor, single: bool) -> None:
        self.weight = weight
        self.total: torch.Tensor | None = None
        self.extra: torch.Tensor | None = None
        self.single = single and weight.is_cuda
        self.split = False
        if not self.single and use_triton(weight):
            from modeling.ops.loss import triton

            self.split = triton.takes_product(weight)

    def add(self, d_logits: torch.Tensor, hidden: torch.Tensor) -> None:
        """d_logits (C, V), hidden (C, H)."""
        first = self.total is None
        if self.single:
            self.total = _product(d_logits.T, hidden)
        elif self.split:
            from modeling.ops.loss import triton

            if self.total is None or self.extra is None:
                self.total = torch.empty_like(self.weight, memory_format=torch.contiguous_format)
                self.extra = torch.empty_like(self.total, dtype=torch.int8)
            triton.add_product_(self.total, self.extra, d_logits, hidden.contiguous(), first=first)
        else:
            if self.total is None:
                self.total = self._zeros(torch.float32)
            if self.weight.dtype == torch.float32:
                self.total.addmm_(d_logits.T, hidden)
            elif self.total.is_cuda:
                torch.addmm(self.total, d_logits.T, hidden, out_dtype=torch.float32, out=self.total)
            else:
                self.total.addmm_(d_logits.T.float(), hidden.float())

    def finish(self) -> torch.Tensor:
        """(V, H) in the weight's dtype; zeros if there was no chunk."""
        return self._zeros(self.weight.dtype) if self.total is None else self.total.to(self.weight.dtype)

    def _zeros(self, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(self.weight.shape, dtype=dtype, device=self.weight.device)


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left @ right. For a small result cuBLAS would cut the inner dimension and add the parts in 16 bits; not here."""
    if left.is_cuda and left.dtype != torch.float32 and left.shape[0] * right.shape[1] < 2**21:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left @ right


def _reciprocal(num_items: float | torch.Tensor, device: torch.device) -> torch.Tensor:
    """1 / num_items as a 0-d fp32 tensor on `device`, 0 for 0; no wait for the device."""
    if isinstance(num_items, torch.Tensor):
        count = num_items.to(device=device, dtype=torch.float32, non_blocking=True).reshape(())
        return torch.where(count > 0, 1 / count, torch.zeros_like(count))
    return torch.full((), 1 / num_items if num_items > 0 else 0.0, dtype=torch.float32, device=device)


def _cast_for_autocast(hidden: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        return hidden.to(dtype), weight.to(dtype)
    return hidden, weight


def _check_num_valid(valid: torch.Tensor, num_valid: int | None) -> int | None:
    if valid.device.type == "cpu":
        count = int(valid.sum())
        if num_valid is not None and num_valid != count:
            raise ValueError(f"num_valid is {num_valid}, but {count} labels are not ignored; count after the shift")
        return count
    if num_valid is not None:
        torch._assert_async(valid.sum() == num_valid, "num_valid is not the number of labels that are not ignored")
    return num_valid


def _check(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, ignore_index: int, chunk_size: int
) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden must be (T, H) and weight (V, H), got {tuple(hidden.shape)} and {tuple(weight.shape)}; flatten "
            "batch and sequence"
        )
    if labels.shape != hidden.shape[:1]:
        raise ValueError(f"labels must be (T={hidden.shape[0]},), got {tuple(labels.shape)}; flatten them like hidden")
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden is {hidden.dtype}, weight {weight.dtype}; cast one or run under torch.autocast")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    if labels.device.type == "cpu" and labels.numel():
        wrong = labels[(labels != ignore_index) & ((labels < 0) | (labels >= weight.shape[0]))]
        if wrong.numel():
            raise ValueError(
                f"labels must lie in [0, V={weight.shape[0]}) or be {ignore_index}, got {int(wrong[0])}; mask "
                "placeholder tokens before the loss"
            )
