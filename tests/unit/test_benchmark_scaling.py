"""The parts of the scaling benchmark that need neither a GPU nor several processes."""

import pytest
import torch

from modeling.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextTopKRouter
from scripts.benchmarks.benchmark_scaling import PIECE, default_meshes, parse_mesh, samples_of, use_zipf_routing
from tests.distributed.toy import toy_config


def test_meshes() -> None:
    assert parse_mesh("dp=2,sp=2,ep=4", 4) == {"dp": 2, "sp": 2, "ep": 4}
    assert parse_mesh("sp=4", 4) == {"dp": 1, "sp": 4, "ep": 1}
    assert parse_mesh("ep=4", 4) == {"dp": 4, "sp": 1, "ep": 4}
    for text, message in (
        ("dp=3", "dp x sp = 3 x 1, but 4"),
        ("tp=2", "'tp=2' is none of"),
        ("dp=x", "'dp=x' is none"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_mesh(text, 4)


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_default_meshes_are_of_all_processes(world: int) -> None:
    for mesh in default_meshes(world):
        sizes = parse_mesh(mesh, world)
        assert sizes["dp"] * sizes["sp"] == world and world % sizes["ep"] == 0


def test_samples() -> None:
    short = samples_of(4 * PIECE, PIECE, image_token_id=7, vocabulary=1000)
    long = samples_of(4 * PIECE, 4 * PIECE, image_token_id=7, vocabulary=1000)
    assert [len(sample["input_ids"]) for sample in short] == [PIECE] * 4
    assert len(long) == 1 and torch.equal(long[0]["input_ids"], torch.cat([s["input_ids"] for s in short]))
    assert long[0]["image_grid_thw"].shape == (4, 3)
    assert (long[0]["input_ids"] == 7).sum() >= 4 * PIECE // 4 and long[0]["input_ids"].max() < 1000


def test_zipf_routing_is_skewed_and_repeats() -> None:
    router = Qwen3VLMoeTextTopKRouter(toy_config().text_config)
    use_zipf_routing(router)
    torch.manual_seed(0)
    tokens = torch.randn(2000, router.hidden_dim)
    _, weights, indices = router(tokens)
    counts = indices.flatten().bincount(minlength=router.num_experts)
    assert indices.shape == weights.shape and (indices.sort(-1).values.diff(dim=-1) > 0).all()
    assert counts[0] > 1.5 * counts[-1]
    assert torch.equal(router(tokens + 1)[2], indices)
