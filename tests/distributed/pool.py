"""Process pools for distributed tests: `world_size` ranks that are started once and run many functions.

A test sends a module-level function and its arguments; every rank runs it and sends back what it returned or the
message it failed with. A rank that does not answer in time is a hang: the pool is killed and the test fails.
"""

import os
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch.multiprocessing as mp

from tests.distributed.device import prepare_rank

DEFAULT_TIMEOUT = 240.0
# A gloo group has three threads, and they poll even when idle. Ranks that have started so many since they joined their
# world have seen many meshes, and are replaced. With NCCL a group has twice as many, and starting anew takes longer.
MOST_THREADS = {"cpu": 160, "cuda": 400}


@dataclass(frozen=True)
class Failure:
    """How a rank failed: the exception's type, its message, its traceback."""

    kind: str
    message: str
    trace: str


class Hang(AssertionError):
    """Some rank did not finish in time."""


class RanksFailed(AssertionError):
    """Some rank raised where none should."""


def _serve(rank: int, world_size: int, store: str, pipe: Connection, collective_timeout: float, device: str) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import datetime

    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        prepare_rank(rank, device),
        init_method=f"file://{store}",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=collective_timeout),
    )
    threads = _threads()
    while True:
        job = pipe.recv()
        if job is None:
            return
        function, args, kwargs = job
        try:
            result = function(*args, **kwargs)
        except BaseException as error:  # a rank reports whatever stopped it; the parent decides what it means
            result = Failure(type(error).__name__, str(error), traceback.format_exc())
        pipe.send((result, _threads() - threads))


def _threads() -> int:
    return len(os.listdir("/proc/self/task"))


class Pool:
    """Ranks that wait for work. `run` raises if any rank fails or hangs; `outcomes` hands failures back.

    On "cuda" rank r has GPU r. What a function returns goes through a pipe: it holds no tensor of a GPU.
    """

    def __init__(self, world_size: int, collective_timeout: float = 120.0, device: str = "cpu") -> None:
        self.world_size = world_size
        self.device = device
        self.collective_timeout = collective_timeout
        self.processes: list[Any] = []
        self.pipes: list[Connection] = []

    def _start(self) -> None:
        if self.device == "cuda":
            # A fork has no use of CUDA if anything that was imported before it has so much as counted the GPUs.
            context = mp.get_context("spawn")
        else:
            # Forked from a server that has imported everything, once for all pools, and has run nothing.
            context = mp.get_context("forkserver")
            context.set_forkserver_preload(["tests.distributed.ranks"])
        store = os.path.join(tempfile.mkdtemp(prefix="pool"), "store")
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            args = (rank, self.world_size, store, theirs, self.collective_timeout, self.device)
            process = context.Process(target=_serve, args=args, daemon=True)
            process.start()
            self.processes.append(process)
            self.pipes.append(ours)

    def close(self) -> None:
        """End the ranks; the next call starts fresh ones."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        self.processes, self.pipes = [], []

    def outcomes(self, function: Callable, *args: Any, timeout: float = DEFAULT_TIMEOUT, **kwargs: Any) -> list[Any]:
        """What each rank returned, or a `Failure`. After a failure the ranks are replaced.

        Raises:
            Hang: a rank did not answer within `timeout` seconds.
        """
        if not self.processes:
            self._start()
        for pipe in self.pipes:
            pipe.send((function, args, kwargs))
        deadline = time.monotonic() + timeout
        results: list[Any] = []
        threads = 0
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(max(0.0, deadline - time.monotonic())):
                answered = [other for other in range(self.world_size) if other < rank or self.pipes[other].poll(0)]
                self.close()
                raise Hang(f"rank {rank} of {self.world_size} did not finish within {timeout} s; {answered} did")
            try:
                result, own_threads = pipe.recv()
            except EOFError:
                result, own_threads = Failure("EOFError", "the process died", ""), 0
            results.append(result)
            threads = max(threads, own_threads)
        if threads > MOST_THREADS[self.device] or any(isinstance(result, Failure) for result in results):
            self.close()
        return results

    def run(self, function: Callable, *args: Any, timeout: float = DEFAULT_TIMEOUT, **kwargs: Any) -> list[Any]:
        """What each rank returned.

        Raises:
            RanksFailed: with every failing rank's traceback.
            Hang: see `outcomes`.
        """
        results = self.outcomes(function, *args, timeout=timeout, **kwargs)
        failures = [f"rank {rank}:\n{r.trace or r.message}" for rank, r in enumerate(results) if isinstance(r, Failure)]
        if failures:
            raise RanksFailed("\n".join(failures))
        return results
