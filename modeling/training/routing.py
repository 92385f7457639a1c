"""How evenly the routers spread tokens over experts, layer by layer."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class RouterStatistics:
    """Over all tokens of all ranks."""

    load: Tensor
    """(layers, E) each expert's share of a layer's assignments; sums to 1."""
    max_violation: list[float]
    """Per layer: the busiest expert's load over the mean, minus 1; 0 is even (Wang et al., 2024, eq. 4)."""
    entropy: list[float]
    """Per layer: mean entropy of a token's routing distribution, in nats; log E knows nothing, 0 is certain."""


class RouterMeter:
    """Sums over micro-batches and ranks; waits for the device once, when it is read."""

    def __init__(self, num_experts: int, top_k: int) -> None:
        self.num_experts, self.top_k = num_experts, top_k
        self._sums: Tensor | None = None

    @torch.no_grad()
    def add(self, router_logits: Sequence[Tensor], real_tokens: int) -> None:
        """router_logits: one (T, E) a layer; `real_tokens` of them, from the first, are not padding."""
        rows = []
        for logits in router_logits:
            probabilities = logits[:real_tokens].detach().softmax(-1, dtype=torch.float32)  # (T, E)
            chosen = probabilities.topk(self.top_k, dim=-1).indices.flatten()
            counts = torch.zeros(self.num_experts, device=logits.device).index_add_(
                0, chosen, torch.ones_like(chosen, dtype=torch.float32)
            )
            entropy = torch.special.entr(probabilities).sum()
            rows.append(torch.cat((counts, entropy[None])))
        sums = torch.stack(rows).double()  # (layers, E + 1)
        self._sums = sums if self._sums is None else self._sums + sums

    def read(self, group: dist.ProcessGroup | None) -> RouterStatistics:
        """Statistics over all ranks of `group`; a collective. Starts anew."""
        assert self._sums is not None
        sums, self._sums = self._sums, None
        if group is not None:
            dist.all_reduce(sums, group=group)
        sums = sums.cpu()
        counts, entropy = sums[:, :-1], sums[:, -1]
        total = counts.sum(1, keepdim=True).clamp(min=1)
        load = counts / total
        violation = (load * self.num_experts).amax(1) - 1
        return RouterStatistics(load, violation.tolist(), (entropy * self.top_k / total[:, 0]).tolist())
