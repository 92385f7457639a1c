"""What a step asks of the network and of the host: collectives in order, and reads that would wait for a device."""

import sys
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from modeling.distributed.parallel_state import ParallelState

KINDS = {
    "_allgather_base_": "all-gather",
    "allgather_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_": "reduce-scatter",
    "allreduce_": "all-reduce",
    "alltoall_base_": "all-to-all",
    "alltoall_": "all-to-all",
    "broadcast_": "broadcast",
    "scatter_": "scatter",
    "gather_": "gather",
    "barrier": "barrier",
    "send": "send",
    "recv_": "recv",
}


@dataclass(frozen=True)
class Collective:
    """One call: what, over which group of the mesh, and how many bytes this rank brought to it."""

    kind: str
    group: str
    sent: int


def group_names(state: ParallelState) -> dict[str, str]:
    """Process group name -> dimension of the mesh."""
    groups = {"dp": state.dp_group, "sp": state.sp_group, "ep": state.ep_group, "world": state.world_group}
    if state.fsdp_grid is not None and state.ep_grid is not None:
        groups |= {"fsdp": state.fsdp_grid["dp_shard_sp"].get_group(), "ep_fsdp": state.ep_grid["ep_fsdp"].get_group()}
        groups |= {"replicate": state.fsdp_grid["dp_replicate"].get_group()}
        groups |= {"replicate_experts": state.ep_grid["dp_replicate"].get_group()}
    return {group.group_name: name for name, group in groups.items() if group is not None}


class CollectiveRecorder(TorchDispatchMode):
    """Every collective of the forwards and backwards inside, in order."""

    def __init__(self, state: ParallelState) -> None:
        super().__init__()
        self.names = group_names(state)
        self.calls: list[Collective] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            kind = func._schema.name.split("::")[1]
            tensors = args[1] if "base" in kind else args[0]
            group = next(self._name(a) for a in args if self._name(a) is not None)
            flat = torch.utils._pytree.tree_leaves(tensors)
            sent = sum(t.nbytes for t in flat if isinstance(t, torch.Tensor))
            self.calls.append(Collective(KINDS[kind], group, sent))
        return func(*args, **(kwargs or {}))

    def _name(self, argument: Any) -> str | None:
        if not isinstance(argument, torch.ScriptObject | dist.ProcessGroup):
            return None
        if isinstance(argument, torch.ScriptObject) and "ProcessGroup" not in str(argument._type()):
            return None
        group = dist.ProcessGroup.unbox(argument) if isinstance(argument, torch.ScriptObject) else argument
        return self.names[group.group_name]

    def counts(self) -> Counter[tuple[str, str]]:
        return Counter((call.kind, call.group) for call in self.calls)


WAITING = {"item", "tolist", "cpu", "nonzero", "__bool__", "__int__", "__float__", "__index__", "numpy"}


class HostReadRecorder(TorchFunctionMode):
    """Counts what would make the host wait for a device: reads of values, and sizes that depend on values.

    Everything is on the CPU here, so what is on the host in real life too is told by where it happens: `host_code`
    names the functions that work on host data, or that only run on CPUs.
    """

    def __init__(self, host_code: set[str]) -> None:
        super().__init__()
        self.host_code = host_code
        self.reads: Counter[tuple[str, str]] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in WAITING or self._indexes_by_mask(name, args) or self._goes_to_host(name, args, kwargs):
            frame = sys._getframe(1)
            where = []
            while frame is not None:
                if "/modeling/" in frame.f_code.co_filename or "/tests/" in frame.f_code.co_filename:
                    where.append(frame.f_code.co_name)
                frame = frame.f_back
            if not self.host_code & set(where):
                self.reads[name, where[0] if where else "elsewhere"] += 1
        return func(*args, **kwargs)

    @staticmethod
    def _indexes_by_mask(name: str, args: Any) -> bool:
        if name not in ("__getitem__", "__setitem__", "masked_select", "where") or len(args) < 2:
            return name == "masked_select" or (name == "where" and len(args) == 1)
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        masks = [i for i in index if isinstance(i, torch.Tensor) and i.dtype in (torch.bool, torch.uint8)]
        return bool(masks) and name in ("__getitem__", "__setitem__")

    @staticmethod
    def _goes_to_host(name: str, args: Any, kwargs: Any) -> bool:
        # Said in so many words; a torch.device is where the data is, which happens to be the CPU here.
        return name == "to" and any(
            isinstance(value, str) and value == "cpu" for value in (*args[1:], *kwargs.values())
        )
