"""python scripts/generate.py MODEL --image F --prompt T

A reply to a prompt about images and videos, printed as it is generated. MODEL is a folder in any layout (hub, fused,
ep-sharded, per-expert) or a Hub id; --image and --video may be given several times and come before the prompt, in that
order. The checkpoint's own sampling settings hold; --greedy takes the likeliest token each time.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoProcessor, GenerationConfig, TextStreamer, set_seed

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # from a checkout, installed or not

from conversion.errors import ConversionError
from conversion.hub import resolve_input
from conversion.layout import LAYOUTS
from modeling.distributed.checkpoint import load_checkpoint
from modeling.distributed.parallel_state import ParallelState
from modeling.qwen3_vl_moe import Qwen3VLMoeConfig
from modeling.qwen3_vl_moe.configuration_qwen3_vl_moe import check_checkpoint_folder
from modeling.qwen3_vl_moe.processing_qwen3_vl_moe import load_image, load_video
from modeling.registry import build_model

DTYPES = ("float32", "bfloat16", "float16")


def load_model(
    folder: Path,
    device: str,
    dtype: torch.dtype | None = None,
    source_layout: str | None = None,
    attention: str = "sdpa",
) -> Any:
    """The model in `folder`, of any layout, ready to generate.

    Args:
        dtype: of the weights from now on; None takes the config's.
        source_layout: settles the layout where neither stamp nor shape can.

    Raises:
        ValueError: the folder does not hold this model, whole.
    """
    config = Qwen3VLMoeConfig.from_pretrained(folder)
    config._attn_implementation = attention
    with torch.device("meta"):
        model = build_model(config)
    if dtype is None:
        dtype = config.dtype or torch.float32
    state = ParallelState(device_type=torch.device(device).type)
    load_checkpoint(model, folder, dtype=dtype, source_layout=source_layout, parallel_state=state)
    if (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.to(device).eval()


def prompt_inputs(processor: Any, prompt: str, images: list[str], videos: list[str], system: str | None) -> Any:
    """The processor's inputs for one question, up to where the reply begins.

    Raises:
        ValueError: an image or video that cannot be read.
    """
    content: list[dict[str, Any]] = [{"type": "image", "image": path} for path in images]
    content += [{"type": "video", "video": path} for path in videos]
    messages: list[dict[str, Any]] = [{"role": "user", "content": [*content, {"type": "text", "text": prompt}]}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
    arguments: dict[str, Any] = {}
    if videos:
        frames, metadata = zip(*(load_video(path, processor.video_processor) for path in videos), strict=True)
        arguments = {"videos": list(frames), "video_metadata": list(metadata), "do_sample_frames": False}
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    pictures = [load_image(path) for path in images]
    return processor(text=[text], images=pictures or None, return_tensors="pt", **arguments)


@torch.no_grad()
def stream_reply(model: Any, processor: Any, inputs: Any, max_new_tokens: int, greedy: bool = False) -> torch.Tensor:
    """Print the reply to stdout, word by word; returns its tokens (n,)."""
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens}
    if greedy:
        # Unset what means nothing without sampling.
        settings |= {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
    streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    tokens = model.generate(**inputs.to(model.device), **settings, streamer=streamer)
    return tokens[0, inputs["input_ids"].shape[1] :]


def check_device(device: str) -> None:
    """Raise a ValueError where PyTorch cannot put a tensor on `device`."""
    try:
        torch.zeros(1, device=device)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"--device {device}: {str(error).splitlines()[0]}") from error


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="checkpoint folder in any layout, or a Hub id")
    parser.add_argument("--prompt", required=True, metavar="T")
    parser.add_argument("--image", action="append", default=[], metavar="F")
    parser.add_argument("--video", action="append", default=[], metavar="F")
    parser.add_argument("--system", metavar="T", help="system prompt; none by default")
    parser.add_argument("--max-new-tokens", type=int, default=512, metavar="N")
    parser.add_argument("--greedy", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="by default the GPU, where there is one")
    parser.add_argument("--dtype", choices=DTYPES, help="by default the checkpoint's")
    parser.add_argument("--attention", default="sdpa", help="attn_implementation")
    parser.add_argument("--source-layout", choices=LAYOUTS, help="where square experts leave the layout open")
    parser.add_argument("--processor", metavar="DIR", help="by default from MODEL")
    args = parser.parse_args(argv)
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    device = args.device or ("cpu" if accelerator is None else accelerator.type)
    try:
        folder, _ = resolve_input(args.model, None)
        check_checkpoint_folder(folder)
        if args.processor and not Path(args.processor).is_dir():
            raise ValueError(f"--processor {args.processor}: no such folder.")
        check_device(device)
        processor = AutoProcessor.from_pretrained(args.processor or folder)
        inputs = prompt_inputs(processor, args.prompt, args.image, args.video, args.system)
        dtype = getattr(torch, args.dtype) if args.dtype else None
        model = load_model(folder, device, dtype, args.source_layout, args.attention)
        set_seed(args.seed)
        stream_reply(model, processor, inputs, args.max_new_tokens, args.greedy)
    except (ConversionError, ImportError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
