"""Every collective against the same operation on whole tensors, and its backward against the definition of an adjoint.

Adjoint: for x and y spread over the ranks, sum of <f(x), y> = sum of <x, f*(y)>, where f*(y) is what backward returns.
"""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from modeling.distributed import sequence_parallel as sp

RANKS = 4


def whole_tensor(*shape: int, seed: int = 0) -> Tensor:
    """The same on every rank."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def my_part(x: Tensor, dim: int) -> Tensor:
    return x.chunk(dist.get_world_size(), dim)[dist.get_rank()].clone()


def total(value: Tensor) -> float:
    value = value.detach().clone()
    dist.all_reduce(value)
    return value.item()


def check_adjoint(function: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Also: the incoming gradient comes back unchanged."""
    x = x.detach().requires_grad_()
    out = function(x)
    y = whole_tensor(*out.shape, seed=dist.get_rank() + 10)
    kept = y.clone()
    out.backward(y)
    torch.testing.assert_close(y, kept, rtol=0, atol=0)
    assert x.grad is not None
    # float64 sums of a few hundred products: rounding stays below 1e-12 of the total.
    assert total((out * kept).sum()) == pytest.approx(total((x * x.grad).sum()), rel=1e-11, abs=1e-11)


def ranks_check_head_exchange() -> None:
    group = dist.group.WORLD
    x = whole_tensor(2, 12, 8, 3)  # (B, S, N, D)
    for seq_dim, head_dim in ((1, 2), (1, -2)):
        gathered = sp.gather_seq_scatter_heads(my_part(x, 1), seq_dim, head_dim, group)
        torch.testing.assert_close(gathered, my_part(x, 2), rtol=0, atol=0)
        back = sp.gather_heads_scatter_seq(gathered, head_dim, seq_dim, group)
        torch.testing.assert_close(back, my_part(x, 1), rtol=0, atol=0)
    check_adjoint(lambda t: sp.gather_seq_scatter_heads(t, 1, 2, group), my_part(x, 1))
    check_adjoint(lambda t: sp.gather_heads_scatter_seq(t, 2, 1, group), my_part(x, 2))
    hidden = whole_tensor(12, 8)  # (M, H): heads before and after the sequence dimension both work
    check_adjoint(lambda t: sp.gather_seq_scatter_heads(t, 0, -1, group), my_part(hidden, 0))
    torch.testing.assert_close(
        sp.gather_seq_scatter_heads(my_part(hidden, 1), 1, 0, group), my_part(hidden, 0), rtol=0, atol=0
    )


def ranks_check_gather() -> None:
    group = dist.group.WORLD
    x = whole_tensor(3, 8, 5)
    for dim in (0, 1, -2):
        source = whole_tensor(8, 3, 5) if dim == 0 else x
        part = my_part(source, dim).requires_grad_()
        plain = sp.gather_outputs(part, dim, group)
        assert not plain.requires_grad
        torch.testing.assert_close(plain, source, rtol=0, atol=0)
        torch.testing.assert_close(sp.gather_outputs_with_grad(part, dim, group), source, rtol=0, atol=0)
        check_adjoint(lambda t, dim=dim: sp.gather_outputs_with_grad(t, dim, group), part)


def ranks_check_sum() -> None:
    group = dist.group.WORLD
    x = whole_tensor(RANKS, 6)
    torch.testing.assert_close(sp.all_reduce_sum(x[dist.get_rank()], group), x.sum(0), rtol=1e-14, atol=1e-14)
    check_adjoint(lambda t: sp.all_reduce_sum(t, group), x[dist.get_rank()])


