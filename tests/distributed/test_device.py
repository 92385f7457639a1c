"""The switch between gloo on CPUs and NCCL on GPUs, as far as a host without GPUs can tell."""

import os
from collections.abc import Iterator

import pytest
import torch

from tests.distributed import device
from tests.distributed.conftest import pool_or_skip
from tests.distributed.pool import Pool


def test_without_the_variable_it_is_the_cpu():
    assert device.device_under_test({}) == "cpu"
    assert device.device_under_test({device.VARIABLE: ""}) == "cpu"
    assert device.device_under_test({device.VARIABLE: "cpu"}) == "cpu"
    assert device.device_under_test({device.VARIABLE: "cuda"}) == "cuda"


def test_an_unknown_device_is_refused():
    with pytest.raises(ValueError, match=r"QWEN3_VL_MOE_TEST_DEVICE='gpu'; it is 'cpu' .* or 'cuda'"):
        device.device_under_test({device.VARIABLE: "gpu"})


@pytest.mark.parametrize(("found", "ranks", "runs"), [(0, 2, False), (2, 2, True), (4, 2, True), (4, 8, False)])
def test_a_mesh_larger_than_the_host_is_skipped_with_the_numbers(monkeypatch, found: int, ranks: int, runs: bool):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: found)

    def pools(world_size: int, device: str) -> Pool:
        return Pool(world_size, device=device)

    assert pool_or_skip(pools, ranks, "cpu").device == "cpu"
    if runs:
        pool = pool_or_skip(pools, ranks, "cuda")
        assert (pool.world_size, pool.device) == (ranks, "cuda")
    else:
        with pytest.raises(
            pytest.skip.Exception, match=f"needs {ranks} GPUs, one for each rank; this host has {found}"
        ):
            pool_or_skip(pools, ranks, "cuda")


@pytest.fixture
def tf32_allowed() -> Iterator[None]:
    """In matrix products and convolutions, until the test is over."""
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = True
    yield
    for backend, allowed in zip(backends, before, strict=True):
        backend.allow_tf32 = allowed


@pytest.mark.usefixtures("tf32_allowed")
def test_a_rank_on_a_gpu_takes_its_own_and_keeps_fp32_whole(monkeypatch):
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "1")
    assert device.prepare_rank(3, "cuda") == "cpu:gloo,cuda:nccl"
    assert chosen == [3]
    assert os.environ["NCCL_NVLS_ENABLE"] == "0"
    assert not torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cudnn.allow_tf32


def test_a_rank_on_the_cpu_is_left_as_it_was(monkeypatch):
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "1")
    assert device.prepare_rank(3, "cpu") == "gloo"
    assert os.environ["NCCL_NVLS_ENABLE"] == "1"
