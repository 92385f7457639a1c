"""The training loop: exact token means over ranks and micro-batches, and stops that lose nothing.

One exchange of a few numbers on the host opens each optimizer step: how many tokens count (the divisor of every
micro-batch's loss), whether a rank failed, ran out of data or was told to stop. So all ranks do the same thing next.
"""

import json
import signal
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from modeling.data.collator import IGNORE_INDEX
from modeling.data.streaming import Pack, PackedStream
from modeling.distributed.failures import fail_together
from modeling.distributed.parallel_state import ParallelState
from modeling.distributed.parallelize import clip_grad_norm_
from modeling.qwen3_vl_moe.modeling_qwen3_vl_moe import is_moe_layer
from modeling.training.checkpoints import Checkpoints
from modeling.training.flops import FlopCounter, peak_flops
from modeling.training.metrics import MetricsWriter, memory_gb
from modeling.training.optimizer import Schedule
from modeling.training.options import TrainOptions
from modeling.training.routing import RouterMeter


class NonFiniteLoss(RuntimeError):
    """The loss or the gradient is NaN or infinite; the message names the file with the step's samples."""


@dataclass
class StepPlan:
    """The micro-batches of one optimizer step, and what all ranks agreed on about it."""

    packs: list[Pack]
    valid: int
    """Label tokens of all ranks and micro-batches: the loss's divisor."""
    tokens: int
    samples: int
    bad: int
    flops: float
    rows: int
    """Packs that hold samples."""
    stop: bool


@dataclass
class Progress:
    """What a checkpoint remembers besides parameters."""

    step: int = 0
    tokens: int = 0
    samples: int = 0
    bad: int = 0
    rows: int = 0
    positions: list[dict[str, Any]] = field(default_factory=list)


