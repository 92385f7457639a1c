"""What the benchmark scripts share: device and versions, ceilings measured in the run, timing, peak memory, JSON."""

from __future__ import annotations

import datetime
import importlib.metadata
import importlib.util
import json
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).resolve().parents[1] / "results"
PACKAGES = (
    *("torch", "triton", "transformers", "quack-kernels", "nvidia-cutlass-dsl"),
    *("flash-attn-4", "flash-attn", "liger-kernel", "veomni"),
)


def require_gpu() -> None:
    """End the program with a readable line where there is no GPU to measure."""
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark measures a CUDA device and found none")


def versions() -> dict[str, str]:
    """Of what is installed of PACKAGES."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def describe() -> dict[str, Any]:
    """Device, versions of what is installed, date, and two ceilings: a large matrix product and a large copy."""
    from triton.testing import do_bench

    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product_ms = do_bench(lambda: a @ b, return_mode="median")
    source = torch.empty(2**30, dtype=torch.int32, device="cuda").random_()
    target = torch.empty_like(source)
    copy_ms = do_bench(lambda: target.copy_(source), return_mode="median")
    return {
        "device": torch.cuda.get_device_name(),
        "date": datetime.date.today().isoformat(),
        "versions": versions(),
        "ceilings": {
            "matmul_8192_tflops": round(2 * 8192**3 / product_ms / 1e9),
            "copy_tb_per_s": round(2 * source.nbytes / copy_ms / 1e9, 2),
        },
    }


def print_description(description: dict[str, Any]) -> None:
    """Two lines above a table."""
    installed = ", ".join(f"{name} {version}" for name, version in description["versions"].items())
    ceilings = description["ceilings"]
    print(f"{description['device']}, {description['date']}: {installed}")
    print(
        f"ceilings: 8192^3 bf16 matmul {ceilings['matmul_8192_tflops']} TFLOP/s, copy {ceilings['copy_tb_per_s']} TB/s"
    )


def median_ms(function: Callable[[], Any], warmup_ms: int = 25, repeat_ms: int = 100) -> float:
    """Median milliseconds of a call after warm-up, by CUDA events, the L2 cache flushed between calls."""
    from triton.testing import do_bench

    # So that none is timed on a chip that the one before it has heated.
    torch.cuda.synchronize()
    time.sleep(0.7)
    return float(do_bench(function, warmup=warmup_ms, rep=repeat_ms, return_mode="median"))


def peak_bytes(function: Callable[[], Any]) -> int:
    """Bytes that one call (after a first one) takes at its peak beyond what was allocated before it."""
    function()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def power_while(function: Callable[[], Any], calls: int) -> dict[str, Any]:
    """What `nvidia-smi` reads every 20 ms while `calls` calls run in a row on GPU 0: medians of the power and of the
    clock of the multiprocessors, their limits, and the share of readings at which power held the clock down.

    {} where there is no nvidia-smi. A reading of power is itself a mean over some 100 ms.
    """
    program = shutil.which("nvidia-smi")
    if program is None:
        return {}
    fields = "power.draw.instant,power.limit,clocks.sm,clocks.max.sm,clocks_event_reasons.sw_power_cap"
    command = [program, "--id=0", f"--query-gpu={fields}", "--format=csv,noheader,nounits", "--loop-ms=20"]
    function()
    torch.cuda.synchronize()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as reader:
        assert reader.stdout is not None
        try:
            reader.stdout.readline()  # it takes a while to start
            for _ in range(calls):
                function()
            torch.cuda.synchronize()
        finally:
            reader.terminate()  # it would read for ever, and be waited for
        readings = [line.split(", ") for line in reader.stdout.read().splitlines() if line.count(",") == 4]
    if not readings:
        return {}
    power, limit, clock, most, capped = zip(*readings, strict=True)
    return {
        "power_w": round(statistics.median(map(float, power))),
        "power_limit_w": round(float(limit[0])),
        "sm_mhz": round(statistics.median(map(float, clock))),
        "sm_max_mhz": round(float(most[0])),
        "held_by_power": round(capped.count("Active") / len(capped), 2),
    }


def relative_error(got: torch.Tensor, exact: torch.Tensor) -> float:
    """||got - exact|| / ||exact||, NaN where got has one."""
    exact = exact.detach().double()
    return float((got.detach().double() - exact).norm() / exact.norm().clamp_min(1e-300))


def failures() -> tuple[type[BaseException], ...]:
    """What a kernel that does not take a shape or a device raises: Python's errors, PyTorch's, Triton's, CUTLASS's."""
    found: list[type[BaseException]] = [ArithmeticError, AssertionError, AttributeError, ImportError, LookupError]
    found += [OSError, RuntimeError, TypeError, ValueError]
    if importlib.util.find_spec("triton") is not None:
        from triton.errors import TritonError

        found.append(TritonError)
    if importlib.util.find_spec("cutlass") is not None:
        from cutlass.base_dsl.common import DSLBaseError

        found.append(DSLBaseError)
    return tuple(found)


def attempt(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A row of figures, or {"failed": why}: one peer that does not run here must not cost the other rows."""
    try:
        return measure()
    except failures() as error:
        lines = str(error).strip().splitlines() or [""]
        return {"failed": f"{type(error).__name__}: {lines[0]}"[:300]}
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def write_json(path: Path, content: dict[str, Any]) -> None:
    """One small, readable JSON file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}")
