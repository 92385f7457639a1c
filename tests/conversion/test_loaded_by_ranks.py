"""An ep-sharded output, loaded by this project's model on 2 and 4 ranks, is the fused one."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from conversion import hf_to_veomni
from conversion.layout import stamp_metadata
from modeling.distributed.checkpoint import load_checkpoint
from modeling.distributed.parallelize import parallelize_model
from modeling.qwen3_vl_moe import Qwen3VLMoeForCausalLM
from tests.distributed.pool import Pool
from tests.distributed.ranks import Mesh, build, state_of
from tests.distributed.toy import toy_config, toy_config_dict


def load(mesh: Mesh, folder: Path) -> tuple[int, dict[str, torch.Tensor]]:
    """(bytes this rank read, every whole parameter) of the toy model on `mesh`."""
    with torch.device("meta"):
        model = Qwen3VLMoeForCausalLM(toy_config())
    model = parallelize_model(model, parallel_state=state_of(mesh))
    read = load_checkpoint(model, folder, parallel_state=state_of(mesh))
    return read, {name: parameter.full_tensor().detach() for name, parameter in model.named_parameters()}


@pytest.fixture(scope="module")
def fused(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ranks") / "fused"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(toy_config_dict() | {"model_type": "qwen3_vl_moe"}))
    tensors = {name: value.contiguous() for name, value in build().state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata=stamp_metadata("fused"))
    return folder


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_get_the_fused_weights(tmp_path, fused, world):
    output = tmp_path / "ep"
    words = ["--target", "ep-sharded", "--ep-size", str(world), "--quiet"]
    assert hf_to_veomni.main([str(fused), str(output), *words]) == 0
    pool = Pool(world)
    try:
        mesh = Mesh(world, ep=world)
        from_fused, from_parts = (pool.run(load, mesh, folder) for folder in (fused, output))
    finally:
        pool.close()
    expected = build().state_dict()
    for (read, parameters), (read_fused, parameters_fused) in zip(from_parts, from_fused):
        assert read == read_fused  # no byte more than it keeps
        for name, value in parameters.items():
            torch.testing.assert_close(value, parameters_fused[name], rtol=0, atol=0)
            torch.testing.assert_close(value, expected[name], rtol=0, atol=0)
