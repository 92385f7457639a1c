"""The definition of the expert layer, a loop over experts, which the fast backends are tested against."""

import torch
import torch.nn.functional as F

from modeling.ops.experts.grouped import row_invariant_linear


def eager_experts(
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
) -> torch.Tensor:
    """The definition: expert by expert, its tokens through its MLP, weighted and added in fp32. Shapes as of
    `fused_moe_forward`."""
    out = torch.zeros_like(hidden_states, dtype=torch.float32)  # (T, H)
    for expert in range(gate_up_proj.shape[0]):
        token, k = torch.where(top_k_index == expert)
        gate, up = row_invariant_linear(hidden_states[token], gate_up_proj[expert]).chunk(2, dim=-1)  # (n, I) each
        y = row_invariant_linear(F.silu(gate) * up, down_proj[expert])  # (n, H)
        out = out.index_add(0, token, y.float() * top_k_weights[token, k, None].float())
    return out.to(hidden_states.dtype)
