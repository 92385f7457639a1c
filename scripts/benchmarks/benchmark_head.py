"""Time the output head with its loss, forward and backward, beside the plain path with full logits.

    python scripts/benchmarks/benchmark_head.py [--tokens 16384] [--vocabulary 151936] [--hidden 2048]
                                                 [--chunk-size 2048]

Medians, peak memory beyond inputs and parameters, and errors of loss and gradients against fp32.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # from a checkout, installed or not

from modeling.ops.loss import cross_entropy as head
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

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def full_logits(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """What a causal language model of transformers does with labels."""
    return F.cross_entropy((hidden @ weight.T).float(), labels)


def exact_results(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> list[torch.Tensor]:
    """Loss and gradients in fp32, some rows at a time."""
    weight = weight.detach().float().requires_grad_()
    d_hidden, total = torch.empty_like(hidden, dtype=torch.float32), torch.zeros((), device="cuda")
    for begin in range(0, hidden.shape[0], 1024):
        rows = slice(begin, begin + 1024)
        part = hidden[rows].detach().float().requires_grad_()
        loss = F.cross_entropy(part @ weight.T, labels[rows], reduction="sum") / labels.numel()
        loss.backward()
        total += loss.detach()
        assert part.grad is not None
        d_hidden[rows] = part.grad
    assert weight.grad is not None
    return [total, d_hidden, weight.grad]


def measure(loss: Loss, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
    def step() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(loss(hidden, weight, labels), (hidden, weight))

    return {"peak_mb": peak_bytes(step) // 10**6, "both_ms": round(median_ms(step, 100, 600), 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--chunk-size", type=int, nargs="+", default=[head.CHUNK_SIZE])
    parser.add_argument("--without-full-logits", action="store_true")
    parser.add_argument("--json", type=Path, default=RESULTS / "benchmark_head.json")
    args = parser.parse_args()
    require_gpu()
    results = describe()
    print_description(results)
    torch.manual_seed(0)
    hidden = torch.randn(args.tokens, args.hidden, device="cuda").bfloat16().requires_grad_()
    weight = (torch.randn(args.vocabulary, args.hidden, device="cuda") * 0.02).bfloat16().requires_grad_()
    labels = torch.randint(0, args.vocabulary, (args.tokens,), device="cuda")
    exact = exact_results(hidden, weight, labels)
    flops = 6 * args.tokens * args.hidden * args.vocabulary
    runs: dict[str, Loss] = {
        f"ours, chunk {chunk}": partial(head.linear_cross_entropy, chunk_size=chunk) for chunk in args.chunk_size
    }
    if not args.without_full_logits:
        runs["full logits"] = full_logits
    print(f"{'':20}{'f+b ms':>9}{'TFLOP/s':>9}{'peak MB':>9}  errors loss d_hidden d_weight")
    for name, loss in runs.items():
        row = measure(loss, hidden, weight, labels)
        value = loss(hidden, weight, labels)
        got = [value, *torch.autograd.grad(value, (hidden, weight))]
        row["errors"] = [float(f"{relative_error(a, b):.3g}") for a, b in zip(got, exact, strict=True)]
        del got
        torch.cuda.empty_cache()
        results[name] = row
        errors = " ".join(f"{e:.1e}" for e in row["errors"])
        rate = flops / row["both_ms"] / 1e9
        print(f"{name:20}{row['both_ms']:9.1f}{rate:9.0f}{row['peak_mb']:9}  {errors}", flush=True)
    write_json(args.json, results)


if __name__ == "__main__":
    main()
