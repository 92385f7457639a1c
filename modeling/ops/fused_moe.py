"""The name that VeOmni's interface calls; the expert layer itself is the package `modeling.ops.experts`."""

from modeling.ops.experts import BACKENDS, default_backend, fused_moe_forward

__all__ = ["BACKENDS", "default_backend", "fused_moe_forward"]
