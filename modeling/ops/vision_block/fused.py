"""A vision block as a few autograd functions, for speed and memory: what is cheap is computed twice.

Between forward and backward they keep the block's input, attention's output and the sum of the two: 3 P x H values,
where the modules, one by one, keep 15. Backward makes the norms, the query-key-value projection (unless told to keep
that, 3 more) and the MLP's first product again. Biases, residual sums and the sums over patches ride in the kernels
that move the data; the products are the framework's own, but for one of quack's (`gelu_product_backward_`).

    residual, attended = norm_attention(x, ...)              h = LN(x);  q, k, v = h Wqkv + b, q and k turned; attention
    out = project_and_mlp(attended, residual, ...)           t = residual + attended Wp + b;  t + MLP(LN(t))

Where attention is another kernel than flash-attn 4, or exchanges heads between ranks, it stands by itself behind
`norm_rotated_qkv`, and keeps query, key and value. All compute what the modules compute, to rounding.

Letters: P patches, H hidden, I intermediate, N heads, D head_dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from modeling.ops.attention import flash_attention_4
from modeling.ops.launch import has_hooks, use_triton
from modeling.ops.vision_block.pointwise import (
    add_layer_norm,
    gelu_product_backward_,
    layer_norm,
    layer_norm_backward,
    linear_gelu,
    rotate_joint_,
    rotate_joint_backward_,
)


def can_fuse(x: Tensor, *modules: nn.Module) -> bool:
    """Whether the functions here stand for `modules` on x: on a GPU, in one dtype, nothing attached to a module.

    An adapter, a hook, a quantised or replaced layer, or autocast asks for the modules themselves.
    """
    if not use_triton(x) or not x.is_contiguous() or torch.is_autocast_enabled(x.device.type):
        return False
    return all(_is_plain(module, x.dtype) for module in modules)


def _is_plain(module: nn.Module, dtype: torch.dtype) -> bool:
    if type(module) not in (nn.Linear, nn.LayerNorm) or has_hooks(module):
        return False
    return module.bias is not None and module.weight.dtype == dtype == module.bias.dtype


def norm_rotated_qkv(
    x: Tensor, norm: nn.LayerNorm, qkv: nn.Linear, cos: Tensor, sin: Tensor, heads: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x (P, H) -> x for the residual sum, and query, key, value (P, N, D), the first two turned by cos, sin (P, D)."""
    return _NormRotatedQKV.apply(x, norm.weight, norm.bias, qkv.weight, qkv.bias, cos, sin, heads, norm.eps)


def project_and_mlp(
    attended: Tensor, residual: Tensor, proj: nn.Linear, norm: nn.LayerNorm, fc1: nn.Linear, fc2: nn.Linear
) -> Tensor:
    """t = residual + proj(attended); t + fc2(gelu(fc1(norm(t)))), with GELU's tanh form. (P, H), (P, H) -> (P, H)."""
    weights = (proj.weight, proj.bias, norm.weight, norm.bias, fc1.weight, fc1.bias, fc2.weight, fc2.bias)
    return _ProjectAndMLP.apply(attended, residual, *weights, norm.eps)


def norm_attention(
    x: Tensor, norm: nn.LayerNorm, qkv: nn.Linear, cos: Tensor, sin: Tensor, heads: int, keep: bool, **options: Any
) -> tuple[Tensor, Tensor]:
    """x (P, H) -> x for the residual sum, and flash-attn 4's output (P, H); options as of `attention.varlen_attention`.

    cos and sin (P, D). keep: whether query, key and value stay for backward, rather than be made again.
    """
    weights = (norm.weight, norm.bias, qkv.weight, qkv.bias)
    return _NormAttention.apply(x, *weights, cos, sin, heads, norm.eps, keep, options)


