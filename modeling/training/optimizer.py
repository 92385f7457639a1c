"""AdamW over the parts of the model, each with its own learning rate, and the schedule they share."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from modeling.distributed.parallelize import param_groups_by_mesh
from modeling.training.options import PARTS, TrainOptions

MERGERS = ("visual.merger.", "visual.deepstack_merger_list.")


def part_of(name: str) -> str:
    """Which of PARTS a parameter belongs to: the mergers translate between vision tower and language model."""
    if any(merger in name for merger in MERGERS):
        return "merger"
    return "vit" if "visual." in name else "lm"


def freeze_parts(model: nn.Module, parts: Iterable[str]) -> None:
    """Take parts out of training; before the model is parallelized."""
    frozen = set(parts)
    for name, parameter in model.named_parameters():
        if part_of(name) in frozen:
            parameter.requires_grad_(False)


class Schedule:
    """Learning rates by step: a linear rise, then a cosine down to a share of the peak, or the peak."""

    def __init__(self, optimizer: torch.optim.Optimizer, options: TrainOptions) -> None:
        self.optimizer = optimizer
        self.peaks = [group["lr"] for group in optimizer.param_groups]
        self.options = options

    def factor(self, step: int) -> float:
        """Of the peak, for optimizer step `step`, counted from 0."""
        options = self.options
        if step < options.warmup_steps:
            return (step + 1) / options.warmup_steps
        if options.schedule == "constant":
            return 1.0
        done = (step - options.warmup_steps) / max(1, options.max_steps - options.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
        return options.min_lr_ratio + (1 - options.min_lr_ratio) * cosine

    def set(self, step: int) -> None:
        """Write the rates of a step into the optimizer."""
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * self.factor(step)


def make_optimizer(model: nn.Module, options: TrainOptions, device_type: str) -> torch.optim.AdamW:
    """AdamW; a group for each part, with and without decay, and mesh (multi-tensor kernels cannot mix meshes).

    Raises:
        ValueError: nothing to train.
    """
    found: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found.setdefault((part_of(name), parameter.ndim > 1), []).append(parameter)
    groups = []
    for part in PARTS:
        for decays in (True, False):
            for group in param_groups_by_mesh(found.get((part, decays), [])):
                decay = options.weight_decay if decays else 0.0
                groups.append({**group, "lr": options.lr_of(part), "weight_decay": decay})
    if not groups:
        raise ValueError("no parameter is left to train; freeze less.")
    implementation = options.optimizer or ("fused" if device_type == "cuda" else "foreach")
    return torch.optim.AdamW(
        groups,
        betas=(options.beta1, options.beta2),
        eps=options.eps,
        **{implementation: True},  # type: ignore[arg-type]
    )
