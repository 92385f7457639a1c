"""Collectives of sequence parallelism (Ulysses), each an autograd function whose backward is its exact adjoint.

Convention: the gradient of a value held by several ranks is the sum of what each of them computed. So a rank's loss is
its share of the global loss, and nothing here divides or multiplies by the size of a group.

Every function takes `group`; None, or a group of one rank, makes it the identity. Sizes must divide: an uneven split is
a ValueError with both numbers, because padding it silently would shift tokens between ranks. Incoming gradients are
read, never written.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

# torch 2.14 gave them these names; before, it knows them by the others.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def group_size(group: ProcessGroup | None) -> int:
    """Ranks in `group`; None counts as one."""
    return 1 if group is None else dist.get_world_size(group)


def group_rank(group: ProcessGroup | None) -> int:
    """This process's place in `group`; None is place 0."""
    return 0 if group is None else dist.get_rank(group)


def _check_divides(x: Tensor, dim: int, group: ProcessGroup, function: str) -> None:
    if x.size(dim) % group_size(group):
        raise ValueError(
            f"{function}: dimension {dim} of size {x.size(dim)} does not divide among {group_size(group)} ranks "
            f"(shape {tuple(x.shape)}); pad it to a multiple, or choose a group size that divides."
        )


def _all_to_all(x: Tensor, scatter_dim: int, gather_dim: int, group: ProcessGroup) -> Tensor:
    """Cut `scatter_dim` into one part a rank, exchange, and join what came along `gather_dim`."""
    ranks = group_size(group)
    send = x.unflatten(scatter_dim, (ranks, x.size(scatter_dim) // ranks)).movedim(scatter_dim, 0).contiguous()
    receive = torch.empty_like(send)
    dist.all_to_all_single(receive, send, group=group)
    return receive.movedim(0, gather_dim).flatten(gather_dim, gather_dim + 1)


def _all_gather(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    x = x.contiguous()
    gathered = x.new_empty(group_size(group), *x.shape)
    all_gather_single(gathered, x.unsqueeze(0), group=group)
    return gathered.movedim(0, dim).flatten(dim, dim + 1)


def _reduce_scatter(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    ranks = group_size(group)
    parts = x.unflatten(dim, (ranks, x.size(dim) // ranks)).movedim(dim, 0).contiguous()
    mine = torch.empty_like(parts[:1])
    reduce_scatter_single(mine, parts, op=dist.ReduceOp.SUM, group=group)
    return mine.squeeze(0)


class _AllToAll(torch.autograd.Function):
    """forward: scatter one dimension, gather another; backward: the exchange the other way round (sum of one term)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scatter_dim: int, gather_dim: int, group: ProcessGroup) -> Tensor:
        ctx.scatter_dim, ctx.gather_dim, ctx.group = scatter_dim, gather_dim, group
        return _all_to_all(x, scatter_dim, gather_dim, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _all_to_all(grads[0], ctx.gather_dim, ctx.scatter_dim, ctx.group), None, None, None


class _AllGather(torch.autograd.Function):
    """forward: all-gather along a dimension; backward: reduce-scatter along it (sum)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return _all_gather(x, dim, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _reduce_scatter(grads[0], ctx.dim, ctx.group), None, None


class _AllReduceSum(torch.autograd.Function):
    """forward: all-reduce (sum); backward: all-reduce (sum)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


class _AllToAllRows(torch.autograd.Function):
    """forward: send runs of rows to each rank; backward: send them back (sum of one term)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, send: list[int], receive: list[int], group: ProcessGroup) -> Tensor:
        ctx.send, ctx.receive, ctx.group = send, receive, group
        out = x.new_empty(sum(receive), *x.shape[1:])
        dist.all_to_all_single(out, x.contiguous(), receive, send, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        grad = grads[0].contiguous()
        out = grad.new_empty(sum(ctx.send), *grad.shape[1:])
        dist.all_to_all_single(out, grad, ctx.send, ctx.receive, group=ctx.group)
        return out, None, None, None


def gather_seq_scatter_heads(x: Tensor, seq_dim: int, head_dim: int, group: ProcessGroup | None) -> Tensor:
    """From a slice of the sequence with all heads (or all of hidden) to the whole sequence with this rank's heads.

    forward: all-to-all, (…, s, …, N, …) -> (…, S, …, N / ranks, …); backward: the all-to-all back (sum).

    Raises:
        ValueError: the heads do not divide among the ranks.
    """
    if group is None or group_size(group) == 1:
        return x
    _check_divides(x, head_dim, group, "gather_seq_scatter_heads")
    return _AllToAll.apply(x, head_dim % x.ndim, seq_dim % x.ndim, group)


def gather_heads_scatter_seq(x: Tensor, head_dim: int, seq_dim: int, group: ProcessGroup | None) -> Tensor:
    """From the whole sequence with this rank's heads to a slice of the sequence with all heads.

    forward: all-to-all, (…, S, …, n, …) -> (…, S / ranks, …, N, …); backward: the all-to-all back (sum).

    Raises:
        ValueError: the sequence does not divide among the ranks.
    """
    if group is None or group_size(group) == 1:
        return x
    _check_divides(x, seq_dim, group, "gather_heads_scatter_seq")
    return _AllToAll.apply(x, seq_dim % x.ndim, head_dim % x.ndim, group)


def gather_outputs(x: Tensor, gather_dim: int, group: ProcessGroup | None) -> Tensor:
    """Every rank's part, joined, outside autograd: for logits, metrics, and embeddings of a frozen encoder.

    forward: all-gather, (…, s, …) -> (…, S, …); backward: none, the result is detached.
    All parts have one shape.
    """
    if group is None or group_size(group) == 1:
        return x.detach()
    return _all_gather(x.detach(), gather_dim % x.ndim, group)


def gather_outputs_with_grad(x: Tensor, gather_dim: int, group: ProcessGroup | None) -> Tensor:
    """Every rank's part, joined; each rank may use any rows, and their gradients meet again at the owner.

    forward: all-gather, (…, s, …) -> (…, S, …); backward: reduce-scatter (sum).
    All parts have one shape.
    """
    if group is None or group_size(group) == 1:
        return x
    return _AllGather.apply(x, gather_dim % x.ndim, group)


def all_reduce_sum(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """The sum of `x` over the ranks, on every rank. forward: all-reduce (sum); backward: all-reduce (sum)."""
    if group is None or group_size(group) == 1:
        return x
    return _AllReduceSum.apply(x, group)


def all_to_all_rows(x: Tensor, send: Sequence[int], receive: Sequence[int], group: ProcessGroup | None) -> Tensor:
    """Send the first send[0] rows of `x` to rank 0, the next send[1] to rank 1, …; return what came, in rank order.

    forward: all-to-all of runs of rows, (sum(send), …) -> (sum(receive), …); backward: the runs go back (sum).
    `send` and `receive` are Python ints and must agree between every two ranks.

    Raises:
        ValueError: the runs do not add up to the rows of `x`.
    """
    if sum(send) != x.size(0):
        raise ValueError(f"all_to_all_rows: {sum(send)} rows to send were announced, but x has {x.size(0)}.")
    if group is None or group_size(group) == 1:
        return x
    return _AllToAllRows.apply(x, list(send), list(receive), group)


def slice_input(x: Tensor, dim: int, group: ProcessGroup | None) -> Tensor:
    """This rank's part of a tensor that every rank holds whole.

    forward: slice, no communication; backward: the gradient of the own part, zero elsewhere (the sum over the ranks is
    the whole gradient).

    Raises:
        ValueError: the dimension does not divide among the ranks.
    """
    if group is None or group_size(group) == 1:
        return x
    _check_divides(x, dim, group, "slice_input")
    part = x.size(dim) // group_size(group)
    return x.narrow(dim, group_rank(group) * part, part)


def padded_length(length: int, multiple: int) -> int:
    """`length` rounded up to a multiple."""
    return (length + multiple - 1) // multiple * multiple


def pad_to(x: Tensor, dim: int, length: int, value: float = 0) -> Tensor:
    """`x` lengthened along `dim` to `length` with `value`; `x` itself where it already is that long."""
    missing = length - x.size(dim)
    if missing == 0:
        return x
    return F.pad(x, [0, 0] * (x.ndim - 1 - dim % x.ndim) + [0, missing], value=value)


def sp_pad_and_slice(
    x: Tensor, dim: int = -1, pad_value: float = 0, pad_scale: int = 1, *, group: ProcessGroup | None
) -> Tensor:
    """Pad `dim` to a multiple of pad_scale x ranks and keep this rank's part.

    Args:
        x: held whole by every rank.
        pad_scale: tokens that must stay on one rank, spatial_merge_size squared for vision patches.

    forward: pad and slice, no communication; backward: the gradient of the own part, zero elsewhere (sum).
    """
    if group is None or group_size(group) == 1:
        return x
    return slice_input(pad_to(x, dim, padded_length(x.size(dim), pad_scale * group_size(group)), pad_value), dim, group)
