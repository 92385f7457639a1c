"""The load-balancing loss of the routers, over every layer and every rank."""

import torch
import torch.distributed as dist


def load_balancing_loss_func(
    gate_logits: tuple[torch.Tensor, ...],
    num_experts: int,
    top_k: int,
    attention_mask: torch.Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """Load-balancing loss E * sum_e f_e p_e over all layers at once (Switch Transformer, eq. 4 to 6; Fedus et al.,
    2021).

    f_e is the number of assignments to expert e per token (so f sums to top_k), p_e the mean router probability.

    Args:
        gate_logits: raw router logits, one (T, E) per MoE layer.
        attention_mask: (B, S) with B*S = T, 0 at padding, which is left out of both means.
        group: ranks that hold other tokens. Counts are summed over them, once and without a gradient; the result is
            this rank's share, through its own tokens' probabilities, and the shares add up to the loss.

    Returns:
        A float32 scalar; top_k for perfectly even routing.
    """
    device = gate_logits[0].device
    counts, probabilities = torch.zeros(2, num_experts, device=device).unbind(0)
    keep = None if attention_mask is None else attention_mask.reshape(-1).to(device, torch.float32)
    rows = torch.full((), gate_logits[0].shape[0], device=device) if keep is None else keep.sum()
    for logits in gate_logits:
        routing = logits.softmax(-1, dtype=torch.float32)  # (T, E)
        chosen = routing.topk(top_k, dim=-1).indices  # (T, K)
        weight = torch.ones_like(chosen, dtype=torch.float32) if keep is None else keep[:, None].expand_as(chosen)
        counts = counts.scatter_add(0, chosen.flatten(), weight.flatten())
        probabilities = probabilities + (routing if keep is None else routing * keep[:, None]).sum(0)
    if group is not None:
        summed = torch.cat((counts, rows[None])).double()  # float32 cannot count beyond 16 million
        dist.all_reduce(summed, group=group)
        counts, rows = summed[:-1], summed[-1]
    total = rows * len(gate_logits)
    return (num_experts * (counts / total * (probabilities / total)).sum()).float()
