"""Loading, exporting and resuming a sharded model: every layout, right bytes, right errors on every rank."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

from conversion.layout import logical_name, pack, stamp_metadata
from modeling.distributed.checkpoint import export_checkpoint, load_checkpoint
from modeling.distributed.failures import RankFailure
from modeling.distributed.parallel_state import use_parallel_state
from modeling.distributed.parallelize import parallelize_model
from modeling.qwen3_vl_moe import Qwen3VLMoeConfig, Qwen3VLMoeForCausalLM
from tests.distributed.oracle import upstream_model
from tests.distributed.ranks import Mesh, build, state_of
from tests.distributed.toy import TEXT, toy_config, toy_config_dict

LAYOUTS = ("hub", "fused", "per-expert", "ep-sharded")
MESHES = [Mesh(4), Mesh(2, sp=2, ep=4), Mesh(1, replicate=2, sp=2, ep=2), Mesh(4, ep=2)]


def write_checkpoint(
    folder: Path, layout: str, dtype: torch.dtype = torch.float32, ep_size: int = 2, aligned: bool = False
) -> Path:
    """The toy model, of the `aligned` sizes or not, in `layout`, in several files, with their stamps."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(toy_config_dict(aligned) | {"model_type": "qwen3_vl_moe"}))
    files: dict[int | None, dict[str, torch.Tensor]] = {}
    for name, value in build(aligned=aligned).state_dict().items():
        value = value.to(dtype)
        parts = pack(layout, name, value, ep_size) if logical_name(name) else {(name, None): value}
        for (stored, ep_rank), part in parts.items():
            files.setdefault(ep_rank, {})[stored] = part.contiguous()
    for ep_rank, tensors in files.items():
        names = sorted(tensors)
        for i in range(2):
            some = {name: tensors[name] for name in names[i::2]}
            stamp = stamp_metadata(layout, ep_size if layout == "ep-sharded" else 1, ep_rank)
            save_file(some, folder / f"part-{ep_rank}-{i}.safetensors", metadata=stamp)
    return folder


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("layouts")
    return {layout: write_checkpoint(root / layout, layout) for layout in LAYOUTS}


def meta_model(mesh: Mesh) -> Qwen3VLMoeForCausalLM:
    with torch.device("meta"):
        model = Qwen3VLMoeForCausalLM(toy_config())
    return parallelize_model(model, parallel_state=state_of(mesh))


def load_and_compare(mesh: Mesh, folder: Path, dtype: torch.dtype | None) -> None:
    model = meta_model(mesh)
    read = load_checkpoint(model, folder, dtype=dtype, parallel_state=state_of(mesh))
    expected = build().state_dict()
    kept = 0
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        assert parameter.dtype == (dtype or torch.float32)
        kept += parameter.to_local().numel() * 4  # the files are fp32
        torch.testing.assert_close(parameter.full_tensor(), expected[name].to(parameter.dtype), rtol=0, atol=0)
    assert read == kept, f"rank {dist.get_rank()} read {read} bytes and keeps {kept}"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_any_layout_on_any_mesh(pools, checkpoints: dict[str, Path], mesh: Mesh, layout: str):
    """Every parameter is whole and right, and no rank reads a byte that it does not keep."""
    pools(4).run(load_and_compare, mesh, checkpoints[layout], None)


def test_dtype_is_converted(pools, checkpoints: dict[str, Path]):
    pools(4).run(load_and_compare, Mesh(2, sp=2, ep=2), checkpoints["hub"], torch.bfloat16)


def test_ep_sharded_files_of_another_size(pools, tmp_path: Path):
    pools(4).run(load_and_compare, Mesh(4, ep=4), write_checkpoint(tmp_path / "x", "ep-sharded", ep_size=8), None)


def test_one_process_without_a_mesh(checkpoints: dict[str, Path]):
    with torch.device("meta"):
        model = Qwen3VLMoeForCausalLM(toy_config())
    load_checkpoint(model, checkpoints["per-expert"])
    for name, value in build().state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=0, atol=0)


def edit(
    change: Callable[[dict[str, torch.Tensor]], None], file: str = "part-None-0.safetensors"
) -> Callable[[Path], None]:
    """A change of the tensors in one of a folder's files."""

    def apply(folder: Path) -> None:
        tensors = load_file(folder / file)
        change(tensors)
        save_file(tensors, folder / file, metadata=stamp_metadata("fused"))

    return apply


def truncate(folder: Path) -> None:
    path = folder / "part-None-1.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def two_tensors(tensors: dict[str, torch.Tensor]) -> None:
    for name in ("lm_head.weight", "model.visual.pos_embed.weight"):
        tensors.pop(name, None)
    tensors["model.language_model.layers.9.extra"] = torch.zeros(2)


DAMAGE: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "missing": (edit(lambda t: t.pop(sorted(t)[0])), ["missing: lm_head.weight"]),
    "several at once": (
        edit(two_tensors),
        ["missing: lm_head.weight", "unexpected: model.language_model.layers.9.extra"],
    ),
    "wrong shape": (
        edit(lambda t: t.update({"lm_head.weight": torch.zeros(3, 56)})),
        ["wrong shape: lm_head.weight is (3, 56)", "(198, 56)"],
    ),
    "wrong dtype": (
        edit(lambda t: t.update({"lm_head.weight": t["lm_head.weight"].half()})),
        ["wrong dtype: lm_head.weight is F16", "torch.float32", "dtype="],
    ),
    "integers": (
        edit(lambda t: t.update({"lm_head.weight": t["lm_head.weight"].long()})),
        ["wrong dtype: lm_head.weight is I64"],
    ),
    "truncated file": (truncate, ["SafetensorError"]),
    "no files": (lambda folder: [p.unlink() for p in folder.glob("*.safetensors")], ["no .safetensors file"]),
    "no folder": (lambda folder: shutil.rmtree(folder), ["is not a folder"]),
}