def ranks_check_slices() -> None:
    group, rank = dist.group.WORLD, dist.get_rank()
    x = whole_tensor(8, 5)
    torch.testing.assert_close(sp.slice_input(x, 0, group), my_part(x, 0), rtol=0, atol=0)
    check_adjoint(lambda t: sp.slice_input(t, 0, group), x)
    leaf = x.clone().requires_grad_()
    (sp.slice_input(leaf, 0, group) * my_part(x, 0)).sum().backward()
    assert leaf.grad is not None
    dist.all_reduce(leaf.grad)
    torch.testing.assert_close(leaf.grad, x, rtol=0, atol=0)
    padded = torch.cat([x, torch.full((8, 5), 7.0, dtype=torch.float64)])
    sliced = sp.sp_pad_and_slice(x, dim=0, pad_value=7, pad_scale=4, group=group)
    torch.testing.assert_close(sliced, padded[rank * 4 : rank * 4 + 4], rtol=0, atol=0)
    check_adjoint(lambda t: sp.sp_pad_and_slice(t, dim=-1, pad_scale=1, group=group), x)


def ranks_check_rows() -> None:
    """Rank r sends r + 2q rows to rank q; some pairs exchange nothing."""
    group, rank = dist.group.WORLD, dist.get_rank()
    table = [[(r + 2 * q) % 3 for q in range(RANKS)] for r in range(RANKS)]
    send, receive = table[rank], [table[r][rank] for r in range(RANKS)]
    x = torch.arange(sum(send), dtype=torch.float64)[:, None] + 100 * rank
    came = sp.all_to_all_rows(x, send, receive, group)
    expected = [100 * r + sum(table[r][:rank]) + i for r in range(RANKS) for i in range(table[r][rank])]
    assert came[:, 0].tolist() == expected
    check_adjoint(lambda t: sp.all_to_all_rows(t, send, receive, group), whole_tensor(sum(send), 3, seed=rank))


def ranks_check_no_rows() -> None:
    """A rank that receives nothing still takes part in backward, and the sender gets its gradient."""
    group, rank = dist.group.WORLD, dist.get_rank()
    send = [3, 0, 0, 0] if rank == 1 else [0] * RANKS
    receive = [0, 3, 0, 0] if rank == 0 else [0] * RANKS
    x = torch.ones(sum(send), 2, dtype=torch.float64, requires_grad=True)
    (sp.all_to_all_rows(x, send, receive, group) * 5).sum().backward()
    assert x.grad is not None
    assert (x.grad == 5).all()


def ranks_check_identity() -> None:
    """No group, or a group of one rank: nothing happens."""
    for group in (None, dist.new_group([dist.get_rank()], use_local_synchronization=True)):
        x = whole_tensor(5, 7).requires_grad_()
        assert sp.gather_seq_scatter_heads(x, 0, 1, group) is x
        assert sp.gather_heads_scatter_seq(x, 1, 0, group) is x
        assert sp.gather_outputs_with_grad(x, 0, group) is x
        assert sp.all_reduce_sum(x, group) is x
        assert sp.slice_input(x, 0, group) is x
        assert sp.sp_pad_and_slice(x, 0, pad_scale=4, group=group) is x
        assert sp.all_to_all_rows(x, [5], [5], group) is x
        torch.testing.assert_close(sp.gather_outputs(x, 0, group), x.detach(), rtol=0, atol=0)


def ranks_check_refusals() -> None:
    group = dist.group.WORLD
    x = whole_tensor(6, 10)
    for function, numbers in (
        (lambda: sp.gather_seq_scatter_heads(x, 0, 1, group), "size 10 .* 4 ranks"),
        (lambda: sp.gather_heads_scatter_seq(x, 1, 0, group), "size 6 .* 4 ranks"),
        (lambda: sp.slice_input(x, 0, group), "size 6 .* 4 ranks"),
        (lambda: sp.all_to_all_rows(x, [1, 1, 1, 1], [1, 1, 1, 1], group), "4 rows .* x has 6"),
    ):
        with pytest.raises(ValueError, match=numbers):
            function()


@pytest.mark.parametrize(
    "check",
    [
        ranks_check_head_exchange,
        ranks_check_gather,
        ranks_check_sum,
        ranks_check_slices,
        ranks_check_rows,
        ranks_check_no_rows,
        ranks_check_identity,
        ranks_check_refusals,
    ],
    ids=lambda check: check.__name__.removeprefix("ranks_check_"),
)
def test_collective(pools, check: Callable[[], None]):
    pools(RANKS).run(check)
