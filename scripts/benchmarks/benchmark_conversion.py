"""Measure the converter: speed against cp, transpose against numpy and torch, memory, and upstream's own conversion.

    python scripts/benchmarks/benchmark_conversion.py [ratio] [transpose] [upstream] [memory] [plan]
                                                          [--dir DIR] [--layers 4]

Without words all five are run. Each prints a table and is written to scripts/results/benchmark_conversion_<word>.json
with the command, the date and the versions. `--dir` is where the checkpoints are made (up to three times the size of
one, removed afterwards); `--layers` is how many of the 30B model's 48 decoder layers they have, 1.2 GB each.
"""

import argparse
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

REPO = Path(__file__).resolve().parents[2]
if __package__ in (None, ""):  # run from a bare checkout
    sys.path[0] = str(REPO)

from conversion.inventory import expected_tensors, model_dims  # noqa: E402
from conversion.layout import logical_name, stored_tensors  # noqa: E402
from conversion.shard_io import build_header  # noqa: E402
from conversion.transpose import TILE_ROWS, choose_kernel, transpose_numpy  # noqa: E402

RESULTS = REPO / "scripts" / "results"
SHARD_BYTES = 5 * 10**9


def published_config(size: str, layers: int | None = None) -> dict[str, Any]:
    """config.json of the published 30B-A3B or 235B-A22B, with `layers` decoder layers instead of its own."""
    hidden, intermediate, expert, heads, depth = {
        "30B": (2048, 6144, 768, 32, 48),
        "235B": (4096, 12288, 1536, 64, 94),
    }[size]
    return {
        "architectures": ["Qwen3VLMoeForConditionalGeneration"], "model_type": "qwen3_vl_moe",
        "tie_word_embeddings": False, "image_token_id": 151655, "video_token_id": 151656,
        "vision_start_token_id": 151652, "vision_end_token_id": 151653,
        "text_config": {
            "model_type": "qwen3_vl_moe_text", "hidden_size": hidden, "intermediate_size": intermediate,
            "moe_intermediate_size": expert, "num_hidden_layers": layers or depth, "num_attention_heads": heads,
            "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8,
            "vocab_size": 151936, "mlp_only_layers": [], "decoder_sparse_step": 1, "rms_norm_eps": 1e-6,
            "max_position_embeddings": 262144, "rope_theta": 5000000, "tie_word_embeddings": False,
            "rope_scaling": {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [24, 20, 20]},
        },
        "vision_config": {
            "model_type": "qwen3_vl_moe", "depth": 27, "hidden_size": 1152, "intermediate_size": 4304,
            "num_heads": 16, "out_hidden_size": hidden, "deepstack_visual_indexes": [8, 16, 24], "in_channels": 3,
            "num_position_embeddings": 2304, "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2,
        },
    }  # fmt: skip


def make_checkpoint(folder: Path, config: dict[str, Any], sparse: bool = False) -> int:
    """A hub-layout bf16 checkpoint of `config` with arbitrary small finite values; returns its bytes.

    `sparse` leaves the data out: the files have their sizes, and take no disk.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    shards: list[list[tuple[str, str, tuple[int, ...]]]] = [[]]
    room = SHARD_BYTES
    for name, shape in expected_tensors(model_dims(config)).items():
        if logical_name(name) is not None:
            assert len(shape) == 3
            shape = next(iter(stored_tensors("hub", name, shape))).shape
        nbytes = 2 * int(np.prod(shape))
        if nbytes > room and shards[-1]:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append((name, "BF16", shape))
        room -= nbytes
    # Exponents of values about 0.01; the block's length shares no factor with a row's, so that no two rows are equal.
    block = np.random.default_rng(0).integers(0, 2**16, 2**24 + 1, dtype=np.uint16) & 0x80FF | 0x3C00
    weight_map: dict[str, str] = {}
    total = 0
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        size = sum(2 * int(np.prod(shape)) for _, _, shape in shard)
        with open(folder / file, "wb") as out:
            out.write(build_header(shard, {"format": "pt"}))
            if sparse:
                out.truncate(out.tell() + size)
            else:
                for start in range(0, size, block.nbytes):
                    out.write(memoryview(block).cast("B")[: min(block.nbytes, size - start)])  # type: ignore[arg-type]
        weight_map |= {name: file for name, _, _ in shard}
        total += size
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    return total


# Runs a script as if it had been started itself, then says what the kernel counts: VmHWM, the process's own peak.
# (getrusage's ru_maxrss begins with what the parent had before the exec.)
MEASURED = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    with open("/proc/self/status") as status:
        print(next(line for line in status if line.startswith("VmHWM")), file=sys.stderr)
"""


