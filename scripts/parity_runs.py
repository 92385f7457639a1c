"""One run of a parity report: either implementation, loaded whole or layer by layer, and what its forward computes."""

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from conversion.checkpoint import open_checkpoint
from scripts.layerwise import build_layerwise, read_any_layout, read_by_shape

Batch = dict[str, torch.Tensor]


@dataclass
class Record:
    """What one run leaves behind, on the CPU in fp32; rows are the real tokens of all chats, in order."""

    vision: list[torch.Tensor]  # features (M, H) of each deepstack layer, then of the merger
    layers: list[torch.Tensor]  # each decoder layer's output (rows, H)
    experts: list[torch.Tensor]  # sorted chosen experts (rows, K) of each MoE layer
    logits: torch.Tensor  # (rows, V)


class Recorder:
    """Hooks on the modules that both implementations have, under the same names."""

    def __init__(self, model: Any, num_batches: int, routes: list[torch.Tensor] | None) -> None:
        self.parts: dict[tuple[str, int], list[torch.Tensor]] = defaultdict(list)
        self.real_tokens = torch.empty(0)  # (B*S,) bool of the batch that is running
        self.rows = slice(0, 0)  # its rows among those of all batches
        self.hooks: list[Any] = []
        visual, text = model.model.visual, model.model.language_model
        for i, merger in enumerate([*visual.deepstack_merger_list, visual.merger]):
            self.watch(merger, "vision", i, lambda output: output.detach().float().cpu())
        routers = [layer.mlp.gate for layer in text.layers if hasattr(layer.mlp, "gate")]
        for i, router in enumerate(routers):
            if routes is not None:
                self.hold(router, routes[i])
            self.watch(router, "experts", i, lambda output: self.keep(output[2]).sort(-1).values)
        # Standard error, and only where that is a terminal: a large model takes minutes for a run.
        self.progress = tqdm(total=len(text.layers) * num_batches, unit="layer", leave=False, disable=None)
        for i, layer in enumerate(text.layers):
            self.watch(layer, "layers", i, self.keep_layer)
        self.watch(model.lm_head, "logits", 0, self.keep)

    def keep(self, output: Any) -> torch.Tensor:
        """Rows of real tokens; of a tuple, of its first entry."""
        values = (output[0] if isinstance(output, tuple) else output).detach()
        values = values.flatten(0, -2)[self.real_tokens].cpu()
        return values.float() if values.is_floating_point() else values

    def keep_layer(self, output: Any) -> torch.Tensor:
        self.progress.update()
        return self.keep(output)

    def watch(self, module: nn.Module, kind: str, number: int, read: Callable[[Any], torch.Tensor]) -> None:
        """Append what `read` makes of the module's output at every forward."""

        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            self.parts[kind, number].append(read(output))

        self.hooks.append(module.register_forward_hook(hook))

    def hold(self, router: nn.Module, route: torch.Tensor) -> None:
        """Send every real token to the experts `route` (rows, K), weighed by this run's own logits."""

        def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
            logits, weights, indices = output
            indices = indices.clone()
            indices[self.real_tokens] = route[self.rows].to(indices)
            held = logits.softmax(-1, dtype=torch.float).gather(-1, indices)
            return logits, (held / held.sum(-1, keepdim=True)).to(weights.dtype), indices

        self.hooks.append(router.register_forward_hook(hook))

    def result(self) -> Record:
        self.progress.close()
        for hook in self.hooks:
            hook.remove()

        def joined(kind: str) -> list[torch.Tensor]:
            return [torch.cat(tensors) for (name, _), tensors in sorted(self.parts.items()) if name == kind]

        return Record(joined("vision"), joined("layers"), joined("experts"), joined("logits")[0])


def record(model: Any, batches: list[Batch], routes: list[torch.Tensor] | None = None) -> Record:
    """One forward per batch, in eval mode; with `routes`, (rows, K) of each MoE layer, the routing is held to those."""
    recorder = Recorder(model, len(batches), routes)
    for batch in batches:
        recorder.real_tokens = batch["attention_mask"].flatten().bool()
        start = recorder.rows.stop
        recorder.rows = slice(start, start + int(recorder.real_tokens.sum()))
        with torch.no_grad():
            model(**{k: v.to(model.dtype) if v.is_floating_point() else v for k, v in batch.items()})
    return recorder.result()


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise ValueError("/proc/meminfo names no MemAvailable: pass --layer-by-layer")


def fits(folder: Path, device: torch.device) -> bool:
    """Whether the checkpoint in fp32, and a fifth on top, fits into the device's free memory."""
    elements = sum(math.prod(location.info.shape) for location in open_checkpoint(folder).stored.values())
    return 1.2 * 4 * elements < free_memory(device)


def load(ours: bool, folder: Path, dtype: torch.dtype, device: torch.device, layerwise: bool) -> Any:
    """The model in eval mode: by its own `from_pretrained`, or layer by layer."""
    from transformers import Qwen3VLMoeForConditionalGeneration

    from modeling.qwen3_vl_moe import Qwen3VLMoeForCausalLM

    model_class = Qwen3VLMoeForCausalLM if ours else Qwen3VLMoeForConditionalGeneration
    if ours and open_checkpoint(folder).layout.layout not in ("hub", "fused"):
        layerwise = True  # from_pretrained reads those two
    if not layerwise:
        return model_class.from_pretrained(folder, dtype=dtype).to(device).eval()
    config = model_class.config_class.from_pretrained(folder)
    read = read_any_layout(folder) if ours else read_by_shape(folder)
    return build_layerwise(model_class, config, read, dtype, device)
