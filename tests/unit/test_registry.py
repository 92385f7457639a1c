"""The registries, what they hold, and the opt-in registration with transformers' Auto classes."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor
from transformers.models.auto import configuration_auto, modeling_auto, processing_auto

from modeling import registry
from modeling.qwen3_vl_moe import Qwen3VLMoeConfig, Qwen3VLMoeForCausalLM, Qwen3VLMoeModel
from modeling.registry import MODEL_CONFIG_REGISTRY, MODEL_PROCESSOR_REGISTRY, MODELING_REGISTRY, Registry, build_model
from scripts.make_tiny_checkpoint import tiny_config


def test_register_and_look_up() -> None:
    models = Registry("test")

    @models.register("a")
    def make_a() -> str:
        return "a"

    assert models["a"] is make_a
    assert models.register("b", len) is len
    assert models.valid_keys() == ["a", "b"] == list(models)
    assert "a" in models and "c" not in models and len(models) == 2
    models.register("a", len)
    assert models["a"] is len


def test_unknown_and_taken_names_are_errors() -> None:
    models = Registry("test")
    models.register("a", len)
    with pytest.raises(ValueError, match="test registry: 'b' is unknown; it has a"):
        models["b"]
    with pytest.raises(ValueError, match="'a' is taken by len"):
        models.register("a")(len)


def test_entries_are_functions_that_return_the_classes() -> None:
    assert MODEL_CONFIG_REGISTRY.valid_keys() == MODELING_REGISTRY.valid_keys() == ["qwen3_vl_moe"]
    assert MODEL_CONFIG_REGISTRY["qwen3_vl_moe"]() is Qwen3VLMoeConfig
    make = MODELING_REGISTRY["qwen3_vl_moe"]
    for name in (None, "Qwen3VLMoeForConditionalGeneration", "Qwen3VLMoeForCausalLM"):
        assert make(name) is Qwen3VLMoeForCausalLM
    assert make("Qwen3VLMoeModel") is Qwen3VLMoeModel
    with pytest.raises(ValueError, match="'LlamaForCausalLM' is not one of"):
        make("LlamaForCausalLM")
    for name in ("Qwen3VLProcessor", "Qwen3VLMoeProcessor"):
        assert MODEL_PROCESSOR_REGISTRY[name]() is transformers.Qwen3VLProcessor


@pytest.mark.parametrize("config_class", [Qwen3VLMoeConfig, transformers.Qwen3VLMoeConfig])
def test_build_model_takes_our_config_or_upstreams(config_class: Any) -> None:
    config = config_class(**tiny_config(torch.float32, {}))
    with torch.device("meta"):
        model = build_model(config)
    assert type(model) is Qwen3VLMoeForCausalLM and isinstance(model.config, Qwen3VLMoeConfig)
    assert model.config.text_config.num_experts == 16 and model.config.text_config.moe_implementation == "fused"
    assert model.model.language_model.layers[0].mlp.experts.gate_up_proj.shape == (16, 80, 64)


def test_build_model_of_an_unknown_type() -> None:
    with pytest.raises(ValueError, match="config registry: 'llama' is unknown"):
        build_model(transformers.LlamaConfig())


@pytest.fixture
def auto_classes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """register_with_transformers, undone after the test."""
    mappings = [
        configuration_auto.CONFIG_MAPPING,
        modeling_auto.MODEL_MAPPING,
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        processing_auto.PROCESSOR_MAPPING,
    ]
    for mapping in mappings:
        monkeypatch.setattr(mapping, "_extra_content", dict(mapping._extra_content))
    registry.register_with_transformers()
    registry.register_with_transformers()  # a second time is no error
    yield


def test_auto_classes_give_this_model(auto_classes: None, tiny_hub: Path) -> None:
    config = AutoConfig.from_pretrained(tiny_hub)
    assert type(config) is Qwen3VLMoeConfig
    model = AutoModelForImageTextToText.from_pretrained(tiny_hub, dtype=torch.float32)
    assert type(model) is Qwen3VLMoeForCausalLM
    expected = Qwen3VLMoeForCausalLM.from_pretrained(tiny_hub, dtype=torch.float32).state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name]), name
    with torch.device("meta"):
        assert type(AutoModel.from_config(config)) is Qwen3VLMoeModel
    assert type(AutoProcessor.from_pretrained(tiny_hub)) is transformers.Qwen3VLProcessor


def test_import_registers_nothing() -> None:
    """In a process of its own: importing the package leaves the Auto classes, and VeOmni, alone."""
    code = (
        "import sys, transformers, modeling.qwen3_vl_moe, modeling.registry, modeling.qwen3_vl_moe.veomni\n"
        "from transformers.models.auto import configuration_auto, modeling_auto, processing_auto\n"
        "assert not configuration_auto.CONFIG_MAPPING._extra_content\n"
        "assert not modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING._extra_content\n"
        "assert transformers.AutoConfig.for_model('qwen3_vl_moe').__class__ is transformers.Qwen3VLMoeConfig\n"
        "assert 'veomni' not in sys.modules\n"
    )
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)


def test_veomni_missing_is_an_import_error_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "veomni", None)  # as if it were not installed
    with pytest.raises(ImportError, match=r"register_with_veomni\(\) needs VeOmni"):
        registry.register_with_veomni()
