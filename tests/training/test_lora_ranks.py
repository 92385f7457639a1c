"""LoRA under FSDP2, sequence and expert parallelism: PEFT's own adapters on one process are what every mesh reproduces.

On the toy model losses, gradients and weights of a few steps, number by number; with the trainer whole runs, stopped
and resumed, and what they write, read by transformers and PEFT.
"""

import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model
from torch.distributed.tensor import DTensor
from transformers import Qwen3VLMoeForConditionalGeneration

from modeling.distributed.parallel_state import use_parallel_state
from modeling.distributed.parallelize import parallelize_model, param_groups_by_mesh
from modeling.training.lora import add_lora, lora_config, merge_and_remove
from tests.distributed.ranks import Mesh, batch_of, build, state_of, summed, whole_gradients
from tests.ecosystem.chats import padded_batch
from tests.training.runs import curve, options_of, run, run_rank, stopped_on_one_rank
from tests.training.test_lora import start_adapters

TARGETS = ("attention", "attention+experts")
KIND = "mixed"
STEPS = 4
# (mesh, recompute): each way of cutting alone on two ranks, and together on four.
MESHES = [
    (Mesh(2), "none"),
    (Mesh(sp=2), "none"),
    (Mesh(2, ep=2), "none"),
    (Mesh(2, sp=2, ep=2), "none"),
    (Mesh(2, sp=2, ep=4), "full"),
    (Mesh(1, replicate=2, sp=2, ep=2), "none"),
]


def adamw(parameters: list[torch.nn.Parameter]) -> torch.optim.AdamW:
    # A large eps: an entry whose gradient is rounding alone does not move by a whole step in either direction.
    groups = param_groups_by_mesh(parameter for parameter in parameters if parameter.requires_grad)
    return torch.optim.AdamW(groups, lr=3e-3, eps=1e-5, weight_decay=0.01)


def plain(name: str) -> str:
    """PEFT's name of a parameter without what its model puts in front."""
    return name.removeprefix("base_model.model.")


def adapters_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {plain(name): p.detach() for name, p in model.named_parameters() if "lora_" in name}
    return {name: (p.full_tensor() if isinstance(p, DTensor) else p).clone() for name, p in found.items()}


def train_on_ranks(mesh: Mesh, targets: str, recompute: str) -> dict[str, Any]:
    """Losses, the first step's gradients, the adapters at the end, and the weights that they are merged into."""
    state = state_of(mesh)
    with use_parallel_state(state):
        model = add_lora(build(), lora_config(targets, 4, 8))
        start_adapters(model)
        model = parallelize_model(model, recompute=recompute)
        optimizer = adamw(list(model.parameters()))
        losses, gradients = [], {}
        for step in range(STEPS):
            loss = model(**batch_of(KIND, state)).loss
            loss.backward()
            losses.append(summed(loss))
            if step == 0:
                gradients = whole_gradients(model)
            optimizer.step()
            optimizer.zero_grad()
        adapters = adapters_of(model)
        merge_and_remove(model)
        merged = {name: p.detach().full_tensor().clone() for name, p in model.named_parameters()}
    if dist.get_rank():
        return {}
    found = {"gradients": gradients, "adapters": adapters, "merged": merged}
    return {"losses": losses} | {key: {k: v.numpy() for k, v in value.items()} for key, value in found.items()}


@cache
def expected(targets: str) -> dict[str, Any]:
    """The same by PEFT's own means, in one process without a mesh."""
    model = get_peft_model(build(), lora_config(targets, 4, 8)).train()
    start_adapters(model)
    optimizer = adamw(list(model.parameters()))
    losses, gradients = [], {}
    for step in range(STEPS):
        loss = model(**batch_of(KIND, state_of(Mesh()))).loss
        loss.backward()
        losses.append(loss.item())
        if step == 0:
            gradients = {
                n.removeprefix("base_model.model."): p.grad.clone()
                for n, p in model.named_parameters()
                if p.requires_grad
            }
        optimizer.step()
        optimizer.zero_grad()
    adapters = adapters_of(model)
    merged = model.merge_and_unload()
    return {"losses": losses, "gradients": gradients, "adapters": adapters, "merged": dict(merged.named_parameters())}


def worst(got: dict[str, Any], wanted: dict[str, torch.Tensor]) -> tuple[float, str]:
    """The largest relative error of a tensor, by norm, and whose it is."""
    assert got.keys() == wanted.keys()
    errors = []
    for name, value in wanted.items():
        difference = (torch.from_numpy(got[name]).double() - value.detach().double()).norm()
        errors.append(((difference / value.detach().double().norm()).item(), name))
    return max(errors)


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize(("mesh", "recompute"), MESHES, ids=lambda value: str(value))
def test_every_mesh_trains_the_adapters_of_one_process(pools: Any, mesh: Mesh, recompute: str, targets: str):
    got = pools(mesh.world).run(train_on_ranks, mesh, targets, recompute)[0]
    reference = expected(targets)
    assert got["losses"] == pytest.approx(reference["losses"], rel=2e-6)
    assert reference["losses"][-1] < reference["losses"][0] - 0.1
    for key in ("gradients", "adapters", "merged"):
        error, name = worst(got[key], reference[key])
        assert error < 5e-6, f"{key} of {name}: {error:.1e}"