class _NormAttention(torch.autograd.Function):
    """forward: `norm_attention`; backward: its adjoint."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        weight: Tensor,
        bias: Tensor,
        cos: Tensor,
        sin: Tensor,
        heads: int,
        eps: float,
        keep: bool,
        options: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        cos, sin = cos.contiguous(), sin.contiguous()
        h = layer_norm(x, norm_weight, norm_bias, eps)[0]
        joint = rotate_joint_(torch.addmm(bias, h, weight.T).view(len(x), 3, heads, -1), cos, sin)
        attended, lse = flash_attention_4.forward(*joint.unbind(1), **options)
        kept = joint if keep else None
        ctx.save_for_backward(x, norm_weight, norm_bias, weight, bias, cos, sin, kept, attended, lse)
        ctx.heads, ctx.eps, ctx.options = heads, eps, options
        return x, attended.flatten(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_residual: Tensor, d_attended: Tensor) -> tuple[Tensor | None, ...]:
        x, norm_weight, norm_bias, weight, bias, cos, sin, joint, attended, lse = ctx.saved_tensors
        h, mean, scale = layer_norm(x, norm_weight, norm_bias, ctx.eps)
        if joint is None:
            joint = rotate_joint_(torch.addmm(bias, h, weight.T).view(len(x), 3, ctx.heads, -1), cos, sin)
        d_joint = torch.empty_like(joint)
        d_attended = d_attended.contiguous().view_as(attended)
        query, key, value = joint.unbind(1)
        into = d_joint.unbind(1)
        flash_attention_4.backward(d_attended, query, key, value, attended, lse, **ctx.options, into=into)
        del joint, query, key, value, into
        d_bias = rotate_joint_backward_(d_joint, cos, sin)
        d_joint = d_joint.view(len(x), -1)
        d_weight = d_joint.T @ h if ctx.needs_input_grad[3] else None
        d_x, sums = layer_norm_backward(d_joint @ weight, x, mean, scale, norm_weight, d_residual.contiguous())
        return d_x, sums[0], sums[1], d_weight, d_bias, None, None, None, None, None, None


class _NormRotatedQKV(torch.autograd.Function):
    """forward: `norm_rotated_qkv`; backward: its adjoint, the norm made again from x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        weight: Tensor,
        bias: Tensor,
        cos: Tensor,
        sin: Tensor,
        heads: int,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        cos, sin = cos.contiguous(), sin.contiguous()
        h = layer_norm(x, norm_weight, norm_bias, eps)[0]
        joint = torch.addmm(bias, h, weight.T).view(len(x), 3, heads, -1)
        query, key, value = rotate_joint_(joint, cos, sin).unbind(1)
        ctx.save_for_backward(x, norm_weight, norm_bias, weight, cos, sin)
        ctx.eps = eps
        return x, query, key, value

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_residual: Tensor, d_query: Tensor, d_key: Tensor, d_value: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, norm_weight, norm_bias, weight, cos, sin = ctx.saved_tensors
        d_joint = torch.stack((d_query, d_key, d_value), dim=1)
        d_bias = rotate_joint_backward_(d_joint, cos, sin)
        d_joint = d_joint.view(len(x), -1)
        h, mean, scale = layer_norm(x, norm_weight, norm_bias, ctx.eps)
        d_weight = d_joint.T @ h if ctx.needs_input_grad[3] else None
        d_x, sums = layer_norm_backward(d_joint @ weight, x, mean, scale, norm_weight, d_residual.contiguous())
        return d_x, sums[0], sums[1], d_weight, d_bias, None, None, None, None


class _ProjectAndMLP(torch.autograd.Function):
    """forward: `project_and_mlp`; backward: its adjoint, everything but the attention's output made again."""

    @staticmethod
    def forward(
        ctx: Any,
        attended: Tensor,
        residual: Tensor,
        proj_weight: Tensor,
        proj_bias: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        weight1: Tensor,
        bias1: Tensor,
        weight2: Tensor,
        bias2: Tensor,
        eps: float,
    ) -> Tensor:
        branch = attended @ proj_weight.T
        # The last bias rides along: the last product then adds to the residual sum in place.
        total, ahead, h, mean, scale = add_layer_norm(residual, branch, proj_bias, bias2, norm_weight, norm_bias, eps)
        del branch
        act = linear_gelu(h, weight1, bias1)  # (P, I)
        ctx.save_for_backward(
            attended, total, mean, scale, proj_weight, norm_weight, norm_bias, weight1, bias1, weight2
        )
        ctx.eps = eps
        return ahead.addmm_(act, weight2.T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        attended, total, mean, scale, proj_weight, norm_weight, norm_bias, weight1, bias1, weight2 = ctx.saved_tensors
        needs = ctx.needs_input_grad
        d_out = d_out.contiguous()
        h = layer_norm(total, norm_weight, norm_bias, ctx.eps)[0]
        act = torch.addmm(bias1, h, weight1.T)  # (P, I), of GELU's input until the next line
        d_pre, d_bias1 = gelu_product_backward_(d_out, weight2, act)
        d_weight2 = d_out.T @ act if needs[8] else None
        del act
        d_weight1 = d_pre.T @ h if needs[6] else None
        d_total, sums = layer_norm_backward(d_pre @ weight1, total, mean, scale, norm_weight, d_out)
        d_norm_weight, d_norm_bias, d_bias2, d_proj_bias = sums
        d_proj_weight = d_total.T @ attended if needs[2] else None
        return (
            d_total @ proj_weight, d_total, d_proj_weight, d_proj_bias, d_norm_weight, d_norm_bias,
            d_weight1, d_bias1, d_weight2, d_bias2, None,
        )  # fmt: skip
