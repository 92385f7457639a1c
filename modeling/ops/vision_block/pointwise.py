"""The steps of a vision block: the element-wise ones, each once as readable torch and once as a Triton kernel, and the
products that end in one.

A caller names neither: tensors on a CUDA device go to the kernel (`triton.py`), all others to the reference in
this file, which is also what the kernel is tested against. Arithmetic is fp32 whatever the storage, rounded once on the
way out, sums over patches too.

Letters: P patches, H hidden, I intermediate, N heads, D head_dim.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from modeling.ops.launch import use_triton, why_not_quack
from modeling.ops.norm_rotary.rotary import rotate_reference


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """LayerNorm (Ba et al., 2016) of x (P, H): h like x, and mean and 1 / deviation (P,) fp32."""
    if use_triton(x):
        from modeling.ops.vision_block import triton

        return triton.layer_norm(x, weight, bias, eps)
    return layer_norm_reference(x, weight, bias, eps)


def add_layer_norm(
    x: torch.Tensor,
    branch: torch.Tensor,
    branch_bias: torch.Tensor,
    tail: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """LayerNorm of a residual sum: total = x + branch + branch_bias, h = LN(total).

    Args: x, branch (P, H); branch_bias, tail, weight, bias (H,).
    Returns: total, total + tail and h, (P, H) in x's dtype; mean and 1 / deviation (P,) fp32 of the total as rounded.
    """
    if use_triton(x):
        from modeling.ops.vision_block import triton

        return triton.add_layer_norm(x, branch, branch_bias, tail, weight, bias, eps)
    return add_layer_norm_reference(x, branch, branch_bias, tail, weight, bias, eps)


def layer_norm_backward(
    d_h: torch.Tensor,
    total: torch.Tensor,
    mean: torch.Tensor,
    inverse_deviation: torch.Tensor,
    weight: torch.Tensor,
    d_total: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The adjoint of LayerNorm inside a residual block, the gradient that arrives beside it added.

    Args: d_h, total, d_total (P, H); mean, inverse_deviation (P,) fp32; weight (H,).
    Returns: d = d_total + LN'(d_h), (P, H); and sums over patches (4, H) in the weight's dtype: the gradients of the
        norm's weight and bias, the sum of d_total, the sum of d.
    """
    if use_triton(d_h):
        from modeling.ops.vision_block import triton

        return triton.layer_norm_backward(d_h, total, mean, inverse_deviation, weight, d_total)
    return layer_norm_backward_reference(d_h, total, mean, inverse_deviation, weight, d_total)


