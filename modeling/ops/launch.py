"""Which kernels run here, and how.

- `use_triton`: whether a Triton kernel takes a tensor (on CUDA, where Triton is installed) instead of its torch
  reference; `launch` starts it.
- `why_not_quack`: what keeps quack's kernels (package quack-kernels, optional) from running.
- `is_plain_linear`, `has_hooks`: whether a function of a module's weights may run in place of the module, which is so
  only where nothing else is attached to it.
"""

import functools
import importlib.util
from typing import Any

import torch
from torch import nn

_HAS_TRITON = importlib.util.find_spec("triton") is not None
_compiled: dict[tuple, Any] = {}


def use_triton(tensor: torch.Tensor) -> bool:
    """Whether the kernels take `tensor`. An empty one has nothing to launch for; under torch.compile the compiler fuses
    the reference with what stands around it."""
    return _HAS_TRITON and tensor.is_cuda and tensor.numel() > 0 and not torch.compiler.is_compiling()


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    tensors: tuple[torch.Tensor, ...],
    numbers: tuple[int | float, ...],
    constants: tuple[Any, ...],
    num_warps: int = 4,
) -> None:
    """Run a Triton kernel whose parameters are, in this order, tensors, numbers and constants.

    The first launch of a kind goes through Triton, which compiles. Later ones use what it compiled: its own search for
    that takes two to three times as long as the launch, and a vision block's kernels are no longer than it.
    """
    pointers = 0
    for tensor in tensors:
        pointers |= tensor.data_ptr()
    kind = (
        id(kernel),
        tensors[0].device,
        num_warps,
        constants,
        *[tensor.dtype for tensor in tensors],
        # What Triton compiles another kernel for: ones, multiples of 16, numbers that need 64 bits.
        *[type(n) is float or (n == 1, n % 16 == 0, n > 0x7FFFFFFF) for n in numbers],
    )
    compiled = None if pointers % 16 else _compiled.get(kind)
    if compiled is not None:
        compiled[(*grid, 1, 1)[:3]](*tensors, *numbers, *constants)
        return
    compiled = kernel[grid](*tensors, *numbers, *constants, num_warps=num_warps)
    if compiled is not None and not pointers % 16:  # Triton's interpreter compiles nothing
        _compiled[kind] = compiled


@functools.cache
def why_not_quack(device: torch.device, dtype: torch.dtype, *widths: int) -> str | None:
    """What keeps quack from multiplying matrices whose rows have these widths; None if nothing does.

    The tile shapes that this project gives to quack were measured on Hopper.
    """
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


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a product with `module.weight` is all that the module does. PEFT's fully trained copies are: theirs is
    the weight of the copy."""
    kind = type(module)
    plain = kind is nn.Linear or kind.__name__ == "ModulesToSaveWrapper"
    return plain and getattr(module, "bias", None) is None and not has_hooks(module)


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks or a forward of its own are attached to this very module."""
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return any(hooks) or "forward" in vars(module)
