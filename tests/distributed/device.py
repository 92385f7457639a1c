"""Where the ranks of the matrix and of the hang suite run: gloo on the CPU, or NCCL with one GPU of this host for each.

    QWEN3_VL_MOE_TEST_DEVICE=cuda python -m pytest -m "" tests/distributed -k "matrix or hangs or torchrun"

The variable is read here and nowhere else. What needs more ranks than there are GPUs is skipped and says so.
"""

import os
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

VARIABLE = "QWEN3_VL_MOE_TEST_DEVICE"


def device_under_test(environment: Mapping[str, str]) -> str:
    """ "cpu" where the variable is unset or empty.

    Raises:
        ValueError: another device than "cpu" and "cuda".
    """
    device = environment.get(VARIABLE) or "cpu"
    if device not in ("cpu", "cuda"):
        raise ValueError(f"{VARIABLE}={device!r}; it is 'cpu' (gloo, the default) or 'cuda' (NCCL).")
    return device


DEVICE = device_under_test(os.environ)


def missing_devices(world_size: int, device: str) -> str | None:
    """Why so many ranks cannot run on `device` of this host; None where they can."""
    found = torch.cuda.device_count() if device == "cuda" else world_size
    return None if found >= world_size else f"needs {world_size} GPUs, one for each rank; this host has {found}"


def prepare_rank(rank: int, device: str) -> str:
    """Make this process the rank that computes on `device`, GPU number `rank`; the backends of its process group."""
    if device == "cpu":
        return "gloo"
    # Multicast over NVLink asks the host's fabric manager for more than a shared host may grant; before NCCL starts.
    os.environ["NCCL_NVLS_ENABLE"] = "0"
    torch.cuda.set_device(rank)
    # TF32 keeps 10 bits of a float's 23: errors of 1e-3, where the bounds on fp32 look for 1e-5.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    # As init_parallel_state starts it: small host-side exchanges go over gloo.
    return "cpu:gloo,cuda:nccl"


def rank_device() -> str:
    """The device type that this process computes on as a rank: a GPU where its group was started with NCCL."""
    return "cuda" if dist.is_initialized() and "nccl" in str(dist.get_backend_config()) else "cpu"


def to_device(value: Any, device: str) -> Any:
    """The tensors of a batch on this rank's `device`; ints and lists stay."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    return {key: to_device(part, device) for key, part in value.items()} if isinstance(value, dict) else value
