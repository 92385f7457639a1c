"""A vision block as fused functions: `fused` holds them, `pointwise` their steps, `triton` and `quack` the kernels."""

from modeling.ops.vision_block.fused import can_fuse, norm_attention, norm_rotated_qkv, project_and_mlp

__all__ = ["can_fuse", "norm_attention", "norm_rotated_qkv", "project_and_mlp"]
