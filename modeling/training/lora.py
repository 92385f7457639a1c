"""LoRA adapters by PEFT on a model that is then sharded: attention, and the stacked weights of the experts.

PEFT gives the modules, their names and the files, so an adapter trained here loads wherever PEFT runs, upstream's model
included. What differs is how the experts' adapters act. PEFT adds B A to the stacked weight by registering a
parametrization for the time of a forward, which moves the parameter away from FSDP and knows no expert parallelism.
Here hooks do it, behind FSDP's gathering: each rank adds the product for its own experts only. Gradients need no
special case: they are summed over all ranks, and a rank's are zero for experts that it does not hold.

    add_lora(model, options)             before parallelize_model; the model may be on the meta device
    parallelize_model(model)
    load_base(model, folder)             base weights by their own names, adapters drawn from the seed
    save_adapter(model, folder)          adapter_config.json and adapter_model.safetensors, as PEFT writes them
    merge_and_remove(model)              W + B A in place, sharded as it is; names are the base model's again
"""

import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from modeling.distributed.checkpoint import load_checkpoint
from modeling.distributed.failures import fail_together
from modeling.distributed.parallel_state import ParallelState, get_parallel_state
from modeling.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextExperts

ADAPTER = "default"
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def lora_config(targets: str, rank: int, alpha: int) -> LoraConfig:
    """PEFT's config for `targets`: "attention" or "attention+experts"."""
    experts = EXPERTS if targets == "attention+experts" else None
    return LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=ATTENTION, target_parameters=experts, task_type="CAUSAL_LM"
    )


def add_lora(model: nn.Module, config: LoraConfig) -> nn.Module:
    """Put adapters into the model, in place, and freeze everything else. Call it before `parallelize_model`."""
    inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    for wrapper in _outermost(model):
        if isinstance(wrapper, ParamWrapper):
            _apply_by_hooks(wrapper)
    return model


def _outermost(model: nn.Module) -> list[Any]:
    """Adapter layers that no other adapter layer wraps."""
    inside = {id(child) for layer in model.modules() if isinstance(layer, LoraLayer) for child in layer.children()}
    return [layer for layer in model.modules() if isinstance(layer, LoraLayer) and id(layer) not in inside]


def _chain(wrapper: Any) -> Iterator[Any]:
    """The wrapper and those inside it: one for each adapted parameter of the same experts."""
    while isinstance(wrapper, ParamWrapper):
        yield wrapper
        wrapper = wrapper.base_layer


def _factors(wrapper: Any) -> tuple[Tensor, Tensor, float]:
    """A (E, r, in), B (out, r, E) and the scale, as views of what PEFT stores for stacked experts."""
    a, b = wrapper.lora_A[ADAPTER].weight, wrapper.lora_B[ADAPTER].weight  # (E r, in), (out, r E)
    experts = wrapper.num_experts
    return a.view(experts, -1, a.shape[1]), b.view(b.shape[0], -1, experts), wrapper.scaling[ADAPTER]


