"""How flash-attn 4's kernels are driven, against a package that computes the same in torch.

The stand-in keeps the package's ways: caches of kernels by kind, gradients of queries added up in rows wider than a
head, segments that begin at whole blocks of the sums, and a main kernel whose rows are narrower than the kernels around
it take them to be. What the real kernels compute is tested on a GPU (test_attention.py).
"""

import sys
from collections import namedtuple
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from modeling.ops.attention import flash_attention_4, reference

BLOCK_ROWS, BLOCK_COLUMNS = 16, 32
LENGTHS = [5, 40, 1, 16, 33, 12]


def up(size: int, of: int) -> int:
    return -(-size // of) * of


def padded_rows(sums: torch.Tensor, width: int, cu_seqlens: torch.Tensor, block: int) -> list[torch.Tensor]:
    """Each segment's part of the sums (heads, rows x width): (heads, length, width), a view."""
    rows = sums.view(sums.shape[0], -1, width)
    bounds = cu_seqlens.tolist()
    starts = [(begin + number * block) // block * block for number, begin in enumerate(bounds[:-1])]
    lengths = sizes(cu_seqlens)
    return [rows[:, start : start + length] for start, length in zip(starts, lengths, strict=True)]


def make_package(launches: list[str]) -> ModuleType:
    """The stand-in for flash_attn.cute.interface; `launches` gets a word for each kernel launched or compiled."""
    package: Any = ModuleType("flash_attn.cute.interface")
    package.AuxData = namedtuple("AuxData", ["tensors", "scalars"])
    package.torch2cute_dtype_map = {torch.float32: "Float32"}

    class Main:
        def __init__(self, dtype: str, head_dim: int, head_dim_v: int, **options: Any) -> None:
            self.tile_hdim = up(head_dim, 16)
            self.SdP_swapAB = True

    package.FlashAttentionBackwardSm90 = Main

    def cached(function: Callable, key: tuple, kernel: Callable) -> Callable:
        if key not in function.compile_cache:  # type: ignore[attr-defined]
            launches.append(f"compile {kernel.__name__}")
            function.compile_cache[key] = kernel  # type: ignore[attr-defined]
        return function.compile_cache[key]  # type: ignore[attr-defined]

    def tiles(head_dim: int, head_dim_v: int, causal: bool, local: bool) -> SimpleNamespace:
        return SimpleNamespace(
            m_block_size=BLOCK_ROWS, n_block_size=BLOCK_COLUMNS, num_wg=2, dQ_single_wg=True, dQ_swapAB=False,
            AtomLayoutMdQ=1, AtomLayoutNdKV=2, dKV_swapAB=False,
        )  # fmt: skip

    def forward(
        q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, return_lse, **tile
    ):  # fmt: skip
        assert tile == (flash_attention_4._TILE if q.shape[-1] == 72 and not causal else {})

        def forward_kernel(q, k, v, out, lse, scale, cu_q, cu_k, *rest):
            launches.append("forward")
            assert len(rest) == 10 and isinstance(rest[7], package.AuxData)
            assert not any(x is not None for x in (*rest[:7], *rest[8:]))
            options = {"cu_seqlens": cu_q, "max_seqlen": 0, "causal": causal, "scale": scale}
            out.copy_(reference.eager_segments(q, k, v, **options))
            lse.zero_()

        out, lse = torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0])
        kernel = cached(forward, (q.shape[1:], k.shape[1], causal), forward_kernel)
        aux = package.AuxData(None, None)
        kernel(q, k, v, out, lse, softmax_scale, cu_seqlens_q, cu_seqlens_k, *[None] * 7, aux, None, None)
        return out, lse, None, None, None

    def preprocess(
        out, d_out, products, lse, log2, sums, cu, seqused, d_lse, dtype, head_dim, head_dim_v, block,
        cu_total_m_blocks=None, *, fake_mode, hdim_multiple_of=32,
    ):  # fmt: skip
        width = up(head_dim, hdim_multiple_of)

        def prepare_kernel(out, d_out, products, lse, log2, sums, cu, *rest):
            launches.append("prepare")
            package.out = out  # the real main kernel needs only the products
            assert rest == (None, None, None, None, 1.0, cu_total_m_blocks, None)
            for part in padded_rows(sums, width, cu, block):
                part.zero_()
            sums_of_rows = (out * d_out).sum(-1).split(sizes(cu))
            for part, own in zip(padded_rows(products, 1, cu, block), sums_of_rows, strict=True):
                part[..., 0] = own.T

        kernel = cached(preprocess, (head_dim, block, hdim_multiple_of), prepare_kernel)
        kernel(out, d_out, products, lse, log2, sums, cu, None, None, None, None, 1.0, cu_total_m_blocks, None)

    def postprocess(
        sums, output, scale, cu, seqused, arch, dtype, head_dim, block, threads, atoms, swap,
        cu_total_m_blocks=None, *, fake_mode, hdim_multiple_of=32,
    ):  # fmt: skip
        width = up(head_dim, hdim_multiple_of)

        def finish_kernel(sums, output, scale, cu, seqused, sink, blocks):
            launches.append("finish")
            parts = padded_rows(sums, width, cu, block)
            output.copy_(torch.cat([part[..., :head_dim].transpose(0, 1) for part in parts]) * scale)

        kernel = cached(postprocess, (head_dim, block, threads, hdim_multiple_of), finish_kernel)
        kernel(sums, output, scale, cu, None, None, cu_total_m_blocks)

    def backward(
        q, k, v, out, d_out, lse, scale, causal, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    ):  # fmt: skip
        head_dim, shared = q.shape[-1], q.shape[1] != k.shape[1]
        made = package.FlashAttentionBackwardSm90("Float32", head_dim, head_dim, dKV_swapAB=False)

        def main_kernel(q, k, v, d_out, log2, products, sums, d_k, d_v, scale, cu, cu_k, *rest):
            launches.append("main")
            assert len(rest) == 10 and isinstance(rest[7], package.AuxData)
            out = package.out
            sums_of_rows = (out * d_out).sum(-1).split(sizes(cu))
            for part, own in zip(padded_rows(products, 1, cu, BLOCK_ROWS), sums_of_rows, strict=True):
                torch.testing.assert_close(part[..., 0], own.T)
            options = {"cu_seqlens": cu, "max_seqlen": 0, "causal": causal, "scale": scale}
            gradients = reference.segments_backward(d_out, q, k, v, out, **options)
            targets = [(sums, BLOCK_ROWS, scale)] + [(d_k, BLOCK_COLUMNS, scale), (d_v, BLOCK_COLUMNS, 1.0)] * shared
            for (target, block, factor), gradient in zip(targets, gradients, strict=False):
                parts = padded_rows(target, made.tile_hdim, cu, block)
                for part, own in zip(parts, gradient.split(sizes(cu)), strict=True):
                    part[..., :head_dim] += own.transpose(0, 1) / factor
            if not shared:
                d_k.copy_(gradients[1])
                d_v.copy_(gradients[2])

        run_package_backward(package, backward, main_kernel, cached, q, k, v, out, d_out, lse, scale, cu_seqlens_q)

    package._tile_size_bwd_sm90 = tiles
    package._flash_attn_fwd, package._flash_attn_bwd = forward, backward
    package._bwd_preprocess, package._bwd_postprocess_convert = preprocess, postprocess
    for function in (forward, backward, preprocess, postprocess):
        function.compile_cache = {}
    return package


