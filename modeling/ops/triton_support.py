"""When a Triton kernel runs in place of its torch reference (on CUDA tensors, where Triton is installed), and how it is
launched."""

import importlib.util
from typing import Any

import torch

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