def run_measured(*command: object) -> tuple[float, int, str]:
    """(seconds, peak resident bytes, standard output) of a Python script; a failing one ends the benchmark."""
    words = [sys.executable, "-c", MEASURED, *map(str, command)]
    started = time.perf_counter()
    done = subprocess.run(words, cwd=REPO, capture_output=True, text=True)
    seconds = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(f"{' '.join(words[3:])} ended with {done.returncode}: {done.stderr}")
    return seconds, int(done.stderr.rpartition("VmHWM:")[2].split()[0]) * 1024, done.stdout


def run_timed(*command: object) -> float:
    """Seconds a command takes; a failing one ends the benchmark."""
    started = time.perf_counter()
    subprocess.run([*map(str, command)], check=True)
    return time.perf_counter() - started


CONVERT, VERIFY = "conversion/hf_to_veomni.py", "conversion/verify.py"


def benchmark_ratio(folder: Path, layers: int, repeats: int = 3) -> dict[str, Any]:
    """The whole conversion, hashes and syncs included, against cp and sync, turn by turn on the same files."""
    source, copy, output = folder / "hub", folder / "copy", folder / "fused"
    total = make_checkpoint(source, published_config("30B", layers))
    rows: dict[str, list[float]] = {"cp_and_sync": [], "convert": []}
    peak = 0
    for _ in range(repeats):
        for name, target in (("cp_and_sync", copy), ("convert", output)):
            os.sync()
            _read_all(source)
            if name == "convert":
                seconds, peak, _ = run_measured(CONVERT, source, output, "--quiet")
            else:
                seconds = run_timed("cp", "-r", source, copy) + run_timed("sync")
            rows[name].append(seconds)
            shutil.rmtree(target)
    best = {name: min(times) for name, times in rows.items()}
    ratios = [c / p for c, p in zip(rows["convert"], rows["cp_and_sync"])]
    ratio = best["convert"] / best["cp_and_sync"]
    print(f"{total / 1e9:.2f} GB, best of {repeats}: cp and sync {best['cp_and_sync']:.1f} s, "
          f"converting {best['convert']:.1f} s, ratio {ratio:.2f}, peak {peak / 1e6:.0f} MB")  # fmt: skip
    return {"bytes": total, "seconds": rows, "ratio_of_best": ratio, "ratios": ratios, "peak_bytes": peak}


def _read_all(folder: Path) -> None:
    """Bring a folder into the page cache, so that both candidates start alike."""
    buffer = bytearray(1 << 24)
    for path in folder.glob("*.safetensors"):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def benchmark_transpose() -> dict[str, Any]:
    """GB/s of one core, bytes of the matrix, for the experts of both published sizes."""
    import torch

    torch.set_num_threads(1)
    simd = choose_kernel(2**40)

    def torch_copy(out: np.ndarray, matrix: np.ndarray) -> None:
        torch.from_numpy(out.view(np.int16)).copy_(torch.from_numpy(matrix.view(np.int16)).t())

    def torch_bfloat16(out: np.ndarray, matrix: np.ndarray) -> None:
        as_bf16 = torch.from_numpy(matrix.view(np.int16)).view(torch.bfloat16)
        torch.from_numpy(out.view(np.int16)).view(torch.bfloat16).copy_(as_bf16.t())

    kernels: dict[str, Callable[[np.ndarray, np.ndarray], None]] = {
        "this converter": simd,
        f"this converter, numpy ({TILE_ROWS} rows)": transpose_numpy,
        "torch copy_ of int16": torch_copy,
        "torch copy_ of bfloat16": torch_bfloat16,
        "numpy copyto": lambda out, matrix: np.copyto(out, matrix.T),
        "memcpy": lambda out, matrix: np.copyto(out.reshape(matrix.shape), matrix),
    }
    rates: dict[str, dict[str, float]] = {}
    for rows, cols in ((2048, 1536), (768, 2048), (4096, 3072), (1536, 4096)):
        matrices = np.random.default_rng(0).integers(0, 2**16, (16, rows, cols), dtype=np.uint16)
        outs = np.zeros((16, cols, rows), np.uint16)
        for name, kernel in kernels.items():
            best = float("inf")
            for _ in range(3):
                started = time.thread_time()
                for out, matrix in zip(outs, matrices):
                    kernel(out, matrix)
                best = min(best, time.thread_time() - started)
            if name != "memcpy" and not np.array_equal(outs, matrices.transpose(0, 2, 1)):
                raise SystemExit(f"{name} is wrong")
            rates.setdefault(name, {})[f"{rows}x{cols}"] = round(matrices.nbytes / best / 1e9, 2)
    for name, by_shape in rates.items():
        print(f"{name:40} " + "  ".join(f"{shape} {rate:5.2f}" for shape, rate in by_shape.items()) + "  GB/s")
    return {"gigabytes_per_second_of_one_core": rates, "simd": simd.__module__}


UPSTREAM = """
import sys, torch, transformers
model = transformers.Qwen3VLMoeForConditionalGeneration.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
model.save_pretrained(sys.argv[2])
"""


