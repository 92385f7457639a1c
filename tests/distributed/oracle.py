"""Upstream transformers in one process, fp32, sample by sample: what every mesh has to reproduce.

The summed loss over the number of valid labels, every parameter's gradient and their joint norm; with `balancing` the
load-balancing loss over all tokens joins in. Sample by sample, so that nothing upstream does about padding or packing
plays a part.
"""

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import load_balancing_loss_func

from tests.distributed.toy import IMAGE, TEXT, VIDEO, fill_weights, labels_of, samples_of, toy_config_dict


@dataclass(frozen=True)
class Reference:
    loss: float
    gradients: dict[str, Tensor]
    norm: float


@cache
def upstream_model(one_expert: bool, aligned: bool = False) -> Qwen3VLMoeForConditionalGeneration:
    model = Qwen3VLMoeForConditionalGeneration(Qwen3VLMoeConfig(**toy_config_dict(aligned)))
    fill_weights(model.state_dict(), one_expert)
    return model.train()


def forward(model: torch.nn.Module, sample: dict[str, Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Logits (L, V) and the router logits of the MoE layers."""
    ids = sample["input_ids"]
    types = (ids == IMAGE).long() + 2 * (ids == VIDEO).long()
    out = model(**sample, mm_token_type_ids=types, attention_mask=torch.ones_like(ids), output_router_logits=True)
    return out.logits[0], out.router_logits


def total_loss(model: torch.nn.Module, kind: str, balancing: bool = False) -> Tensor:
    """The loss of all eight samples of a kind."""
    total, count, routed = torch.zeros(()), 0, []
    for i, sample in enumerate(samples_of(kind)):
        logits, router_logits = forward(model, sample)
        targets = labels_of(kind, i, sample["input_ids"])[0, 1:]
        total = total + F.cross_entropy(logits[:-1], targets, ignore_index=-100, reduction="sum")
        count += int((targets != -100).sum())
        routed.append(router_logits)
    total = total / count
    if balancing:
        layers = tuple(torch.cat(layer) for layer in zip(*routed, strict=True))
        aux = load_balancing_loss_func(layers, TEXT["num_experts"], TEXT["num_experts_per_tok"])
        total = total + TEXT["router_aux_loss_coef"] * aux
    return total


@cache
def reference(kind: str, balancing: bool = False, frozen: str = "", aligned: bool = False) -> Reference:
    """`frozen`: name prefixes, comma-separated, whose parameters get no gradient. `aligned`: sizes, see `toy.py`."""
    model = upstream_model(kind == "one expert", aligned)
    freeze(model, frozen)
    model.zero_grad()
    loss = total_loss(model, kind, balancing)
    loss.backward()
    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    norm = torch.stack([g.double().norm() for g in gradients.values()]).norm().item()
    return Reference(loss.item(), gradients, norm)


@cache
def routes(kind: str, aligned: bool = False) -> list[list[Tensor]]:
    """The experts that every router chooses: for each of the eight samples one (L, K) per MoE layer."""
    with torch.no_grad():
        model = upstream_model(kind == "one expert", aligned)
        logits = [forward(model, sample)[1] for sample in samples_of(kind)]
    return [[layer.topk(TEXT["num_experts_per_tok"], dim=-1).indices for layer in sample] for sample in logits]


def freeze(model: torch.nn.Module, frozen: str) -> None:
    """Take every parameter out of training whose name contains one of the comma-separated words; "" trains all."""
    words = [word for word in frozen.split(",") if word]
    keep = [word.removeprefix("!") for word in words if word.startswith("!")]
    for name, parameter in model.named_parameters():
        hit = any(word in name for word in words if not word.startswith("!"))
        parameter.requires_grad_(not hit or any(word in name for word in keep))
