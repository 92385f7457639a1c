"""Attention over packed sequences of different lengths, one function over several kernels.

Packed rows never form an S x S mask: the boundaries (`cu_seqlens`) go to a variable-length kernel, and where none fits
(CPU, float32) the segments are attended one run of equal lengths at a time. Which kernel runs follows from the model's
`attn_implementation`, the device and what is installed:

    flash_attention_4, flash_attention_2   that package
    sdpa on CUDA in half precision         the fastest installed: flash-attn 4 (Hopper and newer), flash-attn 2, torch
    sdpa elsewhere                         scaled_dot_product_attention per segment
    eager                                  softmax(Q K^T) V per segment, the readable reference

"""

from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from modeling.distributed.sequence_parallel import gather_heads_scatter_seq, gather_seq_scatter_heads, group_size
from modeling.ops.attention import compiled, flash_attention_2, flash_attention_4, reference, torch_varlen

HALF_PRECISION = (torch.float16, torch.bfloat16)


@cache
def _installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


@cache
def flash_attention_4_available() -> bool:
    """flash-attn 4 (`flash_attn.cute`) is installed and the GPU is Hopper or newer."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0):
        return False
    return find_spec("flash_attn") is not None and find_spec("flash_attn.cute") is not None


@cache
def flash_attention_2_available() -> bool:
    """The flash-attn 2 package is installed (flash-attn 4 alone shares its import name, not its functions)."""
    return torch.cuda.is_available() and _installed("flash-attn")


@torch.compiler.assume_constant_result
def select_varlen_backend(implementation: str, device: torch.device, dtype: torch.dtype) -> str:
    """The name of the kernel that `varlen_attention` runs; see the table at the top of the file.

    Raises:
        ValueError: `implementation` names a package that is not installed or does not run on this device and dtype.
    """
    if implementation == "eager":
        return "eager"
    half_on_cuda = device.type == "cuda" and dtype in HALF_PRECISION
    wanted = {"flash_attention_4": flash_attention_4_available, "flash_attention_2": flash_attention_2_available}
    if implementation in wanted:
        if not half_on_cuda:
            raise ValueError(
                f"attn_implementation={implementation!r} needs float16 or bfloat16 on a CUDA device, got {dtype} on "
                f"{device.type}; use attn_implementation='sdpa'."
            )
        if not wanted[implementation]():
            raise ValueError(
                f"attn_implementation={implementation!r} is not available here: install the 'hopper' extra for "
                "flash_attention_4 (Hopper or newer) or the 'flash-attn' extra for flash_attention_2, or use 'sdpa'."
            )
        return implementation
    if half_on_cuda:
        if flash_attention_4_available():
            return "flash_attention_4"
        return "flash_attention_2" if flash_attention_2_available() else "torch_varlen"
    return "sdpa"


VARLEN_BACKENDS: dict[str, Callable] = {
    "eager": reference.eager_segments,
    "sdpa": reference.sdpa_segments,
    "torch_varlen": torch_varlen.attend,
    "flash_attention_2": flash_attention_2.attend,
    "flash_attention_4": flash_attention_4.attend,
}


def exchange_heads(query: Tensor, key: Tensor, value: Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """From all heads of a slice to the whole sequence of this rank's heads: (t, N, D) each to (T, N / ranks, D).

    The three travel together, in one exchange. Key/value heads are repeated only where there are fewer than ranks; a
    rank's query heads find their own key heads among its own, because both are cut in order.

    forward: all-to-all; backward: the all-to-all back, summed over the copies of a repeated head.
    """
    ranks = group_size(group)
    if key.shape[1] < ranks:
        copies = ranks // key.shape[1]
        key, value = key.repeat_interleave(copies, dim=1), value.repeat_interleave(copies, dim=1)
    heads = [x.shape[1] // ranks for x in (query, key, value)]
    rows = torch.cat([x.unflatten(1, (ranks, -1)) for x in (query, key, value)], dim=2).flatten(1, 2)
    query, key, value = gather_seq_scatter_heads(rows, seq_dim=0, head_dim=1, group=group).split(heads, dim=1)
    return query, key, value


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    cu_seqlens: Tensor,
    max_seqlen: int,
    causal: bool,
    scale: float,
    implementation: str = "sdpa",
    group: ProcessGroup | None = None,
) -> Tensor:
    """Self-attention inside each segment of packed rows.

    Args:
        query: (T, N, D). key, value: (T, N_kv, D) with N divisible by N_kv; query head n reads key head n // (N /
            N_kv).
        cu_seqlens: (segments + 1,) int32 on the rows' device, from 0 to T.
        max_seqlen: the longest segment, a Python int.
        causal: whether a row sees only rows before it in its segment.
        scale: factor on the scores, usually 1 / sqrt(D).
        implementation: the model's `attn_implementation`.
        group: ranks that hold the other slices of the rows (Ulysses): query, key and value are then this rank's (t, N,
            D), cu_seqlens and max_seqlen still describe all T rows, and each rank attends with its share of the heads.

    Returns:
        (T, N, D), or (t, N, D) with a group; rows of one segment independent of every other segment, bit for bit.
    """
    backend = select_varlen_backend(implementation, query.device, query.dtype)
    if group is not None and group_size(group) > 1:
        query, key, value = exchange_heads(query, key, value, group)
    options: dict[str, Any] = {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen, "causal": causal, "scale": scale}
    if torch.compiler.is_compiling() and backend in compiled.OPAQUE:
        out = compiled.varlen_attention(query, key, value, **options, backend=backend)
    else:
        out = VARLEN_BACKENDS[backend](query, key, value, **options)
    return gather_heads_scatter_seq(out, head_dim=1, seq_dim=0, group=group)
