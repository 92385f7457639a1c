"""Time this project's expert layer beside every kernel a user could pick, in one run on one GPU.

    python scripts/benchmarks/benchmark_moe.py [--shape 30B] [--tokens 16384] [--routing random]
                                                [--veomni veomni-0.1.12-*.whl]

Forward, forward and backward (medians), memory at the peak and kept for backward, and the error of outputs and
gradients against fp32. transformers comes from the environment; VeOmni's kernels are read out of its wheel
(`pip download --no-deps veomni==0.1.12`), because importing that package wants its whole pinned environment.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import logging
import sys
import tempfile
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # from a checkout, installed or not

from modeling.ops.experts import default_backend, fused_moe_forward
from scripts.benchmarks.benchmarking import (
    RESULTS,
    describe,
    median_ms,
    peak_bytes,
    print_description,
    relative_error,
    require_gpu,
    write_json,
)

SHAPES = {"30B": (2048, 768, 128, 8), "235B": (4096, 1536, 128, 8)}
"""H, I, E, K of the published sizes."""
ROUTINGS = ("random", "zipf", "3 empty")
Problem = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
Layer = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def make_problem(shape: str, tokens: int, routing: str) -> Problem:
    """x (T, H), expert choices (T, K), weights (T, K) fp32, gate_up_proj (E, 2I, H), down_proj (E, H, I); bf16."""
    hidden, intermediate, experts, top_k = SHAPES[shape]
    torch.manual_seed(0)
    logits = torch.randn(tokens, experts, device="cuda")
    if routing == "zipf":
        # Expert e is wanted in proportion to 1 / (e + 1): Gumbel noise on log-probabilities draws without replacement.
        logits = -torch.arange(1, experts + 1, device="cuda").log() - torch.rand_like(logits).log().neg().log()
    if routing == "3 empty":
        logits[:, [0, experts // 2, experts - 1]] = float("-inf")
    index = logits.topk(top_k, dim=-1).indices
    weights = torch.rand(tokens, top_k, device="cuda") + 0.1
    # Rounded to what bf16 holds: the peers take their routing weights in bf16, and should not lose for it.
    weights = (weights / weights.sum(-1, keepdim=True)).bfloat16().float()
    x = torch.randn(tokens, hidden, device="cuda").bfloat16()
    gate_up_proj = (torch.randn(experts, 2 * intermediate, hidden, device="cuda") * 0.02).bfloat16()
    down_proj = (torch.randn(experts, hidden, intermediate, device="cuda") * 0.02).bfloat16()
    return x, index, weights, gate_up_proj, down_proj


def ours(backend: str) -> Layer:
    return lambda x, index, w, gate_up, down: fused_moe_forward(x, index, w, gate_up, down, backend=backend)


def transformers_layer(implementation: str) -> Layer:
    """Upstream's experts module around the given weights, routing weights in bf16 as its router hands them over."""
    from transformers.models.qwen3_vl_moe.configuration_qwen3_vl_moe import Qwen3VLMoeTextConfig
    from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextExperts

    def layer(
        x: torch.Tensor, index: torch.Tensor, w: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
    ) -> torch.Tensor:
        config = Qwen3VLMoeTextConfig(
            hidden_size=down.shape[1],
            moe_intermediate_size=down.shape[2],
            num_experts=down.shape[0],
            num_experts_per_tok=index.shape[1],
        )
        config._experts_implementation = implementation
        with torch.device("meta"):
            experts = Qwen3VLMoeTextExperts(config)
        # Plain tensors in the parameters' place, so that gradients reach the tensors of this benchmark.
        for name, tensor in (("gate_up_proj", gate_up), ("down_proj", down)):
            delattr(experts, name)
            setattr(experts, name, tensor)
        return experts(x, index, w.to(x.dtype))

    return layer


def open_veomni(wheel: str) -> None:
    """Make VeOmni's expert kernels importable from its wheel, with stand-ins for the little they ask of the rest."""
    root = tempfile.mkdtemp()
    kernels = "veomni/ops/kernels/moe"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(root, [name for name in archive.namelist() if name.startswith(kernels)])
    alone = types.SimpleNamespace(ep_enabled=False)
    stand_ins: dict[str, dict[str, Any]] = {
        "utils.logging": {"get_logger": lambda *_, **__: logging.getLogger("veomni")},
        "utils.device": {
            "get_torch_device": lambda: torch.cuda,
            "get_device_name": torch.cuda.get_device_name,
            "synchronize": torch.cuda.synchronize,
            "is_moe_kernel_supported": lambda *_, **__: True,
            "IS_MLU_AVAILABLE": False,
            "IS_NPU_AVAILABLE": False,
        },
        "utils.import_utils": {
            "is_fused_moe_available": lambda: True,
            "is_quack_gemm_available": lambda: True,
            "is_torch_npu_available": lambda: False,
        },
        "distributed.parallel_state": {"get_parallel_state": lambda: alone},
        "distributed.moe": dict.fromkeys(
            ("EPGroupGemm", "EPMergedFc1GroupGemm", "dispatch_to_ep_class", "preprocess")
            + ("token_pre_all2all", "tokens_post_all2all")
        ),
    }
    packages = ["", "utils", "distributed", "ops", "ops.kernels", "ops.kernels.moe"]
    for name, attributes in [*((package, {}) for package in packages), *stand_ins.items()]:
        full = f"veomni.{name}".rstrip(".")
        module = types.ModuleType(full)
        module.__dict__.update(attributes)
        if name in packages:
            module.__path__ = [f"{root}/{full.replace('.', '/')}"]
        sys.modules[full] = module


