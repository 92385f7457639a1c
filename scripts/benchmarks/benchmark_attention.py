"""Time attention over packed sequences: this project's choice beside every kernel called directly, in one run.

    python scripts/benchmarks/benchmark_attention.py [--problem LM ViT] [--rounds 3] [--no-errors]

The language model's attention (16,384 tokens, 32 query and 4 key/value heads of 128, causal, six packed samples of
uneven lengths) and the vision tower's (16 heads of 72, 16 images of 1,024 patches). Forward, and forward and backward:
medians over interleaved rounds, TFLOP/s (2.5 times the forward's for the backward), and relative errors of the output
and the three gradients against fp32. Rows that start with "ours" go through this project's functions, the others are
what a user would write. The last lines compare the project's own choice with the fastest of the others.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # from a checkout, installed or not

from modeling.ops.attention import (
    VARLEN_BACKENDS,
    flash_attention_2_available,
    flash_attention_4_available,
    select_varlen_backend,
    varlen_attention,
)
from scripts.benchmarks.benchmarking import (
    RESULTS,
    attempt,
    describe,
    median_ms,
    peak_bytes,
    print_description,
    relative_error,
    require_gpu,
    write_json,
)

WRONG = 5e-2  # of a result's norm; bf16 rounding gives a few thousandths
WITHIN = 1.03
"""How far the project's choice may lie behind the fastest kernel called directly."""


@dataclass
class Problem:
    """Packed rows: query (T, N, D), key and value (T, N_kv, D), the gradient of the output (T, N, D)."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    gradient: torch.Tensor
    lengths: list[int]
    cu_seqlens: torch.Tensor
    causal: bool

    @property
    def scale(self) -> float:
        return self.query.shape[-1] ** -0.5

    @property
    def forward_flops(self) -> float:
        """Of the two products, counting half of each square where attention is causal."""
        pairs = sum(length**2 for length in self.lengths) / (2 if self.causal else 1)
        return 4.0 * self.query.shape[1] * self.query.shape[2] * pairs


SHAPES: dict[str, tuple[list[int], int, int, int, bool]] = {
    "LM": ([5120, 4096, 3072, 2560, 1024, 512], 32, 4, 128, True),
    "ViT": ([1024] * 16, 16, 16, 72, False),
}
"""Sample lengths, query heads, key/value heads, head size, causal."""

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def make_problem(
    lengths: list[int], heads: int, kv_heads: int, dim: int, causal: bool, device: str = "cuda"
) -> Problem:
    """Random bf16 rows, normal as they are after the norms of queries and keys."""
    torch.manual_seed(0)
    tokens = sum(lengths)
    query, key, value, gradient = (
        torch.randn(tokens, count, dim, device=device).bfloat16() for count in (heads, kv_heads, kv_heads, heads)
    )
    cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
    return Problem(query, key, value, gradient, lengths, cu_seqlens, causal)


def repeated(problem: Problem, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Key and value heads copied until there are as many as query heads."""
    groups = problem.query.shape[1] // problem.key.shape[1]
    return key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)


