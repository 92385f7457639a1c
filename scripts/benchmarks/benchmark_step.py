"""python scripts/benchmarks/benchmark_step.py [--layers 4] [--samples 8] [--vision-recompute none full]
                                             [--compile both] [--veomni FOLDER]

A whole training step, forward and backward, side by side with transformers and VeOmni on the same work: the 27-layer
vision tower, some decoder layers of the 30B-A3B shape, packed samples of 256 image tokens and 768 text tokens each,
every label valid. Prints time, tokens/s, peak memory, host-device synchronisations, power and clock, the vision tower
alone, this project's step as one CUDA graph, and where the time goes; writes results/step_<device>.json.

VeOmni pins another transformers, so it runs in a process of its own whose Python path begins with FOLDER: veomni
0.1.12, transformers 5.9.0, tokenizers 0.22.2 and liger-kernel, installed with `pip install --target FOLDER --no-deps`.
quack and flash-attn 4 come from the environment.
"""

import argparse
import gc
import itertools
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # from a checkout, installed or not

from scripts.benchmarks.benchmarking import (
    RESULTS,
    attempt,
    describe,
    power_while,
    print_description,
    require_gpu,
    write_json,
)

ROOT = Path(__file__).resolve().parents[2]
IMAGE_SIDE = 32  # patches; 32 x 32 / 4 = 256 tokens
IMAGE_TOKENS, TEXT_TOKENS = 256, 768
PATCH_VALUES = 3 * 2 * 16 * 16


def config_dict(layers: int) -> dict[str, Any]:
    """The 30B-A3B configuration with fewer decoder layers."""
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True}
    text = {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "max_position_embeddings": 262144,
        "rope_parameters": rope,
        "tie_word_embeddings": False,
    }
    return {"text_config": text, "vision_config": {"out_hidden_size": 2048}, "tie_word_embeddings": False}


def build(model_class: Any, config: Any, **attributes: Any) -> Any:
    """A bf16 model with random weights on the GPU, in training mode."""
    for name, value in attributes.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            model = model_class(config)
    finally:
        torch.set_default_dtype(default)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.02)
    return model.train()


def features(samples: int, image_token_id: int) -> list[dict[str, torch.Tensor]]:
    """Unpacked samples on the CPU: a token of text, as every chat begins with some, an image, then the other text."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for _ in range(samples):
        ids = torch.randint(0, 150_000, (IMAGE_TOKENS + TEXT_TOKENS,), generator=generator)
        ids[1 : 1 + IMAGE_TOKENS] = image_token_id
        pixels = torch.randn(IMAGE_SIDE**2, PATCH_VALUES, generator=generator)
        grid = torch.tensor([[1, IMAGE_SIDE, IMAGE_SIDE]])
        made.append({"input_ids": ids, "pixel_values": pixels, "image_grid_thw": grid})
    return made


def collator_features(model: Any, samples: list[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    """The samples as this project's and VeOmni's collators take them: placeholders 0, labels, masks, positions."""
    image_token_id, positions_of = model.config.image_token_id, model.get_position_id_func()
    made = []
    for sample in samples:
        ids = sample["input_ids"]
        mask = ids == image_token_id
        positions = positions_of(input_ids=ids.masked_fill(mask, -200)[None], image_grid_thw=sample["image_grid_thw"])
        feature = {"input_ids": ids.masked_fill(mask, 0), "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}
        made.append(sample | feature | {"position_ids": positions["position_ids"][:, 0], "image_mask": mask})
    return made


def our_batch(model: Any, samples: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
    """The samples packed by the collator, its tensors on the GPU."""
    from modeling.data.collator import SequenceParallelCollator

    collator = SequenceParallelCollator(metadata_collate_func=model.get_metadata_collate_func())
    return to_gpu(collator(collator_features(model, samples)))


def to_gpu(value: Any) -> Any:
    """Every tensor in a nest of dicts and lists on the GPU."""
    if isinstance(value, torch.Tensor):
        return value.to("cuda", non_blocking=True)
    if isinstance(value, dict):
        return {key: to_gpu(item) for key, item in value.items()}
    return value


def transformers_batch(config: Any, samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The same samples as rows of a batch, as its processor would give them."""
    ids = torch.stack([sample["input_ids"] for sample in samples])
    return to_gpu(
        {
            "input_ids": ids,
            "labels": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": (ids == config.image_token_id).int(),
            "pixel_values": torch.cat([sample["pixel_values"] for sample in samples]),
            "image_grid_thw": torch.cat([sample["image_grid_thw"] for sample in samples]),
        }
    )


