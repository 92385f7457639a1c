"""Packed attention: every backend against the definition, on packed segments of unequal lengths."""

import pytest
import torch
from transformers.models.qwen3_vl_moe import modeling_qwen3_vl_moe as upstream

from modeling.ops.attention import VARLEN_BACKENDS, select_varlen_backend, varlen_attention

LENGTHS = [5, 5, 1, 12, 3, 3, 3]
LONG = [300, 1, 129, 64, 700]
CROWD = [1 + i % 90 for i in range(200)]  # most end inside a block of any kernel, side by side on the device
MANY = [1 + i % 7 for i in range(300)]


def packed(
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    heads: tuple[int, int] = (6, 2),
    dim: int = 8,
    lengths: list[int] = LENGTHS,
):
    generator = torch.Generator().manual_seed(0)
    total = sum(lengths)
    query, key, value = (
        torch.randn(total, n, dim, generator=generator).to(device, dtype).requires_grad_()
        for n in (heads[0], heads[1], heads[1])
    )
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int().to(device)
    return query, key, value, cu_seqlens


def by_definition(query, key, value, causal: bool, scale: float, lengths: list[int] = LENGTHS) -> torch.Tensor:
    """One dense masked softmax over everything, in float64."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1).double(), value.repeat_interleave(groups, 1).double()
    segment = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(query.device)
    allowed = segment[:, None] == segment[None, :]
    if causal:
        allowed = allowed & torch.ones_like(allowed).tril()
    scores = torch.einsum("qnd,knd->nqk", query.double(), key) * scale
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
    return torch.einsum("nqk,knd->qnd", weights, value)


def errors(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> list[float]:
    return [float((one.double() - other).norm() / other.norm()) for one, other in zip(found, wanted, strict=True)]


def by_upstreams_eager(query, key, value, causal: bool, scale: float, lengths: list[int]) -> torch.Tensor:
    """transformers' own eager attention, one segment after the other."""
    layer = torch.nn.Module()
    layer.num_key_value_groups = query.shape[1] // key.shape[1]
    made = []
    for part in zip(*(x.split(lengths) for x in (query, key, value)), strict=True):
        q, k, v = (x.transpose(0, 1)[None] for x in part)
        mask = torch.full((len(part[0]),) * 2, float("-inf"), device=q.device, dtype=q.dtype).triu(1)
        made.append(upstream.eager_attention_forward(layer, q, k, v, mask if causal else None, scaling=scale)[0][0])
    return torch.cat(made)


NEEDS_GPU = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_GPU)])
@pytest.mark.parametrize("dim", [64, 72, 128])
@pytest.mark.parametrize("heads", [(6, 2), (4, 4)])
@pytest.mark.parametrize("causal", [True, False])
def test_eager_errs_no_more_than_upstreams_in_bf16(causal: bool, heads: tuple[int, int], dim: int, device: str) -> None:
    """Eager rounds its scores to bf16 before the softmax, upstream's as this one: wide scores err by more than 1e-2."""
    query, key, value, cu_seqlens = packed(torch.bfloat16, device, heads, dim, LONG)
    grad = torch.randn(query.shape, generator=torch.Generator().manual_seed(1)).to(device)
    options = {"cu_seqlens": cu_seqlens, "max_seqlen": max(LONG), "causal": causal, "scale": 0.3}
    outs = [
        by_definition(query, key, value, causal, 0.3, LONG),
        by_upstreams_eager(query, key, value, causal, 0.3, LONG),
        varlen_attention(query, key, value, implementation="eager", **options),
    ]
    exact, theirs, ours = (
        [out, *torch.autograd.grad((out * grad.to(out.dtype)).sum(), (query, key, value))] for out in outs
    )
    exact = [x.double() for x in exact]
    for one, other in zip(errors(ours, exact), errors(theirs, exact), strict=True):
        assert other > 1e-4 and one <= 1.1 * other


