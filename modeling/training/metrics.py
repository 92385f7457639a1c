"""What a run says while it runs: a progress bar, `metrics.jsonl`, TensorBoard events. Rank 0 alone writes."""

import json
import resource
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from tqdm import tqdm

from modeling.training.routing import RouterStatistics


def memory_gb(device_type: str) -> float:
    """Peak memory in GB so far: of the device where there is one, else of the process."""
    if device_type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def drop_later_lines(path: Path, last_step: int) -> None:
    """Remove what a stopped run wrote behind the checkpoint that it goes on from, a half-written line included."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            step = json.loads(line)["step"]
        except ValueError:
            continue
        if step <= last_step:
            kept.append(line + "\n")
    path.write_text("".join(kept), encoding="utf-8")


class MetricsWriter:
    """Args: enabled: whether this rank writes. first_step: the step that the run goes on from."""

    def __init__(self, folder: Path, enabled: bool, first_step: int, max_steps: int, tensorboard: bool) -> None:
        self.file: Any = None
        self.bar: Any = None
        self.board: Any = None
        if not enabled:
            return
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        drop_later_lines(path, first_step)
        drop_later_lines(folder / "router.jsonl", first_step)
        self.file = path.open("a", encoding="utf-8")
        self.router_file = (folder / "router.jsonl").open("a", encoding="utf-8")
        interval = 0.5 if sys.stderr.isatty() else 20.0
        self.bar = tqdm(total=max_steps, initial=first_step, unit="step", mininterval=interval, dynamic_ncols=True)
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.file is None:
            return
        self.file.close()
        self.router_file.close()
        self.bar.close()
        if self.board is not None:
            self.board.close()

    def step(self, values: dict[str, Any], log: bool) -> None:
        """One optimizer step; `values` holds "step" and goes to the files where `log` says so."""
        if self.file is None:
            return
        self.bar.update(1)
        shown = {"loss": f"{values['loss']:.4g}", "tok/s": f"{values['tokens_per_second']:.0f}"}
        if values["mfu"] is not None:
            shown["mfu"] = f"{values['mfu']:.1%}"
        self.bar.set_postfix(shown | {"GB": f"{values['memory_gb']:.1f}"}, refresh=False)
        if not log:
            return
        self.file.write(json.dumps(values) + "\n")
        self.file.flush()
        if self.board is not None:
            for name, value in values.items():
                if name != "step" and isinstance(value, int | float):
                    self.board.add_scalar(f"train/{name}", value, values["step"])

    def router(self, step: int, layers: list[int], statistics: RouterStatistics) -> None:
        """Router statistics of a step; `layers` are the numbers of the decoder layers that have experts."""
        if self.file is None:
            return
        entry = {
            "step": step,
            "layers": layers,
            "max_violation": statistics.max_violation,
            "entropy": statistics.entropy,
            "load": [[round(share, 6) for share in layer] for layer in statistics.load.tolist()],
        }
        self.router_file.write(json.dumps(entry) + "\n")
        self.router_file.flush()
        if self.board is not None:
            for i, layer in enumerate(layers):
                self.board.add_scalar(f"router/max_violation/{layer}", statistics.max_violation[i], step)
                self.board.add_scalar(f"router/entropy/{layer}", statistics.entropy[i], step)
                self.board.add_histogram(f"router/load/{layer}", statistics.load[i], step)

    def say(self, text: str) -> None:
        """A line above the bar."""
        if self.bar is not None:
            self.bar.write(text, file=sys.stderr)
