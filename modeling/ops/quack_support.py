"""Where quack's kernels run: quack-kernels is an optional dependency, and its configurations are pinned for Hopper."""

import functools
import importlib.util

import torch


@functools.cache
def why_not_quack(device: torch.device, dtype: torch.dtype, *widths: int) -> str | None:
    """What keeps quack from multiplying matrices whose rows have these widths; None if nothing does."""
    if device.type != "cuda":
        return "quack needs a CUDA device"
    if dtype not in (torch.bfloat16, torch.float16):
        return "quack computes in 16 bits"
    major, minor = torch.cuda.get_device_capability(device)
    if major != 9:
        return f"quack is tuned for compute capability 9.0 (Hopper), this is {major}.{minor}"
    if any(width % 8 for width in widths):
        return f"quack needs widths divisible by 8, these are {' and '.join(map(str, widths))}"
    if importlib.util.find_spec("quack") is None:
        return "quack-kernels is not installed; pip install 'qwen3-vl-moe-veomni[hopper]'"
    return None
