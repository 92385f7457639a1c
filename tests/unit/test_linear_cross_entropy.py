"""The head without full logits: loss, log-probabilities, entropies and all gradients against the plain formula."""

import multiprocessing
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from modeling.ops.loss import cross_entropy as module
from modeling.ops.loss import vocab_softmax
from modeling.ops.loss.cross_entropy import linear_cross_entropy, linear_log_probs

T, H, V = 37, 16, 101

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def make(tokens: int = T, dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[torch.Tensor]:
    """hidden, weight, labels with some ignored; logits of a few units."""
    torch.manual_seed(0)
    labels = torch.randint(0, V, (tokens,))
    labels[::5] = -100
    tensors = torch.randn(tokens, H).to(dtype), (torch.randn(V, H) * 0.5).to(dtype), labels
    return [t.to(device) for t in tensors]


def plain(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, num_items: float | None) -> torch.Tensor:
    total = F.cross_entropy((hidden @ weight.T).float(), labels, reduction="sum")
    return total / ((labels != -100).sum() if num_items is None else num_items)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm().clamp_min(1e-300))


@pytest.mark.parametrize("num_items", [None, 53.0, torch.tensor(53)], ids=["own count", "number", "tensor"])
@pytest.mark.parametrize("chunk_size", [1, 8, T, 1000])
def test_loss_and_gradients_equal_the_plain_formula(chunk_size: int, num_items: float | torch.Tensor | None) -> None:
    hidden, weight, labels = make()
    hidden.requires_grad_(), weight.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, labels, num_items, chunk_size=chunk_size)
    expected = plain(hidden, weight, labels, None if num_items is None else 53.0)
    assert loss.dtype == torch.float32 and loss.dim() == 0
    assert relative(loss, expected) <= 1e-6
    # The loss as part of a larger graph: its gradient is not 1.
    got = torch.autograd.grad(loss * 3 + 1, (hidden, weight))
    for a, b in zip(got, torch.autograd.grad(expected * 3 + 1, (hidden, weight)), strict=True):
        assert relative(a, b) <= 2e-6


@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)])
def test_only_wanted_gradients_are_made(needs: tuple[bool, bool]) -> None:
    hidden, weight, labels = make()
    expected = [t.requires_grad_() for t in make()[:2]]
    plain(*expected, labels, None).backward()
    hidden.requires_grad_(needs[0]), weight.requires_grad_(needs[1])
    loss = linear_cross_entropy(hidden, weight, labels, chunk_size=8)
    assert loss.requires_grad == any(needs)
    if any(needs):
        loss.backward()
    for leaf, reference, wanted in zip((hidden, weight), expected, needs, strict=True):
        assert (leaf.grad is not None) == wanted
        if wanted:
            assert relative(leaf.grad, reference.grad) <= 2e-6


@pytest.mark.parametrize("case", ["all ignored", "no tokens", "divisor zero"])
def test_nothing_to_learn_from_is_zero_not_nan(case: str) -> None:
    hidden, weight, labels = make(0 if case == "no tokens" else T)
    if case == "all ignored":
        labels.fill_(-100)
    hidden.requires_grad_(), weight.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, labels, 0 if case == "divisor zero" else None, chunk_size=8)
    assert loss.item() == 0
    for gradient, leaf in zip(torch.autograd.grad(loss, (hidden, weight)), (hidden, weight), strict=True):
        assert gradient.shape == leaf.shape and not gradient.any()