# Runs of the trainer

MESH = {"dp_shard": 2, "sp": 2, "ep": 2}
LORA = {"lora": "attention+experts", "lora_rank": 4, "lora_alpha": 16, "lr": 1e-2, "max_steps": 5}


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


@pytest.fixture(scope="module")
def undisturbed(pools: Any, tiny_hub: Path, chats: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five steps on four ranks, adapter and merged model written at the end."""
    out = tmp_path_factory.mktemp("lora") / "undisturbed"
    options = options_of(tiny_hub, chats, out, export=True, export_dtype="float32", **LORA, **MESH)
    assert pools(4).run(run_rank, options) == [0] * 4
    return out


def test_two_ranks_of_a_sequence_are_one_process(pools: Any, tiny_hub: Path, chats: Path, tmp_path: Path):
    """Adapters are drawn from the seed alike on any mesh, so the whole curve is the same."""
    assert run(options_of(tiny_hub, chats, tmp_path / "one", **LORA)) == 0
    assert pools(2).run(run_rank, options_of(tiny_hub, chats, tmp_path / "two", sp=2, ep=2, **LORA)) == [0] * 2
    for line, expected in zip(curve(tmp_path / "two"), curve(tmp_path / "one"), strict=True):
        assert line["label_tokens"] == expected["label_tokens"]
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)


def test_a_stopped_run_goes_on_bitwise(pools: Any, undisturbed: Path, tiny_hub: Path, chats: Path, tmp_path: Path):
    """Curve and adapter file; a checkpoint holds adapters alone, and the base comes from its own."""
    out = tmp_path / "run"
    options = options_of(tiny_hub, chats, out, export=True, export_dtype="float32", **LORA, **MESH)
    assert pools(4).run(stopped_on_one_rank, options, 2) == [0] * 4
    (folder,) = (out / "checkpoints").iterdir()
    assert folder.name == "step-00000002"
    assert sum(file.stat().st_size for file in folder.iterdir()) < 0.1 * size_of(tiny_hub)
    assert [line["step"] for line in curve(out)] == [1, 2] and not list(out.glob("adapter-*"))
    assert pools(4).run(run_rank, options) == [0] * 4
    assert curve(out) == curve(undisturbed)
    files = [folder / "adapter-5" / "adapter_model.safetensors" for folder in (out, undisturbed)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_another_mesh_goes_on(pools: Any, undisturbed: Path, tiny_hub: Path, chats: Path, tmp_path: Path):
    """From four ranks to two, of which each holds all experts."""
    out = tmp_path / "run"
    stop = LORA | {"max_steps": 3}
    assert pools(4).run(run_rank, options_of(tiny_hub, chats, out, schedule="constant", **stop, **MESH)) == [0] * 4
    shutil.copytree(out, tmp_path / "whole")
    others = {"same": (4, tmp_path / "whole", MESH), "other": (2, out, {"dp_shard": 2})}
    for world, folder, mesh in others.values():
        options = options_of(tiny_hub, chats, folder, schedule="constant", **LORA, **mesh)
        assert pools(world).run(run_rank, options) == [0] * world
    for line, expected in zip(curve(out), curve(tmp_path / "whole"), strict=True):
        assert line["samples"] == expected["samples"]
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-4)


@torch.no_grad()
def test_upstream_reads_what_four_ranks_wrote(undisturbed: Path, tiny_hub: Path, tiny_processor: Any):
    """transformers' model with the adapter by PEFT gives the logits of transformers' model of the merged export."""
    batch = padded_batch(tiny_processor)
    real, inputs = batch["attention_mask"].bool(), {key: value for key, value in batch.items() if key != "labels"}

    def load(folder: Path) -> torch.nn.Module:
        return Qwen3VLMoeForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()

    merged = load(undisturbed / "export-5")(**inputs).logits[real]
    base = load(tiny_hub)
    before = base(**inputs).logits[real]
    adapted = PeftModel.from_pretrained(base, str(undisturbed / "adapter-5")).eval()
    assert sum("experts" in name and "lora_A" in name for name, _ in adapted.named_parameters()) == 8
    logits = adapted(**inputs).logits[real]
    assert (logits - before).norm() > 0.05 * before.norm()
    assert (logits - merged).norm() < 1e-5 * merged.norm()