def expect_failure(mesh: Mesh, folder: Path, only_rank: int | None, good: Path) -> str:
    """The message of the failure that this rank must see."""
    mine = folder if only_rank in (None, dist.get_rank()) else good
    with pytest.raises(RankFailure) as caught:
        load_checkpoint(meta_model(mesh), mine, parallel_state=state_of(mesh))
    return str(caught.value)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_bad_checkpoint_fails_on_every_rank(pools, checkpoints: dict[str, Path], tmp_path: Path, damage: str):
    folder = tmp_path / "bad"
    shutil.copytree(checkpoints["fused"], folder)
    apply, words = DAMAGE[damage]
    apply(folder)
    messages = pools(4).run(expect_failure, Mesh(2, sp=2, ep=2), folder, None, folder, timeout=60)
    assert len(set(messages)) == 1
    assert messages[0].startswith("all ranks: ")
    for word in words:
        assert word in messages[0]


def test_one_rank_with_a_bad_checkpoint_stops_all(pools, checkpoints: dict[str, Path], tmp_path: Path):
    folder = tmp_path / "bad"
    shutil.copytree(checkpoints["fused"], folder)
    truncate(folder)
    messages = pools(4).run(expect_failure, Mesh(4, ep=2), folder, 2, checkpoints["fused"], timeout=60)
    assert len(set(messages)) == 1
    assert messages[0].startswith("rank 2: ")


def export(mesh: Mesh, folder: Path, layout: str, dtype: torch.dtype | None) -> None:
    with use_parallel_state(state_of(mesh)):
        model = parallelize_model(build())
        export_checkpoint(model, folder, layout=layout, dtype=dtype, max_shard_bytes=200_000)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("layout", ["hub", "fused"])
def test_export_is_what_upstream_reads(pools, tmp_path: Path, mesh: Mesh, layout: str):
    """Upstream transformers, from the exported folder alone, ends up with the weights it would have had, bit by bit."""
    folder = tmp_path / "out"
    pools(4).run(export, mesh, folder, layout, None)
    assert len(list(folder.glob("*.safetensors"))) > 3
    loaded, expected = (
        type(upstream_model(False)).from_pretrained(folder).state_dict(),
        upstream_model(False).state_dict(),
    )
    assert loaded.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(loaded[name], value, rtol=0, atol=0)


def test_export_comes_back(pools, tmp_path: Path):
    """per-expert, in bf16, with companions; loads again on another mesh."""
    notes = tmp_path / "source"
    notes.mkdir()
    (notes / "tokenizer.json").write_text("{}")
    (notes / "old.safetensors").write_bytes(b"")
    folder = tmp_path / "out"

    pools(4).run(export_with_companions, folder, notes)
    assert (folder / "tokenizer.json").exists()
    assert not (folder / "old.safetensors").exists()
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["Qwen3VLMoeForConditionalGeneration"]
    pools(4).run(load_bf16, folder)


def export_with_companions(folder: Path, notes: Path) -> None:
    with use_parallel_state(state_of(Mesh(2, sp=2, ep=4))):
        model = parallelize_model(build())
        export_checkpoint(model, folder, layout="per-expert", dtype=torch.bfloat16, companions=notes)


def test_the_config_is_spelled_as_it_was(tmp_path: Path):
    """With the fields of the checkpoint beside it, which older releases of transformers read; not where it changed."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(toy_config_dict() | {"model_type": "qwen3_vl_moe"}))
    model = build()
    export_checkpoint(model, tmp_path / "same", dtype=torch.bfloat16, companions=source)
    written = json.loads((tmp_path / "same" / "config.json").read_text())
    assert written["text_config"] == TEXT and written["dtype"] == "bfloat16"
    assert written["architectures"] == ["Qwen3VLMoeForConditionalGeneration"]
    model.config.text_config.rms_norm_eps *= 2
    export_checkpoint(model, tmp_path / "other", companions=source)
    changed = Qwen3VLMoeConfig.from_pretrained(tmp_path / "other")
    assert changed.text_config.rms_norm_eps == 2e-6 and changed.text_config.num_experts == TEXT["num_experts"]


def load_bf16(folder: Path) -> None:
    model = meta_model(Mesh(4))
    load_checkpoint(model, folder, dtype=torch.float32, parallel_state=state_of(Mesh(4)))
    for name, value in build().state_dict().items():
        whole = dict(model.named_parameters())[name].full_tensor()
        torch.testing.assert_close(whole, value.bfloat16().float(), rtol=0, atol=0)


def refuse_export(folder: Path) -> str:
    with use_parallel_state(state_of(Mesh(4))), pytest.raises(RankFailure) as caught:
        export_checkpoint(parallelize_model(build()), folder)
    return str(caught.value)


def test_export_never_overwrites(pools, tmp_path: Path):
    messages = pools(4).run(refuse_export, tmp_path)
    assert set(messages) == {f"all ranks: ValueError: {tmp_path} exists; export to a new folder, or remove it."}
