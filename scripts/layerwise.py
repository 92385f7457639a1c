"""Run a model that does not fit into memory: its parameters are read module by module, and dropped after use.

The model is built without parameters. A hook before the vision tower, the embedding, each decoder layer, the last norm
and the head reads that module's parameters from the checkpoint; a hook after it drops them. So one forward reads the
checkpoint once (the vision tower once per modality), and holds one decoder layer at a time: 2.5 GB of fp32 for the 30B
model, 10 GB for the 235B.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import nn

from conversion.checkpoint import open_checkpoint
from conversion.layout import logical_name, unpack

# (name, shape in memory) -> the parameter's values, on the CPU, in the checkpoint's dtype.
Reader = Callable[[str, torch.Size], torch.Tensor]


def read_by_shape(folder: Path) -> Reader:
    """Reads as transformers does, and owes nothing to this project's converter: a tensor whose stored shape is the
    parameter's is taken as it is, one with its last two dimensions exchanged is transposed.

    Only for checkpoints in the `hub` or `fused` layout whose expert matrices are not square.
    """
    index = folder / "model.safetensors.index.json"
    if index.exists():
        files = json.loads(index.read_text())["weight_map"]
    else:
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            files = dict.fromkeys(file.keys(), "model.safetensors")

    def read(name: str, shape: torch.Size) -> torch.Tensor:
        with safe_open(folder / files[name], framework="pt") as file:
            tensor = file.get_tensor(name)
        if len(shape) == 3 and shape[1] == shape[2]:
            raise ValueError(f"{name} is square, {tuple(shape)}: its shape does not tell whether to transpose it")
        if tensor.shape == shape:
            return tensor
        if len(shape) == 3 and tensor.shape == (shape[0], shape[2], shape[1]):
            return tensor.transpose(1, 2)
        raise ValueError(f"{name} is stored as {tuple(tensor.shape)}, the model needs {tuple(shape)}")

    return read


def read_any_layout(folder: Path) -> Reader:
    """Reads every layout this project knows, by its stamp and the converter's table."""
    checkpoint = open_checkpoint(folder)

    def stored(name: str, rank: int | None) -> torch.Tensor:
        with safe_open(checkpoint.stored[name, rank].path, framework="pt") as file:
            return file.get_tensor(name)

    def read(name: str, shape: torch.Size) -> torch.Tensor:
        if logical_name(name) is None:
            return stored(name, None)
        parts = {(part.name, part.ep_rank): stored(part.name, part.ep_rank) for part in checkpoint.parts(name)}
        out = torch.empty(shape, dtype=next(iter(parts.values())).dtype)
        return unpack(checkpoint.layout.layout, name, parts, out, checkpoint.layout.ep_size)

    return read


def build_layerwise(model_class: Any, config: Any, read: Reader, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The model in eval mode, ready for forwards under `torch.no_grad()`; its parameters stay on the meta device."""
    with init_empty_weights(include_buffers=False):
        model = model_class._from_config(config, dtype=dtype).eval()
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    tied = config.tie_word_embeddings
    for prefix, module in streamed_modules(model):
        source = "model.language_model.embed_tokens." if tied and prefix == "lm_head." else prefix
        _read_before_and_drop_after(module, source, read, dtype, device)
    return model


def streamed_modules(model: Any) -> list[tuple[str, nn.Module]]:
    """(name prefix, module) of the modules that are in memory one at a time; together they hold every parameter."""
    text = model.model.language_model
    modules: list[tuple[str, nn.Module]] = [
        ("model.visual.", model.model.visual),
        ("model.language_model.embed_tokens.", text.embed_tokens),
        *((f"model.language_model.layers.{i}.", layer) for i, layer in enumerate(text.layers)),
        ("model.language_model.norm.", text.norm),
        ("lm_head.", model.lm_head),
    ]
    covered = sum(len(list(module.parameters())) for _, module in modules)
    total = len(list(model.parameters(recurse=True)))
    assert covered in (total, total + 1), f"{covered} of {total} parameters are streamed"  # + 1: a tied head
    return modules


def _read_before_and_drop_after(
    module: nn.Module, prefix: str, read: Reader, dtype: torch.dtype, device: torch.device
) -> None:
    places = [
        (prefix + (f"{path}.{leaf}" if path else leaf), owner, leaf, parameter)
        for path, owner in module.named_modules()
        for leaf, parameter in owner.named_parameters(recurse=False)
    ]

    def load(_module: nn.Module, _args: Any) -> None:
        for name, owner, leaf, empty in places:
            values = read(name, empty.shape).to(device=device, dtype=dtype).contiguous()
            owner.register_parameter(leaf, nn.Parameter(values, requires_grad=False))

    def drop(_module: nn.Module, _args: Any, _output: Any) -> None:
        for _name, owner, leaf, empty in places:
            owner.register_parameter(leaf, empty)

    module.register_forward_pre_hook(load)
    module.register_forward_hook(drop)
