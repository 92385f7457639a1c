"""Which rank does what: a frozen description of the process mesh, and the one place where it is kept.

World = dp_replicate x dp_shard x sp, sp innermost. Expert parallelism lays a second grid over the same ranks:
ep x ep_fsdp = dp_shard x sp, ep innermost, so that an expert group may span data ranks, sequence ranks or both. With
dp_shard=2, sp=2, ep=2:

    rank                0      1      2      3
    (dp_shard, sp)    (0,0)  (0,1)  (1,0)  (1,1)      parameters are sharded over all four
    (ep_fsdp, ep)     (0,0)  (0,1)  (1,0)  (1,1)      experts over ep, each expert's rows over ep_fsdp

dp_replicate repeats the whole picture (HSDP): copies that exchange gradients only.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


@dataclass(frozen=True)
class ParallelState:
    """Sizes, ranks, groups and meshes of this process. The default is one process that shares nothing.

    `mesh` has the dimensions (dp_replicate, dp_shard, sp), `fsdp_grid` (dp_replicate, dp_shard_sp), `ep_grid`
    (dp_replicate, ep_fsdp, ep); all three are None in a single process without a process group.
    """

    dp_replicate_size: int = 1
    dp_shard_size: int = 1
    sp_size: int = 1
    ep_size: int = 1
    device_type: str = "cpu"
    mesh: DeviceMesh | None = None
    fsdp_grid: DeviceMesh | None = None
    ep_grid: DeviceMesh | None = None
    dp_group: dist.ProcessGroup | None = None
    """The ranks that hold other samples at this rank's place in the sequence. A group of one rank is None."""
    sp_group: dist.ProcessGroup | None = None
    """The ranks that hold the other slices of this rank's samples."""
    ep_group: dist.ProcessGroup | None = None
    """The ranks that hold the other experts."""
    world_group: dist.ProcessGroup | None = None

    @property
    def world_size(self) -> int:
        return self.dp_replicate_size * self.dp_shard_size * self.sp_size

    @property
    def dp_size(self) -> int:
        """Data ranks: groups of processes that hold different samples."""
        return self.dp_replicate_size * self.dp_shard_size

    @property
    def fsdp_size(self) -> int:
        """Ranks that one copy of the dense parameters is spread over."""
        return self.dp_shard_size * self.sp_size

    @property
    def ep_fsdp_size(self) -> int:
        """Ranks that one copy of an expert is spread over."""
        return self.fsdp_size // self.ep_size

    @property
    def rank(self) -> int:
        return 0 if self.mesh is None else self.mesh.get_rank()

    @property
    def dp_rank(self) -> int:
        return self.rank // self.sp_size

    @property
    def sp_rank(self) -> int:
        return self.rank % self.sp_size

    @property
    def ep_rank(self) -> int:
        return self.rank % self.ep_size

    @property
    def dp_enabled(self) -> bool:
        return self.dp_size > 1

    @property
    def sp_enabled(self) -> bool:
        return self.sp_size > 1

    @property
    def ep_enabled(self) -> bool:
        return self.ep_size > 1

    @property
    def fsdp_enabled(self) -> bool:
        """Whether parameters are shared with other ranks, so that every rank must run every module."""
        return self.world_size > 1

    @property
    def fsdp_mesh(self) -> DeviceMesh | None:
        """Mesh for `fully_shard` of the dense parameters: 1-D, or (replicate, shard) where copies are kept."""
        if self.fsdp_grid is None:
            return None
        return self.fsdp_grid if self.dp_replicate_size > 1 else self.fsdp_grid["dp_shard_sp"]

    @property
    def ep_fsdp_mesh(self) -> DeviceMesh | None:
        """Mesh for `fully_shard` of expert parameters that are already cut over `ep_mesh`."""
        if self.ep_grid is None:
            return None
        return self.ep_grid["dp_replicate", "ep_fsdp"] if self.dp_replicate_size > 1 else self.ep_grid["ep_fsdp"]

    @property
    def ep_mesh(self) -> DeviceMesh | None:
        return None if self.ep_grid is None else self.ep_grid["ep"]


_SINGLE_PROCESS = ParallelState()
# A plain global: a backward that recomputes runs on autograd's threads, which do not inherit context variables.
_current: ParallelState | None = None


