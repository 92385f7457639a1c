"""From (token, expert) choices to rows sorted by expert, and back.

One stable sort replaces the one-hot masks and per-expert index lists of the reference loop: after it, the rows of an
expert are neighbours, as grouped matrix products want them, and every route knows its row, so that the weighted sum
over a token's experts is a gather in a fixed order (no atomics, hence the same bits every run). Nothing here waits for
the host.

Letters: T tokens, K routes per token, E experts, R = T * K rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from modeling.ops.launch import use_triton


@dataclass(frozen=True)
class Routing:
    """Rows sorted by expert. All tensors int32, on the device of the expert indices."""

    route: torch.Tensor
    """(R,) which flattened (token, k) route each row serves; ascending within an expert."""
    token: torch.Tensor
    """(R,) which token each row reads."""
    position: torch.Tensor
    """(T, K) which row serves each route: the inverse of `route`."""
    offsets: torch.Tensor
    """(E + 1,) rows offsets[i] to offsets[i + 1] belong to expert i."""


def inverse_permutation(permutation: torch.Tensor) -> torch.Tensor:
    """`inverse[permutation[i]] = i`. permutation (R,) int32 -> (R,) int32."""
    ranks = torch.arange(permutation.numel(), dtype=torch.int32, device=permutation.device)
    return torch.empty_like(ranks).scatter_(0, permutation.long(), ranks)


def route_by_expert(top_k_index: torch.Tensor, num_experts: int) -> Routing:
    """Sort the routes of (T, K) integer expert choices in [0, num_experts) by expert; ties keep token order.

    Raises ValueError on the CPU for a choice outside the range; on a GPU that check would cost a wait for the host.
    """
    choices = top_k_index.flatten()  # (R,)
    if choices.device.type == "cpu" and choices.numel():
        low, high = int(choices.min()), int(choices.max())
        if low < 0 or high >= num_experts:
            raise ValueError(
                f"expert choices must lie in [0, {num_experts}), got values from {low} to {high}; check that "
                "top_k_index comes from a router over these experts"
            )
    # A radix sort's cost follows the width of its keys, so they are as narrow as the expert count allows.
    keys = choices.to(torch.uint8 if num_experts <= 256 else torch.int16 if num_experts < 2**15 else torch.int32)
    sorted_keys, order = torch.sort(keys, stable=True)
    if use_triton(order):
        from modeling.ops.experts import triton

        return Routing(*triton.lay_out_rows(sorted_keys, order, top_k_index.shape, num_experts))
    return Routing(*lay_out_rows_reference(sorted_keys, order, top_k_index.shape, num_experts))


def lay_out_rows_reference(
    sorted_keys: torch.Tensor, order: torch.Tensor, shape: torch.Size, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The fields of a `Routing` from the sorted experts (R,), the routes (R,) int64 in that order, and (T, K)."""
    route = order.to(torch.int32)  # (R,)
    ends = torch.arange(-1, num_experts, device=order.device)
    offsets = torch.searchsorted(sorted_keys.to(ends.dtype), ends, right=True, out_int32=True)  # (E + 1,)
    return route, route // max(shape[1], 1), inverse_permutation(route).view(shape), offsets
