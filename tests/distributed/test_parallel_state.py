"""Meshes: who is whose neighbour, which products are refused, and that nobody trains in parallel by accident."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import Shard

from modeling.distributed import parallel_state as state
from modeling.distributed.parallel_plan import ParallelPlan
from tests.distributed.ranks import Mesh, state_of

# dp_replicate, dp_shard, sp, ep -> per rank (dp_rank, sp_rank, ep_rank), expected by hand.
LAYOUTS = {
    (1, 4, 1, 1): [(0, 0, 0), (1, 0, 0), (2, 0, 0), (3, 0, 0)],
    (1, 2, 2, 1): [(0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 1, 0)],
    (1, 2, 2, 4): [(0, 0, 0), (0, 1, 1), (1, 0, 2), (1, 1, 3)],
    (2, 1, 2, 2): [(0, 0, 0), (0, 1, 1), (1, 0, 0), (1, 1, 1)],
    (2, 2, 1, 2): [(0, 0, 0), (1, 0, 1), (2, 0, 0), (3, 0, 1)],
}


def group_ranks(group: dist.ProcessGroup | None) -> list[int] | None:
    return None if group is None else dist.get_process_group_ranks(group)


def describe(sizes: tuple[int, int, int, int]) -> dict:
    replicate, shard, sp, ep = sizes
    ps = state_of(Mesh(shard, replicate, sp, ep))
    with state.use_parallel_state(ps):
        assert state.get_parallel_state() is ps
        return {
            "place": (ps.dp_rank, ps.sp_rank, ps.ep_rank),
            "dp": group_ranks(ps.dp_group),
            "sp": group_ranks(ps.sp_group),
            "ep": group_ranks(ps.ep_group),
            "fsdp": ps.fsdp_mesh.shape,
            "ep_fsdp": ps.ep_fsdp_mesh.shape,
            "enabled": (ps.dp_enabled, ps.sp_enabled, ps.ep_enabled, ps.fsdp_enabled),
        }


@pytest.mark.parametrize("sizes", LAYOUTS, ids=str)
def test_layout(pools, sizes: tuple[int, int, int, int]):
    replicate, shard, sp, ep = sizes
    described = pools(4).run(describe, sizes)
    assert [d["place"] for d in described] == LAYOUTS[sizes]
    for rank, d in enumerate(described):
        same_data = [r for r in range(4) if r // sp == rank // sp]
        same_slice = [r for r in range(4) if r % sp == rank % sp]
        assert d["sp"] == (same_data if sp > 1 else None)
        assert d["dp"] == (same_slice if replicate * shard > 1 else None)
        assert d["ep"] == ([r for r in range(4) if r // ep == rank // ep] if ep > 1 else None)
        assert d["fsdp"] == ((replicate, shard * sp) if replicate > 1 else (shard * sp,))
        assert d["ep_fsdp"] == ((replicate, shard * sp // ep) if replicate > 1 else (shard * sp // ep,))
        assert d["enabled"] == (replicate * shard > 1, sp > 1, ep > 1, True)


def raise_on_bad_sizes() -> None:
    for sizes, numbers in (
        ({"dp_shard_size": 3}, r"1 x 3 x 1 = 3, but 4 process"),
        ({"dp_shard_size": 2, "sp_size": 2, "ep_size": 3}, r"ep_size=3 .* 2 x 2 = 4"),
        ({"dp_shard_size": 2, "dp_replicate_size": 2, "ep_size": 4}, r"ep_size=4 .* 2 x 1 = 2"),
        ({"dp_shard_size": 4, "sp_size": 0}, r"sp_size=0"),
    ):
        with pytest.raises(ValueError, match=numbers):
            state.init_parallel_state(**sizes, device_type="cpu")


def test_bad_sizes(pools):
    pools(4).run(raise_on_bad_sizes)


def raise_without_init() -> None:
    state.set_parallel_state(None)
    with pytest.raises(RuntimeError, match="4 processes run"):
        state.get_parallel_state()


def test_several_processes_must_initialise(pools):
    pools(4).run(raise_without_init)


def test_single_process_is_trivial():
    ps = state.get_parallel_state()
    assert (ps.world_size, ps.rank, ps.dp_rank, ps.sp_rank, ps.ep_rank) == (1, 0, 0, 0, 0)
    assert ps.sp_group is ps.dp_group is ps.ep_group is ps.world_group is None
    assert ps.fsdp_mesh is None
    assert not (ps.fsdp_enabled or ps.sp_enabled or ps.ep_enabled)
    with pytest.raises(ValueError, match=r"= 2, but 1 process"):
        state.init_parallel_state(dp_shard_size=2, device_type="cpu")


def test_use_parallel_state_restores():
    before = state.get_parallel_state()
    other = state.ParallelState(sp_size=2)
    with pytest.raises(KeyError), state.use_parallel_state(other):
        assert state.get_parallel_state() is other
        raise KeyError
    assert state.get_parallel_state() is before
    with pytest.raises(AttributeError):
        other.sp_size = 4  # type: ignore[misc]


NAMES = [
    "model.layers.0.mlp.gate_proj",
    "model.layers.1.mlp.experts.down_proj",
    "model.layers.12.mlp.experts.down_proj",
]


def test_plan_resolves_patterns():
    plan = ParallelPlan({"ep": {"model.layers.*.mlp.experts.down_proj": Shard(0)}})
    assert plan.resolve("ep", NAMES) == {NAMES[1]: Shard(0), NAMES[2]: Shard(0)}
    wrapped = [f"base_model.model.{name}" for name in NAMES]
    assert list(plan.resolve("ep", wrapped)) == wrapped[1:]
    assert plan.resolve("tp", NAMES) == {}


def test_plan_refuses_what_it_cannot_place():
    with pytest.raises(ValueError, match=r"'model\.layers\.\*\.experts\.down_proj' matches none of the 3"):
        ParallelPlan({"ep": {"model.layers.*.experts.down_proj": Shard(0)}}).resolve("ep", NAMES)
    twice = {"model.layers.*.mlp.experts.down_proj": Shard(0), "model.layers.1.mlp.experts.*": Shard(1)}
    with pytest.raises(ValueError, match="placed twice"):
        ParallelPlan({"ep": twice}).resolve("ep", NAMES)


def test_cuda_groups_carry_host_tensors_too():
    """The backend string that starts NCCL beside gloo; parsed here, run on GPUs by the GPU tests."""
    config = dist.distributed_c10d.BackendConfig(dist.Backend("cpu:gloo,cuda:nccl"))
    assert config.get_device_backend_map() == {"cpu": "gloo", "cuda": "nccl"}
    assert "cpu:" in str(config)
    assert torch.distributed.is_gloo_available()
