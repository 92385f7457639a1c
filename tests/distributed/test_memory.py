"""A model with 1 GB of experts on four ranks: loading and one optimizer step stay within a rank's share of it."""

import ctypes
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from conversion.layout import logical_name, stamp_metadata
from modeling.distributed.checkpoint import load_checkpoint
from modeling.distributed.parallel_state import use_parallel_state
from modeling.distributed.parallelize import parallelize_model, param_groups_by_mesh
from modeling.qwen3_vl_moe import Qwen3VLMoeForCausalLM
from tests.distributed.pool import Pool
from tests.distributed.ranks import Mesh, batch_of, state_of
from tests.distributed.toy import toy_config, toy_config_dict

MIB = 2**20
# Twelve MoE layers of 64 experts: 12 · 64 · 3 · 56 · 2,100 · 4 bytes = 1.08 GB.
SIZES = {"num_experts": 64, "moe_intermediate_size": 2100, "num_hidden_layers": 13}
ALLOWANCE = 600 * MIB


def write_large_checkpoint(folder: Path) -> int:
    """Fused layout, one file per tensor of experts; returns the bytes of all experts."""
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in Qwen3VLMoeForCausalLM(toy_config(**SIZES)).state_dict().items()}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(toy_config_dict(**SIZES)))
    small, experts = {}, 0
    for name, shape in shapes.items():
        if logical_name(name) is None:
            small[name] = torch.full(shape, 0.02) if len(shape) > 1 else torch.ones(shape)
            continue
        value = torch.full(shape, 0.01)
        experts += value.nbytes
        save_file({name: value}, folder / f"{name}.safetensors", metadata=stamp_metadata("fused"))
        del value
    save_file(small, folder / "small.safetensors", metadata=stamp_metadata("fused"))
    return experts


def peak_memory() -> int:
    """The most this process ever held, in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def load_and_step(mesh: Mesh, folder: Path) -> tuple[int, int, int]:
    """Bytes of the parameters this rank keeps, what loading them took at most, and the peak after an optimizer step."""
    # glibc would keep freed blocks of up to 32 MB for later; the question is what the program holds.
    mmap_threshold = -3
    assert ctypes.CDLL("libc.so.6").mallopt(mmap_threshold, 128 * 1024)
    state = state_of(mesh)
    with use_parallel_state(state):
        with torch.device("meta"):
            model = Qwen3VLMoeForCausalLM(toy_config(**SIZES)).train()
        model = parallelize_model(model)
        before = peak_memory()
        load_checkpoint(model, folder)
        loading = peak_memory() - before
        kept = sum(parameter.to_local().nbytes for parameter in model.parameters())
        optimizer = torch.optim.AdamW(param_groups_by_mesh(model.parameters()), lr=1e-3, foreach=False)
        model(**batch_of("text", state)).loss.backward()
        optimizer.step()
    return kept, loading, peak_memory()


@pytest.mark.parametrize("mesh", [Mesh(4, ep=4), Mesh(2, sp=2, ep=2)], ids=str)
def test_a_rank_holds_its_share_only(tmp_path: Path, mesh: Mesh):
    experts = write_large_checkpoint(tmp_path / "large")
    assert experts > 2**30
    pool = Pool(4)
    try:
        results = pool.run(load_and_step, mesh, tmp_path / "large", timeout=240)
    finally:
        pool.close()
    for kept, loading, peak in results:
        assert kept == pytest.approx(experts / 4, rel=0.02)
        # The file is mapped 64 MiB at a time. Far from all experts, which no rank ever holds.
        assert loading < kept + 100 * MIB < experts / 2
        # Parameters, gradients and two moments, plus what Python and torch take and what one layer needs at a time.
        assert peak < 4 * kept + ALLOWANCE, f"peak {peak / MIB:.0f} MiB, share {kept / MIB:.0f} MiB"
