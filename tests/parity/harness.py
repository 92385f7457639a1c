"""The parity check: this model against upstream transformers, in one process, fp32, by relative error of norms.

`compare` runs both models on the same inputs and returns what the tests hold against the bounds; `check` applies the
bounds. The negative controls run the same `check` on broken copies and expect it to fail.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3VLMoeForConditionalGeneration as Upstream

from modeling.qwen3_vl_moe import Qwen3VLMoeForCausalLM

# fp32 rounding: sums in another order (matrix-product patch embedding, sorted experts, chunked loss).
LOGITS_BOUND = 2e-6
HIDDEN_BOUND = 2e-6
GRADIENT_BOUND = 5e-6


def load_pair(folder: Path, attention: str = "sdpa", moe: str = "fused", dtype: torch.dtype = torch.float32) -> tuple:
    """(ours, upstream) from the same folder, in eval mode."""
    ours = Qwen3VLMoeForCausalLM.from_pretrained(folder, attn_implementation=attention, dtype=dtype)
    for module in ours.modules():
        if hasattr(module, "backend"):
            module.backend = "eager" if moe == "eager" else None
    upstream = Upstream.from_pretrained(folder, attn_implementation=attention, dtype=dtype)
    return ours, upstream


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """||value - reference|| / ||reference||, in float64; the plain norm where the reference is zero."""
    value, reference = value.detach().double(), reference.detach().double()
    scale = reference.norm()
    return ((value - reference).norm() / (scale if scale > 0 else 1.0)).item()


def labels_of(inputs: Mapping[str, torch.Tensor], image_ids: tuple[int, int] = (151655, 151656)) -> torch.Tensor:
    """Every real text token is a target; padding and placeholders are ignored."""
    ids = inputs["input_ids"]
    ignore = (ids == image_ids[0]) | (ids == image_ids[1]) | (inputs["attention_mask"] == 0)
    return ids.masked_fill(ignore, -100)


def routers(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [module for name, module in model.named_modules() if name.endswith("mlp.gate")]


@contextmanager
def pinned(model: torch.nn.Module, choices: list[torch.Tensor]) -> Iterator[None]:
    """Every router of `model` takes these experts (T, K), weighted by its own probabilities for them."""

    def pin(indices: torch.Tensor) -> Callable:
        def hook(module: Any, args: Any, output: tuple) -> tuple:
            logits, scores, _ = output
            weights = logits.softmax(-1, dtype=torch.float).gather(-1, indices)
            return logits, (weights / weights.sum(-1, keepdim=True)).to(scores.dtype), indices

        return hook

    hooks = [router.register_forward_hook(pin(c)) for router, c in zip(routers(model), choices, strict=True)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def reference_choices(upstream: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """What each router chose in the fp32 reference: one (T, K) per MoE layer."""
    found: list[torch.Tensor] = []
    hooks = [router.register_forward_hook(lambda m, a, out: found.append(out[2])) for router in routers(upstream)]
    with torch.no_grad():
        upstream(**inputs)
    for hook in hooks:
        hook.remove()
    return found


@dataclass
class Parity:
    """Relative errors of one comparison."""

    logits: float
    loss: float
    hidden_states: list[float]
    router_flips: int
    gradients: dict[str, float] = field(default_factory=dict)

    def check(self) -> None:
        """Raise an AssertionError that names what is out of bounds."""
        assert self.logits <= LOGITS_BOUND, f"logits differ by {self.logits:.2e}, bound {LOGITS_BOUND:.0e}"
        assert self.loss <= LOGITS_BOUND, f"loss differs by {self.loss:.2e}, bound {LOGITS_BOUND:.0e}"
        for layer, error in enumerate(self.hidden_states):
            assert error <= HIDDEN_BOUND, f"hidden state {layer} differs by {error:.2e}, bound {HIDDEN_BOUND:.0e}"
        assert self.router_flips == 0, f"{self.router_flips} router choices differ"
        worst = max(self.gradients, key=lambda name: self.gradients[name], default=None)
        if worst is not None:
            error = self.gradients[worst]
            assert error <= GRADIENT_BOUND, f"gradient of {worst} differs by {error:.2e}, bound {GRADIENT_BOUND:.0e}"


def top_choices(router_logits: tuple[torch.Tensor, ...], top_k: int, keep: torch.Tensor) -> torch.Tensor:
    """(layers, kept tokens, K) chosen experts, as sorted sets."""
    return torch.stack([logits[keep.flatten()].topk(top_k, dim=-1).indices.sort(-1).values for logits in router_logits])


def gradients(model: torch.nn.Module, inputs: Mapping[str, Any], labels: torch.Tensor) -> tuple[float, dict]:
    """The training loss and every parameter's gradient, zeros where there is none."""
    model.train()
    model.zero_grad(set_to_none=True)
    loss = model(**inputs, labels=labels).loss
    loss.backward()
    model.eval()
    found = {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return loss.item(), found


def compare(
    ours: torch.nn.Module,
    upstream: torch.nn.Module,
    inputs: Mapping[str, Any],
    ours_inputs: Mapping[str, Any] | None = None,
    with_gradients: bool = True,
) -> Parity:
    """Both models on `inputs` (ours on `ours_inputs` where its call differs), real tokens only."""
    ours_inputs = inputs if ours_inputs is None else ours_inputs
    keep = inputs["attention_mask"].bool()
    asked = {"output_hidden_states": True, "output_router_logits": True}
    labels = labels_of(inputs)
    with torch.no_grad():
        ours_out, upstream_out = ours(**ours_inputs, **asked), upstream(**inputs, **asked)
    top_k = upstream.config.text_config.num_experts_per_tok
    flips = top_choices(ours_out.router_logits, top_k, keep) != top_choices(upstream_out.router_logits, top_k, keep)
    hidden = [
        relative_error(a[keep], b[keep])
        for a, b in zip(ours_out.hidden_states, upstream_out.hidden_states, strict=True)
    ]
    loss_error, errors = 0.0, {}
    if with_gradients:
        ours_loss, ours_grads = gradients(ours, ours_inputs, labels)
        upstream_loss, upstream_grads = gradients(upstream, inputs, labels)
        loss_error = abs(ours_loss - upstream_loss) / abs(upstream_loss)
        assert ours_grads.keys() == upstream_grads.keys()
        errors = {name: relative_error(ours_grads[name], upstream_grads[name]) for name in upstream_grads}
    return Parity(
        logits=relative_error(ours_out.logits[keep], upstream_out.logits[keep]),
        loss=loss_error,
        hidden_states=hidden,
        router_flips=int(flips.sum()),
        gradients=errors,
    )
