"""flash-attn 4's kernels on packed rows, forward and backward, without autograd.

Launched directly. Between a caller and a kernel the package spends 100 microseconds of Python forward and 170 backward,
as long as the kernels of a vision block take. So the first call of a kind goes through the package, which compiles;
what it compiled is kept, and later calls of that kind pass their tensors to it. That needs the package's inner
workings: it is done on Hopper and for the releases in `TESTED`. Others are called as usual.

Backward on Hopper with heads that are no multiple of 32 wide (72, say, the vision tower's): the package's main kernel
adds up the query's gradient in rows of the next multiple of 16, but the kernels before and after it clear and read rows
of the next multiple of 32 (flash-attention's pull request 2896), and the gradient is wrong, without a word. Launched
directly, the main kernel is compiled for rows of a multiple of 32 too, as that request has it; otherwise heads get
zeros behind them. (The other way round, all three at the multiple of 16, would be wrong as well: the first kernel then
clears statistics of rows behind a segment's end, which are another segment's.)

Letters: T packed rows, N heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

TESTED = ("4.0.0b36",)
_NARROW = 64
"""Heads narrower than this go through the package's own backward: no published model has them."""
_TILE = {"tile_mn": (192, 128), "mma_pv_is_rs": False, "intra_wg_overlap": True}
"""A forward block's rows and columns for heads of 65 to 96 values, not causal, on Hopper, with the package's flags.
Of the time of its own choice, (192, 144), they take 0.95 to 1.04 for segments of 576 to 8,192 rows, and 0.63 for 256
(heads of 72, H100)."""
_LONG = 512
"""The package compiles other kernels for segments that fit into one block; no block has so many rows."""
_MANY = 256
"""With more segments than this the package's kernels take a table of where each begins."""


