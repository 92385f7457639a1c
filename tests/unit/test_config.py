"""What a saved config says, and to whom."""

import json
from pathlib import Path

import pytest
from transformers.models.qwen3_vl_moe.configuration_qwen3_vl_moe import Qwen3VLMoeConfig as UpstreamConfig

from modeling.qwen3_vl_moe import Qwen3VLMoeConfig

ROPES = {
    "default": {"rope_type": "default", "rope_theta": 3e6, "mrope_section": [4, 3, 3], "mrope_interleaved": True},
    "yarn": {
        "rope_type": "yarn", "rope_theta": 3e6, "factor": 4.0, "original_max_position_embeddings": 64,
        "mrope_section": [4, 3, 3], "mrope_interleaved": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("rope", ROPES)
def test_a_saved_config_says_the_same_to_every_reader(rope: str, tmp_path: Path) -> None:
    """transformers before 5 reads num_experts, rope_theta and rope_scaling, 5 other names for them."""
    text = {"num_experts": 6, "num_hidden_layers": 3, "head_dim": 20, "rope_parameters": dict(ROPES[rope])}
    config = Qwen3VLMoeConfig(text_config=text)
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["text_config"]
    assert written["num_experts"] == 6 and written["rope_theta"] == 3e6
    assert written["rope_scaling"] == {k: v for k, v in config.text_config.rope_parameters.items() if k != "rope_theta"}
    for reader in (Qwen3VLMoeConfig, UpstreamConfig):
        text_config = reader.from_pretrained(tmp_path).text_config
        assert text_config.num_experts == 6 and text_config.num_hidden_layers == 3
        assert text_config.rope_parameters == config.text_config.rope_parameters
        assert config.text_config.rope_parameters["mrope_section"] == [4, 3, 3]
    again = Qwen3VLMoeConfig.from_pretrained(tmp_path).to_dict()
    differing = {key for key, value in config.to_dict().items() if again[key] != value}
    assert differing <= {"transformers_version", "_name_or_path"}
