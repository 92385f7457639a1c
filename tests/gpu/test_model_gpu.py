"""The whole model on a GPU: accuracy of its fast path, steps that never wait for the host, the same bits twice.

Dimensions are such that every fast kernel takes them (heads of 64 and 72, quack or grouped products, 16-byte rows), and
no processor is needed: ids, pixels and weights are random. Tests that say something without a GPU run on the CPU too,
in the reference implementations, so that what they share with the GPU's is exercised everywhere.
"""

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers import Qwen3VLMoeConfig as UpstreamConfig
from transformers import Qwen3VLMoeForConditionalGeneration as Upstream

from modeling.distributed.parallelize import clip_grad_norm_, compile_blocks, set_recompute
from modeling.qwen3_vl_moe import Qwen3VLMoeConfig, Qwen3VLMoeForCausalLM
from scripts.make_tiny_checkpoint import parameter_shapes, random_parameter, tiny_config
from tests.features import feature_of, pack
from tests.parity.harness import GRADIENT_BOUND, LOGITS_BOUND, gradients, pinned, reference_choices, relative_error

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])]

IMAGE, VIDEO, VISION_START, VISION_END, VOCABULARY = 1500, 1501, 1502, 1503, 1536
OVERRIDES: dict[str, Any] = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
    "text_config": {
        "vocab_size": VOCABULARY,
        "bos_token_id": 1504,
        "eos_token_id": 1505,
        "hidden_size": 256,
        "head_dim": 64,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "intermediate_size": 320,
        "moe_intermediate_size": 96,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [12, 10, 10], "rope_type": "default"},
    },
    # Heads of 72, as published; deepstack after each of the first three blocks.
    "vision_config": {"hidden_size": 144, "num_heads": 2, "intermediate_size": 208, "out_hidden_size": 256},
}
NO_WORSE = 1.1
# fp32 on a GPU: sums in tiles, approximate exponentials and roots of an ulp or two, in either model's kernels.
GPU_FP32_BOUND = 1e-5
Inputs = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def whole_float32() -> Iterator[None]:
    """Upstream's patch embedding is a convolution, which would round to TF32 on a GPU."""
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = allowed


