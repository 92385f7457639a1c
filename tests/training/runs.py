"""Runs of the trainer as tests use them: small, quiet, on the CPU; what they logged; ranks of a pool that run one."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Timer
from typing import Any
from unittest import mock

import torch.distributed as dist

from modeling.distributed.parallel_state import set_parallel_state
from modeling.training.metrics import MetricsWriter
from modeling.training.options import TrainOptions
from modeling.training.plots import read_lines
from scripts.train import main, train

SMALL = {
    "pack_tokens": 320,
    "pack_buffer": 12,
    "workers": 0,
    "prefetch": 0,
    "lr": 2e-3,
    "router_every": 3,
    "tensorboard": False,
    "plots": False,
    "export": False,
    "device": "cpu",
    "save_every": 0,
}
# What differs from run to run, whatever happens.
TIMES = ("seconds", "tokens_per_second", "tflops", "mfu", "memory_gb")


def options_of(model: Path, data: Path, out: Path, **changes: Any) -> TrainOptions:
    return TrainOptions(model=str(model), data=[str(data)], out=str(out), **(SMALL | changes))


def arguments_of(options: TrainOptions) -> list[str]:
    """The command line that gives these options, by way of a config file."""
    path = Path(options.out).with_suffix(".yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(options.to_yaml())
    return ["--config", str(path)]


def run(options: TrainOptions) -> int:
    """In this process, as the command does; its exit code."""
    return main(arguments_of(options))


def run_rank(options: TrainOptions) -> int:
    """On a rank of a pool, whose process group stays."""
    try:
        return train(options)
    finally:
        set_parallel_state(None)


def curve(out: Path | str) -> list[dict[str, Any]]:
    """A run's metrics without what the clock decides."""
    return [{k: v for k, v in line.items() if k not in TIMES} for line in read_lines(Path(out) / "metrics.jsonl")]


@contextmanager
def at_step(step: int, act: Callable[[], Any]) -> Iterator[None]:
    """Runs of this process call `act` when this step is logged, before anything else; on every rank, writer or not."""
    log = MetricsWriter.step

    def log_and_act(writer: MetricsWriter, values: dict[str, Any], **rest: Any) -> None:
        log(writer, values, **rest)
        if values["step"] == step:
            act()

    with mock.patch.object(MetricsWriter, "step", log_and_act):
        yield


def stopped_on_one_rank(options: TrainOptions, step: int) -> int:
    """On a rank of a pool: SIGTERM reaches rank 1 alone when it logs `step`; all ranks must stop behind that step."""

    def stop() -> None:
        if dist.get_rank() == 1:
            signal.raise_signal(signal.SIGTERM)

    with at_step(step, stop):
        return run_rank(options)


def killed_behind(step: int, delay: float, last: int, arguments: list[str]) -> None:
    """The command, in a process that is killed `delay` seconds behind `step`; it does not get past step `last`."""
    kill = Timer(delay, os.kill, (os.getpid(), signal.SIGKILL))
    with at_step(step, kill.start), at_step(last, kill.join):
        main(arguments)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())
