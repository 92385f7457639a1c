"""The expert layer: every backend against upstream's own loop, edge cases, what is kept, what is refused."""

import importlib.util
import logging
import multiprocessing

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from modeling.ops import experts as package
from modeling.ops import launch
from modeling.ops.experts import autograd, default_backend, fused_moe_forward, pointwise
from modeling.ops.experts.routing import lay_out_rows_reference, route_by_expert

# (T, H, I, E, K), all distinct. The second has widths that are no multiple of 16 bytes: grouped_mm cannot take it.
SHAPES = [(37, 24, 20, 7, 3), (37, 22, 10, 7, 3)]
ROUTES = ["random", "skewed", "one expert", "duplicates"]
NAMES = ("output", "hidden_states", "top_k_weights", "gate_up_proj", "down_proj")

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
needs_hopper = pytest.mark.skipif(
    not (torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0))
    or importlib.util.find_spec("quack") is None,
    reason="needs a Hopper GPU and quack-kernels",
)
GPU_BACKENDS = [
    pytest.param("grouped_mm", marks=[pytest.mark.gpu, needs_gpu]),
    pytest.param("quack", marks=[pytest.mark.gpu, needs_gpu, needs_hopper]),
]


def choose(kind: str, tokens: int, experts: int, top_k: int) -> torch.Tensor:
    """(T, K) expert choices; "random" leaves the last expert empty, "duplicates" repeats an expert within a token."""
    if kind == "one expert":
        return torch.full((tokens, top_k), 2)
    if kind == "duplicates":
        return torch.randint(0, experts, (tokens, 1)).expand(-1, top_k).contiguous()
    likelihood = torch.rand(tokens, experts)
    if kind == "skewed":
        likelihood = likelihood * torch.arange(1, experts + 1) ** -1.0
    likelihood[:, -1] = 0
    return likelihood.topk(top_k, dim=-1).indices


def make_inputs(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> list[torch.Tensor]:
    """hidden_states, top_k_weights (fp32), gate_up_proj, down_proj, scaled so that no step is degenerate."""
    tokens, hidden, intermediate, experts, top_k = shape
    weights = torch.rand(tokens, top_k) + 0.1
    tensors = [
        torch.randn(tokens, hidden).to(dtype),
        # Values that bf16 holds exactly, so that upstream's bf16 path does not lose at the start.
        (weights / weights.sum(-1, keepdim=True)).bfloat16().float(),
        (torch.randn(experts, 2 * intermediate, hidden) * hidden**-0.5).to(dtype),
        (torch.randn(experts, hidden, intermediate) * intermediate**-0.5).to(dtype),
    ]
    return [t.to(device) for t in tensors]


def run(
    inputs: list[torch.Tensor], index: torch.Tensor, gradient: torch.Tensor, backend: str | None
) -> list[torch.Tensor]:
    """Output and the four gradients."""
    x, w, gate_up, down = leaves = [t.detach().clone().requires_grad_() for t in inputs]
    out = fused_moe_forward(x, index, w, gate_up, down, backend=backend)
    return [out.detach(), *torch.autograd.grad(out, leaves, gradient)]


def run_upstream(inputs: list[torch.Tensor], index: torch.Tensor, gradient: torch.Tensor) -> list[torch.Tensor]:
    """The same from upstream transformers' eager experts, routing weights in the dtype its model gives them."""
    from transformers.models.qwen3_vl_moe.configuration_qwen3_vl_moe import Qwen3VLMoeTextConfig
    from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextExperts

    x, w, gate_up, down = (t.detach().clone().requires_grad_() for t in inputs)
    config = Qwen3VLMoeTextConfig(
        hidden_size=down.shape[1],
        moe_intermediate_size=down.shape[2],
        num_experts=down.shape[0],
        num_experts_per_tok=index.shape[1],
    )
    config._experts_implementation = "eager"
    with torch.device("meta"):
        experts = Qwen3VLMoeTextExperts(config)
    experts.gate_up_proj, experts.down_proj = torch.nn.Parameter(gate_up), torch.nn.Parameter(down)
    out = experts(x, index, w.to(x.dtype))
    return [out.detach(), *torch.autograd.grad(out, [x, w, experts.gate_up_proj, experts.down_proj], gradient)]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm().clamp_min(1e-300))


