"""Floating-point operations of a training step, for MFU (model FLOPs utilisation; Chowdhery et al., 2022, appendix B).

Counted are the matrix products that the model needs: two operations per multiply-add, forward once and backward twice;
what is recomputed counts for nothing, what is padding neither. Attention in the language model counts half of L², since
it is causal; in the vision tower h*w keys for each patch of a frame.
"""

from collections.abc import Mapping
from typing import Any

import torch

from modeling.qwen3_vl_moe.modeling_qwen3_vl_moe import is_moe_layer

# Dense bf16 TFLOP/s without sparsity, as the vendors state them.
PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "H800": 989.0,
    "H20": 148.0,
    "A100": 312.0,
    "A800": 312.0,
    "L40S": 362.0,
    "MI300X": 1307.0,
}


def peak_flops(device_type: str) -> float | None:
    """A device's peak in FLOP/s; None where it is not known (CPUs)."""
    if device_type != "cuda":
        return None
    name = torch.cuda.get_device_name()
    return next((1e12 * peak for known, peak in PEAK_TFLOPS.items() if known in name), None)


class FlopCounter:
    """Counts a batch's operations from what the CPU knows of it.

    Args:
        config: the model's config.
        vit, merger, lm: whether each part is trained; gradients pass through what lies behind a trained part.
    """

    def __init__(
        self, config: Any, *, vit: bool = True, merger: bool = True, lm: bool = True, lora: bool = False
    ) -> None:
        self.text, self.vision = config.text_config, config.vision_config
        # Forward counts 1, gradients of activations 1, gradients of weights 1.
        self.vit_passes = 3 if vit else 1
        self.merger_passes = 3 if merger else (2 if vit else 1)
        self.lm_passes = 3 if lm and not lora else 2

    def per_token(self) -> int:
        """Of the decoder's matrices, for one token, forward; without attention scores and head."""
        text = self.text
        hidden, heads, kv_heads, dim = (
            text.hidden_size,
            text.num_attention_heads,
            text.num_key_value_heads,
            text.head_dim,
        )
        attention = hidden * dim * (2 * heads + 2 * kv_heads)
        dense = 3 * hidden * text.intermediate_size
        experts = hidden * text.num_experts + text.num_experts_per_tok * 3 * hidden * text.moe_intermediate_size
        moe = [is_moe_layer(text, i) for i in range(text.num_hidden_layers)]
        return 2 * sum(attention + (experts if is_moe else dense) for is_moe in moe)

    def language(self, lengths: list[int], predictions: int) -> int:
        """Forward, for samples of these lengths of which `predictions` tokens are predicted."""
        text = self.text
        scores = 2 * sum(length**2 for length in lengths) * text.num_attention_heads * text.head_dim
        head = 2 * predictions * text.hidden_size * text.vocab_size
        return sum(lengths) * self.per_token() + text.num_hidden_layers * scores + head

    def encoder(self, grids: list[tuple[int, int, int]]) -> tuple[int, int]:
        """Forward of the vision tower and of its mergers, for grids in patches."""
        vision = self.vision
        width = vision.hidden_size
        patches = sum(t * h * w for t, h, w in grids)
        scores = sum(t * (h * w) ** 2 for t, h, w in grids)
        pixels = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        block = 2 * patches * (4 * width**2 + 2 * width * vision.intermediate_size) + 4 * scores * width
        tower = vision.depth * block + 2 * patches * width * pixels
        wide = width * vision.spatial_merge_size**2
        tokens = patches // vision.spatial_merge_size**2
        merger = 2 * tokens * (wide**2 + wide * vision.out_hidden_size)
        return tower, merger * (1 + len(vision.deepstack_visual_indexes))

    def count(self, batch: Mapping[str, Any], predictions: int) -> int:
        """Forward and backward of one packed batch; of the whole row, whatever slice this rank works on."""
        lengths = batch["cu_seq_lens_q"].diff().tolist()
        if batch["tail_padding_length"]:
            lengths = lengths[:-1]
        metadata = batch.get("multimodal_metadata", {})
        grids = [(t, h, w) for kind in ("image", "video") for t, h, w in metadata.get(f"{kind}_grid_thw_list", [])]
        tower, mergers = self.encoder(grids)
        language = self.language(lengths, predictions)
        return self.vit_passes * tower + self.merger_passes * mergers + self.lm_passes * language
