"""The expert MLP on quack's Hopper kernels: what surrounds the matrix products happens inside them.

Same two functions and same meaning as `grouped.py`. The gather is in the first product's loads, SwiGLU in its
epilogue; in backward every product that needs token rows gathers them again, so none is copied. quack writes the
pre-activation with gate and up columns in turn (column 2i gate, 2i + 1 up) and reads the weights, whose gate rows come
first, through that pattern, so no weight is rearranged.

Tile shapes are pinned here per kind of product, measured on an H100 by scripts/benchmarks/tune_moe.py; quack's own
tuner would spend minutes per shape. Newer chips get quack's default for the chip; that has not been run.

Letters: R rows, H hidden, I expert intermediate, e experts on this rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from quack.gemm_config import GemmConfig
from quack.gemm_interface import gemm_gated, gemm_tuned

from modeling.ops.experts import triton


def _config(
    tile_m: int, tile_n: int, kind: str, cluster: tuple[int, int], dynamic: bool = False, swizzle: int = 8
) -> GemmConfig:
    return GemmConfig(
        tile_m=tile_m,
        tile_n=tile_n,
        pingpong=kind == "pingpong",
        cluster_m=cluster[0],
        cluster_n=cluster[1],
        is_dynamic_persistent=dynamic,
        max_swizzle_size=swizzle,
        device_capacity=9,
    )


@dataclass(frozen=True)
class Tiles:
    """The configuration of each product of the layer; None: quack's default for the chip."""

    up: GemmConfig | None = None
    down: GemmConfig | None = None
    d_act: GemmConfig | None = None
    d_rows: GemmConfig | None = None
    d_down: GemmConfig | None = None
    d_gate_up: GemmConfig | None = None


_BROAD = _config(128, 256, "cooperative", (2, 1))
_BROAD_IN_ORDER = _config(128, 256, "cooperative", (2, 1), swizzle=1)
_SMALL_EXPERTS = Tiles(
    up=_BROAD_IN_ORDER,
    down=_config(128, 208, "pingpong", (1, 2)),
    d_act=_BROAD,
    d_rows=_config(192, 128, "pingpong", (2, 1)),
    d_down=_config(128, 256, "cooperative", (1, 1)),
    d_gate_up=_config(256, 192, "cooperative", (1, 1), swizzle=1),
)
_SMALL_EXPERTS_FEW_ROWS = replace(_SMALL_EXPERTS, d_rows=_config(128, 256, "cooperative", (1, 1), dynamic=True))
_LARGE_EXPERTS = Tiles(
    up=_BROAD_IN_ORDER,
    down=_config(128, 208, "pingpong", (2, 1), dynamic=True),
    d_act=_BROAD,
    d_rows=_config(128, 192, "pingpong", (2, 1), dynamic=True),
    d_down=_config(128, 192, "pingpong", (2, 1), swizzle=1),
    d_gate_up=_config(128, 192, "pingpong", (2, 1), swizzle=1),
)


def tiles_for(num_rows: int, down_proj: torch.Tensor) -> Tiles:
    """The pinned tile shapes: by the experts' width, and by rows per expert, known from shapes alone."""
    num_experts, _, intermediate_size = down_proj.shape
    if torch.cuda.get_device_capability(down_proj.device)[0] != 9:
        return Tiles()
    if intermediate_size >= 1024:
        return _LARGE_EXPERTS
    return _SMALL_EXPERTS if num_rows >= 512 * num_experts else _SMALL_EXPERTS_FEW_ROWS


def forward(
    x: torch.Tensor, source: torch.Tensor, offsets: torch.Tensor, gate_up_proj: torch.Tensor, down_proj: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `grouped.forward`; pre's columns alternate between gate and up."""
    tiles = tiles_for(source.shape[0], down_proj)
    pre, act = gemm_gated(
        x.contiguous(),
        gate_up_proj.mT,
        activation="swiglu",
        cu_seqlens_m=offsets,
        A_idx=source,
        concat_layout=("B",),
        config=tiles.up,
        tuned=False,
    )
    return pre, rows_product(act, down_proj.mT, offsets, tiles.down)


def backward(
    d_out: torch.Tensor,
    x: torch.Tensor,
    source: torch.Tensor,
    offsets: torch.Tensor,
    pre: torch.Tensor,
    row_weight: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    *,
    take_rows: Callable[[torch.Tensor], torch.Tensor] | None,
    need_gate_up: bool,
    need_down: bool,
    reuse_pre: bool,
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """See `grouped.backward`."""
    d_out, x = d_out.contiguous(), x.contiguous()
    tiles = tiles_for(source.shape[0], down_proj)
    # quack could do SwiGLU's adjoint in this product's epilogue (gemm_dgated): as fast at I = 768, slower at 1,536.
    d_act = rows_product(d_out, down_proj, offsets, tiles.d_act, gather=source)  # (R, I)
    d_pre, weighted_act, d_row_weight = triton.swiglu_backward(
        d_act, pre, row_weight, in_place=reuse_pre, interleaved=True
    )
    del d_act
    d_taken = d_gate_up = d_down = None
    if need_down:
        d_down = torch.empty_like(down_proj)
        weight_product(d_out, weighted_act, source, offsets, d_down, tiles.d_down)
    del weighted_act
    if take_rows is not None:
        d_taken = take_rows(rows_product(d_pre, gate_up_proj, offsets, tiles.d_rows, concat=("B",)))  # (R, H)
    if need_gate_up:
        d_gate_up = torch.empty_like(gate_up_proj)
        weight_product(x, d_pre, source, offsets, d_gate_up.mT, tiles.d_gate_up, concat=("out",))
    return d_taken, d_row_weight, d_gate_up, d_down


def rows_product(
    rows: torch.Tensor,
    weight: torch.Tensor,
    offsets: torch.Tensor,
    config: GemmConfig | None,
    gather: torch.Tensor | None = None,
    concat: tuple[str, ...] | None = None,
) -> torch.Tensor:
    """rows (R or N, C) @ weight[e] (e, C, D) for the expert e of each row -> (R, D); `gather` picks the rows."""
    num_rows = rows.shape[0] if gather is None else gather.shape[0]
    out = rows.new_empty(num_rows, weight.shape[-1])
    if num_rows:
        gemm_tuned.fn(
            rows, weight, out, cu_seqlens_m=offsets, A_idx=gather, concat_layout=concat, config=config,
            dynamic_scheduler=config is not None and config.is_dynamic_persistent,
        )  # fmt: skip
    return out


def weight_product(
    gathered: torch.Tensor,
    rows: torch.Tensor,
    source: torch.Tensor,
    offsets: torch.Tensor,
    out: torch.Tensor,
    config: GemmConfig | None,
    concat: tuple[str, ...] | None = None,
) -> None:
    """out[e] (C, D) = gathered[source].T @ rows over expert e's rows; zero for an expert without rows."""
    if rows.shape[0] == 0:
        out.zero_()
        return
    gemm_tuned.fn(
        gathered.T, rows, out, cu_seqlens_k=offsets, A_idx=source, concat_layout=concat, config=config,
    )  # fmt: skip