def count_syncs(step: Callable[[], Any]) -> int:
    """Host-device synchronisations of one call, by PyTorch's debug mode."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def milliseconds(step: Callable[[], Any], repeats: int, in_a_row: int = 1) -> float:
    """Median over `repeats` of the time of a step, by CUDA events, after a first that warms up.

    Each is the mean of `in_a_row` steps that follow one another as in a training loop, where a host that need not wait
    runs ahead of the device. With one, every step starts on an idle device, and waits for its first launches.
    """
    times = []
    for _ in range(repeats + 1):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(in_a_row):
            step()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) / in_a_row)
    return sorted(times[1:])[repeats // 2]


def top_kernels(step: Callable[[], Any], rows: int = 14) -> list[tuple[str, float, int]]:
    """(kernel, ms, launches) of one step, the longest first, and a last row with the sum of all."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    found = [(e.key[:90], e.self_device_time_total / 1e3, e.count) for e in profiler.key_averages()]
    found.sort(key=lambda row: -row[1])
    total = ("all kernels", sum(row[1] for row in found), sum(row[2] for row in found))
    return [(name, round(ms, 2), count) for name, ms, count in [*found[:rows], total]]


def measure(
    model: Any, batch: dict[str, Any], visual: Callable[[], Any], repeats: int, kernels: bool = False
) -> dict[str, Any]:
    """Time, memory and syncs of one model's step; or, as the profiler slows every later launch, only its kernels.

    Every model's backward runs in the calling thread, as this project's trainer has it: never slower, on a host with
    slow cores up to a third faster. `threaded_ms` is the same step with autograd's own thread, its default.
    """

    def step(threaded: bool = False) -> None:
        model.zero_grad(set_to_none=True)
        with torch.autograd.set_multithreading_enabled(threaded):
            model(**batch).loss.backward()

    step()
    if kernels:
        return {"top_kernels": top_kernels(step)}
    torch.cuda.synchronize()
    model.zero_grad(set_to_none=True)
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    found: dict[str, Any] = {"step_ms": round(milliseconds(step, repeats, in_a_row=5), 1)}
    found |= {"threaded_ms": round(milliseconds(partial(step, threaded=True), repeats, in_a_row=5), 1)}
    found |= {"from_idle_ms": round(milliseconds(step, repeats), 1), "peak_gb": round(peak / 1e9, 2)}
    found |= {"peak_gib": round(peak / 2**30, 2), "syncs": count_syncs(step)}
    found |= power_while(step, calls=20)
    found["tokens_per_s"] = round(batch["input_ids"].numel() / found["step_ms"] * 1e3)
    with torch.no_grad():
        found["vision_forward_ms"] = round(milliseconds(visual, repeats, in_a_row=5), 1)
    model.zero_grad(set_to_none=True)
    return found


def run_ours(
    layers: int,
    samples: list[dict[str, torch.Tensor]],
    recompute: str,
    compiled: bool,
    loss_chunk: int,
    keep_qkv: int,
    repeats: int,
    kernels: bool = False,
) -> dict[str, Any]:
    from modeling.distributed.parallelize import compile_blocks, set_recompute
    from modeling.qwen3_vl_moe import Qwen3VLMoeConfig, Qwen3VLMoeForCausalLM
    from modeling.qwen3_vl_moe.vision_metadata import unpack_metadata

    config = Qwen3VLMoeConfig(**config_dict(layers))
    config.text_config.loss_chunk_size = loss_chunk
    config.vision_config.keep_qkv_blocks = keep_qkv
    model = build(Qwen3VLMoeForCausalLM, config, _attn_implementation="sdpa")
    set_recompute(model.model.visual, recompute)
    if compiled:
        compile_blocks(model)
    batch = our_batch(model, samples)
    metadata = unpack_metadata("image", batch["multimodal_metadata"])
    pixels = batch["pixel_values"].bfloat16()
    found = measure(model, batch, lambda: model.model.visual(pixels, metadata=metadata), repeats, kernels)
    if kernels:
        return found
    waited = attempt(partial(step_without_waiting, model, batch))
    found["a step that may not wait"] = waited.get("failed", "passed")
    replayed = attempt(partial(replay, model, batch, repeats))
    return found | {"as_cuda_graph_ms": replayed.get("ms", replayed.get("failed"))}


