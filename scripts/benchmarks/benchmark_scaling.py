"""How the step and loading scale over the GPUs of one host.

    torchrun --nproc-per-node 4 scripts/benchmarks/benchmark_scaling.py step [--mesh dp=4 sp=4 dp=4,ep=4 dp=2,sp=2,ep=4]
                                        [--routing own zipf] [--tokens 8192] [--sample-tokens 1024] [--layers 4]
    torchrun --nproc-per-node 4 scripts/benchmarks/benchmark_scaling.py load DIR [--layers 8]

step: the step of benchmark_step.py (27-layer vision tower, decoder layers of the 30B-A3B shape, packed samples, a
quarter of them image tokens) on each mesh, under FSDP2, in bf16: every data rank has `--tokens` tokens, cut into slices
by sp. Prints the slowest rank's time, tokens/s per device, peak memory, the share of the time in which a collective
ran, host syncs. `--routing zipf` sends tokens to experts by Zipf's law instead of by the router. `--sample-tokens 0`
makes one sample of all tokens.

load: makes a 30B-A3B checkpoint of `--layers` decoder layers (1.2 GB each) in DIR, ep-sharded over the processes, if it
is not there, and loads it: seconds and bytes per rank.

Without GPUs the processes meet over gloo; `--tiny` takes the tiny model, to try the script out. NVLink multicast stays
off (NCCL_NVLS_ENABLE=0). Rank 0 prints and writes results/scaling_<word>_<device>.json.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # before torch starts NCCL

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # from a checkout, installed or not

from modeling.data.collator import SequenceParallelCollator  # noqa: E402
from modeling.distributed.checkpoint import load_checkpoint  # noqa: E402
from modeling.distributed.parallel_state import ParallelState, init_parallel_state, use_parallel_state  # noqa: E402
from modeling.distributed.parallelize import parallelize_model  # noqa: E402
from modeling.qwen3_vl_moe import Qwen3VLMoeConfig, Qwen3VLMoeForCausalLM  # noqa: E402
from scripts.benchmarks.benchmark_conversion import make_checkpoint, published_config  # noqa: E402
from scripts.benchmarks.benchmark_step import collator_features, config_dict, count_syncs, features  # noqa: E402
from scripts.benchmarks.benchmarking import RESULTS, versions, write_json  # noqa: E402
from scripts.make_tiny_checkpoint import tiny_config  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PIECE = 1024  # tokens of a sample of benchmark_step.py
Feature = dict[str, torch.Tensor]


def parse_mesh(text: str, world: int) -> dict[str, int]:
    """'dp=2,sp=2,ep=4' -> sizes; dp and sp left out are what the other leaves of `world`.

    Raises: ValueError for another word, or sizes that do not make up `world`.
    """
    sizes = {"dp": 0, "sp": 0, "ep": 1}
    for part in text.split(","):
        name, _, size = part.partition("=")
        if name not in sizes or not size.isdigit() or int(size) < 1:
            raise ValueError(f"mesh {text!r}: {part!r} is none of dp=N, sp=N, ep=N")
        sizes[name] = int(size)
    sizes["sp"] = sizes["sp"] or (world // sizes["dp"] if sizes["dp"] else 1)
    sizes["dp"] = sizes["dp"] or world // sizes["sp"]
    if sizes["dp"] * sizes["sp"] != world:
        raise ValueError(f"mesh {text!r}: dp x sp = {sizes['dp']} x {sizes['sp']}, but {world} processes run")
    return sizes


def default_meshes(world: int) -> list[str]:
    """All data, all sequence, both; experts whole and over all ranks."""
    meshes = [f"dp={world}", f"dp={world},ep={world}", f"sp={world}", f"sp={world},ep={world}"]
    if world % 2 == 0 and world > 2:
        meshes += [f"dp={world // 2},sp=2,ep={world}", f"dp=2,sp={world // 2},ep=2"]
    return meshes if world > 1 else ["dp=1"]


def build(config: dict[str, Any], state: ParallelState) -> Any:
    """The parallelized model in bf16 with random weights, never whole on a device."""
    made = Qwen3VLMoeConfig(**config)
    made._attn_implementation = "sdpa"
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            model = Qwen3VLMoeForCausalLM(made)
    finally:
        torch.set_default_dtype(default)
    model = parallelize_model(model, parallel_state=state)
    model.to_empty(device=DEVICE)
    torch.manual_seed(1 + (dist.get_rank() if dist.is_initialized() else 0))
    for name, parameter in model.named_parameters():
        local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        with torch.no_grad():
            if parameter.ndim > 1:
                local.normal_(std=0.02)
            else:
                local.fill_(0.0 if name.endswith("bias") else 1.0)
    return model.train()


def samples_of(tokens: int, sample_tokens: int, image_token_id: int, vocabulary: int) -> list[Feature]:
    """`tokens` tokens in samples of `sample_tokens`; every 1,024 of them begin with an image of 256."""
    pieces = features(tokens // PIECE, image_token_id)
    for piece in pieces:
        text = piece["input_ids"] != image_token_id
        piece["input_ids"] = torch.where(text, piece["input_ids"] % vocabulary, piece["input_ids"])
    count = sample_tokens // PIECE
    groups = [pieces[i : i + count] for i in range(0, len(pieces), count)]
    return [{key: torch.cat([piece[key] for piece in group]) for key in group[0]} for group in groups]


def use_zipf_routing(model: Any) -> None:
    """Replace every router's choice by one drawn by Zipf's law (exponent 1), the same at every step."""
    for module in model.modules():
        if not hasattr(module, "top_k") or not hasattr(module, "num_experts"):
            continue
        drawn: dict[int, torch.Tensor] = {}

        def route(gate: Any, _: Any, output: tuple, drawn: dict[int, torch.Tensor] = drawn) -> tuple:
            logits, weights, indices = output
            if len(indices) not in drawn:
                popularity = -torch.arange(1, gate.num_experts + 1, device=logits.device).float().log()
                # Gumbel noise: the k largest of log p + noise are k draws without replacement.
                noise = -torch.empty(len(indices), gate.num_experts, device=logits.device).exponential_().log()
                drawn[len(indices)] = (popularity + noise).topk(gate.top_k, dim=-1).indices
            return logits, weights, drawn[len(indices)]

        module.register_forward_hook(route)


def to_device(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(DEVICE)
    return {key: to_device(item) for key, item in value.items()} if isinstance(value, dict) else value


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def seconds(step: Callable[[], None], repeats: int) -> float:
    """Median time of a step on this rank, every rank starting together."""
    times = []
    for _ in range(repeats):
        synchronize()
        if dist.is_initialized():
            dist.barrier()
        started = time.perf_counter()
        step()
        synchronize()
        times.append(time.perf_counter() - started)
    return sorted(times)[len(times) // 2]


def collective_seconds(step: Callable[[], None]) -> float:
    """How long the kernels of collectives run in a step (NCCL's on a GPU, gloo's calls on a CPU)."""
    activity = ProfilerActivity.CUDA if DEVICE == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        step()
        synchronize()
    if DEVICE == "cuda":
        return sum(e.self_device_time_total for e in profiler.key_averages() if "nccl" in e.key.lower()) / 1e6
    return sum(e.cpu_time_total for e in profiler.key_averages() if e.key.startswith("gloo:")) / 1e6


def largest(value: float) -> float:
    """The largest of the ranks' values, on every rank."""
    if not dist.is_initialized():
        return value
    values = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return max(values)


