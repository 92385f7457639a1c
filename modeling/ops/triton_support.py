"""When a Triton kernel runs in place of its torch reference: on CUDA tensors, where Triton is installed."""

import importlib.util

import torch

_HAS_TRITON = importlib.util.find_spec("triton") is not None


def use_triton(tensor: torch.Tensor) -> bool:
    """Whether the kernels take `tensor`. An empty one has nothing to launch for; under torch.compile the compiler fuses
    the reference with what stands around it."""
    return _HAS_TRITON and tensor.is_cuda and tensor.numel() > 0 and not torch.compiler.is_compiling()
