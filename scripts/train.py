"""python scripts/train.py --model CHECKPOINT --data chats.jsonl --out RUN [options]
torchrun --nproc-per-node 8 scripts/train.py --config run.yaml --ep 8

Train on chats with images and videos, on one CPU process or on many GPUs. The same command goes on where it stopped:
SIGTERM or Ctrl-C writes a checkpoint and ends, a killed run falls back to its newest. RUN holds config.yaml,
metrics.jsonl, router.jsonl, tensorboard/, checkpoints/, the plots and, at the end, the trained model as export-STEP/
(with --lora also adapter-STEP/). Options can stand in a YAML or JSON file (--config); the command line wins.
"""

import os
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # from a checkout, installed or not

from modeling.data.collator import SequenceParallelCollator
from modeling.data.jsonl import JsonlFiles
from modeling.data.streaming import PackedStream
from modeling.distributed.checkpoint import export_checkpoint, load_checkpoint
from modeling.distributed.encoder_data_balance import EncoderDataBalancer
from modeling.distributed.failures import RankFailure, fail_together
from modeling.distributed.parallel_state import ParallelState, init_parallel_state, set_parallel_state
from modeling.distributed.parallelize import parallelize_model
from modeling.qwen3_vl_moe import Qwen3VLMoeConfig, Qwen3VLMoeForCausalLM
from modeling.qwen3_vl_moe.configuration_qwen3_vl_moe import check_checkpoint_folder
from modeling.qwen3_vl_moe.processing_qwen3_vl_moe import Qwen3VLMoeProcessor, process_sample
from modeling.training.checkpoints import Checkpoints, run_identity
from modeling.training.metrics import MetricsWriter
from modeling.training.optimizer import freeze_parts, make_optimizer
from modeling.training.options import TrainOptions, parse_options
from modeling.training.plots import draw_plots
from modeling.training.trainer import NonFiniteLoss, Trainer


