"""Measure the converter: speed against cp, transpose against numpy and torch, memory, and upstream's own conversion.

    python scripts/benchmark_conversion.py [ratio] [transpose] [upstream] [memory] [plan] [--dir DIR] [--layers 4]

Without words all five are run. Each prints a table and is written to scripts/results/benchmark_conversion_<word>.json
with the command, the date and the versions. `--dir` is where the checkpoints are made (about three times the size of
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

REPO = Path(__file__).resolve().parent.parent
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


def run_measured(command: list[str]) -> tuple[float, int, str]:
    """(seconds, peak resident bytes, standard output) of a command; a failing one ends the benchmark."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPO)
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return time.perf_counter() - started, usage.ru_maxrss * 1024, output


def converter(*arguments: object) -> list[str]:
    """The command line of a conversion to fused."""
    return [sys.executable, "conversion/hf_to_veomni.py", *map(str, arguments)]


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
                seconds, peak, _ = run_measured(converter(source, output, "--quiet"))
            else:
                seconds = run_measured(["cp", "-r", str(source), str(copy)])[0] + run_measured(["sync"])[0]
            rows[name].append(seconds)
            shutil.rmtree(target)
    best = {name: min(times) for name, times in rows.items()}
    ratios = [c / p for c, p in zip(rows["convert"], rows["cp_and_sync"])]
    print(f"{total / 1e9:.2f} GB, best of {repeats}: cp and sync {best['cp_and_sync']:.1f} s, converting "
          f"{best['convert']:.1f} s, ratio {best['convert'] / best['cp_and_sync']:.2f}, peak {peak / 1e6:.0f} MB")  # fmt: skip
    return {"bytes": total, "seconds": rows, "ratio_of_best": best["convert"] / best["cp_and_sync"],
            "ratios": ratios, "peak_bytes": peak}  # fmt: skip


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
