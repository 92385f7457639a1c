"""scripts/parity_report.py: passes on a faithful checkpoint, in memory or layer by layer, and fails on a broken one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from conversion import hf_to_veomni
from conversion.layout import stamp_metadata
from scripts import parity_report, parity_runs
from scripts.layerwise import read_any_layout, read_by_shape
from scripts.make_tiny_checkpoint import make_tiny_checkpoint, parameter_shapes
from tests import media

GATE_UP = "model.language_model.layers.2.mlp.experts.gate_up_proj"


@pytest.fixture(autouse=True)
def _small_chats(monkeypatch: pytest.MonkeyPatch) -> None:
    chats = [{name: media.case_messages(name)} for name in ("text", "mixed")]
    monkeypatch.setattr(parity_report, "report_chats", lambda: chats)


@pytest.fixture(scope="module")
def ep_sharded(tiny_hub: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report") / "ep"
    assert hf_to_veomni.main([str(tiny_hub), str(out), "--target", "ep-sharded", "--ep-size", "4", "--quiet"]) == 0
    return out


def rewrite(source: Path, target: Path, name: str, change: torch.Tensor) -> Path:
    """A copy of a `fused` checkpoint folder with tensor `name` replaced."""
    target.mkdir()
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (target / file.name).write_bytes(file.read_bytes())
            continue
        with safe_open(file, framework="pt") as shard:
            tensors = {key: shard.get_tensor(key) for key in shard.keys()}
        if name in tensors:
            tensors[name] = change
        save_file(tensors, target / file.name, metadata=stamp_metadata("fused"))
    return target


def test_faithful_checkpoint_passes(
    tiny_hub: Path, tiny_fused: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report"
    assert parity_report.main([str(tiny_hub), str(tiny_fused), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "FAILED" not in printed and "decoder layer 4" in printed and "vision merger" in printed
    content = json.loads((out / "parity.json").read_text())
    assert all(check["holds"] for check in content["checks"])
    ours, floor = content["runs"]["ours fp32"], content["runs"]["hf bf16"]
    assert ours["cases"].keys() == {"text", "mixed", "all"}
    # fp32 rounding: measured at 1.3e-6 on the logits, and twice that between versions of torch is not a surprise.
    assert ours["cases"]["all"]["logits_error"] < 3e-6 and max(ours["layers"] + ours["vision"]) < 3e-6
    assert ours["cases"]["all"]["flips"] == 0 and ours["cases"]["all"]["top1"] == 1
    # bf16 keeps 8 bits: an error below 2^-9 would mean that the noise floor was not measured in bf16.
    assert floor["cases"]["all"]["logits_error"] > 2**-9 and min(floor["layers"]) > 2**-9
    held = content["runs"]["hf bf16 held"]["cases"]["all"]
    assert held["flips"] == 0 < floor["cases"]["all"]["flips"]
    assert (out / "parity.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("ours", [True, False], ids=["ours", "transformers"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_by_layer_computes_the_same(
    ours: bool, dtype: torch.dtype, tiny_hub: Path, tiny_fused: Path, tiny_processor: Any
) -> None:
    batch = dict(media.case_inputs(tiny_processor, "text", "mixed"))
    folder, cpu = tiny_fused if ours else tiny_hub, torch.device("cpu")
    whole, streamed = (
        parity_runs.record(parity_runs.load(ours, folder, dtype, cpu, layerwise), [batch])
        for layerwise in (False, True)
    )
    for part in ("vision", "layers", "experts"):
        for a, b in zip(getattr(whole, part), getattr(streamed, part), strict=True):
            assert a.equal(b), part
    assert whole.logits.equal(streamed.logits)


def test_any_layout_is_read(tiny_hub: Path, ep_sharded: Path, tiny_processor: Any) -> None:
    batch, cpu = dict(media.case_inputs(tiny_processor, "image")), torch.device("cpu")
    hub, sharded = (
        parity_runs.record(parity_runs.load(True, folder, torch.float32, cpu, layerwise=False), [batch])
        for folder in (tiny_hub, ep_sharded)
    )
    assert hub.logits.equal(sharded.logits)


def test_broken_checkpoints_fail(tiny_hub: Path, tiny_fused: Path, tmp_path: Path) -> None:
    read = read_any_layout(tiny_fused)
    gate_up = read(GATE_UP, torch.Size((16, 80, 64)))
    swapped = torch.cat(gate_up.chunk(2, dim=1)[::-1], dim=1)
    other = rewrite(tiny_fused, tmp_path / "swapped", GATE_UP, swapped)
    assert parity_report.main([str(tiny_hub), str(other), "--out", str(tmp_path / "out")]) == 3
    content = json.loads((tmp_path / "out" / "parity.json").read_text())
    assert not any(check["holds"] for check in content["checks"])
    layers = content["runs"]["ours fp32"]["layers"]
    assert max(layers[:2]) < 3e-6 < 1e-2 < layers[2], "the report points at the broken layer"


def test_both_readers_agree(tiny_hub: Path, tiny_fused: Path, ep_sharded: Path) -> None:
    shapes = parameter_shapes(json.loads((tiny_hub / "config.json").read_text()))
    readers = [read_by_shape(tiny_hub), read_by_shape(tiny_fused)]
    readers += [read_any_layout(folder) for folder in (tiny_hub, tiny_fused, ep_sharded)]
    for name, shape in shapes.items():
        first, *others = [read(name, shape) for read in readers]
        assert first.shape == shape
        assert all(other.equal(first) for other in others), name


def test_shape_does_not_tell_square_experts(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(
        tmp_path / "square", text_config={"moe_intermediate_size": 32, "num_hidden_layers": 4}
    )
    with pytest.raises(ValueError, match="square"):
        read_by_shape(folder)(GATE_UP, torch.Size((16, 64, 64)))


def test_figures_by_hand() -> None:
    reference = parity_runs.Record(
        vision=[torch.ones(2, 2)],
        layers=[torch.tensor([[3.0, 0.0], [0.0, 4.0]])],
        experts=[torch.tensor([[0, 1], [1, 2]])],
        logits=torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]]),
    )
    run = parity_runs.Record(
        vision=[torch.full((2, 2), 1.5)],
        layers=[torch.tensor([[3.0, 0.0], [3.0, 4.0]])],
        experts=[torch.tensor([[0, 1], [1, 3]])],
        logits=torch.tensor([[1.0, 0.0, 0.0], [3.0, 2.0, 0.0]]),
    )
    figures = parity_report.compare(run, reference, {"a": 1, "b": 1})
    assert figures.vision == pytest.approx([0.5]) and figures.layers == pytest.approx([0.6])
    assert figures.cases["a"] == pytest.approx({"logits_error": 0, "kl": 0, "kl_max": 0, "top1": 1, "flips": 0})
    everything = figures.cases["all"]
    assert everything["logits_error"] == pytest.approx(3 / 5**0.5)
    assert everything["top1"] == everything["flips"] == 0.5
    p, q = reference.logits[1].softmax(-1), run.logits[1].softmax(-1)
    kl = (p * (p / q).log()).sum().item()
    assert everything["kl_max"] == pytest.approx(kl, rel=1e-6) and everything["kl"] == pytest.approx(kl / 2, rel=1e-6)