def benchmark_upstream(folder: Path, layers: int) -> dict[str, Any]:
    """The same conversion by transformers: load the published layout, which transposes, and save."""
    source, by_upstream, ours = folder / "hub", folder / "upstream", folder / "fused"
    script = folder / "upstream.py"
    script.write_text(UPSTREAM)
    result: dict[str, Any] = {"bytes": make_checkpoint(source, published_config("30B", layers))}
    for name, command in {"transformers": (script, source, by_upstream), "converter": (CONVERT, source, ours)}.items():
        os.sync()
        _read_all(source)
        seconds, peak, _ = run_measured(*command)
        seconds += run_timed("sync")
        result[name] = {"seconds": seconds, "peak_bytes": peak}
        print(f"{name:12} {seconds:6.1f} s  peak {peak / 1e6:8.0f} MB")
    result["verify_seconds"] = run_measured(VERIFY, by_upstream, ours, "--quiet")[0]
    print("the two outputs hold the same bits")
    return result


def benchmark_memory(folder: Path, layers: int) -> dict[str, Any]:
    """Peak resident size (VmHWM) of converting under bounds, on a checkpoint twelve times the larger one."""
    source, output = folder / "hub", folder / "fused"
    total = make_checkpoint(source, published_config("30B", layers))
    result: dict[str, Any] = {"bytes": total, "runs": []}
    for bound in ("1GB", "512MB"):
        seconds, peak, printed = run_measured(CONVERT, source, output, "--max-ram", bound, "--json", "-")
        own = json.loads(printed)["peak_memory_bytes"]
        limit = {"1GB": 10**9, "512MB": 512 * 10**6}[bound]
        row = {
            "max_ram": bound,
            "vm_hwm_bytes": peak,
            "own_report_bytes": own,
            "seconds": seconds,
            "under": peak <= limit,
        }
        result["runs"].append(row)
        print(f"{total / 1e9:.2f} GB under --max-ram {bound}: VmHWM {peak / 1e6:.0f} MB, {seconds:.0f} s")
        checked, _, _ = run_measured(VERIFY, "--quiet", "--hashes", output)
        print(f"its hashes hold ({checked:.0f} s)")
        shutil.rmtree(output)
    return result


def benchmark_plan(folder: Path) -> dict[str, Any]:
    """The dry run of the real 235B-A22B, 471 GB, sparse on disk."""
    source = folder / "hub"
    total = make_checkpoint(source, published_config("235B"), sparse=True)
    started = time.perf_counter()
    command = [sys.executable, str(CONVERT), str(source), str(folder / "fused"), "--dry-run", "--max-ram", "1GB"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    seconds = time.perf_counter() - started
    lines = done.stdout.splitlines()
    print("\n".join([*lines[:7], f"… {len(lines) - 13} more files …", *lines[-6:], done.stderr.strip()]))
    print(f"{seconds:.1f} s")
    return {"bytes": total, "seconds": seconds, "exit_code": done.returncode, "lines": lines}


def versions() -> dict[str, str]:
    """What the figures depend on."""
    found = {"python": platform.python_version(), "system": platform.platform(), "cores": str(os.cpu_count())}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            found["processor"] = line.partition(":")[2].strip()
    for package in ("numpy", "numba", "xxhash", "torch", "transformers", "safetensors"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


# What a word runs, and how many layers its checkpoint has by default; 8 are 12 GB.
BENCHMARKS: dict[str, tuple[Callable[[Path, int], dict[str, Any]], int]] = {
    "ratio": (benchmark_ratio, 2),
    "transpose": (lambda folder, layers: benchmark_transpose(), 0),
    "upstream": (benchmark_upstream, 2),
    "memory": (benchmark_memory, 8),
    "plan": (lambda folder, layers: benchmark_plan(folder), 0),
}


def main() -> None:
    """Run the benchmarks named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="WORD", help=f"of {', '.join(BENCHMARKS)} (default: all)")
    parser.add_argument(
        "--dir", type=Path, help="folder for the checkpoints (default: the system's for temporary files)"
    )
    parser.add_argument("--layers", type=int, help="decoder layers (default 2; for memory 8, which is 12 GB)")
    args = parser.parse_args()
    if set(args.words) - set(BENCHMARKS):
        parser.error(f"words are {', '.join(BENCHMARKS)}")
    RESULTS.mkdir(exist_ok=True)
    for word in args.words or BENCHMARKS:
        print(f"== {word}", flush=True)
        benchmark, layers = BENCHMARKS[word]
        with tempfile.TemporaryDirectory(dir=args.dir) as folder:
            result = benchmark(Path(folder), args.layers or layers)
        options = f" --layers {args.layers}" if args.layers else ""
        record = {
            "command": f"python scripts/benchmarks/benchmark_conversion.py {word}{options}",
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "versions": versions(),
            "result": result,
        }
        (RESULTS / f"benchmark_conversion_{word}.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
