"""The trainer on four ranks: data, sequence and expert parallel at once; stops that any mesh can go on from."""

import shutil
import signal
import threading
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemWriter

from modeling.training.options import TrainOptions
from tests.training.runs import at_step, curve, options_of, read_json, run_rank, stopped_on_one_rank

STEPS = 6
MESH = {"dp_shard": 2, "sp": 2, "ep": 2}
# Two data ranks each, so that the batches are the same; everything else is cut another way.
OTHERS = {
    4: {"dp_shard": 1, "dp_replicate": 2, "sp": 2, "ep": 1},
    2: {"dp_shard": 2, "sp": 1, "ep": 2, "recompute": "full"},
}


def checkpoints_of(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def undisturbed(pools: Any, tiny_hub: Path, chats: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ranks") / "undisturbed"
    assert pools(4).run(run_rank, options_of(tiny_hub, chats, out, max_steps=STEPS, **MESH)) == [0] * 4
    return out


@pytest.fixture(scope="module")
def stopped(pools: Any, tiny_hub: Path, chats: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped behind its second step."""
    out = tmp_path_factory.mktemp("ranks") / "stopped"
    options = options_of(tiny_hub, chats, out, max_steps=STEPS, **MESH)
    assert pools(4).run(stopped_on_one_rank, options, 2) == [0] * 4
    assert [line["step"] for line in curve(out)] == [1, 2]
    assert checkpoints_of(out) == ["step-00000002"]
    return out


def test_same_mesh_goes_on_bitwise(
    pools: Any, undisturbed: Path, stopped: Path, tiny_hub: Path, chats: Path, tmp_path: Path
):
    out = tmp_path / "run"
    shutil.copytree(stopped, out)
    assert pools(4).run(run_rank, options_of(tiny_hub, chats, out, max_steps=STEPS, **MESH)) == [0] * 4
    assert curve(out) == curve(undisturbed)


def killed_in_mid_write(options: TrainOptions, step: int) -> int:
    """On every rank of a pool: SIGKILL when `step` is logged and the step before has its checkpoint half written.

    Half: the parts of all ranks are there, the metadata are not. The ranks meet through a file before they die: one
    that waited in a collective could see another die first, and fail where it should be killed.
    """
    world = dist.get_world_size()
    meeting = dist.FileStore(f"{options.out}.killed-at-{step}", world)
    finish = FileSystemWriter.finish

    def hold(writer: FileSystemWriter, **content: Any) -> None:
        if Path(writer.path).name == f"step-{step - 1:08d}.partial":
            meeting.set("parts written", "")
            threading.Event().wait()
        finish(writer, **content)

    def die() -> None:
        if meeting.add("ranks", 1) == world:
            meeting.set("all here", "")
        meeting.wait(["all here", "parts written"])
        signal.raise_signal(signal.SIGKILL)

    with mock.patch.object(FileSystemWriter, "finish", hold), at_step(step, die):
        return run_rank(options)


def test_killed_ranks_fall_back_to_the_newest_checkpoint(
    pools: Any, undisturbed: Path, tiny_hub: Path, chats: Path, tmp_path: Path
):
    """All at once, each time while a checkpoint is written: first with no other to go on from, then with three."""
    out = tmp_path / "run"
    options = options_of(tiny_hub, chats, out, max_steps=STEPS, save_every=1, keep=STEPS, **MESH)
    for step in (2, 5):
        outcomes = pools(4).outcomes(killed_in_mid_write, options, step)
        assert [getattr(outcome, "kind", outcome) for outcome in outcomes] == ["EOFError"] * 4
        assert [line["step"] for line in curve(out)] == list(range(1, step + 1))
        whole = [f"step-{done:08d}" for done in range(1, step - 1)]
        assert checkpoints_of(out) == [*whole, f"step-{step - 1:08d}.partial"]
    assert pools(4).run(run_rank, options) == [0] * 4
    assert curve(out) == curve(undisturbed)


def test_non_finite_stops_all_ranks(pools: Any, tiny_hub: Path, chats: Path, tmp_path: Path):
    """A rate that blows the weights up in the first step: the second ends on every rank, all its samples named."""
    out = tmp_path / "run"
    outcomes = pools(4).outcomes(run_rank, options_of(tiny_hub, chats, out, lr=1e30, schedule="constant", **MESH))
    assert {outcome.kind for outcome in outcomes} == {"NonFiniteLoss"}
    assert len({outcome.message for outcome in outcomes}) == 1
    ranks = read_json(out / "non_finite_step_2.json")["ranks"]
    samples = [[sample for batch in rank["micro_batches"] for sample in batch["samples"]] for rank in ranks]
    assert samples[0] == samples[1] != samples[2] == samples[3] and all(samples)
    assert len(curve(out)) == 1


@pytest.mark.parametrize("world", OTHERS)
def test_other_meshes_go_on_within_1e_4(
    pools: Any, undisturbed: Path, stopped: Path, tiny_hub: Path, chats: Path, tmp_path: Path, world: int
):
    out = tmp_path / "run"
    shutil.copytree(stopped, out)
    begun = len(curve(out))
    assert pools(world).run(run_rank, options_of(tiny_hub, chats, out, max_steps=STEPS, **OTHERS[world])) == [0] * world
    for line, expected in zip(curve(out), curve(undisturbed), strict=True):
        assert line["samples"] == expected["samples"] and line["label_tokens"] == expected["label_tokens"]
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        assert line["step"] > begun or line == expected


def test_other_numbers_of_data_ranks_see_every_sample_once(pools: Any, tiny_hub: Path, chats: Path, tmp_path: Path):
    """One epoch, begun on two data ranks of two each, gone on with one, then ended on four."""
    out = tmp_path / "run"
    common = {"epochs": 1, "pack_tokens": 256, "pack_buffer": 6}
    assert pools(4).run(run_rank, options_of(tiny_hub, chats, out, **common, **MESH, max_steps=1)) == [0] * 4
    first = curve(out)[-1]
    assert pools(2).run(run_rank, options_of(tiny_hub, chats, out, **common, sp=2, max_steps=2)) == [0] * 2
    second = curve(out)[-1]
    assert pools(4).run(run_rank, options_of(tiny_hub, chats, out, **common, dp_shard=4, max_steps=99)) == [0] * 4
    last = curve(out)[-1]
    assert 0 < first["samples"] < second["samples"] < last["samples"] == 36


def test_a_bad_sample_on_one_rank_stops_all(pools: Any, tiny_hub: Path, chats: Path, tmp_path: Path):
    lines = chats.read_text().splitlines()
    path = chats.with_name("one_bad.jsonl")
    path.write_text("\n".join([lines[0], "{", lines[2]]))
    options = options_of(tiny_hub, path, tmp_path / "run", on_bad_sample="fail", shuffle=False, **MESH)
    outcomes = pools(4).outcomes(run_rank, options)
    assert {outcome.kind for outcome in outcomes} == {"RankFailure"}
    assert len({outcome.message for outcome in outcomes}) == 1
    assert f"{path}:2: not JSON: Expecting" in outcomes[0].message


def test_ranks_without_samples_go_along(pools: Any, tiny_hub: Path, chats: Path, tmp_path: Path):
    """One sample for two data ranks: the other rank works on padding, and the run ends with its only step."""
    path = chats.with_name("one.jsonl")
    path.write_text(chats.read_text().splitlines()[0])
    options = options_of(tiny_hub, path, tmp_path / "run", epochs=1, **MESH)
    assert pools(4).run(run_rank, options) == [0] * 4
    assert [(line["step"], line["samples"]) for line in curve(tmp_path / "run")] == [(1, 1)]