def start_processes(options: TrainOptions) -> ParallelState:
    """The mesh over torchrun's ranks; a program that was started alone is one rank."""
    device = options.device or None
    if device is None and not torch.cuda.is_available():
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        device = "cpu" if accelerator is None else accelerator.type
    device = device or "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch sees no CUDA device here; leave the option out, or give cpu.")
    if "WORLD_SIZE" not in os.environ and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        store = dist.FileStore(os.path.join(tempfile.mkdtemp(prefix="train"), "store"), 1)
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    world = int(os.environ.get("WORLD_SIZE", "1")) if not dist.is_initialized() else dist.get_world_size()
    shard = options.dp_shard or max(1, world // (options.dp_replicate * options.sp))
    return init_parallel_state(shard, options.sp, options.ep, options.dp_replicate, device_type=device)


def build_model(options: TrainOptions, state: ParallelState) -> tuple[Any, Any]:
    """The parallelized model with its weights, and PEFT's config where adapters are trained."""
    config = Qwen3VLMoeConfig.from_pretrained(options.model)
    if options.attention:
        config._attn_implementation = options.attention
    if options.moe_backend:
        config.text_config.moe_backend = options.moe_backend
    if options.loss_chunk_size:
        config.text_config.loss_chunk_size = options.loss_chunk_size
    if options.keep_qkv_blocks:
        config.vision_config.keep_qkv_blocks = min(options.keep_qkv_blocks, config.vision_config.depth)
    with torch.device("meta"):
        model = Qwen3VLMoeForCausalLM(config)
    lora = None
    if options.lora != "none":
        from modeling.training.lora import add_lora, lora_config

        lora = lora_config(options.lora, options.lora_rank, options.lora_alpha)
        lora.base_model_name_or_path = options.model
        add_lora(model, lora)
    freeze_parts(model, options.freeze)
    compute = options.compute_dtype or ("float32" if state.device_type == "cpu" else "bfloat16")
    model = parallelize_model(
        model,
        param_dtype=None if compute == options.param_dtype else getattr(torch, compute),
        recompute=options.recompute,
        reshard_after_forward=options.reshard_after_forward,
    )
    dtype = getattr(torch, options.param_dtype)
    if lora is not None:
        from modeling.training.lora import load_base

        load_base(model, options.model, dtype=dtype, seed=options.seed)
    else:
        load_checkpoint(model, options.model, dtype=dtype)
    if options.balance_encoder:
        vision = config.vision_config
        sizes = (vision.spatial_merge_size, vision.hidden_size, vision.intermediate_size)
        model.set_encoder_data_balance(EncoderDataBalancer(*sizes))
    return model, lora


def build_stream(options: TrainOptions, model: Any, state: ParallelState) -> PackedStream:
    """Packed batches of this rank."""
    processor = Qwen3VLMoeProcessor.from_pretrained(options.model)
    transform = partial(
        transform_sample,
        processor=processor,
        position_id_func=model.get_position_id_func(),
        max_length=options.max_length,
        on_cut_image=options.on_cut_image,
    )
    collator = SequenceParallelCollator(
        state.sp_size,
        state.sp_rank,
        model.get_metadata_collate_func(),
        pad_to_length=options.pack_tokens if options.pad else None,
        spatial_merge_size=model.config.vision_config.spatial_merge_size,
    )
    return PackedStream(
        JsonlFiles(options.data),
        transform,
        collator,
        budget=options.pack_tokens,
        dp_rank=state.dp_rank,
        dp_size=state.dp_size,
        seed=options.seed if options.shuffle else None,
        epochs=options.epochs or None,
        on_bad_sample=options.on_bad_sample,
        workers=options.workers,
        buffer=options.pack_buffer,
        prefetch=options.prefetch,
        pin_memory=state.device_type == "cuda",
    )


def transform_sample(sample: Any, folder: Path, **arguments: Any) -> dict[str, torch.Tensor]:
    """`process_sample` with media found beside the JSONL file."""
    return process_sample(sample, media_root=folder, **arguments)


def export(options: TrainOptions, model: Any, lora: Any, step: int, again: bool = False) -> list[Path]:
    """Write the trained model, and the adapter where there is one; adapters are merged into the model by this.

    again: also where this step's export exists, which gives way when the new one is whole.
    """
    written = []
    if lora is not None:
        from modeling.training.lora import merge_and_remove, save_adapter

        written.append(Path(options.out) / f"adapter-{step}")
        save_adapter(model, lora, written[-1])
        merge_and_remove(model)
    folder = Path(options.out) / f"export-{step}"
    written.append(folder)
    if again or not folder.exists():  # else an earlier end of this run wrote it
        source = Qwen3VLMoeConfig.from_pretrained(options.model)
        dtype = options.export_dtype or str(source.dtype or "float32")
        # The run's choices, not the model's.
        for name in ("moe_backend", "loss_chunk_size"):
            setattr(model.config.text_config, name, getattr(source.text_config, name))
        model.config.vision_config.keep_qkv_blocks = source.vision_config.keep_qkv_blocks
        export_checkpoint(
            model,
            folder,
            layout=options.export_layout,
            dtype=getattr(torch, dtype.removeprefix("torch.")),
            companions=options.model,
            replace=again,
        )
    return written


def export_newest(options: TrainOptions, model: Any, lora: Any, optimizer: Any, checkpoints: Checkpoints) -> None:
    """Write the export of the run's newest checkpoint; the data are not needed."""
    step = checkpoints.latest()
    if step is None:
        raise ValueError(f"{options.out} has no checkpoint to export; train first.")
    checkpoints.load(step, model, optimizer)
    written = export(options, model, lora, step, again=True)
    if checkpoints.state.rank == 0:
        print(f"step {step}: {', '.join(map(str, written))}")


def train(options: TrainOptions) -> int:
    """One run, from its newest checkpoint to its end."""
    if options.export_only:  # on whatever ranks there are now: the run's mesh is of no interest, parameters are shared
        options = replace(options, dp_shard=0, dp_replicate=1, sp=1, ep=1, balance_encoder=False)
    state = start_processes(options)
    folder, is_first = Path(options.out), state.rank == 0
    with fail_together(state.world_group):
        check_checkpoint_folder(Path(options.model))
    model, lora = build_model(options, state)
    optimizer = make_optimizer(model, options, state.device_type)
    identity = run_identity(options)
    checkpoints = Checkpoints(folder / "checkpoints", state, options.keep, options.async_save, identity)
    if options.export_only:
        export_newest(options, model, lora, optimizer, checkpoints)
        return 0
    with fail_together(state.world_group):
        stream = build_stream(options, model, state)
        folder.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(model, optimizer, stream, checkpoints, options, state)
    resumed = options.resume and trainer.resume()
    if not resumed and checkpoints.latest() is not None:
        raise ValueError(
            f"{folder} holds checkpoints of an earlier run; choose another --out, or leave out --no-resume."
        )
    with fail_together(state.world_group):
        if is_first:
            (folder / "config.yaml").write_text(options.to_yaml(), encoding="utf-8")
    with MetricsWriter(folder, is_first, trainer.progress.step, options.max_steps, options.tensorboard) as writer:
        if resumed:
            writer.say(f"Going on from step {trainer.progress.step}.")
        finished = trainer.run(writer)
    if is_first and options.plots:
        draw_plots(folder)
    if not finished:
        return 0
    progress = trainer.progress
    written = export(options, model, lora, progress.step) if options.export else []
    if is_first:
        print(
            f"{progress.step} steps, {progress.samples} samples, {progress.tokens} tokens; bad samples left out: "
            f"{progress.bad} times. {', '.join(map(str, written))}"
        )
    return 0


def main(arguments: list[str] | None = None) -> int:
    options = parse_options(arguments, __doc__)
    try:
        return train(options)
    except (ValueError, OSError, ImportError, RankFailure, NonFiniteLoss) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        set_parallel_state(None)
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
