"""What the ranks run: a toy model on a mesh, batches for it, and its whole gradients."""

from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from modeling.data.collator import SequenceParallelCollator
from modeling.distributed.encoder_data_balance import EncoderDataBalancer
from modeling.distributed.parallel_state import ParallelState, init_parallel_state, use_parallel_state
from modeling.distributed.parallelize import clip_grad_norm_, parallelize_model
from modeling.distributed.sequence_parallel import padded_length
from modeling.qwen3_vl_moe import Qwen3VLMoeForCausalLM
from tests.distributed.device import rank_device, to_device
from tests.distributed.oracle import freeze
from tests.distributed.toy import PADDED_LENGTH, fill_weights, labels_of, samples_of, toy_config
from tests.features import feature_of
from tests.parity.harness import pinned


@dataclass(frozen=True)
class Mesh:
    """Sizes of a mesh, in the order in which they are spoken: dp_shard, dp_replicate, sp, ep."""

    shard: int = 1
    replicate: int = 1
    sp: int = 1
    ep: int = 1

    @property
    def world(self) -> int:
        return self.shard * self.replicate * self.sp

    def __str__(self) -> str:
        return f"shard{self.shard}-replicate{self.replicate}-sp{self.sp}-ep{self.ep}"


@dataclass(frozen=True)
class Options:
    """How the model is parallelized and run, besides its mesh."""

    parallelize: dict[str, Any] = field(default_factory=dict)
    balancing: bool = False
    """Add the load-balancing loss."""
    frozen: str = ""
    encoder_balance: bool = False
    aligned: bool = False
    """The larger sizes of `toy.py`."""


@cache
def state_of(mesh: Mesh) -> ParallelState:
    """The state of a mesh, built once per process: a mesh is some nine process groups."""
    with use_parallel_state(None):
        return init_parallel_state(mesh.shard, mesh.sp, mesh.ep, mesh.replicate, device_type=rank_device())


@cache
def single_process_model() -> Qwen3VLMoeForCausalLM:
    return Qwen3VLMoeForCausalLM(toy_config())


def build(one_expert: bool = False, frozen: str = "", aligned: bool = False, **text: object) -> Qwen3VLMoeForCausalLM:
    """The toy model with its weights, in training mode, not yet parallel."""
    model = Qwen3VLMoeForCausalLM(toy_config(aligned, **text))
    fill_weights(model.state_dict(), one_expert)
    freeze(model, frozen)
    return model.train()


@cache
def features_of(kind: str) -> list[dict[str, Tensor]]:
    features = []
    for i, sample in enumerate(samples_of(kind)):
        feature = feature_of(sample, single_process_model())
        features.append(feature | {"labels": labels_of(kind, i, sample["input_ids"])[0]})
    return features


def batch_of(kind: str, state: ParallelState) -> dict[str, Any]:
    """This rank's batch, on its device: its share of the eight samples, packed, padded where the kind says so, and
    sliced."""
    share = 8 // state.dp_size
    collator = SequenceParallelCollator(
        state.sp_size,
        state.sp_rank,
        single_process_model().get_metadata_collate_func(),
        pad_to_length=PADDED_LENGTH[state.dp_size] if kind == "padded" else None,
    )
    batch = collator(features_of(kind)[state.dp_rank * share : (state.dp_rank + 1) * share])
    return to_device(batch, state.device_type)


def routes_of(choices: list[list[np.ndarray]], kind: str, state: ParallelState) -> list[Tensor]:
    """This rank's part of the experts that every sample's tokens take, as `batch_of` packs, pads and slices the tokens.

    choices: for each of the eight samples one (L, K) per MoE layer. Returns one (s, K) per MoE layer.
    """
    share = 8 // state.dp_size
    own = choices[state.dp_rank * share : (state.dp_rank + 1) * share]
    layers = [torch.from_numpy(np.concatenate(layer)) for layer in zip(*own, strict=True)]
    length = max(len(layers[0]), PADDED_LENGTH[state.dp_size] if kind == "padded" else 0)
    length = padded_length(length, state.sp_size)
    # Where padding goes is all the same: the first K experts.
    whole = [torch.arange(layer.shape[1]).repeat(length, 1) for layer in layers]
    for padded, layer in zip(whole, layers, strict=True):
        padded[: len(layer)] = layer
    part = slice(state.sp_rank * length // state.sp_size, (state.sp_rank + 1) * length // state.sp_size)
    return [layer[part].to(state.device_type) for layer in whole]


def summed(value: Tensor) -> float:
    total = value.detach().double().clone()
    dist.all_reduce(total)
    return total.item()


def whole_gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """Every trainable parameter's gradient as one tensor; a collective. A missing gradient is an error here, but for a
    rank that is alone: it has no one to run the vision tower for where it has no images, and those gradients are zero.
    """
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.grad is None and dist.get_world_size() == 1:
            gradients[name] = torch.zeros(parameter.shape, device=parameter.device)
        elif parameter.requires_grad:
            assert parameter.grad is not None, f"{name} has no gradient"
            # A copy: where one rank holds all of it, full_tensor() is the gradient itself, which clipping scales.
            gradients[name] = parameter.grad.full_tensor().clone()
    return gradients


def make_parallel(mesh: Mesh, options: Options, one_expert: bool = False) -> tuple[torch.nn.Module, ParallelState]:
    state = state_of(mesh)
    model = build(one_expert, options.frozen, options.aligned)
    model = parallelize_model(model, parallel_state=state, **options.parallelize)
    if options.encoder_balance:
        vision = model.config.vision_config
        balancer = EncoderDataBalancer(
            vision.spatial_merge_size, vision.hidden_size, vision.intermediate_size, parallel_state=state
        )
        model.set_encoder_data_balance(balancer)
    return model, state


def gradients_of(
    mesh: Mesh, kind: str, options: Options = Options(), choices: list[list[np.ndarray]] | None = None
) -> dict[str, Any] | None:
    """Loss, whole gradients and clipping norm of one step; from rank 0, None from the others.

    choices: the experts that the tokens take (see `routes_of`); None leaves it to the routers.
    """
    model, state = make_parallel(mesh, options, one_expert=kind == "one expert")
    held = nullcontext() if choices is None else pinned(model, routes_of(choices, kind, state))
    with use_parallel_state(state), held:
        loss = model(**batch_of(kind, state), output_router_logits=options.balancing).loss
        loss.backward()
        gradients = whole_gradients(model)
        norm = clip_grad_norm_(model, 1.0).item()
        clipped = whole_gradients(model)
    result = {
        "loss": summed(loss),
        "norm": norm,
        "clipped_norm": torch.stack([g.double().norm() for g in clipped.values()]).norm().item(),
        "gradients": {name: gradient.cpu().numpy() for name, gradient in gradients.items()},
    }
    return result if dist.get_rank() == 0 else None