def test_backward_twice_and_the_incoming_gradient_untouched() -> None:
    hidden, weight, labels = make()
    hidden.requires_grad_(), weight.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, labels, chunk_size=8)
    two, five = torch.tensor(2.0), torch.tensor(5.0)
    first = torch.autograd.grad(loss, (hidden, weight), two, retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(loss, (hidden, weight), five)
    assert (two.item(), five.item()) == (2, 5)
    for a, b, c in zip(first, kept, second, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
        torch.testing.assert_close(c, a * 2.5)


def test_never_holds_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, labels = make(64)
    labels = labels.clamp_min(0)
    seen: list[tuple[int, ...]] = []

    def spy(logits: torch.Tensor, *args: object) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(tuple(logits.shape))
        return vocab_softmax.statistics_and_gradient_(logits, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "statistics_and_gradient_", spy)
    linear_cross_entropy(hidden.requires_grad_(), weight, labels, chunk_size=24)
    assert seen == [(24, V), (24, V), (16, V)]


def test_ignored_rows_leave_before_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, labels = make()
    rows: list[int] = []

    def spy(logits: torch.Tensor, *args: object) -> tuple[torch.Tensor, torch.Tensor]:
        rows.append(logits.shape[0])
        return vocab_softmax.statistics_and_gradient_(logits, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "statistics_and_gradient_", spy)
    linear_cross_entropy(hidden.requires_grad_(), weight, labels)
    assert rows == [int((labels != -100).sum())]


def test_log_probs_and_entropy_equal_the_plain_formula() -> None:
    hidden, weight, labels = make()
    hidden.requires_grad_(), weight.requires_grad_()
    log_probs, entropy = linear_log_probs(hidden, weight, labels, chunk_size=8)
    log_p = (hidden @ weight.T).log_softmax(-1)
    expected = log_p.gather(1, labels.clamp_min(0)[:, None])[:, 0].where(labels != -100, 0)
    expected_entropy = -(log_p.exp() * log_p).sum(-1)
    assert relative(log_probs, expected) <= 1e-6 and relative(entropy, expected_entropy) <= 1e-6
    weights = torch.randn(2, T)
    got = torch.autograd.grad((log_probs * weights[0] + entropy * weights[1]).sum(), (hidden, weight))
    reference = torch.autograd.grad((expected * weights[0] + expected_entropy * weights[1]).sum(), (hidden, weight))
    for a, b in zip(got, reference, strict=True):
        assert relative(a, b) <= 2e-6


@pytest.mark.parametrize("chunk_size", [96, 4096])
def test_bf16_error_is_no_larger_than_the_plain_paths(chunk_size: int) -> None:
    hidden, _, labels = make(512, torch.bfloat16)
    weight = (torch.randn(700, H) * 0.5).bfloat16()
    labels = labels.where(labels < 0, labels * 6)
    results = []
    for function in (partial(linear_cross_entropy, chunk_size=chunk_size), lambda *a: plain(*a, None)):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = function(h, w, labels)
        results.append([loss, *torch.autograd.grad(loss, (h, w))])
    h, w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    loss = F.cross_entropy(h @ w.T, labels)
    exact = [loss, *torch.autograd.grad(loss, (h, w))]
    for name, ours, theirs, reference in zip(("loss", "hidden", "weight"), *results, exact, strict=True):
        # The losses come from the same bf16 logits; what is left between them is the order of an fp32 sum.
        slack = 1e-6 if name == "loss" else 0.0
        assert relative(ours, reference) <= 1.1 * relative(theirs, reference) + slack, name


def test_autocast_computes_in_its_dtype() -> None:
    hidden, weight, labels = make()
    hidden.requires_grad_(), weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, labels)
    loss.backward()
    assert hidden.grad is not None and hidden.grad.dtype == torch.float32
    assert 1e-6 < relative(loss, plain(hidden, weight, labels, None)) < 1e-2


def test_wrong_input_is_refused_with_both_numbers() -> None:
    hidden, weight, labels = make()
    labels[3] = 3
    wrong = [
        ((hidden[None], weight, labels), {}, r"\(T, H\).*\(1, 37, 16\)"),
        ((hidden, weight.T, labels), {}, r"\(37, 16\) and \(16, 101\)"),
        ((hidden, weight, labels[1:]), {}, r"\(T=37,\), got \(36,\)"),
        ((hidden, weight.bfloat16(), labels), {}, "float32.*bfloat16"),
        ((hidden, weight, labels.where(labels != 3, V)), {}, r"\[0, V=101\).*got 101"),
        ((hidden, weight, labels), {"chunk_size": 0}, "got 0"),
        ((hidden, weight, labels), {"num_valid": 5}, "num_valid is 5, but 29"),
    ]
    for arguments, options, message in wrong:
        with pytest.raises(ValueError, match=message):
            linear_cross_entropy(*arguments, **options)


def check_triton_kernel() -> None:
    from modeling.ops.loss import triton

    torch.manual_seed(0)
    rows, vocabulary = 6, 9001  # more than one block, and no multiple of it
    logits, labels = torch.randn(rows, vocabulary) * 5, torch.randint(0, vocabulary, (rows,))
    labels[2] = -100
    statistics = vocab_softmax.row_statistics_reference(logits, labels, -100)
    torch.testing.assert_close(triton.row_statistics(logits, labels, -100), statistics)
    d_log_prob, d_entropy = torch.randn(2, rows)
    log_sum, label_logit, entropy = statistics
    for extra in ((None, None), (entropy, d_entropy)):
        arguments = (labels, log_sum, d_log_prob, -100, *extra)
        got = triton.logits_gradient_(logits.clone(), *arguments)
        torch.testing.assert_close(got, vocab_softmax.logits_gradient_reference_(logits.clone(), *arguments))
    fused = logits.clone()
    torch.testing.assert_close(triton.statistics_and_gradient_(fused, labels, d_log_prob, -100), (log_sum, label_logit))
    arguments = (labels, log_sum, d_log_prob, -100)
    torch.testing.assert_close(fused, vocab_softmax.logits_gradient_reference_(logits.clone(), *arguments))

    # For the interpreter, in a process that ends with this test: small blocks, and fp32, because it multiplies the bit
    # patterns of bf16; the kernel itself takes any float.
    triton._PRODUCT_BLOCKS = (64, 64, 32, 4, 2)
    left, right = torch.randn(3, 70, 304), torch.randn(3, 70, 96)
    high, low = torch.empty(304, 96, dtype=torch.bfloat16), torch.empty(304, 96, dtype=torch.int8)
    for part in range(3):
        triton.add_product_(high, low, left[part], right[part], first=part == 0)
    exact = (left.transpose(1, 2) @ right).sum(0)
    bits = (high.view(torch.int16).int() << 16) + (low.int() << 8)
    # 16 bits of mantissa where bf16 has 8: the sum of parts is as good as one rounding of the whole.
    assert relative(bits.view(torch.float32), exact) < 2**-16
    assert relative(high, exact) < 1.01 * relative(exact.bfloat16(), exact)


def test_triton_kernel_equals_its_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own, because Triton decides at import whether to interpret kernels on the CPU."""
    pytest.importorskip("triton", reason="needs triton, whose interpreter runs the kernels without a GPU")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        pool.apply(check_triton_kernel)


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("vocabulary", [9000, 9001])  # rows of whole 16 bytes, and not
@pytest.mark.parametrize("count_known", [False, True])
@pytest.mark.parametrize("chunk_size", [256, 2000])  # several chunks, and one
def test_gpu_error_against_fp64_is_no_larger_than_the_plain_paths(
    chunk_size: int, count_known: bool, vocabulary: int
) -> None:
    torch.manual_seed(0)
    tokens, width = 1111, 256
    hidden = torch.randn(tokens, width, device="cuda").bfloat16()
    weight = (torch.randn(vocabulary, width, device="cuda") * width**-0.5).bfloat16()
    labels = torch.randint(0, vocabulary, (tokens,), device="cuda")
    labels[::7] = -100
    num_valid = int((labels != -100).sum()) if count_known else None
    h, w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    loss = F.cross_entropy(h @ w.T, labels)
    exact = [loss, *torch.autograd.grad(loss, (h, w))]
    results = []
    for _ in range(3):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        torch.cuda.set_sync_debug_mode("error" if results else "default")
        try:
            if len(results) < 2:
                loss = linear_cross_entropy(h, w, labels, num_valid=num_valid, chunk_size=chunk_size)
            else:
                loss = plain(h, w, labels, None)
            results.append([loss, *torch.autograd.grad(loss, (h, w))])
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for name, ours, again, theirs, reference in zip(("loss", "hidden", "weight"), *results, exact, strict=True):
        torch.testing.assert_close(ours, again, rtol=0, atol=0)
        slack = 1e-6 if name == "loss" else 0.0
        assert relative(ours, reference) <= 1.1 * relative(theirs, reference) + slack, name


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_gpu_scale(factor: float) -> None:
    """In place, with a factor of 1 left alone."""
    gradient = torch.randn(333, 65, device="cuda").bfloat16()
    expected = (gradient.float() * factor).bfloat16()
    scaled = vocab_softmax.scale_(gradient, torch.tensor(factor, device="cuda"))
    assert scaled is gradient and torch.equal(scaled, expected)


@pytest.mark.gpu
@needs_gpu
def test_gpu_log_probs_equal_the_reference_in_fp32() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(333, 64, device="cuda"), torch.randn(9001, 64, device="cuda") * 0.3
    labels = torch.randint(0, 9001, (333,), device="cuda")
    labels[::7] = -100
    weights = torch.randn(2, 333, device="cuda")
    results = []
    for h, w in ((hidden, weight), (hidden.double(), weight.double())):
        h, w = h.requires_grad_(), w.requires_grad_()
        if h.dtype == torch.float32:
            log_probs, entropy = linear_log_probs(h, w, labels, chunk_size=100)
        else:
            log_p = (h @ w.T).log_softmax(-1)
            log_probs = log_p.gather(1, labels.clamp_min(0)[:, None])[:, 0].where(labels != -100, 0)
            entropy = -(log_p.exp() * log_p).sum(-1)
        gradients = torch.autograd.grad((log_probs * weights[0] + entropy * weights[1]).sum(), (h, w))
        results.append([log_probs, entropy, *gradients])
    for a, b in zip(*results, strict=True):
        assert relative(a, b) <= 1e-5