def _apply_by_hooks(outermost: Any) -> None:
    """Let hooks on the experts add the adapters' products in place of PEFT's own way.

    They shadow the parameters for the time of the experts' forward. They run inside FSDP's: its own hook, which
    gathers, stands before any other, and the adapters' factors are gathered with the decoder layer around them.
    """
    experts = outermost.get_base_layer()
    if not isinstance(experts, Qwen3VLMoeTextExperts):
        raise ValueError(f"adapters of stacked parameters are known for experts only, not {type(experts).__name__}.")
    wrappers = list(_chain(outermost))
    for wrapper in wrappers:
        wrapper._disable_adapters = True  # its forward then only calls what it wraps

    def shadow(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        for wrapper in wrappers:
            weight = module._parameters[wrapper.parameter_name]
            assert weight is not None
            local = weight.to_local() if isinstance(weight, DTensor) else weight  # (e, out, in)
            module.__dict__[wrapper.parameter_name] = _with_product(local, wrapper)

    def reveal(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        for wrapper in wrappers:
            module.__dict__.pop(wrapper.parameter_name, None)

    handles = (experts.register_forward_pre_hook(shadow), experts.register_forward_hook(reveal, always_call=True))
    outermost.adapter_hooks = handles


def _with_product(local: Tensor, wrapper: Any) -> Tensor:
    """W + scale * B A of this rank's experts: (e, out, in), in the weight's dtype."""
    a, b, scale = _factors(wrapper)
    own = local.shape[0]
    first = get_parallel_state().ep_rank * own if own < wrapper.num_experts else 0
    a, b = a[first : first + own], b[:, :, first : first + own].permute(2, 0, 1)  # (e, r, in), (e, out, r)
    return torch.baddbmm(local, b.to(local.dtype), a.to(local.dtype), alpha=scale)


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """The model with its base layers in the adapters' places, so that names are a checkpoint's."""
    names = {id(module): name for name, module in model.named_modules()}
    layers = {names[id(layer)]: layer for layer in _outermost(model)}
    for name, layer in layers.items():
        model.set_submodule(name, layer.get_base_layer())
    try:
        yield
    finally:
        for name, layer in layers.items():
            model.set_submodule(name, layer)


def load_base(
    model: nn.Module,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    parallel_state: ParallelState | None = None,
) -> None:
    """Base weights from a checkpoint in any layout; adapters as LoRA begins: A from the seed, B zero."""
    state = parallel_state or get_parallel_state()
    if any(parameter.is_meta for parameter in model.parameters()):
        model.to_empty(device=state.device_type)
    with without_adapters(model):
        load_checkpoint(model, folder, dtype=dtype, parallel_state=state)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            _begin(name, parameter, seed)


@torch.no_grad()
def _begin(name: str, parameter: Tensor, seed: int) -> None:
    """PEFT's own start, from a generator of the name, so that it is the same on any mesh."""
    local, block = _local_block(parameter)
    if "lora_B" in name:
        local.zero_()
        return
    generator = torch.Generator().manual_seed(seed * 1_000_003 + zlib.crc32(name.encode()))
    bound = 1 / math.sqrt(parameter.shape[1])  # kaiming_uniform_ with a = sqrt(5)
    whole = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
    local.copy_(whole[block])


def _local_block(parameter: Tensor) -> tuple[Tensor, tuple[slice, ...]]:
    """What this rank holds of a parameter, and where that lies in the whole."""
    if not isinstance(parameter, DTensor):
        return parameter, tuple(slice(0, size) for size in parameter.shape)
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return parameter.to_local(), tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))


def _whole(parameter: Tensor) -> Tensor:
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


@torch.no_grad()
def _merge(layer: Any) -> None:
    """Add one adapter to its base weight, each rank to its own part; a collective."""
    a, b = _whole(layer.lora_A[ADAPTER].weight).float(), _whole(layer.lora_B[ADAPTER].weight).float()
    scale = layer.scaling[ADAPTER]
    if isinstance(layer, ParamWrapper):
        local, (experts, rows, columns) = _local_block(layer.get_param())
        a = a.view(layer.num_experts, -1, a.shape[1])[experts, :, columns]  # (e, r, in)
        b = b.view(b.shape[0], -1, layer.num_experts)[rows, :, experts].permute(2, 0, 1)  # (e, out, r)
    else:
        local, (rows, columns) = _local_block(layer.get_base_layer().weight)
        a, b = a[:, columns], b[rows]
    if local.numel():
        local.copy_(local.float() + scale * (b @ a))


def merge_and_remove(model: nn.Module) -> nn.Module:
    """Fold the adapters into the base weights and take them out, in place. For export: FSDP still remembers them."""
    for layer in [module for module in model.modules() if isinstance(module, LoraLayer)]:
        _merge(layer)
    names = {id(module): name for name, module in model.named_modules()}
    for layer in _outermost(model):
        model.set_submodule(names[id(layer)], layer.get_base_layer())
        if isinstance(layer, ParamWrapper):
            handles: Any = layer.adapter_hooks
            for handle in handles:
                handle.remove()
    assert not any(isinstance(module, BaseTunerLayer) for module in model.modules())
    return model


def save_adapter(
    model: nn.Module, config: LoraConfig, folder: str | Path, *, parallel_state: ParallelState | None = None
) -> None:
    """Write the adapters as PEFT does; a collective, rank 0 writes."""
    state = parallel_state or get_parallel_state()
    whole = {name: _whole(p.detach()) for name, p in model.named_parameters() if "lora_" in name}
    with fail_together(state.world_group):
        if state.rank == 0:
            folder = Path(folder)
            folder.mkdir(parents=True, exist_ok=True)
            named = get_peft_model_state_dict(model, state_dict=whole, adapter_name=ADAPTER)
            tensors = {f"base_model.model.{name}": value.cpu().contiguous() for name, value in named.items()}
            save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
            config.inference_mode = True
            config.save_pretrained(str(folder))
            config.inference_mode = False
