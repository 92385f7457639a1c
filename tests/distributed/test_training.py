"""Twenty AdamW steps on four ranks against upstream in one process, and runs that stop at step ten and resume."""

from pathlib import Path

import pytest
import torch

from modeling.distributed.checkpoint import load_training_state, save_training_state
from modeling.distributed.failures import RankFailure
from modeling.distributed.parallel_state import use_parallel_state
from modeling.distributed.parallelize import clip_grad_norm_, parallelize_model, param_groups_by_mesh
from tests.distributed.oracle import total_loss
from tests.distributed.ranks import Mesh, batch_of, build, state_of, summed
from tests.distributed.toy import fill_weights

MESHES = [Mesh(4), Mesh(2, sp=2, ep=4), Mesh(1, replicate=2, sp=2, ep=2)]
STEPS, STOP = 20, 10
OPTIMIZER = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
MAX_NORM = 1.0
# Both hold images and videos in every step: upstream leaves a parameter without a gradient alone, where ranks that
# share it decay it like any other.
KINDS = ("mixed", "padded")


def train(mesh: Mesh, start: int, stop: int, folder: Path, save_at: int | None = None) -> dict:
    """Losses of steps [start, stop) and the weights at the end; saves after `save_at` steps, resumes if start > 0."""
    losses = []
    with use_parallel_state(state_of(mesh)):
        model = parallelize_model(build())
        optimizer = torch.optim.AdamW(param_groups_by_mesh(model.parameters()), **OPTIMIZER)
        if start:
            assert load_training_state(folder, model, optimizer) == {"step": start}
        for step in range(start, stop):
            loss = model(**batch_of(KINDS[step % 2], state_of(mesh))).loss
            loss.backward()
            clip_grad_norm_(model, MAX_NORM)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(summed(loss))
            if step + 1 == save_at:
                save_training_state(folder, model, optimizer, {"step": step + 1})
        weights = {name: p.full_tensor().clone().numpy() for name, p in model.state_dict().items()}
    return {"losses": losses, "weights": weights}


@pytest.fixture(scope="module")
def upstream_curve() -> list[float]:
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

    from tests.distributed.toy import toy_config_dict

    model = Qwen3VLMoeForConditionalGeneration(Qwen3VLMoeConfig(**toy_config_dict())).train()
    fill_weights(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), **OPTIMIZER)
    losses = []
    for step in range(STEPS):
        loss = total_loss(model, KINDS[step % 2])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.fixture(scope="module")
def undisturbed(pools, tmp_path_factory: pytest.TempPathFactory) -> dict[Mesh, tuple[Path, dict]]:
    """Per mesh: the state saved at step ten, and the whole run."""
    runs = {}
    for mesh in MESHES:
        folder = tmp_path_factory.mktemp("runs") / str(mesh)
        runs[mesh] = (folder, pools(4).run(train, mesh, 0, STEPS, folder, save_at=STOP)[0])
    return runs


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_curve_follows_upstream(undisturbed, upstream_curve: list[float], mesh: Mesh):
    losses = undisturbed[mesh][1]["losses"]
    assert losses == pytest.approx(upstream_curve, rel=1e-4)
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_resume_on_the_same_mesh_is_bitwise(pools, undisturbed, mesh: Mesh):
    folder, whole = undisturbed[mesh]
    resumed = pools(4).run(train, mesh, STOP, STEPS, folder)[0]
    assert resumed["losses"] == whole["losses"][STOP:]
    for name, value in whole["weights"].items():
        assert (resumed["weights"][name] == value).all(), name


@pytest.mark.parametrize(("saved_on", "resumed_on"), [(0, 1), (1, 2), (2, 0)])
def test_resume_on_another_mesh(pools, undisturbed, saved_on: int, resumed_on: int):
    folder, whole = undisturbed[MESHES[saved_on]]
    resumed = pools(4).run(train, MESHES[resumed_on], STOP, STEPS, folder)[0]
    assert resumed["losses"] == pytest.approx(whole["losses"][STOP:], rel=1e-5)


def resume_from_nothing(folder: Path) -> str:
    with use_parallel_state(state_of(MESHES[0])):
        model = parallelize_model(build())
        optimizer = torch.optim.AdamW(param_groups_by_mesh(model.parameters()), **OPTIMIZER)
        with pytest.raises(RankFailure) as caught:
            load_training_state(folder, model, optimizer)
    return str(caught.value)


def test_resume_without_a_complete_state(pools, tmp_path: Path):
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "__0_0.distcp").write_bytes(b"1")
    messages = pools(4).run(resume_from_nothing, tmp_path / "half")
    assert len(set(messages)) == 1
    assert "no complete training state" in messages[0]