def linear_gelu(h: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """gelu(h @ weight.T + bias) with GELU's tanh form; on a GPU in the epilogue of the product. (P, H) -> (P, I)."""
    if h.is_cuda:
        return torch._addmm_activation(bias, h, weight.T, use_gelu=True)
    return F.gelu(torch.addmm(bias, h, weight.T), approximate="tanh")  # there the fused operator means the erf form


def gelu_backward_(pre: torch.Tensor, d_act: torch.Tensor) -> torch.Tensor:
    """In place: pre (P, I) becomes gelu(pre), d_act (P, I) the gradient of pre. Returns its sum over patches (I,).

    GELU in its tanh form (Hendrycks & Gimpel, 2016).
    """
    if use_triton(pre):
        from modeling.ops.vision_block import triton

        return triton.gelu_backward_(pre, d_act)
    return gelu_backward_reference_(pre, d_act)


def gelu_product_backward_(
    d_out: torch.Tensor, weight: torch.Tensor, pre: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The adjoint of gelu(pre) @ weight.T in pre (P, I), for d_out (P, H) and weight (H, I); GELU's tanh form.

    In place pre becomes gelu(pre). Returns the gradient of pre and its sum over patches (I,). On Hopper, where quack is
    installed, one kernel does all of it (`quack.py`).
    """
    aligned = weight.data_ptr() % 16 == 0  # a matter of course, but for a weight in somebody's flat buffer
    if use_triton(pre) and aligned and why_not_quack(pre.device, pre.dtype, *weight.shape) is None:
        from modeling.ops.vision_block import quack

        return quack.gelu_product_backward_(d_out, weight, pre)
    d_pre = d_out @ weight
    return d_pre, gelu_backward_(pre, d_pre)


def rotate_joint_(joint: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn the queries and keys of a joint projection (P, 3, N, D) in place by cos and sin (P, D); returns it."""
    if use_triton(joint):
        from modeling.ops.vision_block import triton

        return triton.rotate_joint_(joint, cos, sin)
    return rotate_joint_reference_(joint, cos, sin)


def rotate_joint_backward_(d_joint: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The adjoint of `rotate_joint_`, in place on d_joint (P, 3, N, D). Returns its sum over patches (3 N D,)."""
    if use_triton(d_joint):
        from modeling.ops.vision_block import triton

        return triton.rotate_joint_backward_(d_joint, cos, sin)
    return rotate_joint_backward_reference_(d_joint, cos, sin)


def layer_norm_reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`layer_norm` in torch's own operations."""
    centred = x.float()
    mean = centred.mean(-1)
    centred = centred - mean[:, None]
    inverse_deviation = torch.rsqrt(centred.pow(2).mean(-1) + eps)
    h = centred * inverse_deviation[:, None] * weight.float() + bias.float()
    return h.to(x.dtype), mean, inverse_deviation


def add_layer_norm_reference(
    x: torch.Tensor,
    branch: torch.Tensor,
    branch_bias: torch.Tensor,
    tail: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`add_layer_norm` in torch's own operations."""
    total = (x.float() + (branch.float() + branch_bias.float())).to(x.dtype)
    ahead = (total.float() + tail.float()).to(x.dtype)
    return total, ahead, *layer_norm_reference(total, weight, bias, eps)


def layer_norm_backward_reference(
    d_h: torch.Tensor,
    total: torch.Tensor,
    mean: torch.Tensor,
    inverse_deviation: torch.Tensor,
    weight: torch.Tensor,
    d_total: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`layer_norm_backward` in torch's own operations."""
    normalised = (total.float() - mean[:, None]) * inverse_deviation[:, None]
    grad = d_h.float() * weight.float()
    along = (grad * normalised).mean(-1, keepdim=True)
    d = (grad - grad.mean(-1, keepdim=True) - normalised * along) * inverse_deviation[:, None] + d_total.float()
    sums = [(d_h.float() * normalised).sum(0), d_h.float().sum(0), d_total.float().sum(0), d.sum(0)]
    return d.to(d_h.dtype), torch.stack(sums).to(weight.dtype)


def gelu_backward_reference_(pre: torch.Tensor, d_act: torch.Tensor) -> torch.Tensor:
    """`gelu_backward_` in torch's own operations."""
    x = pre.float()
    # 0.5 * (1 + tanh(u)) = sigmoid(2 u), with u = sqrt(2 / pi) * (x + 0.044715 x^3)
    twice = 2 * math.sqrt(2 / math.pi)
    gate = torch.sigmoid(twice * (x + 0.044715 * x**3))
    d_pre = d_act.float() * (gate + x * gate * (1 - gate) * twice * (1 + 3 * 0.044715 * x * x))
    pre.copy_(x * gate)
    d_act.copy_(d_pre)
    return d_pre.sum(0).to(pre.dtype)


def rotate_joint_reference_(joint: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """`rotate_joint_` in torch's own operations."""
    turned = rotate_reference(joint[:, :2].float(), cos.float()[:, None], sin.float()[:, None])
    joint[:, :2] = turned.to(joint.dtype)
    return joint


def rotate_joint_backward_reference_(d_joint: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """`rotate_joint_backward_` in torch's own operations."""
    back = rotate_reference(d_joint[:, :2].float(), cos.float()[:, None], -sin.float()[:, None])
    total = torch.cat([back, d_joint[:, 2:].float()], dim=1).flatten(1).sum(0)
    d_joint[:, :2] = back.to(d_joint.dtype)
    return total.to(d_joint.dtype)
