"""Packed attention by the flash-attn 2 package."""

from torch import Tensor


def attend(
    query: Tensor, key: Tensor, value: Tensor, *, cu_seqlens: Tensor, max_seqlen: int, causal: bool, scale: float
) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    out = flash_attn_varlen_func(
        query,
        key,
        value,
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        max_seqlen_q=max_seqlen,
        max_seqlen_k=max_seqlen,
        softmax_scale=scale,
        causal=causal,
    )
    return out[0] if isinstance(out, tuple) else out