def measure_step(args: argparse.Namespace, sizes: dict[str, int], routing: str) -> dict[str, Any]:
    world = sizes["dp"] * sizes["sp"]
    with use_parallel_state(None):
        state = init_parallel_state(sizes["dp"], sizes["sp"], sizes["ep"], device_type=DEVICE)
    with use_parallel_state(state):
        config = tiny_config(torch.bfloat16, {}) if args.tiny else config_dict(args.layers)
        model = build(config, state)
        if routing == "zipf":
            use_zipf_routing(model)
        image_token_id, vocabulary = model.config.image_token_id, model.config.text_config.vocab_size
        # The same samples on every data rank: all have the same work.
        samples = samples_of(args.tokens, args.sample_tokens or args.tokens, image_token_id, min(vocabulary, 1000))
        collator = SequenceParallelCollator(sizes["sp"], state.sp_rank, model.get_metadata_collate_func())
        batch = to_device(collator(collator_features(model, samples)))

        def step() -> None:
            model.zero_grad(set_to_none=True)
            with torch.autograd.set_multithreading_enabled(False):
                model(**batch).loss.backward()

        step()
        step()
        if DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()
        took = largest(seconds(step, args.repeats))
        found = {
            "mesh": sizes,
            "routing": routing,
            "tokens": args.tokens,
            "sample_tokens": args.sample_tokens or args.tokens,
            "step_ms": round(took * 1e3, 1),
            "tokens_per_s_per_device": round(args.tokens * sizes["dp"] / took / world),
        }
        if DEVICE == "cuda":
            found["peak_gb"] = round(largest(torch.cuda.max_memory_allocated() / 1e9), 2)
            found["syncs"] = count_syncs(step)
        found["collectives_share"] = round(largest(collective_seconds(step)) / took, 3)
        return found


