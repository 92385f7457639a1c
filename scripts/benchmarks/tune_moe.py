"""Find the tile shapes that modeling/ops/moe_quack.py pins, on the GPU at hand.

    python scripts/benchmarks/tune_moe.py [--shape 30B 235B] [--tokens 16384 4096] [--json FILE]

Times every tile shape that quack offers for Hopper on each matrix product of the expert layer, and prints the best few
per product. Kernels compile in a pool of processes first; nothing here runs when a model trains.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # from a checkout, installed or not

from scripts.benchmarks.benchmark_moe import SHAPES, make_problem
from scripts.benchmarks.benchmarking import describe, median_ms, print_description, require_gpu, write_json


def candidates(gathers: bool, gated: bool, varlen_m: bool) -> list:
    """quack's Hopper configurations that fit: a gathered product takes no cluster along N and no dynamic scheduler."""
    from quack.gemm_config import config_supports, get_all_configs

    found = []
    for config in get_all_configs("gated" if gated else None):
        if config.device_capacity != 9 or config.swap_ab:
            continue
        for dynamic, cluster in itertools.product((False, True), ((2, 1), (1, 2), (1, 1))):
            variant = dataclasses.replace(
                config, is_dynamic_persistent=dynamic, cluster_m=cluster[0], cluster_n=cluster[1]
            )
            if config_supports(variant, gather_A=gathers, varlen_m=varlen_m) and variant not in found:
                found.append(variant)
    return found


def products(shape: str, tokens: int) -> dict[str, tuple[Callable, list, int]]:
    """name -> (run(config), candidate configurations, multiply-adds)."""
    from quack.gemm_interface import gemm_dgated, gemm_gated

    from modeling.ops.experts.quack import rows_product, weight_product
    from modeling.ops.experts.routing import route_by_expert

    x, index, weights, w1, w2 = make_problem(shape, tokens, "random")
    hidden, intermediate, experts, top_k = SHAPES[shape]
    routing = route_by_expert(index, experts)
    source, offsets = routing.token, routing.offsets
    rows = tokens * top_k
    act = torch.randn(rows, intermediate, device="cuda").bfloat16()
    pre = torch.randn(rows, 2 * intermediate, device="cuda").bfloat16()
    scale = weights.flatten()[routing.route]
    d_w1, d_w2 = torch.empty_like(w1), torch.empty_like(w2)
    varlen = {"cu_seqlens_m": offsets, "tuned": False}
    size = 2 * rows * hidden * intermediate
    found: dict[str, tuple[Callable, list, int]] = {
        "up": (
            lambda c: gemm_gated(x, w1.mT, activation="swiglu", A_idx=source, concat_layout=("B",), config=c, **varlen),
            candidates(True, True, True),
            2 * size,
        ),
        "down": (lambda c: rows_product(act, w2.mT, offsets, c), candidates(False, False, True), size),
        "d_act": (lambda c: rows_product(x, w2, offsets, c, gather=source), candidates(True, False, True), size),
        "d_act fused": (
            lambda c: gemm_dgated(
                x,
                w2,
                pre,
                activation="swiglu",
                colvec_scale=scale,
                colvec_reduce=True,
                A_idx=source,
                config=c,
                dynamic_scheduler=False,
                **varlen,
            ),
            candidates(True, True, True),
            size,
        ),
        "d_rows": (
            lambda c: rows_product(pre, w1, offsets, c, concat=("B",)),
            candidates(False, False, True),
            2 * size,
        ),
        "d_down": (lambda c: weight_product(x, act, source, offsets, d_w2, c), candidates(True, False, False), size),
        "d_gate_up": (
            lambda c: weight_product(x, pre, source, offsets, d_w1.mT, c, concat=("out",)),
            candidates(True, False, False),
            2 * size,
        ),
    }
    return found


def compile_all(work: list[tuple[Callable, object]]) -> None:
    """Compile every kernel of `work` in quack's pool of processes; launches nothing that is not compiled."""
    from quack.cache import CompilePending, pool_scope

    os.environ.setdefault("QUACK_COMPILE_WORKERS", str(os.cpu_count() or 8))
    waiting, start = list(work), time.monotonic()
    with pool_scope():
        while waiting and time.monotonic() - start < 300:
            pending = []
            for run, config in waiting:
                try:
                    run(config)
                except CompilePending:
                    pending.append((run, config))
                except (RuntimeError, ValueError, AssertionError, TypeError) as error:
                    print(f"left out {config}: {type(error).__name__}: {str(error)[:120]}")
            waiting = pending
            time.sleep(0.5)
    print(f"compiled {len(work) - len(waiting)} of {len(work)} kernels in {time.monotonic() - start:.0f} s", flush=True)


def label(c: Any) -> str:
    kind = "pingpong" if c.pingpong else "coop"
    dynamic = " dynamic" if c.is_dynamic_persistent else ""
    swizzle = "" if c.max_swizzle_size == 8 else f" swizzle {c.max_swizzle_size}"
    return f"{c.tile_m}x{c.tile_n} {kind} {c.cluster_m}x{c.cluster_n}{dynamic}{swizzle}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["30B"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[16384])
    parser.add_argument("--only", nargs="+", help="names of products")
    parser.add_argument("--swizzle", action="store_true", help="for the best three also the width of the tile order")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    require_gpu()
    results = describe()
    print_description(results)
    for position, (shape, tokens) in enumerate(itertools.product(args.shape, args.tokens)):
        table = {k: v for k, v in products(shape, tokens).items() if not args.only or k in args.only}
        if position == 0:
            compile_all([(run, config) for run, configs, _ in table.values() for config in configs])
        for name, (run, configs, flops) in table.items():
            timed = []
            for config in configs:
                try:
                    timed.append((median_ms(partial(run, config), 5, 25), config))
                except (RuntimeError, ValueError, AssertionError, TypeError) as error:
                    print(f"{name} {label(config)}: {type(error).__name__}: {str(error)[:120]}")
            timed.sort(key=lambda entry: entry[0])
            if args.swizzle:
                for _, config in timed[:3]:
                    for size in (1, 2, 4, 16):
                        variant = dataclasses.replace(config, max_swizzle_size=size)
                        timed.append((median_ms(partial(run, variant), 5, 25), variant))
                timed.sort(key=lambda entry: entry[0])
            results[f"{shape} {tokens} {name}"] = [(round(ms, 4), label(config)) for ms, config in timed]
            best = "   ".join(f"{ms:.3f} ({flops / ms / 1e9:.0f}) {label(config)}" for ms, config in timed[:4])
            print(f"{shape} {tokens:6} {name:12} {best}   worst {timed[-1][0]:.2f}" if timed else name, flush=True)
    if args.json:
        write_json(args.json, results)


if __name__ == "__main__":
    main()