def sdpa_per_sequence(problem: Problem, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """One call of scaled_dot_product_attention for each sample."""
    parts = zip(*(x.transpose(0, 1).unsqueeze(0).split(problem.lengths, dim=2) for x in (query, key, value)))
    grouped = query.shape[1] != key.shape[1]
    outputs = [
        F.scaled_dot_product_attention(q, k, v, is_causal=problem.causal, enable_gqa=grouped) for q, k, v in parts
    ]
    return torch.cat(outputs, dim=2).squeeze(0).transpose(0, 1)


def torch_varlen(
    problem: Problem, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, repeat: bool
) -> torch.Tensor:
    """PyTorch's varlen_attn, key/value heads repeated or left to the kernel."""
    from torch.nn.attention.varlen import varlen_attn

    accepted = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {}
    if "window_size" in accepted:
        options["window_size"] = (-1, 0) if problem.causal else (-1, -1)
    else:
        options["is_causal"] = problem.causal
    if repeat:
        key, value = repeated(problem, key, value)
    elif "enable_gqa" in accepted:
        options["enable_gqa"] = True
    longest = max(problem.lengths)
    out = varlen_attn(query, key, value, problem.cu_seqlens, problem.cu_seqlens, longest, longest, **options)
    return out[0] if isinstance(out, tuple) else out


def flash_attention(
    problem: Problem, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, package: str
) -> torch.Tensor:
    """flash_attn_varlen_func of flash-attn 2 ("flash_attn") or flash-attn 4 ("flash_attn.cute")."""
    function = importlib.import_module(package).flash_attn_varlen_func
    longest = max(problem.lengths)
    out = function(
        query,
        key,
        value,
        cu_seqlens_q=problem.cu_seqlens,
        cu_seqlens_k=problem.cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        causal=problem.causal,
    )
    return out[0] if isinstance(out, tuple) else out


def implementations(problem: Problem) -> tuple[dict[str, Attention], dict[str, Attention]]:
    """What this project runs, its own choice first, and what a user could call."""
    options: dict[str, Any] = {"cu_seqlens": problem.cu_seqlens, "max_seqlen": max(problem.lengths)}
    options |= {"causal": problem.causal, "scale": problem.scale}
    choice = select_varlen_backend("sdpa", problem.query.device, problem.query.dtype)
    ours: dict[str, Attention] = {f"ours: chosen ({choice})": partial(varlen_attention, **options)}
    runs_here = {
        "flash_attention_2": flash_attention_2_available(),
        "flash_attention_4": flash_attention_4_available(),
        "torch_varlen": problem.query.is_cuda,
    }
    for name, backend in VARLEN_BACKENDS.items():
        if runs_here.get(name, True):
            ours[f"ours: {name}"] = partial(backend, **options)
    direct: dict[str, Attention] = {"SDPA per sequence": partial(sdpa_per_sequence, problem)}
    grouped = problem.query.shape[1] != problem.key.shape[1]
    if problem.query.is_cuda:
        direct["torch varlen_attn"] = partial(torch_varlen, problem, repeat=False)
        if grouped:
            direct["torch varlen_attn, k/v repeated"] = partial(torch_varlen, problem, repeat=True)
    if flash_attention_4_available():
        direct["flash-attn 4"] = partial(flash_attention, problem, package="flash_attn.cute")
    if flash_attention_2_available():
        direct["flash-attn 2"] = partial(flash_attention, problem, package="flash_attn")
    return ours, direct


def run(attention: Attention, problem: Problem, dtype: torch.dtype | None = None) -> list[torch.Tensor]:
    """Output and the gradients of query, key and value."""
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in (problem.query, problem.key, problem.value)]
    out = attention(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, problem.gradient.to(out.dtype))]


def exact_results(problem: Problem) -> list[torch.Tensor]:
    """The same in fp32, softmax(Q K^T) V written out, one sample at a time so that it fits."""
    parts = []
    bounds = [0, *accumulate(problem.lengths)]
    for start, stop in pairwise(bounds):
        rows = slice(start, stop)
        part = Problem(
            problem.query[rows],
            problem.key[rows],
            problem.value[rows],
            problem.gradient[rows],
            lengths=[stop - start],
            cu_seqlens=torch.tensor([0, stop - start], dtype=torch.int32, device=problem.query.device),
            causal=problem.causal,
        )

        def written_out(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, part: Problem = part) -> torch.Tensor:
            k, v = repeated(part, k, v)
            scores = torch.einsum("snd,tnd->nst", q, k) * part.scale
            if part.causal:
                scores.masked_fill_(torch.ones_like(scores[0], dtype=torch.bool).triu(1), float("-inf"))
            return torch.einsum("nst,tnd->snd", scores.softmax(-1), v)

        parts.append(run(written_out, part, torch.float32))
    return [torch.cat(tensors) for tensors in zip(*parts, strict=True)]


