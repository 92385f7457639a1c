"""From a model to its parallel form: experts are sliced, layers recompute, FSDP2 shards what is left.

    model = parallelize_model(model)        # every parameter becomes a DTensor; full_tensor() is the whole of it

Gradients are sums over ranks, never means: FSDP reduces with SUM and divides by nothing, because a rank's loss already
is its share of the global loss. What the model must say about itself is `ParallelizableModel`; nothing here knows more.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers.modeling_layers import GradientCheckpointingLayer

from .expert_parallel import recompute_context_fn
from .parallel_plan import ParallelPlan
from .parallel_state import ParallelState, get_parallel_state

RECOMPUTE = ("none", "full", "selective")


class ParallelizableModel(Protocol):
    """What a model tells about itself, besides being an nn.Module of transformers' `GradientCheckpointingLayer`s."""

    fsdp_modules: Sequence[str]
    """Class names of the modules whose parameters are gathered together, each for the time it runs."""

    def get_parallel_plan(self) -> ParallelPlan:
        """The expert weights."""

    def check_parallel_state(self, state: ParallelState) -> None:
        """Raise a ValueError for sizes that do not divide the model's."""

    def get_input_embeddings(self) -> nn.Module: ...

    def get_output_embeddings(self) -> nn.Module | None: ...


def parallelize_model(
    model: Any,
    *,
    parallel_state: ParallelState | None = None,
    param_dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype | None = torch.float32,
    recompute: str = "none",
    reshard_after_forward: bool | int = True,
    prefetch: int = 1,
) -> Any:
    """Slice experts, switch on recomputation, shard with FSDP2; in place.

    Freeze parameters before the call. A model on the meta device stays there until `load_checkpoint`, so that no rank
    ever holds more than its part; one with real weights must have the same on every rank.

    Args:
        model: a `ParallelizableModel`.
        parallel_state: None takes the current one.
        param_dtype: mixed precision: parameters are kept in their own dtype and gathered in this one. None computes in
            the dtype they have.
        reduce_dtype: gradients are summed over ranks in this dtype, and kept in the parameters'.
        recompute: "none"; "full" keeps only each layer's input; "selective" also keeps what matrix products and
            attention gave, and recomputes the cheap steps and the experts.
        reshard_after_forward: free gathered parameters between forward and backward (True), keep them (False), or
            spread them over this many ranks.
        prefetch: how many FSDP units are gathered ahead of the running one in forward, where expert parallelism makes
            the host wait and FSDP cannot run ahead by itself. In backward it is one.

    Returns: the model.

    Raises:
        ValueError: sizes that do not divide, with both numbers; an unknown `recompute`; mixed precision without ranks.
    """
    state = parallel_state or get_parallel_state()
    model.check_parallel_state(state)
    if state.ep_enabled:
        _slice_experts(model, state)
    set_recompute(model, recompute)
    if state.mesh is None:
        if param_dtype is not None:
            raise ValueError(
                f"param_dtype={param_dtype} needs FSDP, and this process was not started by torchrun; run "
                f"`torchrun --nproc-per-node 1`, or cast the model with model.to({param_dtype})."
            )
        return model
    if not any(parameter.is_meta for parameter in model.parameters()):
        model.to(state.device_type)
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False)
    _shard(model, state, policy, reshard_after_forward)
    _set_prefetch(model, prefetch)
    return model


def _slice_experts(model: Any, state: ParallelState) -> None:
    """Replace each planned parameter by a DTensor over the ep mesh that holds this rank's experts."""
    parameters = dict(model.named_parameters())
    for name, placement in model.get_parallel_plan().resolve("ep", parameters).items():
        parameter = parameters[name]
        experts, rows = parameter.shape[:2]
        if experts % state.ep_size:
            raise ValueError(
                f"{name} has {experts} experts, which ep_size={state.ep_size} does not divide; choose another ep_size."
            )
        if rows % state.ep_fsdp_size:
            raise ValueError(
                f"{name} has {rows} rows per expert, which dp_shard_size x sp_size / ep_size = {state.ep_fsdp_size} "
                "does not divide; raise ep_size, or use dp_replicate_size for some of the ranks."
            )
        module_name, _, attribute = name.rpartition(".")
        # Without a source rank: every rank has the same weights, or none yet (meta), so nothing needs to be sent.
        local = distribute_tensor(parameter.data, state.ep_mesh, [placement], src_data_rank=None)
        sliced = nn.Parameter(local, requires_grad=parameter.requires_grad)
        setattr(model.get_submodule(module_name), attribute, sliced)


