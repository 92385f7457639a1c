"""This model as VeOmni runs it: built, loaded, cut over ranks and scaled by VeOmni's own trainer.

VeOmni's interface differs from this project's in five places, and each is met here, so that nothing of it reaches the
model:

- ranks and groups come from VeOmni's parallel state, not from ours;
- the loss is the mean over the rank's own tokens (under sequence parallelism: its sequence's), which VeOmni's trainer
  weighs by token counts, where this project returns a share of the global mean;
- weights arrive one tensor at a time, in whatever layout the files have;
- attention and expert kernels carry VeOmni's names;
- the parallel plan is VeOmni's class.

Written against VeOmni 0.1.12. Importing this module does not import it.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from huggingface_hub.dataclasses import strict
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from conversion.inventory import expected_tensors, model_dims
from conversion.layout import StoredTensor, is_per_expert, layouts_by_shape, logical_name, stored_tensors
from modeling.distributed.encoder_data_balance import EncoderDataBalancer
from modeling.distributed.parallel_state import ParallelState, set_parallel_state
from modeling.qwen3_vl_moe import configuration_qwen3_vl_moe as configuration
from modeling.qwen3_vl_moe import modeling_qwen3_vl_moe as modeling
from modeling.qwen3_vl_moe.parallel_plan import get_parallel_plan
from modeling.qwen3_vl_moe.pretrained import check_loading

# VeOmni's names for kernels wrapped for its own sequence parallelism; ours is wrapped around any of them.
ATTENTION_NAMES = {
    "veomni_flash_attention_2_with_sp": "flash_attention_2",
    "veomni_flash_attention_4_with_sp": "flash_attention_4",
}


@strict
class Qwen3VLMoeConfig(configuration.Qwen3VLMoeConfig):
    """The config plus the two fields that VeOmni's builder writes into it."""

    encoder_data_balance: bool = False
    encoder_data_balance_sorting_algo: str | None = None


def veomni_parallel_state(theirs: Any) -> ParallelState:
    """This project's state over the groups of VeOmni's; both order ranks alike (sp and ep innermost).

    Its `world_group` is the sequence's group: what losses are shares of, until VeOmni's trainer weighs them.

    Args:
        theirs: veomni.distributed.parallel_state.ParallelState.

    Raises:
        ValueError: a kind of parallelism that this model does not have.
    """
    unsupported = {"tp_size": theirs.tp_size, "pp_size": theirs.pp_size, "cp_size": theirs.cp_size}
    for name, size in unsupported.items():
        if size > 1:
            raise ValueError(f"{name}={size} is not supported by this model, set it to 1; it has dp, ulysses and ep.")
    return ParallelState(
        dp_replicate_size=theirs.dp_replicate_size,
        dp_shard_size=theirs.dp_shard_size,
        sp_size=theirs.ulysses_size,
        ep_size=theirs.ep_size,
        device_type=theirs.device_type,
        mesh=theirs.device_mesh,
        dp_group=theirs.dp_group if theirs.dp_size > 1 else None,
        sp_group=theirs.sp_group,
        ep_group=theirs.ep_group if theirs.ep_enabled else None,
        world_group=theirs.sp_group,
    )


