"""The same model whichever way its experts lie on disk, and after a way through this project and back to upstream."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig
from transformers import Qwen3VLMoeForConditionalGeneration as Upstream

from modeling.qwen3_vl_moe import Qwen3VLMoeConfig, Qwen3VLMoeForCausalLM, Qwen3VLMoeModel
from tests.features import InputsOf
from tests.parity.harness import compare

ROOT = Path(__file__).parents[2]


def convert(script: str, source: Path, target: Path, *options: str) -> Path:
    command = [sys.executable, str(ROOT / "conversion" / script), str(source), str(target), "--quiet", *options]
    subprocess.run(command, check=True)
    return target


def same_parameters(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    mine, theirs = dict(one.named_parameters()), dict(other.named_parameters())
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_hub_to_fused_and_back(tiny_hub: Path, tmp_path: Path, upstream: torch.nn.Module, inputs_of: InputsOf) -> None:
    """Hub -> converted -> this model equals upstream; exported to hub -> upstream itself, the same bits."""
    fused = convert("hf_to_veomni.py", tiny_hub, tmp_path / "fused")
    ours = Qwen3VLMoeForCausalLM.from_pretrained(fused)
    compare(ours, upstream, inputs_of("mixed")).check()
    exported = convert("veomni_to_hf.py", fused, tmp_path / "hub")
    assert same_parameters(Upstream.from_pretrained(exported), upstream)
    with torch.no_grad():
        again = Upstream.from_pretrained(exported)(**inputs_of("image")).logits
        assert torch.equal(again, upstream(**inputs_of("image")).logits)


@pytest.mark.parametrize("layout", ["fused", "hub"])
def test_save_pretrained(ours: torch.nn.Module, tmp_path: Path, layout: str) -> None:
    """Both layouts come back here and in upstream; every file is stamped."""
    ours.save_pretrained(tmp_path, layout=layout, max_shard_size="20MB")
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 1
    for path in files:
        with safe_open(path, framework="pt") as file:
            assert file.metadata()["veomni_layout"] == layout
    assert same_parameters(Qwen3VLMoeForCausalLM.from_pretrained(tmp_path), ours)
    assert same_parameters(Upstream.from_pretrained(tmp_path), ours)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["Qwen3VLMoeForConditionalGeneration"]


def test_a_save_replaces_another_layout_whole(ours: torch.nn.Module, tiny_hub: Path, tmp_path: Path) -> None:
    """Nothing of an expert-parallel checkpoint stays in its folder to contradict what is there now."""
    folder = convert("hf_to_veomni.py", tiny_hub, tmp_path / "folder", "--target", "ep-sharded", "--ep-size", "4")
    ours.save_pretrained(folder)
    left = [path.name for path in folder.iterdir() if path.name.startswith("model") or "manifest" in path.name]
    assert left == ["model.safetensors"]
    exported = convert("veomni_to_hf.py", folder, tmp_path / "hub")
    assert same_parameters(Upstream.from_pretrained(exported), ours)


def test_upstreams_own_save_is_read(upstream: torch.nn.Module, tmp_path: Path) -> None:
    upstream.save_pretrained(tmp_path)
    assert same_parameters(Qwen3VLMoeForCausalLM.from_pretrained(tmp_path), upstream)


def square_model(tmp_path: Path) -> tuple[Qwen3VLMoeForCausalLM, Path]:
    """A model whose expert matrices are square (H = 2I), saved in the published layout."""
    text = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 4, "head_dim": 12,
            "num_attention_heads": 4, "num_key_value_heads": 2, "moe_intermediate_size": 16, "num_experts": 8,
            "num_experts_per_tok": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
            "mrope_section": [2, 2, 2], "mrope_interleaved": True}}  # fmt: skip
    vision = {"depth": 4, "hidden_size": 24, "intermediate_size": 28, "num_heads": 2, "out_hidden_size": 32,
              "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1, 2], "patch_size": 4}  # fmt: skip
    model = Qwen3VLMoeForCausalLM(Qwen3VLMoeConfig(text_config=text, vision_config=vision))
    model.save_pretrained(tmp_path / "square", layout="hub")
    return model, tmp_path / "square"


def test_square_experts_are_told_by_their_stamp(tmp_path: Path) -> None:
    """Where shapes cannot tell, the stamp does: transformers' own loader would leave these transposed."""
    model, folder = square_model(tmp_path)
    assert same_parameters(Qwen3VLMoeForCausalLM.from_pretrained(folder), model)


def test_square_experts_without_a_stamp_are_refused(tmp_path: Path) -> None:
    _, folder = square_model(tmp_path)
    for path in folder.glob("*.safetensors"):
        save_file(load_file(path), path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="source-layout"):
        Qwen3VLMoeForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("damage", ["missing", "unexpected", "shape"])
