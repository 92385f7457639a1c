"""RMSNorm, rotary position embedding, and the two in one kernel."""

from modeling.ops.norm_rotary.norm import rms_norm, rms_norm_reference
from modeling.ops.norm_rotary.rotary import norm_rotate, rotate, rotate_qkv, rotate_reference

__all__ = ["norm_rotate", "rms_norm", "rms_norm_reference", "rotate", "rotate_qkv", "rotate_reference"]