def init_parallel_state(
    dp_shard_size: int = 1,
    sp_size: int = 1,
    ep_size: int = 1,
    dp_replicate_size: int = 1,
    *,
    device_type: str | None = None,
) -> ParallelState:
    """Build the meshes over all ranks and make the result the current state.

    Under torchrun the process group is started here if the program has not done so: NCCL beside gloo on GPUs, so that
    small host-side exchanges need no GPU; gloo alone on CPUs.

    Args:
        dp_shard_size: data ranks that share one copy of the parameters.
        sp_size: ranks that share one packed sequence; it also shards parameters.
        ep_size: ranks that share the experts; divides dp_shard_size x sp_size.
        dp_replicate_size: copies of all that (HSDP).
        device_type: "cuda", "npu" or "cpu"; None takes the accelerator that torch finds, else the CPU.

    Raises:
        ValueError: a size below 1, a product that is not the number of processes, an ep_size that does not divide.
    """
    sizes = {
        "dp_replicate_size": dp_replicate_size,
        "dp_shard_size": dp_shard_size,
        "sp_size": sp_size,
        "ep_size": ep_size,
    }
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}={size}; a mesh dimension is at least 1.")
    if dp_shard_size * sp_size % ep_size:
        raise ValueError(
            f"ep_size={ep_size} does not divide dp_shard_size x sp_size = {dp_shard_size} x {sp_size} = "
            f"{dp_shard_size * sp_size}; choose an ep_size that does."
        )
    if device_type is None:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        device_type = "cpu" if accelerator is None else accelerator.type
    _start_process_group(device_type)
    world = dist.get_world_size() if dist.is_initialized() else 1
    product = math.prod((dp_replicate_size, dp_shard_size, sp_size))
    if product != world:
        raise ValueError(
            f"dp_replicate_size x dp_shard_size x sp_size = {dp_replicate_size} x {dp_shard_size} x {sp_size} = "
            f"{product}, but {world} process(es) run; make them equal (ep_size lays over them and does not count)."
        )
    state = _build_state(sizes, device_type) if dist.is_initialized() else ParallelState(device_type=device_type)
    set_parallel_state(state)
    return state


def _start_process_group(device_type: str) -> None:
    if dist.is_initialized() or "WORLD_SIZE" not in os.environ:
        return
    if device_type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group({"cuda": "cpu:gloo,cuda:nccl", "cpu": "gloo"}.get(device_type))


def _build_state(sizes: dict[str, int], device_type: str) -> ParallelState:
    replicate, shard, sp, ep = (sizes[f"{name}_size"] for name in ("dp_replicate", "dp_shard", "sp", "ep"))
    mesh = init_device_mesh(device_type, (replicate, shard, sp), mesh_dim_names=("dp_replicate", "dp_shard", "sp"))
    fsdp_grid = init_device_mesh(device_type, (replicate, shard * sp), mesh_dim_names=("dp_replicate", "dp_shard_sp"))
    ep_grid = init_device_mesh(
        device_type, (replicate, shard * sp // ep, ep), mesh_dim_names=("dp_replicate", "ep_fsdp", "ep")
    )
    return ParallelState(
        *(replicate, shard, sp, ep, device_type, mesh, fsdp_grid, ep_grid),
        dp_group=mesh["dp_replicate", "dp_shard"]._flatten("dp").get_group() if replicate * shard > 1 else None,
        sp_group=mesh["sp"].get_group() if sp > 1 else None,
        ep_group=ep_grid["ep"].get_group() if ep > 1 else None,
        world_group=dist.group.WORLD if replicate * shard * sp > 1 else None,
    )


def set_parallel_state(state: ParallelState | None) -> None:
    """Make `state` the current one; None forgets it."""
    global _current
    _current = state


def get_parallel_state() -> ParallelState:
    """The current state; a single process that never initialised gets the trivial one.

    Raises:
        RuntimeError: several processes run and none of the accessors was ever called, where guessing "not parallel"
            would train every rank on its own.
    """
    if _current is not None:
        return _current
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise RuntimeError(
            f"The parallel state is not initialised, but {dist.get_world_size()} processes run. Call "
            "init_parallel_state(dp_shard_size=..., sp_size=..., ep_size=...) before building or running the model."
        )
    return _SINGLE_PROCESS


@contextmanager
def use_parallel_state(state: ParallelState | None) -> Iterator[ParallelState | None]:
    """Make `state` current inside the block and put the former one back after it."""
    former = _current
    set_parallel_state(state)
    try:
        yield state
    finally:
        set_parallel_state(former)