def test_a_checkpoint_that_does_not_fit_is_an_error(tiny_fused: Path, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(tiny_fused, folder)
    name = "model.language_model.layers.0.self_attn.q_proj.weight"
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        tensors = load_file(path)
        if name in tensors:
            value = tensors.pop(name)
            if damage == "unexpected":
                tensors |= {name: value, "model.language_model.layers.0.self_attn.extra": value.clone()}
            elif damage == "shape":
                tensors[name] = value[:-1].clone()
            save_file(tensors, path, metadata=metadata)
            index_path = folder / "model.safetensors.index.json"
            index = json.loads(index_path.read_text())
            index["weight_map"] = {k: v for k, v in index["weight_map"].items() if v != path.name}
            index["weight_map"] |= dict.fromkeys(tensors, path.name)
            index_path.write_text(json.dumps(index))
    what = {"missing": "missing from", "unexpected": "unknown to", "shape": "shape|mismatch"}[damage]
    with pytest.raises((ValueError, RuntimeError), match=what):
        Qwen3VLMoeForCausalLM.from_pretrained(folder)


def test_a_layout_that_is_not_read_says_what_reads_it(tiny_hub: Path, tmp_path: Path) -> None:
    sharded = convert("hf_to_veomni.py", tiny_hub, tmp_path / "ep", "--target", "ep-sharded", "--ep-size", "2")
    message = r"ep-sharded layout, which from_pretrained does not read\. .*load_checkpoint\(model, .*veomni_to_hf\.py"
    with pytest.raises(ValueError, match=message):
        Qwen3VLMoeForCausalLM.from_pretrained(sharded)
    per_expert = convert("veomni_to_hf.py", tiny_hub, tmp_path / "per", "--target", "per-expert")
    with pytest.raises(ValueError, match=message.replace("ep-sharded", "per-expert")):
        Qwen3VLMoeForCausalLM.from_pretrained(per_expert)


def test_a_folder_without_a_config_is_not_the_default_model(tiny_hub: Path, tmp_path: Path) -> None:
    """transformers would take the default configuration, and refuse its shapes one by one."""
    run = tmp_path / "run"
    shutil.copytree(tiny_hub, run / "export-7")
    for read in (Qwen3VLMoeConfig.from_pretrained, Qwen3VLMoeForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match=r"run holds no config\.json, but export-7; give one of these"):
            read(run)
        assert read(run, subfolder="export-7") is not None


def test_the_base_model_loads_without_the_head(tiny_hub: Path, ours: torch.nn.Module) -> None:
    assert same_parameters(Qwen3VLMoeModel.from_pretrained(tiny_hub), ours.model)


def test_tied_embeddings(tmp_path: Path, ours: torch.nn.Module, inputs_of: InputsOf) -> None:
    """The published models are untied; a tied one saves one matrix and loads into both places, here and upstream."""
    config = Qwen3VLMoeConfig.from_dict({**ours.config.to_dict(), "tie_word_embeddings": True})
    model = Qwen3VLMoeForCausalLM(config).eval()
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    again, reference = Qwen3VLMoeForCausalLM.from_pretrained(tmp_path), Upstream.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.model.language_model.embed_tokens.weight
    compare(again, reference, inputs_of("image"), with_gradients=False).check()


def test_meta_device_needs_no_extra_step(tiny_hub: Path, ours: torch.nn.Module, inputs_of: InputsOf) -> None:
    """No buffer is left uninitialised when a model is built without memory and given its weights."""
    with torch.device("meta"):
        model = Qwen3VLMoeForCausalLM(Qwen3VLMoeConfig.from_pretrained(tiny_hub))
    assert not list(model.buffers())
    model.load_state_dict(ours.state_dict(), assign=True)
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(**inputs_of("image")).logits, ours(**inputs_of("image")).logits)


def test_a_damaged_file_is_named(tiny_fused: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_fused, tmp_path / "cut")
    file = sorted((tmp_path / "cut").glob("*.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=rf"{file.name} is damaged .*download or write it again"):
        Qwen3VLMoeForCausalLM.from_pretrained(tmp_path / "cut")


def test_transformers_own_config_is_taken(tiny_hub: Path, ours: torch.nn.Module, inputs_of: InputsOf) -> None:
    """AutoConfig's, and one that a model of theirs carries."""
    theirs = Upstream.from_pretrained(tiny_hub).config
    model = Qwen3VLMoeForCausalLM(theirs)
    assert type(model.config) is Qwen3VLMoeConfig and model.config._attn_implementation == theirs._attn_implementation
    loaded = Qwen3VLMoeForCausalLM.from_pretrained(tiny_hub, config=AutoConfig.from_pretrained(tiny_hub))
    with torch.no_grad():
        assert torch.equal(loaded(**inputs_of("image")).logits, ours(**inputs_of("image")).logits)


def test_what_a_save_does_not_do_is_an_error(ours: torch.nn.Module, tmp_path: Path) -> None:
    for option in ({"variant": "fp32"}, {"push_to_hub": True}):
        with pytest.raises(ValueError, match=f"{next(iter(option))}: not done here"):
            ours.save_pretrained(tmp_path / "no", **option)
    assert not (tmp_path / "no").exists()
    ours.model.visual.save_pretrained(tmp_path / "visual")
    assert load_file(tmp_path / "visual" / "model.safetensors").keys() == ours.model.visual.state_dict().keys()
