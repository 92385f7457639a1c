"""Qwen3-VL-MoE for training. `from modeling.qwen3_vl_moe import Qwen3VLMoeForCausalLM`."""

from modeling.qwen3_vl_moe.configuration_qwen3_vl_moe import (
    Qwen3VLMoeConfig,
    Qwen3VLMoeTextConfig,
    Qwen3VLMoeVisionConfig,
)
from modeling.qwen3_vl_moe.modeling_qwen3_vl_moe import (
    Qwen3VLMoeForCausalLM,
    Qwen3VLMoeForConditionalGeneration,
    Qwen3VLMoeModel,
    Qwen3VLMoePreTrainedModel,
    Qwen3VLMoeTextModel,
    Qwen3VLMoeVisionModel,
)

__all__ = [
    "Qwen3VLMoeConfig",
    "Qwen3VLMoeForCausalLM",
    "Qwen3VLMoeForConditionalGeneration",
    "Qwen3VLMoeModel",
    "Qwen3VLMoePreTrainedModel",
    "Qwen3VLMoeTextConfig",
    "Qwen3VLMoeTextModel",
    "Qwen3VLMoeVisionConfig",
    "Qwen3VLMoeVisionModel",
]
