"""Every rank finishes, or every rank fails with the same message, within a time limit; never some of each.

What one step may meet: no images anywhere, images or videos on one rank only, fewer images than ranks, ranks with one
sample beside ranks with five; and one rank whose data or checkpoint is bad.
"""

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist

from modeling.data.collator import SequenceParallelCollator
from modeling.distributed.failures import RankFailure, fail_together
from modeling.distributed.parallel_state import use_parallel_state
from modeling.distributed.parallelize import clip_grad_norm_
from tests.distributed.device import DEVICE, rank_device, to_device
from tests.distributed.pool import Hang, Pool
from tests.distributed.ranks import Mesh, Options, features_of, make_parallel, single_process_model, state_of, summed

# On GPUs the first step waits for every kernel to be compiled.
LIMIT = 60.0 if DEVICE == "cpu" else 300.0
MESHES = [Mesh(4), Mesh(4, ep=4), Mesh(2, sp=2, ep=4), Mesh(2, replicate=2, ep=2)]
# Samples per data rank (of four; with two data ranks the first two), by kind and number.
LOADS: dict[str, list[list[tuple[str, int]]]] = {
    "no images anywhere": [[("text", i)] for i in range(4)],
    "images on one rank": [[("text", 0)], [("image", 1), ("image", 2)], [("text", 1)], [("text", 2)]],
    "videos on one rank": [[("video", 0)], [("text", 0)], [("text", 1)], [("text", 2)]],
    "images here, videos there": [[("image", 0)], [("video", 0)], [("text", 0)], [("mixed", 3)]],
    "more ranks than images": [[("mixed", 1)], [("image", 0)], [("mixed", 4)], [("text", 0)]],
    "unequal sample counts": [
        [("mixed", i) for i in range(5)],
        [("text", 2)],
        [("image", 4)],
        [("text", 1), ("text", 2)],
    ],
}


def one_step(mesh: Mesh, load: list[list[tuple[str, int]]], options: Options) -> float:
    model, state = make_parallel(mesh, options)
    collator = SequenceParallelCollator(
        state.sp_size, state.sp_rank, single_process_model().get_metadata_collate_func()
    )
    with use_parallel_state(state):
        batch = collator([features_of(kind)[i] for kind, i in load[state.dp_rank]])
        loss = model(**to_device(batch, state.device_type)).loss
        loss.backward()
        norm = clip_grad_norm_(model, 1.0)
    assert math.isfinite(norm.item())
    assert norm > 0
    return summed(loss)


@pytest.mark.parametrize("balanced", [False, True], ids=["plain", "balancer"])
@pytest.mark.parametrize("load", LOADS)
def test_any_load_finishes(device_pools, load: str, balanced: bool):
    """The same summed loss on every rank, and whatever the mesh, where the samples are the same."""
    for mesh in MESHES:
        options = Options(encoder_balance=balanced, parallelize={"recompute": "full" if mesh.ep == 4 else "none"})
        losses = device_pools(4).run(one_step, mesh, LOADS[load], options, timeout=LIMIT)
        assert len(set(losses)) == 1
        assert math.isfinite(losses[0])


class Source:
    """Samples of a rank; one rank's third cannot be read."""

    def __init__(self, bad_rank: int) -> None:
        self.bad_rank = bad_rank

    def __getitem__(self, step: int) -> dict[str, Any]:
        if step == 2 and dist.get_rank() == self.bad_rank:
            raise OSError("clip_17.mp4: moov atom not found")
        return features_of("mixed")[step]


def train_until_the_data_fails(mesh: Mesh, bad_rank: int) -> tuple[int, str]:
    model, state = make_parallel(mesh, Options())
    source, done = Source(bad_rank), 0
    collator = SequenceParallelCollator(
        state.sp_size, state.sp_rank, single_process_model().get_metadata_collate_func()
    )
    with use_parallel_state(state), pytest.raises(RankFailure) as caught:
        for step in range(4):
            with fail_together(state.world_group):
                batch = to_device(collator([source[step]]), state.device_type)
            model(**batch).loss.backward()
            done += 1
    assert (caught.value.__cause__ is not None) == (dist.get_rank() == bad_rank)
    return done, str(caught.value)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_bad_data_on_one_rank_stops_all(device_pools, mesh: Mesh):
    outcomes = device_pools(4).run(train_until_the_data_fails, mesh, 3, timeout=LIMIT)
    assert set(outcomes) == {(2, "rank 3: OSError: clip_17.mp4: moov atom not found")}


def collate_on_a_rank_with_wrong_tokens(mesh: Mesh) -> str:
    state = state_of(mesh)
    feature = dict(features_of("text")[0])
    if dist.get_rank() == 1:
        feature["input_ids"] = feature["input_ids"] + 1000
    collator = SequenceParallelCollator(1, 0, single_process_model().get_metadata_collate_func())
    with pytest.raises(RankFailure) as caught, fail_together(state.world_group):
        collator([feature])
    return str(caught.value)


def test_the_collator_finds_wrong_input_before_the_model_runs(device_pools):
    messages = device_pools(4).run(collate_on_a_rank_with_wrong_tokens, Mesh(4), timeout=LIMIT)
    assert len(set(messages)) == 1
    assert messages[0].startswith("rank 1: ValueError: input_ids run from 100")


def test_without_ranks_errors_pass_through():
    with pytest.raises(KeyError, match="x"), fail_together(None):
        raise KeyError("x")
    with fail_together(None):
        pass


def wait_for_nobody() -> None:
    here = torch.zeros(1, device=rank_device())
    if dist.get_rank() == 0:
        dist.all_reduce(here)
    here.item()  # over NCCL the call above returns, and this waits


def test_a_hang_is_noticed(device_pools):
    """The suite's own alarm: a rank that waits for one that left."""
    pool = Pool(2, device=device_pools(2).device)
    try:
        pool.run(rank_device, timeout=LIMIT)  # both ranks are up, so that what follows is no slow start
        with pytest.raises(Hang, match=r"rank 0 of 2 did not finish within 20.0 s; \[1\] did"):
            pool.run(wait_for_nobody, timeout=20.0)
    finally:
        pool.close()
