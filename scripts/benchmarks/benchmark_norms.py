"""Time the memory-bound steps of a layer, forward and backward: RMSNorm, rotary embedding, SwiGLU.

    python scripts/benchmarks/benchmark_norms.py [--tokens 8192] [--problem rotary-LM ...]

This project's functions beside liger-kernel's, torch.compile of the plain formula and the plain formula itself, at the
30B-A3B sizes in bf16. The GPU is kept busy while calls are queued, so that times are the kernels' and not the host's
launches. With the floor that the bytes which must move set at the copy rate of the same run (and products at the matrix
rate), and relative errors of outputs and gradients against fp32.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # from a checkout, installed or not

from modeling.ops.norm_rotary import rms_norm, rms_norm_reference, rotate, rotate_qkv, rotate_reference
from scripts.benchmarks.benchmarking import (
    RESULTS,
    attempt,
    describe,
    print_description,
    relative_error,
    require_gpu,
    write_json,
)

HIDDEN, DENSE = 2048, 6144
HEADS, KV_HEADS, HEAD_DIM = 32, 4, 128
VISION_HEADS, VISION_HEAD_DIM = 16, 72
EPS = 1e-6

Tensors = tuple[torch.Tensor, ...]


@dataclass
class Problem:
    """One step: its inputs, what computes it, and what it cannot do without.

    Attributes:
        inputs: what gradients are wanted of; every implementation takes them in this order and returns a tuple.
        plain: the readable formula; also what is compiled, and in fp32 what errors are taken against.
        others: further implementations by name, the project's own first where it has one.
        forward_bytes, both_bytes: read and written at least, in the forward, and in forward and backward.
        forward_flops: of its matrix products; the backward has twice as many.
    """

    inputs: Tensors
    plain: Callable[..., Tensors]
    others: dict[str, Callable[..., Tensors]]
    forward_bytes: int
    both_bytes: int
    forward_flops: float = 0.0

    def floors_ms(self, ceilings: dict[str, float]) -> tuple[float, float]:
        """The time that bytes and products alone take at the ceilings of `describe`."""
        rate, speed = ceilings["copy_tb_per_s"] * 1e9, ceilings["matmul_8192_tflops"] * 1e9
        forward, both = self.forward_flops / speed, 3 * self.forward_flops / speed
        return self.forward_bytes / rate + forward, self.both_bytes / rate + both


def has_liger() -> bool:
    return importlib.util.find_spec("liger_kernel") is not None


def liger_variants() -> dict[str, str]:
    """Row name -> module with liger-kernel's autograd functions: Triton's by default, CuTe's where CUTLASS is there."""
    found = {}
    if has_liger():
        found["liger"] = "liger_kernel.ops"
        if importlib.util.find_spec("cutlass") is not None:
            found["liger, CuTe"] = "liger_kernel.ops.cutedsl.ops"
    return found


def liger_norm(x: torch.Tensor, weight: torch.Tensor, module: str) -> Tensors:
    function = importlib.import_module(module).LigerRMSNormFunction
    # As VeOmni calls it: not in place, because a residual branch may read the same gradient.
    return (function.apply(x, weight, EPS, 0.0, "llama", False, None),)


def norm_problem(shape: tuple[int, ...], device: str) -> Problem:
    """x (..., H) and weight (H,); the backward reads x and the gradient and writes another."""
    x = torch.randn(shape, device=device).bfloat16()
    weight = (1 + 0.1 * torch.randn(shape[-1], device=device)).bfloat16()
    others: dict[str, Callable[..., Tensors]] = {"this project": lambda x, w: (rms_norm(x, w, EPS),)}
    others |= {name: partial(liger_norm, module=module) for name, module in liger_variants().items()}
    return Problem((x, weight), lambda x, w: (rms_norm_reference(x, w, EPS),), others, 2 * x.nbytes, 5 * x.nbytes)