def _keep_products(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Selective recomputation: outputs of matrix products and attention kernels are kept."""
    name = str(op)
    kept = ("aten.mm.", "aten.addmm.", "attention", "flash_attn", "varlen")
    return CheckpointPolicy.MUST_SAVE if any(part in name for part in kept) else CheckpointPolicy.PREFER_RECOMPUTE


def set_recompute(model: Any, recompute: str) -> None:
    """Set how `model`'s checkpointed layers (or those of a part of it) recompute; see `parallelize_model`."""
    if recompute not in RECOMPUTE:
        raise ValueError(f"recompute={recompute!r} is unknown; choose one of {', '.join(map(repr, RECOMPUTE))}.")
    if recompute == "none":
        return
    context_fn: Callable[[], Any] = recompute_context_fn
    if recompute == "selective":
        inner = partial(create_selective_checkpoint_contexts, _keep_products)
        context_fn = partial(recompute_context_fn, inner)
    text_config = model.config.get_text_config().to_dict()
    # Restoring the random state waits for the device; worth it only where something draws from it.
    uses_dropout = any(key.endswith("dropout") and value for key, value in text_config.items())
    run = partial(checkpoint, use_reentrant=False, context_fn=context_fn, preserve_rng_state=uses_dropout)
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module._gradient_checkpointing_func = run
            module.gradient_checkpointing = True


def compile_blocks(model: Any, parallel_state: ParallelState | None = None) -> None:
    """torch.compile every block of `model` (or of a part of it), in place; the first step then takes its time.

    Blocks have no graph break on one rank, and a break is an error there; the exchanges of sequence and expert
    parallelism are left to run as they are, between compiled pieces. Call it before `parallelize_model`.
    """
    state = parallel_state or get_parallel_state()
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.compile(fullgraph=not (state.sp_enabled or state.ep_enabled))


def _shard(model: Any, state: ParallelState, policy: MixedPrecisionPolicy, reshard_after_forward: bool | int) -> None:
    """`fully_shard` bottom-up, then SUM instead of AVG on every unit."""
    shard = partial(fully_shard, mp_policy=policy, reshard_after_forward=reshard_after_forward)
    expert_modules = set()
    if state.ep_enabled:
        planned = model.get_parallel_plan().resolve("ep", (name for name, _ in model.named_parameters()))
        expert_modules = {model.get_submodule(name.rpartition(".")[0]) for name in planned}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and head.weight is embedding.weight
    for module in reversed(list(model.modules())):
        if module in expert_modules:
            # Experts are cut on dim 0 already; FSDP cuts the rows of each, so that the whole is one plain (E, R, C).
            shard(module, mesh=state.ep_fsdp_mesh, shard_placement_fn=_second_dimension)
        elif type(module).__name__ in model.fsdp_modules or (module is embedding and not tied):
            shard(module, mesh=state.fsdp_mesh)
    # The loss reads the head's weight outside the head's own forward: it stays with the root, gathered throughout.
    fully_shard(model, mesh=state.fsdp_mesh, mp_policy=policy)
    for unit in _units(model):
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)


def _second_dimension(_: nn.Parameter) -> Shard:
    return Shard(1)


def _units(module: nn.Module) -> list[FSDPModule]:
    return [child for child in module.modules() if isinstance(child, FSDPModule)]


def _set_prefetch(model: nn.Module, prefetch: int) -> None:
    """Chain the units of every list of layers; a layer's experts follow their layer.

    Backward is left to FSDP, which gathers one unit ahead: a chain set by hand would be followed once per output of a
    layer, and router logits, which are one, would have the layer's experts gathered again after they are done.
    """
    if prefetch < 0:
        raise ValueError(f"prefetch={prefetch}; it counts units gathered ahead, 0 for none.")
    for stack in (module for module in model.modules() if isinstance(module, nn.ModuleList)):
        units = [unit for layer in stack for unit in _units(layer)]
        for i, unit in enumerate(units):
            unit.set_modules_to_forward_prefetch(units[i + 1 : i + 1 + prefetch])


def param_groups_by_mesh(parameters: Iterable[nn.Parameter]) -> list[dict[str, list[nn.Parameter]]]:
    """Optimizer parameter groups with one mesh each: multi-tensor optimizers cannot mix experts with the rest."""
    groups: dict[Any, list[nn.Parameter]] = {}
    for parameter in parameters:
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        groups.setdefault(mesh, []).append(parameter)
    return [{"params": group} for group in groups.values()]


def _local_gradients(parameters: Iterable[nn.Parameter]) -> Iterator[Tensor]:
    for parameter in parameters:
        if parameter.grad is not None:
            yield parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad


@torch.no_grad()
def clip_grad_norm_(model: nn.Module, max_norm: float, *, parallel_state: ParallelState | None = None) -> Tensor:
    """Scale all gradients so that their joint 2-norm, over all parameters and ranks, is at most `max_norm`.

    Dense and expert parameters lie on different meshes, but either is spread once over the dp_shard x sp ranks of a
    copy: so the squares of all local parts are summed in one all-reduce. No host synchronisation.

    Returns: the norm before clipping, a float32 scalar tensor, the same on every rank.
    """
    state = parallel_state or get_parallel_state()
    gradients = list(_local_gradients(model.parameters()))
    norms = torch._foreach_norm(gradients, 2, dtype=torch.float32) if gradients else []
    total = torch.stack(list(norms)).square().sum() if norms else torch.zeros((), device=state.device_type)
    if state.fsdp_grid is not None:
        dist.all_reduce(total, group=state.fsdp_grid["dp_shard_sp"].get_group())
    norm = total.sqrt()
    if gradients:
        torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm
