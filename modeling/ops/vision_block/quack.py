"""The MLP of a vision block on quack's Hopper kernels: GELU's adjoint in the epilogue of the product before it."""

from __future__ import annotations

import torch
from quack.epilogue.library import dgelu_dbias_mod
from quack.gemm_config import GemmConfig

from modeling.ops.column_sums import sum_rows

_CONFIG = GemmConfig(
    tile_m=128, tile_n=160, pingpong=True, cluster_m=2, cluster_n=1, is_dynamic_persistent=False, device_capacity=9
)
"""The fastest of eight on an H100 for 8,192 patches, H = 1,152, I = 4,304: 173 us; product and Triton kernel take 242.
quack's forward products with bias or GELU were faster alone (115 us for 128), but not in the step, and are not used."""


def gelu_product_backward_(
    d_out: torch.Tensor, weight: torch.Tensor, pre: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `pointwise.gelu_product_backward_`. A tile's part of pre is read before gelu(pre) is written to it."""
    d_pre = torch.empty_like(pre)
    partial = pre.new_empty(-(-pre.shape[0] // _CONFIG.tile_m), pre.shape[1], dtype=torch.float32)
    out = {"D": d_pre, "postact": pre}
    dgelu_dbias_mod(d_out, weight, pre, out=out, dbias=partial, config=_CONFIG, tuned=False)
    return d_pre, sum_rows(partial, pre.dtype)