def forward(
    query: Tensor, key: Tensor, value: Tensor, *, cu_seqlens: Tensor, max_seqlen: int, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention inside each segment: the output (T, N, D) and the log-sum-exp of the scores (N, T) float32.

    Arguments as of `attention.varlen_attention`, bf16 or fp16 on Hopper or newer.
    """
    from flash_attn.cute.interface import _flash_attn_fwd

    direct = _launches_directly(query.device)
    by_package = partial(
        _flash_attn_fwd, query, key, value, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=max_seqlen,
        max_seqlen_k=max_seqlen, softmax_scale=scale, causal=causal, return_lse=True,
        **(_TILE if direct and 64 < query.shape[-1] <= 96 and not causal else {}),
    )  # fmt: skip
    if not direct or cu_seqlens.shape[0] - 1 > _MANY or query.numel() == 0:
        out, lse, *_ = by_package()
        return out, lse
    kind = _kind(query, key, cu_seqlens, max_seqlen, causal)
    kernel = _forward_kernels.get(kind)
    if kernel is None:
        (out, lse, *_), _forward_kernels[kind] = _recorded(_flash_attn_fwd, by_package)
        return out, lse
    query, key, value = _aligned(query), _aligned(key), _aligned(value)
    rows, heads, _ = query.shape
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(heads, rows, dtype=torch.float32, device=query.device)
    kernel(
        query, key, value, out, lse, scale, cu_seqlens, cu_seqlens,
        None, None, None, None, None, None, None, _nothing(), None, None,
    )  # fmt: skip
    return out, lse


def backward(
    d_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    cu_seqlens: Tensor,
    max_seqlen: int,
    causal: bool,
    scale: float,
    into: tuple[Tensor, ...] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The adjoint of `forward` in query, key and value, written to `into` where given: three shaped like them, their
    rows of whole 16 bytes."""
    if into is None:
        into = (torch.empty_like(query), torch.empty_like(key), torch.empty_like(value))
    options: dict[str, Any] = {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen, "causal": causal, "scale": scale}
    if not _launches_directly(query.device) or query.shape[-1] < _NARROW or query.numel() == 0:
        for target, gradient in zip(into, _padded_backward(d_out, query, key, value, out, lse, **options), strict=True):
            target.copy_(gradient)
        return into[0], into[1], into[2]
    kind = _kind(query, key, cu_seqlens, max_seqlen, causal)
    kernels = _backward_kernels.get(kind)
    if kernels is None:
        kernels = _backward_kernels[kind] = _compile_backward(d_out, query, key, value, out, lse, **options)
    d_out, query, key, value = (_aligned(x) for x in (d_out, query, key, value))
    _launch_backward(kernels, d_out, query, key, value, out, lse, cu_seqlens, scale, into)
    return into[0], into[1], into[2]


def attend(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """`forward` as a step of autograd; the options are its keywords."""
    return _Attention.apply(query, key, value, options)


class _Attention(torch.autograd.Function):
    """forward: `forward`; backward: `backward`. The package's own autograd function is left out."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> Tensor:
        query, key, value = query.detach(), key.detach(), value.detach()
        out, lse = forward(query, key, value, **options)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.options = options
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        return *backward(d_out.contiguous(), *ctx.saved_tensors, **ctx.options), None


def padded_width(head_dim: int, device: torch.device) -> int:
    """How wide heads must be for the package's own backward."""
    return _multiple(head_dim, 32) if torch.cuda.get_device_capability(device)[0] == 9 else head_dim


class _BackwardKernels(NamedTuple):
    prepare: Callable  # rowsum(d_out * out), and zeros where the query's gradient is added up
    main: Callable
    finish_query: Callable  # sums of float32 to the gradient
    finish_key: Callable | None  # the same for key and value, where query heads share them
    block_rows: int
    block_columns: int
    width: int  # of a row of the sums


_forward_kernels: dict[tuple, Callable] = {}
_backward_kernels: dict[tuple, _BackwardKernels] = {}


@cache
def _launches_directly(device: torch.device) -> bool:
    try:
        return version("flash-attn-4") in TESTED and torch.cuda.get_device_capability(device)[0] == 9
    except PackageNotFoundError:
        return False


@cache
def _nothing() -> Any:
    """The package's record of further tensors that a kernel reads: none."""
    from flash_attn.cute.interface import AuxData

    return AuxData(None, None)


def _kind(query: Tensor, key: Tensor, cu_seqlens: Tensor, max_seqlen: int, causal: bool) -> tuple:
    """What decides which kernels the package compiles."""
    many = cu_seqlens.shape[0] - 1 > _MANY
    return query.device, query.dtype, query.shape[1:], key.shape[1], causal, min(max_seqlen, _LONG), many


def _aligned(x: Tensor) -> Tensor:
    """x, or a copy whose rows begin at whole 16 bytes, as the kernels take for granted."""
    row, head, element = x.stride()
    return x if element == 1 and not (row % 8 or head % 8 or x.data_ptr() % 16) else x.contiguous()


def _multiple(size: int, of: int) -> int:
    return -(-size // of) * of


class _Recorder(dict):
    """Takes the place of one of the package's caches for a while, and keeps the kernel that was asked for last."""

    asked: Callable | None = None

    def __getitem__(self, key: Any) -> Callable:
        self.asked = super().__getitem__(key)
        return self.asked


def _recorded(function: Any, call: Callable[[], Any]) -> tuple[Any, Callable]:
    """What a call of `function` returns, and the kernel it launched, compiled anew."""
    kernels = function.compile_cache
    function.compile_cache = recorder = _Recorder()
    try:
        result = call()
    finally:
        function.compile_cache = kernels
    return result, recorder.asked or _no_kernel


def _no_kernel(*args: Any) -> None:
    raise RuntimeError("the package launched no kernel for the first call of this kind")


def _padded_backward(
    d_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    cu_seqlens: Tensor,
    max_seqlen: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The package's own backward, heads widened where it needs that."""
    from flash_attn.cute.interface import _flash_attn_bwd

    head_dim, width = query.shape[-1], padded_width(query.shape[-1], query.device)
    if width != head_dim:
        d_out, query, key, value, out = (F.pad(x, (0, width - head_dim)) for x in (d_out, query, key, value, out))
    lengths = {"max_seqlen_q": max_seqlen, "max_seqlen_k": max_seqlen}
    gradients = _flash_attn_bwd(
        query, key, value, out, d_out, lse, scale, causal, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, **lengths
    )
    d_query, d_key, d_value = (gradient[..., :head_dim] for gradient in gradients)
    return d_query, d_key, d_value


def _launch_backward(
    kernels: _BackwardKernels,
    d_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    into: tuple[Tensor, ...],
) -> None:
    (rows, heads, _), key_heads, segments = query.shape, key.shape[1], cu_seqlens.shape[0] - 1
    # Each segment begins at a whole block of the sums.
    sum_rows = _multiple(rows + segments * kernels.block_rows, kernels.block_rows)
    sums = torch.empty(heads, sum_rows * kernels.width, dtype=torch.float32, device=query.device)
    products, log2_sums = (sums.new_empty(heads, sum_rows) for _ in range(2))
    key_sums, value_sums = into[1:]
    if kernels.finish_key is not None:
        key_rows = _multiple(rows + segments * kernels.block_columns, kernels.block_columns)
        key_sums, value_sums = (sums.new_zeros(key_heads, key_rows * kernels.width) for _ in range(2))
    query_blocks, key_blocks = _first_blocks(kernels, cu_seqlens)
    kernels.prepare(
        out, d_out, products, lse, log2_sums, sums, cu_seqlens, None, None, None, None, 1.0, query_blocks, None
    )
    kernels.main(
        query, key, value, d_out, log2_sums, products, sums, key_sums, value_sums, scale, cu_seqlens, cu_seqlens,
        None, None, None, None, None, None, None, _nothing(), None, key_blocks,
    )  # fmt: skip
    kernels.finish_query(sums, into[0], scale, cu_seqlens, None, None, query_blocks)
    if kernels.finish_key is not None:
        kernels.finish_key(key_sums, into[1], scale, cu_seqlens, None, None, key_blocks)
        kernels.finish_key(value_sums, into[2], 1.0, cu_seqlens, None, None, key_blocks)


def _first_blocks(kernels: _BackwardKernels, cu_seqlens: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Of many segments, where the blocks of each begin, counted in query rows and in key rows."""
    if cu_seqlens.shape[0] - 1 <= _MANY:
        return None, None
    from flash_attn.cute.interface import _compute_tile_cumsum

    query_blocks, _ = _compute_tile_cumsum(cu_seqlens=cu_seqlens, seqused=None, tile_size=kernels.block_rows)
    key_blocks, _ = _compute_tile_cumsum(cu_seqlens=cu_seqlens, seqused=None, tile_size=kernels.block_columns)
    return query_blocks, key_blocks


def _of_width(main_class: Any, width: int) -> Any:
    """The package's main kernel with rows of `width` for heads, in registers, shared memory and sums."""

    class Wide(main_class):
        def __init__(self, dtype: Any, head_dim: int, head_dim_v: int | None = None, *args: Any, **kwargs: Any) -> None:
            super().__init__(dtype, head_dim, head_dim_v, *args, **kwargs)
            self.tile_hdim = self.tile_hdimv = width
            self.check_hdim_oob = self.check_hdim_v_oob = head_dim != width
            self.shuffle_LSE = self.shuffle_dPsum = self.SdP_swapAB and width <= 64

    return Wide


def _compile_main(call: Callable[[], Any], width: int) -> Callable:
    """The main kernel that a call of the package's backward compiles, with rows of `width`."""
    from flash_attn.cute import interface

    main_class = interface.FlashAttentionBackwardSm90
    interface.FlashAttentionBackwardSm90 = _of_width(main_class, width)
    try:
        return _recorded(interface._flash_attn_bwd, call)[1]
    finally:
        interface.FlashAttentionBackwardSm90 = main_class


def _compile_backward(
    d_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    cu_seqlens: Tensor,
    max_seqlen: int,
    causal: bool,
    scale: float,
) -> _BackwardKernels:
    """The kernels for tensors of this kind; what they compute here is thrown away."""
    from flash_attn.cute import interface

    head_dim = query.shape[-1]
    tiles = interface._tile_size_bwd_sm90(head_dim, head_dim, causal, False)
    dtype = interface.torch2cute_dtype_map[query.dtype]
    multiple = 64 if tiles.dKV_swapAB else 32
    width = _multiple(head_dim, multiple)
    call = partial(
        interface._flash_attn_bwd, query, key, value, out, d_out, lse, scale, causal,
        cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=max_seqlen, max_seqlen_k=max_seqlen,
    )  # fmt: skip
    main = _compile_main(call, width)
    kernels = _BackwardKernels(_no_kernel, main, _no_kernel, None, tiles.m_block_size, tiles.n_block_size, width)
    query_blocks, key_blocks = _first_blocks(kernels, cu_seqlens)
    common: dict[str, Any] = {"hdim_multiple_of": multiple, "fake_mode": False}

    def room(heads: int, block: int) -> tuple[Tensor, Tensor, Tensor]:
        rows = _multiple(query.shape[0] + (cu_seqlens.shape[0] - 1) * block, block)
        sums, products, lse = (
            torch.zeros(heads, size, dtype=torch.float32, device=query.device) for size in (rows * width, rows, rows)
        )
        return sums, products, lse

    def finish(heads: int, like: Tensor, block: int, threads: int, atoms: int, swap: bool, blocks: Any) -> Callable:
        call = partial(
            interface._bwd_postprocess_convert, room(heads, block)[0], torch.empty_like(like), scale, cu_seqlens, None,
            90, dtype, head_dim, block, threads, atoms, swap, cu_total_m_blocks=blocks, **common,
        )  # fmt: skip
        return _recorded(interface._bwd_postprocess_convert, call)[1]

    sums, products, log2_sums = room(query.shape[1], tiles.m_block_size)
    call = partial(
        interface._bwd_preprocess, out, d_out.contiguous(), products, lse, log2_sums, sums, cu_seqlens, None, None,
        dtype, head_dim, head_dim, tiles.m_block_size, cu_total_m_blocks=query_blocks, **common,
    )  # fmt: skip
    prepare = _recorded(interface._bwd_preprocess, call)[1]
    threads = tiles.num_wg * 128
    of_query = (tiles.m_block_size, 128 if tiles.dQ_single_wg else threads, tiles.AtomLayoutMdQ, tiles.dQ_swapAB)
    of_key = (tiles.n_block_size, threads, tiles.AtomLayoutNdKV, tiles.dKV_swapAB)
    return kernels._replace(
        prepare=prepare,
        finish_query=finish(query.shape[1], query, *of_query, query_blocks),
        finish_key=finish(key.shape[1], key, *of_key, key_blocks) if query.shape[1] != key.shape[1] else None,
    )