def sizes(cu_seqlens: torch.Tensor) -> list[int]:
    return cu_seqlens.diff().tolist()


def run_package_backward(
    package: Any, backward: Any, kernel: Callable, cached: Callable, q, k, v, out, d_out, lse, scale, cu
) -> None:
    """The package's own backward as far as the main kernel, with sums for heads of the next multiple of 32."""
    width, segments = up(q.shape[-1], 32), len(cu) - 1
    rows = up(len(q) + segments * BLOCK_ROWS, BLOCK_ROWS)
    sums, products, log2 = (q.new_zeros(q.shape[1], size) for size in (rows * width, rows, rows))
    package._bwd_preprocess(
        out, d_out, products, lse, log2, sums, cu, None, None, "Float32", q.shape[-1], q.shape[-1], BLOCK_ROWS,
        fake_mode=False,
    )  # fmt: skip
    d_k, d_v = torch.empty_like(k), torch.empty_like(v)
    if q.shape[1] != k.shape[1]:
        key_rows = up(len(q) + segments * BLOCK_COLUMNS, BLOCK_COLUMNS)
        d_k, d_v = (k.new_zeros(k.shape[1], key_rows * width) for _ in range(2))
    aux = package.AuxData(None, None)
    cached(backward, (q.shape[1:], k.shape[1]), kernel)(
        q, k, v, d_out, log2, products, sums, d_k, d_v, scale, cu, cu, *[None] * 7, aux, None, None
    )


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The stand-in installed and driven directly, whatever the device; what it launched and compiled."""
    words: list[str] = []
    for name in ("flash_attn", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    package: Any = make_package(words)
    monkeypatch.setitem(sys.modules, "flash_attn.cute.interface", package)
    sys.modules["flash_attn.cute"].interface = package  # type: ignore[attr-defined]
    monkeypatch.setattr(flash_attention_4, "_launches_directly", lambda device: True)
    monkeypatch.setattr(flash_attention_4, "_NARROW", 0)
    for kernels in ("_forward_kernels", "_backward_kernels"):
        monkeypatch.setattr(flash_attention_4, kernels, {})
    flash_attention_4._nothing.cache_clear()
    yield words
    flash_attention_4._nothing.cache_clear()


def check(heads: tuple[int, int], dim: int, lengths: list[int], causal: bool, into: bool) -> None:
    generator = torch.Generator().manual_seed(len(lengths) + dim)
    rows = sum(lengths)
    joint = torch.randn(rows, heads[0] + 2 * heads[1], dim, generator=generator)
    query, key, value = joint.split([heads[0], heads[1], heads[1]], dim=1)  # strided, as a projection's parts are
    d_out = torch.randn(rows, heads[0], dim, generator=generator)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    options = {"cu_seqlens": cu_seqlens, "max_seqlen": max(lengths), "causal": causal, "scale": 0.3}
    wanted = reference.eager_segments(query, key, value, **options)
    gradients = reference.segments_backward(d_out, query, key, value, wanted, **options)
    out, lse = flash_attention_4.forward(query, key, value, **options)
    torch.testing.assert_close(out, wanted)
    target = torch.full_like(joint, float("nan")).split([heads[0], heads[1], heads[1]], dim=1) if into else None
    found = flash_attention_4.backward(d_out, query, key, value, out, lse, **options, into=target)
    for one, other in zip(found, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    if target is not None:
        assert all(one is other for one, other in zip(found, target, strict=True))


@pytest.mark.parametrize("into", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dim", [32, 40, 72])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
def test_forward_and_backward(heads: tuple[int, int], dim: int, causal: bool, into: bool, launches: list[str]) -> None:
    for lengths in (LENGTHS, LENGTHS[::-1], [7, *LENGTHS]):
        check(heads, dim, lengths, causal, into)
    finishes = 1 if heads[0] == heads[1] else 3
    last = ["forward", "prepare", "main"] + ["finish"] * finishes
    assert launches[-len(last) :] == last
    # A second and third batch of the kind compile nothing.
    assert "compile" not in " ".join(launches[-2 * len(last) :])


def test_short_batches_are_a_kind_of_their_own(launches: list[str]) -> None:
    check((4, 4), 40, [600, 5], False, False)
    first = sum("compile" in word for word in launches)
    check((4, 4), 40, [700, 5], False, False)
    assert sum("compile" in word for word in launches) == first
    check((4, 4), 40, [6, 5], False, False)
    assert sum("compile" in word for word in launches) > first


def test_negative_control(launches: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of 16s in the main kernel and of 32s around it, as the package has them: queries' gradients are wrong."""
    check((4, 4), 64, LENGTHS, False, False)
    monkeypatch.setattr(flash_attention_4, "_of_width", lambda main, width: main)
    with pytest.raises((AssertionError, RuntimeError)):
        check((4, 4), 40, LENGTHS, False, False)


def test_the_packages_class_is_put_back(launches: list[str]) -> None:
    package: Any = sys.modules["flash_attn.cute.interface"]
    main = package.FlashAttentionBackwardSm90
    check((4, 4), 72, LENGTHS, False, False)
    assert package.FlashAttentionBackwardSm90 is main
