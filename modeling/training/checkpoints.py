"""Checkpoints of a run: written while training goes on, whole or absent, the newest few kept, found again by step.

    RUN/checkpoints/step-00000200/            complete, since it has this name
        __0_0.distcp ... .metadata            trained parameters and optimizer state (torch.distributed.checkpoint)
        progress.json                         step, data positions, counters, and what the run is (`run_identity`)
    RUN/checkpoints/step-00000400.partial/    being written, or what a killed run left

A folder gets its name when every rank has written its part. Frozen parameters are not in it: they come from the
checkpoint that the run started from.
"""

import json
import re
import shutil
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from modeling.data.jsonl import fingerprint
from modeling.distributed.failures import fail_together
from modeling.distributed.parallel_state import ParallelState
from modeling.training.options import TrainOptions

_COMPLETE = re.compile(r"step-(\d{8})")
# Flat: settings are stored by parameter, because which parameters share a group depends on the mesh. Not strict: frozen
# parameters are missing, and meant to be.
OPTIONS = StateDictOptions(ignore_frozen_params=True, flatten_optimizer_state_dict=True, strict=False)


_FAILURES = (CheckpointException, OSError, RuntimeError, EOFError)


def _cause(error: BaseException) -> str:
    """A line about what went wrong inside torch.distributed.checkpoint, on the first rank that says."""
    failures = getattr(error, "failures", {})
    cause = next((wrapped[0] for wrapped in failures.values()), error)
    return f"{type(cause).__name__}: {cause}".splitlines()[0]


def _unwritten(path: Path, error: BaseException) -> OSError:
    return OSError(
        f"{path} could not be written ({_cause(error)}); is the disk full? The run can go on from the one before."
    )


def run_identity(options: TrainOptions) -> dict[str, Any]:
    """What a run's checkpoints mean nothing without: what is trained and, where not all is, on top of what."""
    identity: dict[str, Any] = {"freeze": sorted(options.freeze), "lora": options.lora}
    if options.lora != "none":
        identity |= {"lora_rank": options.lora_rank, "lora_alpha": options.lora_alpha}
    if options.lora != "none" or options.freeze:
        identity["weights of --model"] = fingerprint(sorted(Path(options.model).rglob("*.safetensors")))
    return identity


def complete_state(optimizer: torch.optim.Optimizer) -> None:
    """Give parameters that no gradient has reached yet the state that AdamW would begin with, so that every checkpoint
    of a run holds the same: a vision tower has none before the first image."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter not in optimizer.state:
                # As AdamW has it: the fused one counts its steps beside the parameter, the others on the host.
                step = torch.zeros((), device=parameter.device if group["fused"] else "cpu", dtype=torch.float32)
                moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                optimizer.state[parameter] = {"step": step, **moments}


class Checkpoints:
    """The checkpoints of one run. Every method is a collective unless it says otherwise.

    identity: see `run_identity`; a checkpoint of another is refused. None: nothing is compared.
    """

    def __init__(
        self, folder: Path, state: ParallelState, keep: int, asynchronous: bool, identity: dict[str, Any] | None = None
    ) -> None:
        self.folder, self.state, self.keep, self.asynchronous = folder, state, keep, asynchronous
        self.identity = identity or {}
        self.pending: tuple[Path, Future[Any]] | None = None
        # The writer's alone: it exchanges in a thread of its own, and must not meet what the training loop exchanges.
        self.group: Any = dist.new_group(backend="gloo")

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints on disk, in order. Not a collective."""
        found = [_COMPLETE.fullmatch(path.name) for path in self.folder.glob("step-*")]
        return sorted(int(match.group(1)) for match in found if match)

    def latest(self) -> int | None:
        """The newest complete checkpoint's step, as rank 0 sees it."""
        box = [self.steps()[-1:] if self.state.rank == 0 else []]
        dist.broadcast_object_list(box, src=0)
        return box[0][0] if box[0] else None

    def _content(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        weights, moments = get_state_dict(model, optimizer, options=OPTIONS)
        return {"model": weights, "optimizer": moments}

    def save(
        self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, progress: dict[str, Any], wait: bool
    ) -> None:
        """Write a checkpoint; in the background unless `wait`. The one before it is finished first."""
        self.finish()
        path = self._path(step)
        partial = path.with_name(path.name + ".partial")
        with fail_together(self.state.world_group):
            if self.state.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
                described = {"step": step, "run": self.identity} | progress
                (partial / "progress.json").write_text(json.dumps(described), encoding="utf-8")
        complete_state(optimizer)
        content = self._content(model, optimizer)
        if self.asynchronous and not wait:
            future = dcp.async_save(content, checkpoint_id=partial, process_group=self.group)
            assert isinstance(future, Future)
            self.pending = (path, future)
            return
        try:
            dcp.save(content, checkpoint_id=partial, process_group=self.group)
        except _FAILURES as error:
            raise _unwritten(path, error) from error
        self._name(path)

    def poll(self) -> None:
        """Give a checkpoint that is written its name. Not a collective, and waits for nothing."""
        if self.pending is not None and self.pending[1].done():
            path, future = self.pending
            self.pending = None
            try:
                future.result()
            except _FAILURES as error:
                raise _unwritten(path, error) from error
            self._name(path)

    def finish(self) -> None:
        """Wait for what is being written. Not a collective, but every rank does it."""
        if self.pending is not None:
            self.pending[1].exception()
            self.poll()

    def _name(self, path: Path) -> None:
        """Rank 0's write is done when all are: the metadata comes last."""
        if self.state.rank != 0:
            return
        shutil.rmtree(path, ignore_errors=True)
        path.with_name(path.name + ".partial").rename(path)
        for step in self.steps()[: -self.keep]:
            shutil.rmtree(self._path(step))

    def _instead(self, step: int) -> str:
        older = [other for other in self.steps() if other < step]
        return f"To go on from step {older[-1]}, remove that folder." if older else "There is no older checkpoint."

    def _check_identity(self, path: Path, former: dict[str, Any]) -> None:
        """Raise a ValueError where both the checkpoint and the run say what they are, and differ."""
        now = self.identity
        other = [
            f"{name} {former.get(name)} then, {now.get(name)} now"
            for name in sorted(former.keys() | now.keys())
            if former.get(name) != now.get(name)
        ]
        if former and now and other:
            raise ValueError(
                f"{path} is of a run with other options: {'; '.join(other)}. Go on with the same, or train a new run "
                "(another --out) from this one's export."
            )

    def load(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Fill model and optimizer, on whatever mesh they are now; returns the progress that was saved."""
        path = self._path(step)
        with fail_together(self.state.world_group):
            if not (path / ".metadata").exists() or not (path / "progress.json").exists():
                raise ValueError(f"{path} is no complete checkpoint; remove it, or resume from another.")
            try:
                progress = json.loads((path / "progress.json").read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(f"{path / 'progress.json'} is broken: {error}. {self._instead(step)}") from error
            self._check_identity(path, progress.pop("run", {}))
        content = self._content(model, optimizer)
        try:
            dcp.load(content, checkpoint_id=path, process_group=self.group)
        except _FAILURES as error:  # on every rank the same
            raise ValueError(
                f"{path} does not hold what this run trains, or is damaged ({_cause(error)}). Resume with the options "
                f"it was written with. {self._instead(step)}"
            ) from error
        set_state_dict(
            model,
            optimizer,
            model_state_dict=content["model"],
            optim_state_dict=content["optimizer"],
            options=OPTIONS,
        )
        return progress