def veomni_layer(kernel: str) -> Layer:
    module = importlib.import_module(f"veomni.ops.kernels.moe.{kernel}")
    function = getattr(module, f"{kernel}_fused_moe_forward")
    return lambda x, index, w, gate_up, down: function(
        down.shape[0], w.to(x.dtype), index, x, None, None, down, gate_up
    )


def layers(veomni: str | None) -> dict[str, Layer]:
    """Every implementation that is installed, this project's last."""
    found = {name: transformers_layer(name) for name in ("eager", "grouped_mm")}
    named = {f"transformers {name}": layer for name, layer in found.items()}
    device = torch.device("cuda")
    has_quack = default_backend(device, torch.bfloat16, 2048, 768) == "quack"
    if veomni:
        open_veomni(veomni)
        named["VeOmni Triton"] = veomni_layer("group_gemm")
        if has_quack:
            named["VeOmni quack"] = veomni_layer("quack_gemm")
    named["ours grouped_mm"] = ours("grouped_mm")
    if has_quack:
        named["ours quack"] = ours("quack")
    return named


def exact_results(problem: Problem, gradient: torch.Tensor) -> list[torch.Tensor]:
    """Output and gradients in fp32, by the readable loop."""
    x, index, *rest = problem
    leaves = [t.float().requires_grad_() for t in (x, *rest)]
    out = ours("eager")(leaves[0], index, *leaves[1:])
    return [out.detach(), *torch.autograd.grad(out, leaves, gradient.float())]


def measure(layer: Layer, problem: Problem, exact: list[torch.Tensor] | None, flops: float) -> dict[str, Any]:
    """Milliseconds, TFLOP/s, memory, and errors where an exact result is at hand."""
    x, index, w, gate_up, down = (t.detach() for t in problem)
    leaves = [t.requires_grad_() for t in (x, w, gate_up, down)]
    torch.manual_seed(1)
    gradient = torch.randn_like(x)

    def forward() -> torch.Tensor:
        return layer(leaves[0], index, *leaves[1:])

    def step() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(forward(), leaves, gradient)

    row: dict[str, Any] = {"peak_mb": peak_bytes(step) // 10**6}
    before = torch.cuda.memory_allocated()
    out = forward()
    row["kept_mb"] = (torch.cuda.memory_allocated() - before - out.nbytes) // 10**6
    if exact is not None:
        got = [out, *torch.autograd.grad(out, leaves, gradient)]
        row["errors"] = [float(f"{relative_error(a, b):.3g}") for a, b in zip(got, exact, strict=True)]
        again = [out2 := forward(), *torch.autograd.grad(out2, leaves, gradient)]
        row["same_bits_again"] = all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
        del got, again, out2
    del out
    with torch.no_grad():
        row["forward_ms"] = round(median_ms(forward), 3)
    row["both_ms"] = round(median_ms(step), 3)
    row["tflops"] = round(3 * flops / row["both_ms"] / 1e9)
    return row


def print_table(title: str, rows: dict[str, dict[str, Any]], own: str) -> None:
    fastest = rows[own]["both_ms"]
    print(f"\n{title}")
    print(
        f"{'':24}{'fwd ms':>8}{'f+b ms':>9}{'TFLOP/s':>9}{'peak MB':>9}{'kept MB':>9}{f'x {own}':>17}"
        "  errors out dx dw dW1 dW2"
    )
    for name, row in rows.items():
        errors = " ".join(f"{e:.1e}" for e in row.get("errors", [])) + (
            "" if row.get("same_bits_again", True) else " *"
        )
        print(
            f"{name:24}{row['forward_ms']:8.2f}{row['both_ms']:9.2f}{row['tflops']:9}{row['peak_mb']:9}"
            f"{row['kept_mb']:9}{row['both_ms'] / fastest:17.2f}  {errors}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["30B"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[16384])
    parser.add_argument("--routing", nargs="+", choices=ROUTINGS, default=["random"])
    parser.add_argument("--veomni", help="path of a veomni wheel")
    parser.add_argument("--without", nargs="+", default=[], help="implementations to leave out, by name")
    parser.add_argument("--no-errors", action="store_true", help="leave out the comparison with fp32")
    parser.add_argument("--json", type=Path, default=RESULTS / "benchmark_moe.json")
    args = parser.parse_args()
    require_gpu()
    results = describe()
    print_description(results)
    chosen = {name: layer for name, layer in layers(args.veomni).items() if name not in args.without}
    own = list(chosen)[-1]
    for shape, tokens, routing in itertools.product(args.shape, args.tokens, args.routing):
        hidden, intermediate, _, top_k = SHAPES[shape]
        flops = 6.0 * tokens * top_k * hidden * intermediate
        problem = make_problem(shape, tokens, routing)
        torch.manual_seed(1)
        exact = None if args.no_errors else exact_results(problem, torch.randn_like(problem[0]))
        rows = {}
        for name, layer in chosen.items():
            rows[name] = measure(layer, problem, exact, flops)
            torch.cuda.empty_cache()
        del exact
        title = f"{shape} T={tokens} {routing}"
        print_table(title, rows, own)
        results[title] = rows
    print("\n* not the same bits when run again")
    write_json(args.json, results)


if __name__ == "__main__":
    main()