class CheckpointTensors:
    """VeOmni's checkpoint converter: files' tensors, in any order, to this model's; hub, fused or per-expert layout.

    Raises (from `convert` and `finalize`):
        ValueError: a tensor that is unknown, misshapen or square (its layout cannot be told), or one that never came.
    """

    def __init__(self, config: configuration.Qwen3VLMoeConfig) -> None:
        self.dims = model_dims(config.to_dict())
        self.shapes = expected_tensors(self.dims)
        if self.dims.tied:
            del self.shapes["lm_head.weight"]
        self.done: set[str] = set()
        self.parts: dict[str, dict[str, torch.Tensor]] = {}

    def can_handle(self, name: str) -> bool:
        """All of them: `finalize` knows what is missing only if it has seen everything."""
        return True

    def convert(self, name: str, tensor: torch.Tensor) -> Any:
        """A tensor of the model, or None as long as an expert tensor is incomplete."""
        from veomni.models.checkpoint_tensor_loading import ConvertedCheckpointTensor

        logical = logical_name(name) or name
        if logical not in self.shapes:
            if self.dims.tied and name == "lm_head.weight":
                return None
            check_loading(set(), {name}, set())
        if is_per_expert(name):
            whole = self._collect(logical, name, tensor)
            if whole is None:
                return None
            tensor = whole
        elif logical_name(name) is not None:
            tensor = self._turn(name, tensor)
        if tuple(tensor.shape) != self.shapes[logical]:
            check_loading(set(), set(), {f"{name} {tuple(tensor.shape)}, expected {self.shapes[logical]}"})
        self.done.add(logical)
        return ConvertedCheckpointTensor(logical, tensor)

    def finalize(self) -> list[Any]:
        """Nothing is left over, or it is an error."""
        check_loading(self.shapes.keys() - self.done, set(), set())
        return []

    def _turn(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        layouts = layouts_by_shape(name, tuple(tensor.shape), self.dims.hidden, self.dims.expert_intermediate)
        if {"hub", "fused"} <= layouts:
            raise ValueError(
                f"{name} is square, {tuple(tensor.shape)}: its shape does not tell hub from fused layout. VeOmni's "
                "loader does not pass the files' stamps on; convert with --target per-expert: python "
                "conversion/veomni_to_hf.py INPUT OUTPUT --target per-expert"
            )
        return tensor.transpose(1, 2).contiguous() if "hub" in layouts else tensor

    def _collect(self, logical: str, name: str, tensor: torch.Tensor) -> torch.Tensor | None:
        """The whole expert tensor (E, R, C) once its last part has come."""
        experts, rows, columns = self.shapes[logical]
        parts = self.parts.setdefault(logical, {})
        parts[name] = tensor
        wanted: list[StoredTensor] = list(stored_tensors("per-expert", logical, (experts, rows, columns)))
        if len(parts) < len(wanted):
            return None
        check_loading({part.name for part in wanted} - parts.keys(), parts.keys() - {p.name for p in wanted}, set())
        return torch.cat([parts.pop(part.name) for part in wanted]).view(experts, rows, columns)


class Qwen3VLMoeForConditionalGeneration(modeling.Qwen3VLMoeForConditionalGeneration):
    """The model under VeOmni's parallel state, loss convention and kernel names."""

    config_class = Qwen3VLMoeConfig

    @classmethod
    def _from_config(cls, config: Qwen3VLMoeConfig, **kwargs: Any) -> "Qwen3VLMoeForConditionalGeneration":
        """transformers' own, after VeOmni's kernel names are translated."""
        from veomni.ops.config.singleton import get_ops_config

        attention = kwargs.pop("attn_implementation", None)
        attention = ATTENTION_NAMES.get(attention, attention)
        if attention not in (None, "eager", "sdpa", *ATTENTION_NAMES.values()):
            raise ValueError(
                f"attn_implementation={attention!r} is not one of this model's: choose flash_attention_4, "
                "flash_attention_2, sdpa (the fastest that is installed) or eager."
            )
        ops = get_ops_config()
        if ops is not None and ops.moe_implementation == "eager":
            config.text_config.moe_implementation = "eager"
        elif ops is not None and ops.moe_implementation == "fused_quack":
            config.text_config.moe_backend = "quack"
        return super()._from_config(config, attn_implementation=attention, **kwargs)

    def __init__(self, config: Qwen3VLMoeConfig) -> None:
        super().__init__(config)
        state = self._adopt_parallel_state()
        self.check_parallel_state(state)
        if config.encoder_data_balance:
            vision = config.vision_config
            world = dist.group.WORLD if state.world_size > 1 else None
            balancer = EncoderDataBalancer(
                vision.spatial_merge_size,
                vision.hidden_size,
                vision.intermediate_size,
                replace(state, world_group=world),
            )
            self.set_encoder_data_balance(balancer)

    @staticmethod
    def _adopt_parallel_state() -> ParallelState:
        """Make VeOmni's current state ours, also for a backward that recomputes outside of any context."""
        from veomni.distributed.parallel_state import get_parallel_state as get_veomni_state

        state = veomni_parallel_state(get_veomni_state())
        set_parallel_state(state)
        return state

    @staticmethod
    def _create_checkpoint_tensor_converter(model: Any) -> CheckpointTensors:
        """VeOmni's hook for loading."""
        return CheckpointTensors(model.config)

    def get_parallel_plan(self) -> Any:
        """VeOmni's ParallelPlan with this model's patterns."""
        from veomni.distributed.parallel_plan import ParallelPlan

        plan = get_parallel_plan().extra_parallel_plan
        return ParallelPlan(extra_parallel_plan={dim: dict(patterns) for dim, patterns in plan.items()})

    def forward(self, *args: Any, **kwargs: Any) -> MoeCausalLMOutputWithPast:
        """The model's forward; the loss is as VeOmni's trainer expects it (see the module's docstring)."""
        state = self._adopt_parallel_state()
        output = super().forward(*args, **kwargs)
        if output.loss is not None and state.sp_enabled:
            # A rank returns its share of its sequence's mean; VeOmni takes the mean over the sequence's ranks.
            output.loss = output.loss * state.sp_size
        return output


def config_class() -> type[Qwen3VLMoeConfig]:
    """What VeOmni's config registry holds."""
    return Qwen3VLMoeConfig


def model_class(architecture: str | None = None) -> type[Qwen3VLMoeForConditionalGeneration]:
    """What VeOmni's modeling registry holds.

    Raises:
        ValueError: an architecture other than the whole model.
    """
    if architecture not in (None, "Qwen3VLMoeForConditionalGeneration", "Qwen3VLMoeForCausalLM"):
        raise ValueError(
            f"architecture {architecture!r}: only Qwen3VLMoeForConditionalGeneration runs inside VeOmni; check "
            "`architectures` in config.json."
        )
    return Qwen3VLMoeForConditionalGeneration
