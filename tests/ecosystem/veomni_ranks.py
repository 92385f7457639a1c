"""One rank of a VeOmni run on CPUs, and what it shares with the single-process tests.

VeOmni's own functions build the mesh, cut the experts, load the weights, collate and weigh the loss. FSDP alone is left
out (its gradient division needs NCCL): gradients are summed here as it would do, and divided by its world size.
"""

import logging
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

MESHES = {"dp2_ep2": {"dp_size": 2}, "sp2_ep2": {"ulysses_size": 2}}


def cpu_ops(moe: str = "fused_triton") -> Any:
    """VeOmni's kernel choices for a CPU. Its own experts must be `moe="eager"` there; for this model that name asks for
    the reference loop, which cannot be shared over ranks, and any other for its own choice."""
    from veomni.arguments.arguments_types import OpsImplementationConfig

    names = [name for name in OpsImplementationConfig.__dataclass_fields__ if name.endswith("_implementation")]
    eager = dict.fromkeys(set(names) - {"attn_implementation", "qat_implementation"}, "eager")
    return OpsImplementationConfig(**(eager | {"attn_implementation": "sdpa", "moe_implementation": moe}))


def join(rank: int, world: int, rendezvous: Path) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(str(rendezvous), world), rank=rank, world_size=world)


def run_rank(rank: int, world: int, checkpoint: Path, out: Path, features: list[dict[str, torch.Tensor]]) -> None:
    """For every mesh: a step's loss and whole gradients in out/<mesh>.pt, written by rank 0."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    join(rank, world, out / "rendezvous")
    from veomni.distributed.parallel_state import init_parallel_state, use_parallel_state

    from modeling.registry import register_with_veomni

    register_with_veomni()
    for name, sizes in MESHES.items():
        state = init_parallel_state(**sizes, device_type="cpu", extra_parallel_sizes=(2,), name=name)
        with use_parallel_state(state):
            loss, gradients = _step(checkpoint, state, features)
        if rank == 0:
            torch.save({"loss": loss, "gradients": gradients}, out / f"{name}.pt")
    dist.destroy_process_group()


def _step(checkpoint: Path, state: Any, features: list[dict[str, torch.Tensor]]) -> tuple[float, dict[str, Any]]:
    from veomni.data import MainCollator
    from veomni.models import build_foundation_model, load_model_weights
    from veomni.utils.loss_utils import count_loss_token, mean_global_loss

    model = build_foundation_model(
        str(checkpoint), str(checkpoint), torch_dtype="float32", init_device="meta", ops_implementation=cpu_ops()
    )
    model.get_parallel_plan().apply(model, state.extra_parallel_fsdp_device_mesh)
    load_model_weights(model, str(checkpoint), "cpu")
    model.train()
    model.gradient_checkpointing_enable()
    mine = features if state.sp_enabled else features[state.dp_rank :: state.dp_size]
    mine = [{key: value.clone() for key, value in feature.items()} for feature in mine]
    batch = MainCollator(metadata_collate_func=model.get_metadata_collate_func())(mine)
    losses = mean_global_loss(model(**batch, use_cache=False).loss, count_loss_token(batch), count_loss_token([batch]))
    loss = torch.stack(list(losses.values())).sum()
    loss.backward()

    total = loss.detach() / state.world_size
    dist.all_reduce(total)
    gradients = {}
    for name, parameter in model.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        if ".experts." in name:
            parts = [torch.empty_like(gradient) for _ in range(state.ep_size)]
            dist.all_gather(parts, gradient, group=state.ep_group)
            gradient = torch.cat(parts)
        else:
            dist.all_reduce(gradient)
        gradients[name] = gradient / state.world_size
    return total.item(), gradients