def assert_equal_to_rounding(got: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    # fp32 sums of some tens of terms in another order: 1e-7 in practice. The bounds are the project's for the model.
    for name, a, b in zip(NAMES, got, expected, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype, name
        assert relative(a, b) <= (2e-6 if name == "output" else 5e-6), f"{name}: {relative(a, b):.1e}"


@pytest.mark.parametrize("backend", ["eager", "grouped_mm"])
@pytest.mark.parametrize("routes", ROUTES)
@pytest.mark.parametrize("shape", SHAPES, ids=["aligned", "unaligned"])
def test_fp32_equals_upstream(shape: tuple[int, int, int, int, int], routes: str, backend: str) -> None:
    torch.manual_seed(0)
    tokens, hidden, _, experts, top_k = shape
    inputs, index, gradient = make_inputs(shape), choose(routes, tokens, experts, top_k), torch.randn(tokens, hidden)
    assert_equal_to_rounding(run(inputs, index, gradient, backend), run_upstream(inputs, index, gradient))


@pytest.mark.parametrize("backend", ["grouped_mm", *GPU_BACKENDS[1:]])
def test_a_retained_graph_runs_again(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Backward writes over the pre-activation, but not where the graph stays; the control does, and is caught."""
    torch.manual_seed(0)
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    inputs, index = make_inputs((37, 24, 16, 7, 3), dtype, device), choose("random", 37, 7, 3).to(device)
    leaves = [t.requires_grad_() for t in inputs]
    out = fused_moe_forward(leaves[0], index, *leaves[1:], backend=backend)
    gradient = torch.randn(37, 24).to(out)
    first, second = (torch.autograd.grad(out, leaves, gradient, retain_graph=True) for _ in range(2))
    with monkeypatch.context() as patch:
        patch.setattr(autograd, "_graph_is_kept", lambda: False)
        third = torch.autograd.grad(out, leaves, gradient, retain_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(out, leaves, gradient)
    for one, *others in zip(first, second, third, strict=True):
        assert all(torch.equal(one, other) for other in others)


@pytest.mark.parametrize("backend", ["eager", "grouped_mm"])
@pytest.mark.parametrize("tokens", [0, 1])
def test_no_token_and_one_token(tokens: int, backend: str) -> None:
    torch.manual_seed(0)
    inputs = make_inputs((tokens, *SHAPES[0][1:]))
    index, gradient = choose("random", tokens, 7, 3), torch.randn(tokens, 24)
    got = run(inputs, index, gradient, backend)
    if tokens:
        assert_equal_to_rounding(got, run_upstream(inputs, index, gradient))
    else:
        assert got[0].shape == (0, 24)
        assert all(not g.any() for g in got[1:])


@pytest.mark.parametrize("backend", ["eager", "grouped_mm"])
def test_experts_without_tokens_get_zeros(backend: str) -> None:
    torch.manual_seed(0)
    inputs = make_inputs(SHAPES[0])
    _, _, _, d_gate_up, d_down = run(inputs, choose("one expert", 37, 7, 3), torch.randn(37, 24), backend)
    for gradient in (d_gate_up, d_down):
        used = gradient.flatten(1).norm(dim=1) > 0
        assert used.tolist() == [expert == 2 for expert in range(7)]


@pytest.mark.parametrize("frozen", range(4), ids=NAMES[1:])
def test_frozen_inputs_get_no_gradient_and_change_none(frozen: int) -> None:
    torch.manual_seed(0)
    inputs, index, gradient = make_inputs(SHAPES[0]), choose("random", 37, 7, 3), torch.randn(37, 24)
    expected = run(inputs, index, gradient, "grouped_mm")[1:]
    x, w, gate_up, down = leaves = [t.clone().requires_grad_(i != frozen) for i, t in enumerate(inputs)]
    fused_moe_forward(x, index, w, gate_up, down, backend="grouped_mm").backward(gradient)
    for i, leaf in enumerate(leaves):
        if i == frozen:
            assert leaf.grad is None
        else:
            torch.testing.assert_close(leaf.grad, expected[i], rtol=0, atol=0)


def test_strided_inputs_and_gradient() -> None:
    torch.manual_seed(0)
    inputs, index, gradient = make_inputs(SHAPES[0]), choose("random", 37, 7, 3), torch.randn(24, 37).t()
    expected = run(inputs, index, gradient.contiguous(), "grouped_mm")
    wide = torch.randn(37, 60)
    wide[:, 5:53:2] = inputs[0]
    x = wide[:, 5:53:2].requires_grad_()
    w = inputs[1].t().contiguous().t().requires_grad_()
    strided_index = index.t().contiguous().t()
    gate_up, down = inputs[2].clone().requires_grad_(), inputs[3].clone().requires_grad_()
    before = gradient.clone()
    out = fused_moe_forward(x, strided_index, w, gate_up, down, backend="grouped_mm")
    got = [out.detach(), *torch.autograd.grad(out, [x, w, gate_up, down], gradient)]
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    torch.testing.assert_close(gradient, before, rtol=0, atol=0)  # an incoming gradient is never written to


def test_recompute_and_a_second_run_give_the_same_bits() -> None:
    torch.manual_seed(0)
    inputs, index, gradient = make_inputs(SHAPES[0]), choose("skewed", 37, 7, 3), torch.randn(37, 24)
    expected = run(inputs, index, gradient, "grouped_mm")
    again = run(inputs, index, gradient, "grouped_mm")
    x, w, gate_up, down = leaves = [t.clone().requires_grad_() for t in inputs]
    out = checkpoint(fused_moe_forward, x, index, w, gate_up, down, backend="grouped_mm", use_reentrant=False)
    recomputed = [out.detach(), *torch.autograd.grad(out, leaves, gradient)]
    for a, b, c in zip(expected, again, recomputed, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
        torch.testing.assert_close(a, c, rtol=0, atol=0)


def test_keeps_only_input_and_pre_activation() -> None:
    tokens, hidden, intermediate, experts, top_k = shape = (96, 64, 48, 7, 3)
    x, w, gate_up, down = (t.requires_grad_() for t in make_inputs(shape))
    parameters = {gate_up.data_ptr(), down.data_ptr()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in parameters:
            kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        fused_moe_forward(x, choose("random", tokens, experts, top_k), w, gate_up, down, backend="grouped_mm")
    assert sum(kept.values()) == tokens * hidden + tokens * top_k * 2 * intermediate + tokens * top_k


def test_bf16_error_is_no_larger_than_upstreams() -> None:
    torch.manual_seed(0)
    shape = (64, 96, 80, 8, 3)
    inputs, index = make_inputs(shape, torch.bfloat16), choose("random", 64, 8, 3)
    gradient = torch.randn(64, 96).bfloat16()
    exact = run([t.double() for t in inputs], index, gradient.double(), "eager")
    ours, theirs = run(inputs, index, gradient, "grouped_mm"), run_upstream(inputs, index, gradient)
    for name, a, b, reference in zip(NAMES, ours, theirs, exact, strict=True):
        assert relative(a, reference) <= 1.1 * relative(b, reference), name


def test_autocast_computes_in_its_dtype_and_returns_the_callers() -> None:
    torch.manual_seed(0)
    inputs, index, gradient = make_inputs(SHAPES[0]), choose("random", 37, 7, 3), torch.randn(37, 24)
    with torch.autocast("cpu", torch.bfloat16):
        got = run(inputs, index, gradient, "grouped_mm")
    assert all(t.dtype == torch.float32 for t in got)
    exact = run(inputs, index, gradient, "eager")
    # bf16 operands: 2^-9 a factor, a few factors deep.
    assert all(1e-4 < relative(a, b) < 2e-2 for a, b in zip(got, exact, strict=True))


@pytest.mark.parametrize(("backend", "frozen"), [(None, None), ("grouped_mm", 2)])
def test_compiles_without_a_graph_break(backend: str | None, frozen: int | None) -> None:
    """As one operator: the sort, the loops and kernels inside are not traced."""
    torch.manual_seed(0)
    inputs, index, gradient = make_inputs(SHAPES[0]), choose("random", 37, 7, 3), torch.randn(37, 24)
    expected = run(inputs, index, gradient, "grouped_mm")

    def layer(x: torch.Tensor, w: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        return fused_moe_forward(x, index, w, gate_up, down, backend=backend)

    leaves = [t.clone().requires_grad_(i != frozen) for i, t in enumerate(inputs)]
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    compiled(*leaves).backward(gradient)
    torch.testing.assert_close(compiled(*leaves), expected[0], rtol=0, atol=0)
    for i, leaf in enumerate(leaves):
        if i == frozen:
            assert leaf.grad is None
        else:
            torch.testing.assert_close(leaf.grad, expected[i + 1], rtol=0, atol=0)


def test_operators_are_registered_as_pytorch_wants_them() -> None:
    """Schema, fake shapes, autograd and tracing, by PyTorch's own checks."""
    torch.manual_seed(0)
    x, w, gate_up, down = (t.requires_grad_() for t in make_inputs(SHAPES[0]))
    arguments = (x, choose("random", 37, 7, 3), w, gate_up, down, "grouped_mm")
    torch.library.opcheck(torch.ops.qwen3_vl_moe.experts.default, arguments)


def test_routing_sorts_by_expert_and_keeps_token_order() -> None:
    torch.manual_seed(0)
    index = torch.randint(0, 5, (11, 3))
    routing = route_by_expert(index, 6)
    experts = index.flatten()[routing.route.long()]
    assert experts.tolist() == sorted(index.flatten().tolist())
    assert routing.offsets.tolist() == [int((index < expert).sum()) for expert in range(7)]
    for expert in range(6):
        rows = routing.route[routing.offsets[expert] : routing.offsets[expert + 1]]
        assert rows.tolist() == sorted(rows.tolist())
    assert torch.equal(routing.token, routing.route // 3)
    assert torch.equal(routing.route[routing.position.flatten().long()], torch.arange(33, dtype=torch.int32))


def test_wrong_input_is_refused_with_both_numbers() -> None:
    x, w, gate_up, down = make_inputs(SHAPES[0])
    index = choose("random", 37, 7, 3)
    wrong = [
        ((x[None], index, w, gate_up, down), r"\(T, H\), got \(1, 37, 24\)"),
        ((x, index[:5], w, gate_up, down), r"\(T=37, K\), got \(5, 3\)"),
        ((x, index, torch.zeros(37, 7), gate_up, down), r"compact top-k"),
        ((x, index, w, gate_up.transpose(1, 2), down), r"\(E, 2I, H=24\), got \(7, 24, 40\)"),
        ((x, index, w, gate_up, down.transpose(1, 2)), r"\(E=7, H=24, I=20\).*got \(7, 20, 24\)"),
        ((x.bfloat16(), index, w, gate_up, down), r"bfloat16.*float32"),
        ((x, index + 4, w, gate_up, down), r"\[0, 7\), got values from 4 to"),
    ]
    for arguments, message in wrong:
        with pytest.raises(ValueError, match=message):
            fused_moe_forward(*arguments, backend="grouped_mm")
    with pytest.raises(ValueError, match="unknown expert backend 'cutlass'"):
        fused_moe_forward(x, index, w, gate_up, down, backend="cutlass")


@pytest.mark.parametrize(
    ("device", "dtype", "sizes", "capability", "installed", "backend", "why"),
    [
        ("cpu", torch.bfloat16, (64, 32), None, True, "grouped_mm", "CUDA device"),
        ("cuda", torch.float32, (64, 32), (9, 0), True, "grouped_mm", "16 bits"),
        ("cuda", torch.bfloat16, (64, 32), (8, 0), True, "grouped_mm", "8.0"),
        ("cuda", torch.bfloat16, (64, 30), (9, 0), True, "grouped_mm", "64 and 30"),
        ("cuda", torch.bfloat16, (64, 32), (9, 0), False, "grouped_mm", "not installed"),
        ("cuda", torch.bfloat16, (64, 32), (9, 0), True, "quack", "Hopper"),
    ],
)
def test_default_backend_is_chosen_once_and_says_why(
    device: str,
    dtype: torch.dtype,
    sizes: tuple[int, int],
    capability: tuple[int, int] | None,
    installed: bool,
    backend: str,
    why: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for cached in (package._decide, launch.why_not_quack):
        cached.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: object() if installed else None)
    with caplog.at_level(logging.INFO, logger=package.__name__):
        assert [default_backend(torch.device(device), dtype, *sizes) for _ in range(3)] == [backend] * 3
    for cached in (package._decide, launch.why_not_quack):
        cached.cache_clear()
    assert len(caplog.messages) == 1 and backend in caplog.messages[0] and why in caplog.messages[0]


def check_triton_kernels() -> None:
    from modeling.ops.experts import triton

    torch.manual_seed(0)
    for experts, choices in ((6, torch.randint(1, 5, (1500, 3))), (300, torch.randint(0, 300, (1, 1)))):
        order_of = torch.sort(choices.flatten().to(torch.int16), stable=True)
        for a, b in zip(
            triton.lay_out_rows(*order_of, choices.shape, experts),
            lay_out_rows_reference(*order_of, choices.shape, experts),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
    rows, intermediate, tokens, top_k, hidden = 35, 300, 5, 7, 1100  # no multiple of any block
    pre, d_act, weight = torch.randn(rows, 2 * intermediate), torch.randn(rows, intermediate), torch.rand(rows)
    torch.testing.assert_close(triton.swiglu(pre), pointwise.swiglu_reference(pre))
    expected = pointwise.swiglu_backward_reference(d_act, pre, weight)
    torch.testing.assert_close(triton.swiglu_backward(d_act, pre, weight), expected)
    alternate = torch.stack(pre.chunk(2, -1), -1).flatten(1)
    d_alternate, *rest = triton.swiglu_backward(d_act, alternate, weight, interleaved=True)
    torch.testing.assert_close(torch.cat([d_alternate[:, ::2], d_alternate[:, 1::2]], -1), expected[0])
    torch.testing.assert_close(rest, list(expected[1:]))
    for columns, interleaved in ((pre.clone(), False), (alternate.clone(), True)):
        elsewhere = triton.swiglu_backward(d_act, columns, weight, interleaved=interleaved)
        in_place = triton.swiglu_backward(d_act, columns, weight, in_place=True, interleaved=interleaved)
        assert in_place[0] is columns and all(map(torch.equal, in_place, elsewhere))
    values, position = torch.randn(rows, hidden), torch.randperm(rows).view(tokens, top_k).int()
    for w in (torch.rand(tokens, top_k), None):
        reference = pointwise.gather_sum_reference(values, position, w)
        torch.testing.assert_close(triton.gather_sum(values, position, w), reference)


def test_triton_kernels_equal_their_references(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own, because Triton decides at import whether to interpret kernels on the CPU."""
    pytest.importorskip("triton", reason="needs triton, whose interpreter runs the kernels without a GPU")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        pool.apply(check_triton_kernels)


# --- on a GPU ---------------------------------------------------------------------------------------------------------

GPU_SHAPE = (333, 256, 96, 16, 4)


def check_against_upstream(
    inputs: list[torch.Tensor], index: torch.Tensor, gradient: torch.Tensor, backend: str, exact_dtype: torch.dtype
) -> None:
    """Errors no larger than upstream's, the same bits again, and zeros, not leftovers, for experts without a token."""
    exact = run([t.to(exact_dtype) for t in inputs], index, gradient.to(exact_dtype), "eager")
    ours, theirs = run(inputs, index, gradient, backend), run_upstream(inputs, index, gradient)
    for name, a, b, reference in zip(NAMES, ours, theirs, exact, strict=True):
        bound = 1.1 * float((b.double() - reference).norm())
        if len(index) < 16:
            # The ratio of two rounding errors means something over many numbers only, and a routing weight's gradient,
            # a product of the output's gradient with an expert's output, may be near zero.
            scale = gradient.norm() * exact[0].norm() if name == "top_k_weights" else reference.norm()
            bound += 2**-6 * float(scale)
        assert float((a.double() - reference).norm()) <= bound, name
    for a, b in zip(ours, run(inputs, index, gradient, backend), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    unused = torch.ones(len(inputs[2]), dtype=torch.bool, device=index.device)
    unused[index.flatten()] = False
    assert not ours[3][unused].any() and not ours[4][unused].any()
    with torch.inference_mode():
        x, w, gate_up, down = inputs
        torch.testing.assert_close(
            fused_moe_forward(x, index, w, gate_up, down, backend=backend), ours[0], rtol=0, atol=0
        )


@pytest.mark.parametrize("tokens", [3, 40])
def test_bf16_with_many_experts_and_few_tokens(tokens: int) -> None:
    """What the GPU tests below check, on the CPU."""
    torch.manual_seed(0)
    inputs = make_inputs((tokens, 64, 48, 128, 8), torch.bfloat16)
    index, gradient = choose("random", tokens, 128, 8), torch.randn(tokens, 64).bfloat16()
    check_against_upstream(inputs, index, gradient, "grouped_mm", torch.float64)


@pytest.mark.parametrize("backend", GPU_BACKENDS)
@pytest.mark.parametrize("routes", ROUTES)
@pytest.mark.parametrize("tokens", [1, 333])
def test_gpu_error_against_fp64_is_no_larger_than_upstreams(tokens: int, routes: str, backend: str) -> None:
    torch.manual_seed(0)
    shape = (tokens, *GPU_SHAPE[1:])
    inputs, index = make_inputs(shape, torch.bfloat16, "cuda"), choose(routes, tokens, 16, 4).cuda()
    gradient = torch.randn(tokens, 256, device="cuda").bfloat16()
    check_against_upstream(inputs, index, gradient, backend, torch.float64)


@pytest.mark.parametrize("backend", GPU_BACKENDS)
@pytest.mark.parametrize("tokens", [2, 3, 127, 129, 1025])
def test_gpu_many_experts_and_few_tokens(tokens: int, backend: str) -> None:
    """128 experts, of which most get no token or one; numbers of tokens beside those that kernels like."""
    torch.manual_seed(0)
    inputs = make_inputs((tokens, 256, 96, 128, 8), torch.bfloat16, "cuda")
    index = choose("skewed", tokens, 128, 8).cuda()
    gradient = torch.randn(tokens, 256, device="cuda").bfloat16()
    check_against_upstream(inputs, index, gradient, backend, torch.float64)


@pytest.mark.parametrize("backend", GPU_BACKENDS)
@pytest.mark.parametrize("routes", ["random", "skewed"])
def test_gpu_published_sizes(routes: str, backend: str) -> None:
    """The 30B model's layer, whose kernel configurations are pinned; against fp32, which is exact enough and fits."""
    torch.manual_seed(0)
    shape = (4099, 2048, 768, 128, 8)
    inputs, index = make_inputs(shape, torch.bfloat16, "cuda"), choose(routes, shape[0], 128, 8).cuda()
    gradient = torch.randn(shape[0], 2048, device="cuda").bfloat16()
    check_against_upstream(inputs, index, gradient, backend, torch.float32)


@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_gpu_never_waits_for_the_host(backend: str) -> None:
    torch.manual_seed(0)
    inputs, index = make_inputs(GPU_SHAPE, torch.bfloat16, "cuda"), choose("skewed", 333, 16, 4).cuda()
    gradient = torch.randn(333, 256, device="cuda").bfloat16()
    run(inputs, index, gradient, backend)  # kernels compile
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(inputs, index, gradient, backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("backend", GPU_BACKENDS)
@pytest.mark.parametrize("frozen", [*range(4), None], ids=[*NAMES[1:], "none"])
def test_gpu_frozen_strided_recomputed(frozen: int | None, backend: str) -> None:
    torch.manual_seed(0)
    inputs, index = make_inputs(GPU_SHAPE, torch.bfloat16, "cuda"), choose("random", 333, 16, 4).cuda()
    gradient = torch.randn(256, 333, device="cuda").bfloat16().t()
    expected = run(inputs, index, gradient.contiguous(), backend)
    inputs[0] = torch.cat([inputs[0], inputs[0]], dim=-1)[:, 256:]  # a view with a row stride of its own
    leaves = [t.detach().requires_grad_(i != frozen) for i, t in enumerate(inputs)]
    x, w, gate_up, down = leaves
    out = checkpoint(fused_moe_forward, x, index, w, gate_up, down, backend=backend, use_reentrant=False)
    out.backward(gradient)
    torch.testing.assert_close(out, expected[0], rtol=0, atol=0)
    for i, leaf in enumerate(leaves):
        if i == frozen:
            assert leaf.grad is None
        else:
            torch.testing.assert_close(leaf.grad, expected[i + 1], rtol=0, atol=0)


@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_gpu_without_tokens(backend: str) -> None:
    inputs = make_inputs((0, *GPU_SHAPE[1:]), torch.bfloat16, "cuda")
    index = torch.empty(0, 4, dtype=torch.int64, device="cuda")
    got = run(inputs, index, torch.empty(0, 256, dtype=torch.bfloat16, device="cuda"), backend)
    assert got[0].shape == (0, 256)
    assert all(not g.any() for g in got[1:])
