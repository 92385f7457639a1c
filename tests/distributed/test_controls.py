"""Negative controls: the check of the matrix on code that is broken on purpose, once for each mistake seen elsewhere.

If one of these went unnoticed, a green matrix would mean nothing.
"""

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

from modeling.distributed import encoder_data_balance, sequence_parallel
from modeling.qwen3_vl_moe import modeling_qwen3_vl_moe as model_file
from tests.distributed.oracle import reference
from tests.distributed.pool import Hang, Pool, RanksFailed
from tests.distributed.ranks import Mesh, Options, gradients_of
from tests.distributed.test_matrix import check

MESH = Mesh(2, sp=2, ep=2)


def deepstack_without_gradient() -> Any:
    """VeOmni issue 681: the gather of deepstack features drops their gradient."""
    return mock.patch.object(model_file, "gather_outputs_with_grad", sequence_parallel.gather_outputs)


def mean_instead_of_sum() -> Any:
    """FSDP's default: gradients averaged over ranks."""
    return mock.patch.object(FSDPModule, "set_gradient_divide_factor", lambda self, factor: None)


def slice_gradient_gathered() -> Any:
    """The gradient of a sum over ranks taken once per rank: twice too large under sp=2."""
    backward = sequence_parallel._AllToAll.backward
    return mock.patch.object(
        sequence_parallel._AllToAll,
        "backward",
        staticmethod(lambda ctx, *grads: (2 * backward(ctx, *grads)[0], None, None, None)),
    )


def local_loss_denominator() -> Any:
    """Each rank divides by its own number of labels, as if ranks had equally many."""
    whole = model_file.linear_cross_entropy

    def local(hidden: Any, weight: Any, labels: Any, *, num_items: Any, **rest: Any) -> Any:
        return whole(hidden, weight, labels, num_items=4 * (labels != -100).sum(), **rest)

    return mock.patch.object(model_file, "linear_cross_entropy", local)


def local_expert_counts() -> Any:
    """The load-balancing loss of each rank's own tokens."""
    whole = model_file.load_balancing_loss_func

    def local(*args: Any, group: Any, **rest: Any) -> Any:
        return whole(*args, group=None, **rest) / 4

    return mock.patch.object(model_file, "load_balancing_loss_func", local)


def images_come_home_swapped() -> Any:
    """The balancer's way back takes rows in another order."""
    whole = encoder_data_balance.Exchange.reverse

    def reverse(self: Any) -> Any:
        there = whole(self)
        return encoder_data_balance.Exchange(
            there.send, there.receive, there.pick.flip(0), there.place, there.rows_before, there.rows_after
        )

    return mock.patch.object(encoder_data_balance.Exchange, "reverse", reverse)


CONTROLS: dict[str, tuple[Callable[[], Any], Options]] = {
    "deepstack without gradient": (deepstack_without_gradient, Options()),
    "mean instead of sum": (mean_instead_of_sum, Options()),
    "gradient counted once per rank": (slice_gradient_gathered, Options()),
    "local loss denominator": (local_loss_denominator, Options()),
    "local expert counts": (local_expert_counts, Options(balancing=True)),
    "images come home swapped": (images_come_home_swapped, Options(encoder_balance=True)),
}


def broken_gradients(name: str) -> dict[str, Any] | None:
    breakage, options = CONTROLS[name]
    with breakage():
        return gradients_of(MESH, "mixed", options)


@pytest.mark.parametrize("name", CONTROLS)
def test_the_check_notices(pools, name: str):
    expected = reference("mixed", balancing=CONTROLS[name][1].balancing)
    with pytest.raises(AssertionError, match=r"is off by|has no gradient|not approx|== "):
        check(pools(4).run(broken_gradients, name)[0], expected)


def test_a_missing_dummy_is_noticed(pools):
    """Text-only ranks that skip the vision tower leave the others waiting; the collectives no longer agree."""
    pool = Pool(2, collective_timeout=10.0)
    try:
        with pytest.raises((Hang, RanksFailed)):
            pool.run(step_without_dummy, timeout=40.0)
    finally:
        pool.close()


def step_without_dummy() -> None:
    whole = model_file.Qwen3VLMoeModel._fill_back

    def skip(self: Any, visual: Any, inputs_embeds: Any, state: Any) -> Any:
        if visual.pixel_values is None:
            none = torch.zeros(0, dtype=torch.int64)
            return inputs_embeds, none, [inputs_embeds.new_zeros(0, inputs_embeds.shape[-1])] * 3
        return whole(self, visual, inputs_embeds, state)

    with mock.patch.object(model_file.Qwen3VLMoeModel, "_fill_back", skip):
        gradients_of(Mesh(2), "images on one rank", Options())