def step_without_waiting(model: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """Forward and backward where PyTorch raises if the host waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(**batch).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return {}


def replay(model: Any, batch: dict[str, Any], repeats: int) -> dict[str, Any]:
    """The step's time as one CUDA graph: what is left when launching its kernels costs next to nothing."""
    model.zero_grad(set_to_none=True)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.autograd.set_multithreading_enabled(False):
        with torch.cuda.stream(stream):  # allocations and workspaces of a stream of its own, as captures want
            model(**batch).loss.backward()
        model.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            model(**batch).loss.backward()
    return {"ms": round(milliseconds(graph.replay, repeats, in_a_row=5), 1)}


def run_transformers(
    layers: int, samples: list[dict[str, torch.Tensor]], repeats: int, kernels: bool = False
) -> dict[str, Any]:
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

    config = Qwen3VLMoeConfig(**config_dict(layers))
    model = build(
        Qwen3VLMoeForConditionalGeneration, config, _attn_implementation="sdpa", _experts_implementation="grouped_mm"
    )
    batch = transformers_batch(config, samples)
    pixels = batch["pixel_values"].bfloat16()
    return measure(model, batch, lambda: model.model.visual(pixels, grid_thw=batch["image_grid_thw"]), repeats, kernels)


def run_veomni(
    folder: Path,
    layers: int,
    samples: int,
    repeats: int,
    moe: str = "fused_quack",
    attention: str = "flash_attention_4",
) -> dict[str, Any]:
    """VeOmni's step, measured by scripts/benchmarks/benchmark_step_veomni.py in a process that sees `folder` first.

    Raises:
        RuntimeError: it failed, with the last line it wrote; all of it has gone to standard error.
    """
    with tempfile.TemporaryDirectory() as scratch:
        result = Path(scratch) / "result.json"
        command = [sys.executable, str(ROOT / "scripts/benchmarks/benchmark_step_veomni.py"), str(result), "--moe", moe]
        command += ["--attention", attention, "--layers", str(layers), "--samples", str(samples)]
        path = os.pathsep.join([str(folder.resolve()), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "PYTHONPATH": path}
        done = subprocess.run(
            [*command, "--repeats", str(repeats)], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
        )
        if done.returncode != 0:
            print(done.stderr, file=sys.stderr, flush=True)
            last = (done.stderr.strip().splitlines() or ["no output"])[-1]
            raise RuntimeError(f"VeOmni's process ended with {done.returncode}: {last}")
        found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        return found


def print_run(name: str, found: dict[str, Any]) -> None:
    figures = [f"{key} {value}" for key, value in found.items() if key not in ("top_kernels", "versions")]
    print(f"\n{name}: {', '.join(figures)}")
    for kernel, ms, count in found.get("top_kernels", []):
        print(f"  {ms:8.2f} ms {count:6d} x  {kernel}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--vision-recompute", nargs="+", default=["none"], choices=["none", "full", "selective"])
    parser.add_argument("--compile", choices=["no", "yes", "both"], default="both")
    parser.add_argument("--loss-chunk", type=int, default=8192, help="loss_chunk_size of this project's config")
    parser.add_argument(
        "--keep-qkv", type=int, nargs="+", default=[7, 27], help="keep_qkv_blocks of this project's vision config, each"
    )
    parser.add_argument("--skip-transformers", action="store_true")
    parser.add_argument("--veomni", type=Path, metavar="FOLDER", help="packages of VeOmni's environment; see above")
    parser.add_argument("--veomni-triton", action="store_true", help="VeOmni also with Triton experts and sdpa")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    require_gpu()
    description = describe()
    print_description(description)
    samples = features(args.samples, 151655)
    runs: dict[str, Callable[..., dict[str, Any]]] = {}
    compilations = {"no": [False], "yes": [True], "both": [True, False]}[args.compile]
    for recompute, compiled, keep_qkv in itertools.product(args.vision_recompute, compilations, args.keep_qkv):
        name = "this project" + (", compiled" if compiled else "")
        name += "" if recompute == "none" else f", vision recompute {recompute}"
        name += "" if keep_qkv == args.keep_qkv[0] else f", {keep_qkv} blocks keep query, key and value"
        chosen = (recompute, compiled, args.loss_chunk, keep_qkv)
        runs[name] = partial(run_ours, args.layers, samples, *chosen, args.repeats)
    if not args.skip_transformers:
        runs["transformers"] = partial(run_transformers, args.layers, samples, args.repeats)
    if args.veomni is not None:
        veomni = partial(run_veomni, args.veomni, args.layers, args.samples, args.repeats)
        runs["VeOmni, quack, flash-attn 4, liger"] = veomni
        if args.veomni_triton:
            runs["VeOmni, Triton, sdpa, liger"] = partial(veomni, moe="fused_triton", attention="sdpa")
    results = {}
    for name, run in runs.items():
        results[name] = attempt(run)
        gc.collect()
        torch.cuda.empty_cache()
        print_run(name, results[name])
    for name, run in runs.items():
        if not name.startswith("VeOmni"):
            results[name] |= attempt(partial(run, kernels=True))
            gc.collect()
            torch.cuda.empty_cache()
            print_run(f"{name}, by kernel", results[name])
    own = results[next(iter(results))]
    for name, found in results.items():
        if not name.startswith("this project") and "step_ms" in found and "step_ms" in own:
            threaded = f"with autograd's own thread {found['threaded_ms'] / own['step_ms']:.2f}"
            print(f"\n{name} / this project: {found['step_ms'] / own['step_ms']:.2f}, {threaded}")
    device = description["device"].split()[1].lower()
    arguments = {key: value for key, value in vars(args).items() if key not in ("out", "veomni")}
    write_json(args.out / f"step_{device}.json", description | {"arguments": arguments, "runs": results})
    own_runs = [found for name, found in results.items() if name.startswith("this project")]
    if any(found.get("a step that may not wait") != "passed" for found in own_runs):
        raise SystemExit("a run of this project failed, or its step waited for the device: see above")


if __name__ == "__main__":
    main()