def check(
    implementation: str,
    causal: bool,
    heads: tuple[int, int],
    dtype: torch.dtype,
    device: str,
    bound: float,
    dim: int = 8,
    lengths: list[int] = LENGTHS,
):
    query, key, value, cu_seqlens = packed(dtype, device, heads, dim, lengths)
    grad = torch.randn(query.shape, generator=torch.Generator().manual_seed(1)).to(device)
    options = {"cu_seqlens": cu_seqlens, "max_seqlen": max(lengths), "causal": causal, "scale": 0.3}
    expected = by_definition(query, key, value, causal, 0.3, lengths)
    wanted = [expected, *torch.autograd.grad((expected * grad.double()).sum(), (query, key, value))]
    for _ in range(2):  # flash-attn 4's second call goes another way than its first
        out = varlen_attention(query, key, value, implementation=implementation, **options)
        found = [out, *torch.autograd.grad((out.float() * grad).sum(), (query, key, value))]
        assert [one.shape for one in found] == [other.shape for other in wanted]
        assert max(errors(found, [other.double() for other in wanted])) <= bound


@pytest.mark.parametrize("heads", [(6, 2), (4, 4)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_on_the_cpu(implementation: str, causal: bool, heads: tuple[int, int]) -> None:
    check(implementation, causal, heads, torch.float32, "cpu", bound=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("lengths", [LENGTHS, LONG, CROWD, MANY], ids=["short", "long", "crowd", "many"])
@pytest.mark.parametrize("dim", [64, 72, 128])
@pytest.mark.parametrize("heads", [(6, 2), (4, 4)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("implementation", ["sdpa", "torch_varlen", "flash_attention_2", "flash_attention_4"])
def test_on_the_gpu(
    implementation: str, causal: bool, heads: tuple[int, int], dim: int, lengths: list[int], monkeypatch
) -> None:
    """bf16 operands, so 1e-2 by norm; each kernel that is installed. 72 is the vision tower's, and no multiple of 32:
    flash-attn 4 needs help there."""
    from modeling.ops import attention

    if implementation == "torch_varlen":
        monkeypatch.setattr(attention, "flash_attention_4_available", lambda: False)
        monkeypatch.setattr(attention, "flash_attention_2_available", lambda: False)
        implementation = "sdpa"
    elif implementation.startswith("flash") and not getattr(attention, f"{implementation}_available")():
        pytest.skip(f"{implementation} is not installed")
    check(implementation, causal, heads, torch.bfloat16, "cuda", 1e-2, dim, lengths)


@pytest.mark.parametrize("heads", [(6, 2), (4, 4)])
def test_flash_attention_4_is_given_wide_heads(heads: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """On Hopper the package's backward sees heads of a multiple of 32, zeros behind, and the caller its own width."""
    import sys
    from types import ModuleType

    from modeling.ops.attention import flash_attention_4, reference

    seen = []

    def backward(query, key, value, out, d_out, lse, scale, causal, *, cu_seqlens_q, max_seqlen_q, **options):
        seen.append({x.shape[-1] for x in (query, key, value, out, d_out)})
        assert not any(x[..., 8:].any() for x in (query, key, value, out, d_out))
        options = {"cu_seqlens": cu_seqlens_q, "max_seqlen": max_seqlen_q, "causal": causal, "scale": scale}
        return reference.segments_backward(d_out, query, key, value, out, **options)

    package = ModuleType("flash_attn.cute.interface")
    package._flash_attn_bwd = backward
    for name in ("flash_attn", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "flash_attn.cute.interface", package)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(flash_attention_4, "_launches_directly", lambda device: False)
    query, key, value, cu_seqlens = packed(heads=heads)
    options = {"cu_seqlens": cu_seqlens, "max_seqlen": 12, "causal": True, "scale": 0.3}
    out = varlen_attention(query, key, value, **options)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    expected = torch.autograd.grad(out, (query, key, value), grad)
    with torch.no_grad():
        found = flash_attention_4.backward(grad, query, key, value, out, torch.empty(0), **options)
    assert seen == [{32}]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_kernel_of_a_first_call_is_kept() -> None:
    """The kernel that the package compiles for one call, and nothing of its own cache changed or used by that."""
    from modeling.ops.attention import flash_attention_4

    def function(x: int) -> int:
        if x not in function.compile_cache:
            function.compile_cache[x] = lambda y: x * y
        return function.compile_cache[x](10)

    cache: dict = {3: lambda y: -y}
    function.compile_cache = cache
    result, kernel = flash_attention_4._recorded(function, lambda: function(3))
    assert result == 30 and kernel(5) == 15
    assert function.compile_cache is cache and function(3) == -10

    def failing(x: int) -> None:
        raise ValueError("no such head")

    failing.compile_cache = cache
    with pytest.raises(ValueError, match="no such head"):
        flash_attention_4._recorded(failing, lambda: failing(3))
    assert failing.compile_cache is cache
    with pytest.raises(RuntimeError, match="launched no kernel"):
        flash_attention_4._no_kernel()


@pytest.mark.parametrize("causal", [True, False])
def test_written_out_backward_is_autograds(causal: bool) -> None:
    """The formula that compiled blocks use on the CPU."""
    from modeling.ops.attention.reference import segments_backward

    query, key, value, cu_seqlens = packed()
    options = {"cu_seqlens": cu_seqlens, "max_seqlen": 12, "causal": causal, "scale": 0.3}
    out = varlen_attention(query, key, value, **options)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    expected = torch.autograd.grad(out, (query, key, value), grad)
    with torch.no_grad():
        found = segments_backward(grad, query, key, value, out, **options)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_no_rows_and_empty_segments() -> None:
    query = torch.randn(4, 2, 8)
    options = {"max_seqlen": 4, "causal": True, "scale": 0.3}
    with_empty = varlen_attention(query, query, query, cu_seqlens=torch.tensor([0, 0, 4, 4]).int(), **options)
    plain = varlen_attention(query, query, query, cu_seqlens=torch.tensor([0, 4]).int(), **options)
    assert torch.equal(with_empty, plain)
    none = varlen_attention(query[:0], query[:0], query[:0], cu_seqlens=torch.tensor([0]).int(), **options)
    assert none.shape == (0, 2, 8)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_segments_are_strangers_bit_for_bit(implementation: str) -> None:
    query, key, value, cu_seqlens = packed()
    options = {"cu_seqlens": cu_seqlens, "max_seqlen": 12, "causal": True, "scale": 0.3}
    with torch.no_grad():
        before = varlen_attention(query, key, value, implementation=implementation, **options)
        for x in (query, key, value):
            x[:5] = 100 * torch.randn(5, *x.shape[1:])
        after = varlen_attention(query, key, value, implementation=implementation, **options)
    assert torch.equal(before[5:], after[5:]) and not torch.equal(before[:5], after[:5])


def test_selection(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table at the top of the module, with the packages there or not."""
    from modeling.ops import attention

    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert select_varlen_backend("eager", cuda, torch.bfloat16) == "eager"
    assert select_varlen_backend("sdpa", cpu, torch.bfloat16) == "sdpa"
    assert select_varlen_backend("sdpa", cuda, torch.float32) == "sdpa"
    for has_4, has_2, expected in (
        (True, True, "flash_attention_4"),
        (False, True, "flash_attention_2"),
        (False, False, "torch_varlen"),
    ):
        monkeypatch.setattr(attention, "flash_attention_4_available", lambda has=has_4: has)
        monkeypatch.setattr(attention, "flash_attention_2_available", lambda has=has_2: has)
        assert select_varlen_backend("sdpa", cuda, torch.bfloat16) == expected
        assert expected in VARLEN_BACKENDS
    with pytest.raises(ValueError, match="'flash_attention_4' is not available"):
        select_varlen_backend("flash_attention_4", cuda, torch.bfloat16)
    with pytest.raises(ValueError, match=r"needs float16 or bfloat16 on a CUDA device, got torch.float32 on cpu"):
        select_varlen_backend("flash_attention_2", cpu, torch.float32)