def tables(tokens: int, dim: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin (1, T, D) in fp32, halves equal."""
    frequencies = 1.0 / 5e6 ** (torch.arange(0, dim, 2, device=device) / dim)
    angles = torch.arange(tokens, device=device)[:, None] * frequencies
    angles = torch.cat((angles, angles), dim=-1)[None]
    return angles.cos(), angles.sin()


def liger_rotary(query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Tensors:
    from liger_kernel.transformers.rope import liger_rotary_pos_emb

    # It turns its inputs in place.
    query, key = liger_rotary_pos_emb(query.transpose(1, 2), key.transpose(1, 2), cos, sin)
    return query.transpose(1, 2), key.transpose(1, 2)


def rotary_problem(tokens: int, device: str) -> Problem:
    """The language model's queries (1, T, N, D) and keys (1, T, N_kv, D)."""
    query = torch.randn(1, tokens, HEADS, HEAD_DIM, device=device).bfloat16()
    key = torch.randn(1, tokens, KV_HEADS, HEAD_DIM, device=device).bfloat16()
    cos, sin = (table.bfloat16() for table in tables(tokens, HEAD_DIM, device))

    def plain(q: torch.Tensor, k: torch.Tensor) -> Tensors:
        return rotate_reference(q, cos, sin), rotate_reference(k, cos, sin)

    others: dict[str, Callable[..., Tensors]] = {
        "this project": lambda q, k: (rotate(q, cos, sin), rotate(k, cos, sin))
    }
    if has_liger():
        others["liger, in place"] = lambda q, k: liger_rotary(q, k, cos, sin)
    moved = 2 * (query.nbytes + key.nbytes)
    return Problem((query, key), plain, others, moved, 2 * moved)


def norm_rotary_problem(tokens: int, device: str) -> Problem:
    """The queries' norm and then their rotation, which a compiler can fuse."""
    query = torch.randn(1, tokens, HEADS, HEAD_DIM, device=device).bfloat16()
    weight = (1 + 0.1 * torch.randn(HEAD_DIM, device=device)).bfloat16()
    cos, sin = (table.bfloat16() for table in tables(tokens, HEAD_DIM, device))

    def plain(q: torch.Tensor, w: torch.Tensor) -> Tensors:
        return (rotate_reference(rms_norm_reference(q, w, EPS), cos, sin),)

    others: dict[str, Callable[..., Tensors]] = {"this project": lambda q, w: (rotate(rms_norm(q, w, EPS), cos, sin),)}
    return Problem((query, weight), plain, others, 2 * query.nbytes, 5 * query.nbytes)


def vision_rotary_problem(tokens: int, device: str) -> Problem:
    """The vision tower's joint projection (P, 3 N D) to query, key, value (P, N, D), turned in fp32."""
    qkv = torch.randn(tokens, 3 * VISION_HEADS * VISION_HEAD_DIM, device=device).bfloat16()
    cos, sin = (table[0] for table in tables(tokens, VISION_HEAD_DIM, device))

    def plain(qkv: torch.Tensor) -> Tensors:
        query, key, value = qkv.unflatten(-1, (3, VISION_HEADS, -1)).unbind(1)
        query, key = (rotate_reference(x.float(), cos, sin).to(x.dtype) for x in (query, key))
        return query, key, value

    def liger(qkv: torch.Tensor) -> Tensors:
        from liger_kernel.transformers.rope import liger_rotary_pos_emb_vision

        query, key, value = qkv.unflatten(-1, (3, VISION_HEADS, -1)).unbind(1)
        return *liger_rotary_pos_emb_vision(query, key, cos, sin), value

    others: dict[str, Callable[..., Tensors]] = {"this project": lambda qkv: rotate_qkv(qkv, cos, sin, VISION_HEADS)}
    if has_liger():
        others["liger"] = liger
    return Problem((qkv,), plain, others, 2 * qkv.nbytes, 4 * qkv.nbytes)


def liger_swiglu(gate: torch.Tensor, up: torch.Tensor, module: str = "liger_kernel.ops") -> torch.Tensor:
    product: torch.Tensor = importlib.import_module(module).LigerSiLUMulFunction.apply(gate, up)
    return product


def swiglu_problem(tokens: int, device: str) -> Problem:
    """silu(gate) * up (T, I) of a dense layer; the published models have none, and the project runs the formula."""
    gate, up = (torch.randn(tokens, DENSE, device=device).bfloat16() for _ in range(2))
    others: dict[str, Callable[..., Tensors]] = {
        name: lambda gate, up, module=module: (liger_swiglu(gate, up, module),)
        for name, module in liger_variants().items()
    }
    return Problem((gate, up), lambda gate, up: (F.silu(gate) * up,), others, 3 * gate.nbytes, 8 * gate.nbytes)


def mlp_problem(tokens: int, device: str) -> Problem:
    """The same with its three products, x (T, H): what the choice above is worth to a layer."""
    x = torch.randn(tokens, HIDDEN, device=device).bfloat16()
    gate_proj, up_proj = ((torch.randn(DENSE, HIDDEN, device=device) * HIDDEN**-0.5).bfloat16() for _ in range(2))
    down_proj = (torch.randn(HIDDEN, DENSE, device=device) * DENSE**-0.5).bfloat16()

    def plain(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> Tensors:
        return (F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down),)

    def liger(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> Tensors:
        return (F.linear(liger_swiglu(F.linear(x, gate), F.linear(x, up)), down),)

    others: dict[str, Callable[..., Tensors]] = {"liger": liger} if has_liger() else {}
    inner = tokens * DENSE * x.element_size()
    inputs = (x, gate_proj, up_proj, down_proj)
    return Problem(inputs, plain, others, 3 * inner, 8 * inner, 6.0 * tokens * HIDDEN * DENSE)


PROBLEMS: dict[str, Callable[[int, str], Problem]] = {
    "RMSNorm-hidden": lambda tokens, device: norm_problem((tokens, HIDDEN), device),
    "RMSNorm-queries": lambda tokens, device: norm_problem((1, tokens, HEADS, HEAD_DIM), device),
    "rotary-LM": rotary_problem,
    "RMSNorm+rotary-queries": norm_rotary_problem,
    "rotary-ViT": vision_rotary_problem,
    "SwiGLU-dense": swiglu_problem,
    "MLP-dense": mlp_problem,
}


def implementations(problem: Problem) -> dict[str, Callable[..., Tensors]]:
    """By name; the plain formula comes last."""
    compiled = torch.compile(problem.plain, dynamic=False)
    plain = "plain" if "this project" in problem.others else "plain (this project)"
    return {**problem.others, "torch.compile": compiled, plain: problem.plain}


def gradients_like(outputs: Tensors) -> Tensors:
    """Random gradients of the outputs, the same for every implementation."""
    torch.manual_seed(1)
    return tuple(torch.randn(out.shape, device=out.device).to(out.dtype) for out in outputs)


def results(function: Callable[..., Tensors], inputs: Tensors, gradients: Tensors) -> list[torch.Tensor]:
    """Outputs and the inputs' gradients, the inputs copied because some kernels write into them."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    # Not leaves themselves: an operator that works in place must find what it finds in a model.
    outputs = function(*(leaf.view_as(leaf) for leaf in leaves))
    found = torch.autograd.grad(outputs, leaves, tuple(g.clone() for g in gradients))
    return [*(out.detach() for out in outputs), *found]


def exact_results(problem: Problem, gradients: Tensors) -> list[torch.Tensor]:
    """The plain formula in fp32."""
    return results(problem.plain, tuple(t.float() for t in problem.inputs), tuple(g.float() for g in gradients))


def queued_ms(function: Callable[[], Any], calls: int = 20, rounds: int = 15) -> float:
    """Median milliseconds of a call among many queued behind a wait, so that the GPU never waits for the host.

    Nothing is flushed between calls: tensors are larger than the L2 cache, or as small in a model.
    """
    function()
    torch.cuda.synchronize()
    times = []
    for _ in range(rounds):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(60_000_000)  # clock cycles: about 30 ms
        start.record()
        for _ in range(calls):
            function()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) / calls)
    return statistics.median(times)


def measure(
    function: Callable[..., Tensors], problem: Problem, gradients: Tensors, exact: list[torch.Tensor]
) -> dict[str, Any]:
    """Errors, then milliseconds of the forward, and of forward and backward."""
    got = results(function, problem.inputs, gradients)
    row: dict[str, Any] = {"errors": [float(f"{relative_error(a, b):.3g}") for a, b in zip(got, exact, strict=True)]}
    del got
    leaves = [t.detach().clone().requires_grad_() for t in problem.inputs]
    own = tuple(g.clone() for g in gradients)  # some kernels write into these, too

    def step() -> None:
        outputs = function(*(leaf.view_as(leaf) for leaf in leaves))
        torch.autograd.grad(outputs, leaves, own)

    def forward() -> None:
        with torch.no_grad():
            function(*leaves)

    row["forward_ms"] = round(queued_ms(forward), 4)
    row["both_ms"] = round(queued_ms(step), 4)
    return row


def print_table(name: str, rows: dict[str, dict[str, Any]], floors: tuple[float, float]) -> None:
    print(f"\n{name}: floor {floors[0]:.3f} ms forward, {floors[1]:.3f} ms forward and backward")
    print(f"{'':24}{'fwd ms':>9}{'f+b ms':>9}{'/ floor':>9}  errors of outputs, then gradients")
    for implementation, row in rows.items():
        if "failed" in row:
            print(f"{implementation:24}  failed: {row['failed']}", flush=True)
            continue
        errors = " ".join(f"{e:.1e}" for e in row["errors"])
        print(
            f"{implementation:24}{row['forward_ms']:9.3f}{row['both_ms']:9.3f}{row['both_ms'] / floors[1]:9.2f}"
            f"  {errors}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--problem", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--json", type=Path, default=RESULTS / "benchmark_norms.json")
    args = parser.parse_args()
    require_gpu()
    content = describe()
    print_description(content)
    if not has_liger():
        print("liger-kernel is not installed: its rows are missing")
    for name in args.problem:
        torch.manual_seed(0)
        problem = PROBLEMS[name](args.tokens, "cuda")
        with torch.no_grad():
            gradients = gradients_like(problem.plain(*problem.inputs))
        exact = exact_results(problem, gradients)
        rows = {
            implementation: attempt(partial(measure, function, problem, gradients, exact))
            for implementation, function in implementations(problem).items()
        }
        floors = problem.floors_ms(content["ceilings"])
        print_table(name, rows, floors)
        content[name] = {"floor_ms": [round(floor, 4) for floor in floors], "rows": rows}
        write_json(args.json, content)  # after each, so that nothing is lost


if __name__ == "__main__":
    main()