def make_state(overrides: dict[str, Any]) -> Inputs:
    """Weights that let every part matter (see make_tiny_checkpoint), float32 on the CPU."""
    shapes = parameter_shapes(tiny_config(torch.float32, overrides))
    return {name: random_parameter(name, shape, seed=0) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def state() -> Inputs:
    return make_state(OVERRIDES)


def build(
    model_class: Any, config_class: Any, state: Inputs, device: str, dtype: torch.dtype, overrides: dict[str, Any]
) -> Any:
    """A model with these weights, rotary tables in float32 whatever its dtype, as from_pretrained leaves them."""
    config = config_class(**tiny_config(dtype, overrides))
    config._attn_implementation = "sdpa"
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = model_class(config)
    finally:
        torch.set_default_dtype(default)
    model.load_state_dict(state)
    return model.eval()


def ours(state: Inputs, device: str, dtype: torch.dtype = torch.bfloat16, overrides: dict[str, Any] = OVERRIDES) -> Any:
    return build(Qwen3VLMoeForCausalLM, Qwen3VLMoeConfig, state, device, dtype, overrides)


def upstream(state: Inputs, device: str, dtype: torch.dtype) -> Any:
    return build(Upstream, UpstreamConfig, state, device, dtype, OVERRIDES)


def to_device(value: Any, device: str) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    return {key: to_device(item, device) for key, item in value.items()} if isinstance(value, dict) else value


# Patches of the image in each sample, or None: lengths of text follow.
GRIDS = ((1, 8, 8), (1, 4, 12), None)


def make_samples(seed: int, length: int = 85) -> list[Inputs]:
    """Processor inputs, batches of one: two samples with an image, at different places, and one of text."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for number, grid in enumerate(GRIDS):
        ids = torch.randint(0, IMAGE, (1, length), generator=generator)
        sample = {"input_ids": ids}
        if grid is not None:
            patches, start = grid[1] * grid[2], 3 + 7 * number
            ids[0, start - 1], ids[0, start + patches // 4] = VISION_START, VISION_END
            ids[0, start : start + patches // 4] = IMAGE
            sample["pixel_values"] = torch.randn(patches, 3 * 2 * 16 * 16, generator=generator)
            sample["image_grid_thw"] = torch.tensor([grid])
        made.append(sample)
    return made


def packed(model: Any, samples: list[Inputs], device: str) -> dict[str, Any]:
    """One row through the collator, metadata included."""
    return to_device(pack([feature_of(sample, model) for sample in samples], model), device)


def padded(samples: list[Inputs], device: str) -> Inputs:
    """Rows of equal length, as upstream takes them; token after token the order of the packed row."""
    ids = torch.cat([sample["input_ids"] for sample in samples])
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == IMAGE).int(),
        "pixel_values": torch.cat([sample["pixel_values"] for sample in samples if "pixel_values" in sample]),
        "image_grid_thw": torch.cat([sample["image_grid_thw"] for sample in samples if "image_grid_thw" in sample]),
    }
    return to_device(inputs, device)


def run(model: Any, inputs: dict[str, Any], labels: torch.Tensor) -> tuple[torch.Tensor, float, Inputs]:
    """Logits (T, V), the training loss, and every parameter's gradient."""
    with torch.no_grad():
        logits = model(**inputs).logits.flatten(0, -2)
    return logits, *gradients(model, inputs, labels)


def run_pair(
    model: Any, reference: Any, samples: list[Inputs], device: str
) -> tuple[tuple[torch.Tensor, float, Inputs], tuple[torch.Tensor, float, Inputs]]:
    batch = packed(model, samples, device)
    labels = batch.pop("labels")
    inputs = padded(samples, device)
    return run(model, batch, labels), run(reference, inputs, labels.view_as(inputs["input_ids"]))


@pytest.mark.parametrize("device", DEVICES)
def test_fp32_equals_upstream(state: Inputs, device: str) -> None:
    """Without the half-precision kernels, to rounding: what the bf16 test compares is the same function."""
    model, reference = ours(state, device, torch.float32), upstream(state, device, torch.float32)
    samples = make_samples(0)
    (logits, loss, grads), (expected_logits, expected_loss, expected) = run_pair(model, reference, samples, device)
    output_bound, gradient_bound = (LOGITS_BOUND, GRADIENT_BOUND) if device == "cpu" else (GPU_FP32_BOUND,) * 2
    assert relative_error(logits, expected_logits) <= output_bound
    assert abs(loss - expected_loss) <= output_bound * expected_loss
    assert grads.keys() == expected.keys()
    for name, grad in expected.items():
        assert grad.any(), f"{name} is dead in this test"
        assert relative_error(grads[name], grad) <= gradient_bound, name


@pytest.mark.parametrize("device", DEVICES)
def test_bf16_error_is_no_larger_than_upstreams(state: Inputs, device: str) -> None:
    """Logits and gradients against upstream in fp32, routes pinned to its choices (see tests/parity/test_bf16.py).

    Errors are summed over several batches. NO_WORSE holds for the logits and for all gradients as one vector; the error
    of a single small parameter is that of a few numbers and scatters more, but nowhere by a quarter.
    """
    exact = upstream(state, device, torch.float32)
    models = (ours(state, device), upstream(state, device, torch.bfloat16))
    squares: list[Counter[str]] = [Counter() for _ in models]
    for seed in range(3):
        samples = make_samples(seed)
        inputs = padded(samples, device)
        choices = reference_choices(exact, inputs)
        batch = packed(models[0], samples, device)
        labels = batch.pop("labels")
        rows = labels.view_as(inputs["input_ids"])
        exact_logits, _, exact_grads = run(exact, inputs, rows)
        whole = sum(float(grad.double().square().sum()) for grad in exact_grads.values())
        for model, given, wanted, found in zip(models, (batch, inputs), (labels, rows), squares, strict=True):
            with pinned(model, choices):
                logits, _, grads = run(model, given, wanted)
            assert logits.dtype == torch.bfloat16
            found["logits"] += relative_error(logits, exact_logits) ** 2
            for name, grad in exact_grads.items():
                square = float((grads[name].double() - grad.double()).square().sum())
                found["gradients"] += square / whole
                found[name] += square / float(grad.double().square().sum())
    for name, theirs in squares[1].items():
        bound = NO_WORSE if name in ("logits", "gradients") else 1.25
        mine = squares[0][name]
        assert mine <= bound**2 * theirs, f"{name}: {mine**0.5:.2e} against upstream's {theirs**0.5:.2e}"


@contextmanager
def waiting_is_an_error(device: str) -> Iterator[None]:
    """On a GPU, PyTorch raises where the host waits for the device."""
    if device == "cpu":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("router_loss", [False, True], ids=["", "router loss"])
@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
def test_training_step_never_waits_for_the_device(
    state: Inputs, recompute: str, router_loss: bool, device: str
) -> None:
    """Forward, backward, clipping and the optimizer's step, on a batch of a shape that was not seen before."""
    model = ours(state, device).train()
    plain = ours(state, device).train()
    set_recompute(model, recompute)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=device == "cuda")

    def step(batch: dict[str, Any]) -> torch.Tensor:
        loss = model(**batch, output_router_logits=router_loss).loss
        loss.backward()
        norms.append(clip_grad_norm_(model, 1.0))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    norms: list[torch.Tensor] = []
    first, second = (packed(model, make_samples(seed, length), device) for seed, length in ((0, 85), (1, 140)))
    expected = plain(**first, output_router_logits=router_loss).loss.detach()
    losses = [step(first)]  # kernels compile
    with waiting_is_an_error(device):
        losses.append(step(second))
    torch.testing.assert_close(losses[0], expected, rtol=1e-6, atol=0)
    assert all(float(value) > 0 and torch.isfinite(value) for value in [*losses, *norms])
    moved = sum(not torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    assert moved == len(list(model.parameters()))


def check_compiled(device: str) -> None:
    """A compiled model's step against the same model's, every token through every expert so that no route can flip."""
    overrides = copy.deepcopy(OVERRIDES)
    overrides["text_config"] |= {"num_experts": 4, "num_experts_per_tok": 4}
    state = make_state(overrides)
    plain, compiled = (ours(state, device, overrides=overrides).train() for _ in range(2))
    torch._dynamo.reset()
    compile_blocks(compiled)
    batch = packed(plain, make_samples(0), device)
    labels = batch.pop("labels")
    loss, expected = gradients(plain, batch, labels)
    gradients(compiled, batch, labels)  # compiles
    compiled.train()
    with waiting_is_an_error(device):
        compiled(**batch, labels=labels).loss.backward()
    compiled_loss, found = gradients(compiled, batch, labels)
    # Either is some percent from the exact gradient (see the bf16 test), and fused steps round in other places.
    assert abs(compiled_loss - loss) <= 5e-3 * loss
    whole, other = (torch.cat([grads[name].float().flatten() for name in expected]) for grads in (expected, found))
    assert relative_error(other, whole) <= 0.1


@pytest.mark.gpu
@needs_gpu
def test_compiled_blocks_give_the_same_and_never_wait() -> None:
    """Regional torch.compile, Inductor's kernels."""
    check_compiled("cuda")


@pytest.mark.parametrize("device", DEVICES)
def test_expert_layers_repeat_bit_by_bit(state: Inputs, device: str) -> None:
    """Every MoE block on the tokens that reach it in the model, twice: outputs and all gradients are the same bits."""
    model = ours(state, device).train()
    seen: list[tuple[torch.nn.Module, torch.Tensor]] = []
    blocks = [layer.mlp for layer in model.model.language_model.layers if hasattr(layer.mlp, "experts")]
    hooks = [block.register_forward_hook(lambda m, args, out: seen.append((m, args[0].detach()))) for block in blocks]
    model(**packed(model, make_samples(0), device))
    for hook in hooks:
        hook.remove()
    assert len(seen) == len(blocks) > 2
    for block, tokens in seen:
        results = []
        for _ in range(2):
            x = tokens.clone().requires_grad_()
            out = block(x)[0]
            seed = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out)
            results.append([out, *torch.autograd.grad(out, [x, *block.parameters()], seed)])
        for first, second in zip(*results, strict=True):
            assert first.any()
            assert torch.equal(first, second)