def benchmark_step(args: argparse.Namespace) -> dict[str, Any]:
    world = dist.get_world_size() if dist.is_initialized() else 1
    rows = []
    for mesh in args.mesh or default_meshes(world):
        for routing in args.routing:
            rows.append(measure_step(args, parse_mesh(mesh, world), routing))
            say(", ".join(f"{key} {value}" for key, value in rows[-1].items()))
            if DEVICE == "cuda":
                torch.cuda.empty_cache()
    return {"rows": rows}


def benchmark_load(args: argparse.Namespace) -> dict[str, Any]:
    world = dist.get_world_size() if dist.is_initialized() else 1
    folder = args.folder / f"ep-sharded-{world}-{args.layers}-layers"
    if not folder.exists() and (not dist.is_initialized() or dist.get_rank() == 0):
        make_checkpoint(args.folder / "hub", published_config("30B", args.layers))
        words = ["--target", "ep-sharded", "--ep-size", str(world), "--quiet"]
        command = [sys.executable, "conversion/hf_to_veomni.py", str(args.folder / "hub"), str(folder), *words]
        subprocess.run(command, cwd=ROOT, check=True)
    state = init_parallel_state(dp_shard_size=world, ep_size=world, device_type=DEVICE)
    if dist.is_initialized():
        dist.barrier()
    with torch.device("meta"):
        model = Qwen3VLMoeForCausalLM(Qwen3VLMoeConfig.from_pretrained(folder))
    model = parallelize_model(model, parallel_state=state)
    started = time.perf_counter()
    read = load_checkpoint(model, folder, dtype=torch.bfloat16)
    synchronize()
    took = time.perf_counter() - started
    local = (p.to_local() if hasattr(p, "to_local") else p for p in model.parameters())
    kept = sum(tensor.nbytes for tensor in local)
    rows: list[Any] = [{"rank": 0, "seconds": round(took, 2), "read": read, "kept": kept}]
    if dist.is_initialized():
        rows = [None] * world
        row = {"rank": dist.get_rank(), "seconds": round(took, 2), "read": read, "kept": kept}
        dist.all_gather_object(rows, row)
    whole = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    for row in rows:
        say(
            f"rank {row['rank']}: {row['seconds']} s, read {row['read'] / 1e9:.2f} GB, keeps {row['kept'] / 1e9:.2f} GB"
        )
    say(f"checkpoint: {whole / 1e9:.2f} GB")
    return {"checkpoint_bytes": whole, "rows": rows}


def say(line: str) -> None:
    """Print on rank 0."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(line, flush=True)


def device_name() -> str:
    if DEVICE == "cuda":
        return torch.cuda.get_device_name()
    return f"{os.cpu_count()} CPU cores, gloo"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words = parser.add_subparsers(dest="word", required=True)
    step = words.add_parser("step")
    step.add_argument("--mesh", nargs="+", help="such as dp=2,sp=2,ep=4; default: a handful")
    step.add_argument("--routing", nargs="+", default=["own"], choices=["own", "zipf"])
    step.add_argument("--tokens", type=int, default=8192, help="per data rank, a multiple of 1,024")
    step.add_argument("--sample-tokens", type=int, default=PIECE, help="a multiple of 1,024; 0: one sample")
    step.add_argument("--layers", type=int, default=4)
    step.add_argument("--repeats", type=int, default=5)
    step.add_argument("--tiny", action="store_true", help="the tiny model")
    load = words.add_parser("load")
    load.add_argument("folder", type=Path)
    load.add_argument("--layers", type=int, default=8)
    for part in (step, load):
        part.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.word == "step" and (args.tokens % PIECE or args.sample_tokens % PIECE or args.tokens < PIECE):
        parser.error(f"--tokens and --sample-tokens come in multiples of {PIECE}")
    if "WORLD_SIZE" in os.environ:
        with use_parallel_state(None):
            init_parallel_state(dp_shard_size=int(os.environ["WORLD_SIZE"]), device_type=DEVICE)
    try:
        found = benchmark_step(args) if args.word == "step" else benchmark_load(args)
        if not dist.is_initialized() or dist.get_rank() == 0:
            world = dist.get_world_size() if dist.is_initialized() else 1
            about = {"device": device_name(), "processes": world, "date": datetime.date.today().isoformat()}
            arguments = {key: value for key, value in vars(args).items() if key not in ("out", "folder")}
            device = device_name().split()[1].lower() if DEVICE == "cuda" else "cpu"
            written = json.loads(json.dumps(found))
            path = args.out / f"scaling_{args.word}_{device}.json"
            write_json(path, about | {"versions": versions(), "arguments": arguments} | written)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
