"""Runs a converter's main in a process of its own that can be killed, without the seconds a new interpreter takes."""

import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

from conversion import hf_to_veomni

_CONTEXT = multiprocessing.get_context("forkserver")
# There is one such server in a session, started by whoever comes first: the distributed tests' ranks come from it, too.
_CONTEXT.set_forkserver_preload(["tests.conversion.crash", "tests.distributed.ranks"])

# The calls that decide what of the output is there after a crash.
_STEPS = ("fsync", "replace", "unlink", "mkdir")


def _convert(arguments: list[str], die_at: int | None, counted: Path | None) -> None:
    steps = 0

    def dying(call: Callable[..., object]) -> Callable[..., object]:
        def step(*args: object, **kwargs: object) -> object:
            nonlocal steps
            steps += 1
            if steps == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return step

    if die_at is not None or counted is not None:
        for name in _STEPS:
            setattr(os, name, dying(getattr(os, name)))
    code = hf_to_veomni.main(arguments)
    if counted is not None:
        counted.write_text(str(steps))
    os._exit(code)


def start(arguments: list[str], die_at: int | None = None, counted: Path | None = None) -> BaseProcess:
    """Start a conversion that kills itself just before its `die_at`-th step; `counted` is told how many it took."""
    process = _CONTEXT.Process(target=_convert, args=(arguments, die_at, counted))
    process.start()
    return process
