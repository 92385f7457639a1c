"""Row-wise softmax statistics of a block of logits, and the gradient that goes back through them.

The step between the two matrix products of an output head (`cross_entropy.py`). Arithmetic is fp32 whatever the
logits' dtype. CUDA tensors go to a Triton kernel (`triton.py`), all others to the reference in this file.

Letters: C rows, V vocabulary.
"""

from __future__ import annotations

import torch

from modeling.ops.launch import use_triton


def row_statistics(
    logits: torch.Tensor, labels: torch.Tensor, ignore_index: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """logits (C, V), labels (C,) -> log sum exp, logit of the label (0 if ignored), entropy in nats; (C,) fp32."""
    if use_triton(logits):
        from modeling.ops.loss import triton

        return triton.row_statistics(logits, labels, ignore_index)
    return row_statistics_reference(logits, labels, ignore_index)


def logits_gradient_(
    logits: torch.Tensor,
    labels: torch.Tensor,
    log_sum: torch.Tensor,
    d_log_prob: torch.Tensor,
    ignore_index: int,
    entropy: torch.Tensor | None = None,
    d_entropy: torch.Tensor | None = None,
) -> torch.Tensor:
    """Overwrite logits (C, V) with the gradient of sum(d_log_prob * log_prob + d_entropy * entropy); return them.

    d log p_y / d z_j = [j = y] - p_j, absent where the label is ignored;  d H / d z_j = -p_j * (log p_j + H).
    The d_ vectors are (C,) fp32; entropy goes with d_entropy.
    """
    if use_triton(logits):
        from modeling.ops.loss import triton

        return triton.logits_gradient_(logits, labels, log_sum, d_log_prob, ignore_index, entropy, d_entropy)
    return logits_gradient_reference_(logits, labels, log_sum, d_log_prob, ignore_index, entropy, d_entropy)


def statistics_and_gradient_(
    logits: torch.Tensor, labels: torch.Tensor, d_log_prob: torch.Tensor, ignore_index: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`row_statistics` without the entropy, then `logits_gradient_`, row by row. -> log sum, label logit."""
    if use_triton(logits):
        from modeling.ops.loss import triton

        return triton.statistics_and_gradient_(logits, labels, d_log_prob, ignore_index)
    log_sum, label_logit, _ = row_statistics_reference(logits, labels, ignore_index)
    logits_gradient_reference_(logits, labels, log_sum, d_log_prob, ignore_index)
    return log_sum, label_logit


def scale_(gradient: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """gradient (contiguous) times a 0-d factor, in place; on a GPU a factor of 1 costs no pass over the memory."""
    if use_triton(gradient):
        from modeling.ops.loss import triton

        return triton.scale_(gradient, factor)
    return gradient.mul_(factor.to(gradient.dtype))


def row_statistics_reference(
    logits: torch.Tensor, labels: torch.Tensor, ignore_index: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    z = logits.float()
    log_sum = torch.logsumexp(z, dim=-1)
    valid = labels != ignore_index
    label_logit = z.gather(1, labels.where(valid, 0)[:, None]).squeeze(1).where(valid, 0)
    log_p = z - log_sum[:, None]
    return log_sum, label_logit, -(log_p.exp() * log_p).sum(-1)


def logits_gradient_reference_(
    logits: torch.Tensor,
    labels: torch.Tensor,
    log_sum: torch.Tensor,
    d_log_prob: torch.Tensor,
    ignore_index: int,
    entropy: torch.Tensor | None = None,
    d_entropy: torch.Tensor | None = None,
) -> torch.Tensor:
    log_p = logits.float() - log_sum[:, None]
    p = log_p.exp()
    valid = labels != ignore_index
    d_label = d_log_prob.where(valid, 0)
    gradient = p * -d_label[:, None]
    gradient.scatter_add_(1, labels.where(valid, 0)[:, None], d_label[:, None])
    if entropy is not None and d_entropy is not None:
        gradient -= d_entropy[:, None] * p * (log_p + entropy[:, None])
    return logits.copy_(gradient)
