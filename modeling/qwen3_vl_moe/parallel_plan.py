"""Which of this model's parameters are cut over ranks, and which mesh sizes it can be cut by."""

from torch.distributed.tensor import Shard

from modeling.distributed.parallel_plan import ParallelPlan
from modeling.distributed.parallel_state import ParallelState
from modeling.qwen3_vl_moe.configuration_qwen3_vl_moe import Qwen3VLMoeConfig

EXPERTS = "model.language_model.layers.*.mlp.experts"


def get_parallel_plan() -> ParallelPlan:
    """Experts are cut on dim 0, whole experts to a rank."""
    return ParallelPlan(
        extra_parallel_plan={"ep": {f"{EXPERTS}.gate_up_proj": Shard(0), f"{EXPERTS}.down_proj": Shard(0)}}
    )


def check_parallel_state(config: Qwen3VLMoeConfig, state: ParallelState) -> None:
    """Raise a ValueError, with both numbers, for mesh sizes that this model cannot be cut by.

    Sequence parallelism exchanges slices of the sequence for whole heads, and slices of hidden for the fill-back of
    visual features. Key/value heads fewer than sp are repeated; more must divide.
    """
    sp = state.sp_size
    text, vision = config.text_config, config.vision_config
    for name, size in (
        ("hidden_size", text.hidden_size),
        ("num_attention_heads", text.num_attention_heads),
        ("vision num_heads", vision.num_heads),
    ):
        if size % sp:
            raise ValueError(f"sp_size={sp} does not divide {name}={size}; choose an sp_size that does.")
    key_heads = text.num_key_value_heads
    if key_heads % sp and sp % key_heads:
        raise ValueError(
            f"sp_size={sp} and num_key_value_heads={key_heads}: one must be a multiple of the other, so that key/value "
            "heads can be divided or repeated; choose another sp_size."
        )
    if text.num_experts % state.ep_size:
        raise ValueError(
            f"ep_size={state.ep_size} does not divide num_experts={text.num_experts}; choose an ep_size that does."
        )
    if state.ep_enabled and text.moe_implementation == "eager":
        raise ValueError(
            f"moe_implementation='eager' cannot reach experts on other ranks, and ep_size={state.ep_size}; use 'fused'."
        )
