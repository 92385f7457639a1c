"""Packed attention by `torch.nn.attention.varlen`: the kernel that every CUDA build of torch has."""

import inspect
from functools import cache
from typing import Any

from torch import Tensor


@cache
def _varlen_options() -> frozenset[str]:
    """The keywords that the installed torch's varlen_attn takes; they grew between torch 2.11 and 2.14."""
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)


def attend(
    query: Tensor, key: Tensor, value: Tensor, *, cu_seqlens: Tensor, max_seqlen: int, causal: bool, scale: float
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    accepted = _varlen_options()
    options: dict[str, Any] = {"scale": scale}
    if "window_size" in accepted:
        options["window_size"] = (-1, 0) if causal else (-1, -1)
    else:
        options["is_causal"] = causal
    if query.shape[1] != key.shape[1]:
        if "enable_gqa" in accepted:
            options["enable_gqa"] = True
        else:
            groups = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    out = varlen_attn(query, key, value, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, **options)
    return out[0] if isinstance(out, tuple) else out
