"""The VeOmni part of scripts/benchmarks/benchmark_step.py, which starts it; by hand where VeOmni is installed:

    python scripts/benchmarks/benchmark_step_veomni.py RESULT.json [--moe fused_quack] [--attention flash_attention_4]

VeOmni's own builder, model, collator and metadata function on the samples that the other implementations get, with
liger kernels and its fused loss, in a world of one process.
"""

import argparse
import importlib
import sys
import types
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # from a checkout, installed or not

from scripts.benchmarks.benchmark_step import collator_features, config_dict, features, measure, to_gpu
from scripts.benchmarks.benchmarking import versions, write_json


def ops_config(moe: str, attention: str, other: str | None = None) -> Any:
    """VeOmni's kernel choices: `other` for every field besides the two, its own defaults (liger, Triton) if None."""
    from veomni.arguments.arguments_types import OpsImplementationConfig

    chosen = {"moe_implementation": moe, "attn_implementation": attention}
    if other is not None:
        names = {name for name in OpsImplementationConfig.__dataclass_fields__ if name.endswith("_implementation")}
        chosen = dict.fromkeys(names - {"qat_implementation"}, other) | chosen
    return OpsImplementationConfig(**chosen)


def build(config: dict[str, Any], ops: Any, device: str) -> Any:
    """A bf16 model with the random weights that benchmark_step gives the others, in training mode."""
    from transformers import Qwen3VLMoeConfig
    from veomni.distributed.parallel_state import ParallelState, set_parallel_state
    from veomni.models import build_foundation_model

    set_parallel_state(ParallelState(device_type=device))
    torch.manual_seed(0)
    model = build_foundation_model(
        Qwen3VLMoeConfig(**config, architectures=["Qwen3VLMoeForConditionalGeneration"]),
        torch_dtype="bfloat16",
        init_device=device,
        ops_implementation=ops,
    )
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.02)
    return model.train()


def collate(model: Any, samples: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
    """One packed batch on the CPU by VeOmni's collator, ViT metadata included."""
    import veomni

    # Its collator without the rest of veomni.data, whose streaming data sets ask for packages that nothing here needs.
    package = types.ModuleType("veomni.data")
    package.__path__ = [str(Path(veomni.__file__).parent / "data")]
    sys.modules.setdefault("veomni.data", package)
    collator = importlib.import_module("veomni.data.data_collator").MainCollator
    batch = collator(metadata_collate_func=model.get_metadata_collate_func())(collator_features(model, samples))
    segments = len(batch["cu_seq_lens_q"]) - 1
    if segments != len(samples):
        raise RuntimeError(f"VeOmni's collator found {segments} segments in {len(samples)} samples")
    return dict(batch, use_cache=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("--moe", default="fused_quack", choices=["fused_quack", "fused_triton", "eager"])
    parser.add_argument("--attention", default="flash_attention_4")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()
    model = build(config_dict(args.layers), ops_config(args.moe, args.attention), "cuda")
    batch = to_gpu(collate(model, features(args.samples, model.config.image_token_id)))
    metadata = batch["multimodal_metadata"]
    vision = {
        "grid_thw_list": metadata["image_grid_thw_list"],
        "cu_seqlens": metadata["vit_image_cu_seqlens"],
        "max_seqlen": metadata["vit_image_max_seqlen"],
    }
    pixels = batch["pixel_values"].bfloat16()

    def visual() -> Any:
        return model.model.visual(pixels, grid_thw=batch["image_grid_thw"], vit_metadata=vision)

    found = measure(model, batch, visual, args.repeats)
    write_json(args.result, found | measure(model, batch, visual, 1, kernels=True) | {"versions": versions()})


if __name__ == "__main__":
    main()