def check(attention: Attention, problem: Problem, exact: list[torch.Tensor] | None) -> dict[str, Any]:
    """A first run, which compiles: errors, and memory at the peak."""
    row: dict[str, Any] = {"peak_mb": peak_bytes(lambda: run(attention, problem)) // 10**6}
    if exact is not None:
        got = run(attention, problem)
        row["errors"] = [float(f"{relative_error(a, b):.3g}") for a, b in zip(got, exact, strict=True)]
    return row


def time_once(attention: Attention, problem: Problem) -> dict[str, float]:
    """Milliseconds of the forward, and of forward and backward."""
    leaves = [t.detach().requires_grad_() for t in (problem.query, problem.key, problem.value)]

    def step() -> None:
        torch.autograd.grad(attention(*leaves), leaves, problem.gradient)

    with torch.no_grad():
        forward = median_ms(partial(attention, *leaves))
    return {"forward_ms": forward, "both_ms": median_ms(step)}


def measure(problem: Problem, rounds: int, errors: bool) -> dict[str, dict[str, Any]]:
    """Every implementation's row; a slow one is timed in the first round only."""
    ours, direct = implementations(problem)
    everything = ours | direct
    exact = exact_results(problem) if errors else None
    rows = {name: attempt(partial(check, attention, problem, exact)) for name, attention in everything.items()}
    del exact
    found: dict[str, list[dict[str, float]]] = {name: [] for name, row in rows.items() if "failed" not in row}
    for turn in range(rounds):
        fastest = min((times[0]["both_ms"] for times in found.values() if times), default=0.0)
        for name in list(found):
            if turn and found[name][0]["both_ms"] > 1.25 * fastest:
                continue
            times = attempt(partial(time_once, everything[name], problem))
            if "failed" in times:
                rows[name] |= times
                del found[name]
            else:
                found[name].append(times)
    for name, timings in found.items():
        row = rows[name]
        for key, factor in (("forward", 1.0), ("both", 3.5)):
            milliseconds = statistics.median(times[f"{key}_ms"] for times in timings)
            row[f"{key}_ms"] = round(milliseconds, 3)
            row[f"{key}_tflops"] = round(factor * problem.forward_flops / milliseconds / 1e9)
    return rows


def compare(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The project's choice against the fastest direct call, forward, and forward and backward.

    A call whose output or gradients are wrong is no peer: the comparison names it, and leaves it out.
    """
    chosen = next(row for name, row in rows.items() if name.startswith("ours: chosen"))
    direct = {name: row for name, row in rows.items() if not name.startswith("ours") and "both_ms" in row}
    wrong = {name for name, row in direct.items() if max(row.get("errors", [0.0])) > WRONG}
    for name in sorted(wrong):
        print(f"{name}: wrong, errors {direct.pop(name)['errors']} of output, dq, dk, dv against fp32")
    verdict: dict[str, Any] = {}
    for key in ("forward_ms", "both_ms"):
        if key not in chosen or not direct:
            continue
        best = min(direct, key=lambda name: direct[name][key])
        ratio = round(chosen[key] / direct[best][key], 3)
        verdict[key] = {"best": best, "ours_over_best": ratio, "within": ratio <= WITHIN}
    return verdict


def print_table(title: str, rows: dict[str, dict[str, Any]], verdict: dict[str, Any]) -> None:
    print(f"\n{title}")
    print(f"{'':34}{'fwd ms':>8}{'TFLOP/s':>9}{'f+b ms':>9}{'TFLOP/s':>9}{'peak MB':>9}  errors out dq dk dv")
    for name, row in rows.items():
        if "failed" in row:
            print(f"{name:34}  failed: {row['failed']}", flush=True)
            continue
        errors = " ".join(f"{e:.1e}" for e in row.get("errors", []))
        print(
            f"{name:34}{row['forward_ms']:8.3f}{row['forward_tflops']:9}{row['both_ms']:9.3f}{row['both_tflops']:9}"
            f"{row['peak_mb']:9}  {errors}",
            flush=True,
        )
    for key, found in verdict.items():
        words = "within" if found["within"] else "NOT within"
        print(f"{key}: ours / best ({found['best']}) = {found['ours_over_best']:.3f}, {words} {WITHIN}", flush=True)
    if len(verdict) < 2:
        print("no comparison: see the failed rows")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problem", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=3, help="timings of each, interleaved; their median counts")
    parser.add_argument("--no-errors", action="store_true", help="leave out the comparison with fp32")
    parser.add_argument("--json", type=Path, default=RESULTS / "benchmark_attention.json")
    args = parser.parse_args()
    require_gpu()
    results = describe()
    print_description(results)
    for name in args.problem:
        lengths, heads, kv_heads, dim, causal = SHAPES[name]
        problem = make_problem(lengths, heads, kv_heads, dim, causal)
        rows = measure(problem, args.rounds, not args.no_errors)
        verdict = compare(rows)
        title = f"{name}: {sum(lengths)} tokens in {len(lengths)} samples, {heads}/{kv_heads} heads of {dim}"
        print_table(title + (", causal" if causal else ""), rows, verdict)
        results[name] = {"lengths": lengths, "rows": rows, "comparison": verdict}
        write_json(args.json, results)  # after each, so that nothing is lost


if __name__ == "__main__":
    main()