@contextmanager
def stop_signal() -> Iterator[list[int]]:
    """A list that is no longer empty once SIGTERM or Ctrl-C has come. A second Ctrl-C interrupts at once.

    A signal that the process was started to ignore (Ctrl-C, in a shell's background) stays ignored.
    """
    received: list[int] = []
    former: dict[int, Any] = {}

    def remember(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if number == signal.SIGINT:
            signal.signal(number, former[number])

    for stop in (signal.SIGTERM, signal.SIGINT):
        if signal.getsignal(stop) is not signal.SIG_IGN:
            former[stop] = signal.signal(stop, remember)
    try:
        yield received
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def to_device(value: Any, device: torch.device) -> Any:
    """Tensors of a batch on the device; boundaries' ints and lists stay."""
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    return {key: to_device(part, device) for key, part in value.items()} if isinstance(value, dict) else value


class Trainer:
    """Trains a parallelized model. `stream.collator` makes the batches; `run` returns when it is done or told to."""

    def __init__(
        self,
        model: Any,
        optimizer: torch.optim.Optimizer,
        stream: PackedStream,
        checkpoints: Checkpoints,
        options: TrainOptions,
        state: ParallelState,
    ) -> None:
        self.model, self.optimizer, self.stream, self.checkpoints = model, optimizer, stream, checkpoints
        self.options, self.state = options, state
        self.folder = Path(options.out)
        self.reported: set[tuple[str, int]] = set()  # bad samples in the file of them
        self.progress = Progress()
        self.position = stream.position
        self.schedule = Schedule(optimizer, options)
        text = model.config.text_config
        self.router = RouterMeter(text.num_experts, text.num_experts_per_tok)
        # A mean over tokens already, so micro-batches average it where they add up the rest.
        self.coefficient = options.balancing / options.accumulation
        trained = {part: part not in options.freeze and options.lora == "none" for part in ("vit", "merger")}
        self.flops = FlopCounter(model.config, **trained, lm="lm" not in options.freeze, lora=options.lora != "none")
        self.peak = options.peak_tflops * 1e12 or peak_flops(state.device_type)
        self.device = torch.device(state.device_type)
        if state.device_type == "cuda":
            self.device = torch.device("cuda", torch.cuda.current_device())

    # Resuming and saving

    def resume(self) -> bool:
        """Load the newest checkpoint, if there is one; whether there was."""
        step = self.checkpoints.latest()
        if step is None:
            return False
        self.progress = Progress(**self.checkpoints.load(step, self.model, self.optimizer))
        self.stream.resume(self.progress.positions)
        self.position = self.stream.position
        return True

    def save(self, wait: bool) -> None:
        """Write a checkpoint of this moment, between two steps."""
        positions: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(positions, self.position)
        self.progress.positions = positions[:: self.state.sp_size]
        self.checkpoints.save(self.progress.step, self.model, self.optimizer, {**vars(self.progress)}, wait)

    # One step

    def _plan(self, packs: Iterator[Pack], stop: bool) -> StepPlan:
        """Fetch this rank's micro-batches and agree with the others; a collective."""
        fetched: list[Pack] = []
        error: ValueError | OSError | RuntimeError | None = None
        try:
            while len(fetched) < self.options.accumulation and (pack := next(packs, None)) is not None:
                fetched.append(pack)
        except (ValueError, OSError, RuntimeError) as problem:
            error = problem
        full = [pack for pack in fetched if pack.samples]
        predictions = [pack.batch["num_valid_labels"] for pack in full]
        per_row = 1 / self.state.sp_size  # the ranks of a sequence hold the same pack
        # Under sequence parallelism a slice's predictions are this rank's, so their sum over ranks is the row's.
        flops = sum(
            self.flops.count(pack.batch, valid * self.state.sp_size)
            for pack, valid in zip(full, predictions, strict=True)
        )
        own = [
            sum(predictions),
            *(per_row * sum(pack.tokens for pack in full), per_row * sum(len(pack.samples) for pack in full)),
            *(per_row * sum(len(pack.bad) for pack in fetched), per_row * flops, per_row * len(full)),
            *(float(stop), float(error is not None)),
        ]
        total = torch.tensor(own, dtype=torch.float64)
        if self.state.world_group is not None:
            dist.all_reduce(total, group=self.state.world_group)
        valid, tokens, samples, bad, step_flops, rows, stops, errors = total.tolist()
        if errors:
            with fail_together(self.state.world_group):
                if error is not None:
                    raise error
        self._report_bad([sample for pack in fetched for sample in pack.bad])
        return StepPlan(
            fetched, round(valid), round(tokens), round(samples), round(bad), step_flops, round(rows), stops > 0
        )

    def _report_bad(self, bad: list[Any]) -> None:
        fresh = {(sample.file, sample.line): sample for sample in bad}  # not in every epoch again
        fresh = {place: sample for place, sample in fresh.items() if place not in self.reported}
        if not fresh or self.state.sp_rank != 0:
            return
        self.reported |= fresh.keys()
        with (self.folder / f"bad_samples.{self.state.dp_rank}.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(vars(sample)) + "\n" for sample in fresh.values())

    def _filler(self) -> dict[str, Any]:
        """A batch of padding, for a rank that has run out of samples while others have not."""
        ids = torch.zeros(2, dtype=torch.int64)
        nothing = torch.zeros(2, dtype=torch.bool)
        labels = torch.full_like(ids, IGNORE_INDEX)
        return self.stream.collator(
            [{"input_ids": ids, "labels": labels, "image_mask": nothing, "video_mask": nothing}]
        )

    def _micro_batch(self, batch: dict[str, Any], valid: int, measure: bool) -> torch.Tensor:
        """Forward and backward of one micro-batch: (2,) this rank's share of the loss, and of the balancing loss."""
        with_router = measure or self.coefficient > 0
        outputs = self.model(
            **to_device(batch, self.device), num_items_in_batch=max(valid, 1), output_router_logits=with_router
        )
        # In this thread: with one device per process there is nothing to gain from autograd's own, and where cores are
        # slow its launches take up to a third longer.
        if outputs.loss.requires_grad:  # not where all that runs is frozen: mergers alone, on a batch without images
            with torch.autograd.set_multithreading_enabled(False):
                outputs.loss.backward()
        if measure and outputs.router_logits:
            length = batch["input_ids"].shape[1]
            behind = (self.state.sp_size - 1 - self.state.sp_rank) * length
            real = min(length, max(0, length + behind - batch["tail_padding_length"]))
            self.router.add(outputs.router_logits, real)
        loss = outputs.loss.detach().float()
        balancing = torch.zeros_like(loss) if outputs.aux_loss is None else outputs.aux_loss.detach().float()
        return torch.stack((loss - self.coefficient * balancing, balancing / self.options.accumulation))

    def _check_finite(self, values: list[float], shares: list[torch.Tensor], plan: StepPlan) -> None:
        """Stop all ranks where anything is NaN or infinite, and leave the step's samples on disk."""
        if all(map(torch.isfinite, torch.tensor(values))):
            return
        own = [
            {"loss_share": float(share[0]), "samples": pack.samples}
            for share, pack in zip(shares, plan.packs, strict=False)
        ]
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, own)
        step = self.progress.step + 1
        path = self.folder / f"non_finite_step_{step}.json"
        loss, _, norm = values
        if self.state.rank == 0:
            ranks = [{"rank": rank, "micro_batches": batches} for rank, batches in enumerate(gathered)]
            path.write_text(json.dumps({"step": step, "loss": loss, "grad_norm": norm, "ranks": ranks}, indent=1))
        raise NonFiniteLoss(
            f"step {step}: loss {loss}, gradient norm {norm}. The step's samples are in {path}; parameters are those "
            f"of step {self.progress.step}, and the last checkpoint is untouched."
        )

    def accumulate(self, plan: StepPlan, measure: bool = False) -> list[torch.Tensor]:
        """Forward and backward of a step's micro-batches: the gradient of the mean over all their tokens on all ranks.

        Returns: (2,) of each micro-batch, this rank's share of the loss and of the balancing loss.
        """
        batches = [pack.batch if pack.samples else self._filler() for pack in plan.packs]
        batches += [self._filler() for _ in range(self.options.accumulation - len(batches))]
        return [self._micro_batch(batch, plan.valid, measure) for batch in batches]

    def _step(self, plan: StepPlan, measure: bool) -> dict[str, Any]:
        """One optimizer step; what it was like."""
        self.schedule.set(self.progress.step)
        # Stateless, so that dropout after a resume, on any mesh, does not depend on how often the run was stopped.
        torch.manual_seed(self.options.seed * 7_919 + self.progress.step * 65_537 + self.state.rank)
        shares = self.accumulate(plan, measure)
        norm = clip_grad_norm_(self.model, self.options.clip or float("inf"), parallel_state=self.state)
        losses = torch.stack(shares).sum(0)
        if self.state.world_group is not None:
            dist.all_reduce(losses, group=self.state.world_group)
        values = torch.cat((losses, norm.to(losses.dtype).reshape(1))).tolist()  # the step's one wait for the device
        self._check_finite(values, shares, plan)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        loss, balancing, norm_value = values
        return {"loss": loss, "balancing_loss": balancing, "grad_norm": norm_value}

    # The loop

    def run(self, writer: MetricsWriter) -> bool:
        """Train to the last step; True when it got there, False when told to stop before (a checkpoint is written)."""
        options, progress = self.options, self.progress
        text = self.model.config.text_config
        layers = [i for i in range(text.num_hidden_layers) if is_moe_layer(text, i)]
        self.model.train()
        with stop_signal() as received, closing(self.stream.__iter__()) as packs, self._balancing():
            started = time.perf_counter()
            while progress.step < options.max_steps:
                plan = self._plan(packs, bool(received))
                if plan.stop:
                    writer.say(f"Told to stop: checkpoint of step {progress.step}, then the end.")
                    self._save_last()
                    return False
                if not plan.rows:
                    writer.say(f"The data's {options.epochs} epochs end at step {progress.step}.")
                    break
                measure = (progress.step + 1) % options.router_every == 0
                values = self._step(plan, measure)
                self._advance(plan)
                now = time.perf_counter()
                values |= self._rates(plan, now - started)
                started = now
                if measure and layers:
                    writer.router(progress.step, layers, self.router.read(self.state.world_group))
                writer.step({"step": progress.step} | values, log=progress.step % options.log_every == 0)
                self.checkpoints.poll()
                if options.save_every and progress.step % options.save_every == 0:
                    self.save(wait=False)
        self._save_last()
        return True

    @contextmanager
    def _balancing(self) -> Iterator[None]:
        """This run's coefficient of the load-balancing loss in the model's config, and the config's own again."""
        text = self.model.config.text_config
        former, text.router_aux_loss_coef = text.router_aux_loss_coef, self.coefficient
        try:
            yield
        finally:
            text.router_aux_loss_coef = former

    def _save_last(self) -> None:
        self.checkpoints.finish()
        if self.progress.step and self.checkpoints.latest() != self.progress.step:
            self.save(wait=True)

    def _advance(self, plan: StepPlan) -> None:
        progress = self.progress
        progress.step += 1
        progress.tokens += plan.tokens
        progress.samples += plan.samples
        progress.bad += plan.bad
        progress.rows += plan.rows
        if plan.packs:
            self.position = plan.packs[-1].position

    def _rates(self, plan: StepPlan, seconds: float) -> dict[str, Any]:
        progress, world = self.progress, self.state.world_size
        flops = plan.flops / seconds / world  # of one device
        return {
            "lr": self.optimizer.param_groups[-1]["lr"],
            "tokens": progress.tokens,
            "samples": progress.samples,
            "bad_samples": progress.bad,
            "padding": 1 - progress.tokens / max(1, progress.rows * self.options.pack_tokens),
            "label_tokens": plan.valid,
            "seconds": seconds,
            "tokens_per_second": plan.tokens / seconds,
            "tflops": flops / 1e12,
            "mfu": flops / self.peak if self.peak else None,
            "memory_gb": memory_gb(self.state.device_type),
        }
