"""PEFT's LoRA on this model: trained here, saved, and loaded on top of transformers' own implementation."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version

from modeling.qwen3_vl_moe import Qwen3VLMoeForCausalLM, modeling_qwen3_vl_moe
from tests.ecosystem.chats import padded_batch

peft = pytest.importorskip("peft", reason="PEFT is not installed here: pip install peft")

ATTENTION = r"model\.language_model\..*\.(q_proj|k_proj|v_proj|o_proj)"
TARGETS: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ATTENTION},
    "attention_and_experts": {
        "target_modules": ATTENTION,
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    },
}


def trained(model: torch.nn.Module, batch: dict[str, torch.Tensor], steps: int = 5) -> list[float]:
    """Losses of a few AdamW steps on the trainable parameters."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.0)
    losses = []
    model.train()
    for _ in range(steps):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def logits(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """(tokens, V) at the tokens that are not padding."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    return model.eval()(**inputs).logits[batch["attention_mask"].bool()]


@pytest.mark.parametrize("targets", TARGETS)
def test_adapter_trains_and_loads_in_upstream(
    tiny_hub: Path, tiny_processor: Any, tmp_path: Path, targets: str
) -> None:
    torch.manual_seed(0)
    batch = padded_batch(tiny_processor)
    base = Qwen3VLMoeForCausalLM.from_pretrained(tiny_hub, dtype=torch.float32)
    before = logits(base, batch)
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=16, **TARGETS[targets]))
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert names and all("lora_" in name for name in names)
    assert any("experts" in name for name in names) == ("experts" in targets)
    losses = trained(model, batch)
    assert losses[-1] < 0.9 * losses[0], losses
    after = logits(model, batch)
    assert (after - before).abs().max() > 1.0  # far beyond what two implementations differ by

    model.save_pretrained(tmp_path)
    upstream = transformers.Qwen3VLMoeForConditionalGeneration.from_pretrained(tiny_hub, dtype=torch.float32)
    loaded = peft.PeftModel.from_pretrained(upstream, str(tmp_path))
    # float32, two implementations: about 1e-5 of logits of this size.
    torch.testing.assert_close(logits(loaded, batch), after, rtol=0, atol=5e-5 * after.abs().max().item())

    again = Qwen3VLMoeForCausalLM.from_pretrained(tiny_hub, dtype=torch.float32)
    assert torch.equal(logits(peft.PeftModel.from_pretrained(again, str(tmp_path)), batch), after)


def test_merged_adapter_is_a_plain_checkpoint(tiny_hub: Path, tiny_processor: Any, tmp_path: Path) -> None:
    """merge_and_unload, saved in the published layout, read by transformers alone."""
    torch.manual_seed(0)
    batch = padded_batch(tiny_processor)
    base = Qwen3VLMoeForCausalLM.from_pretrained(tiny_hub, dtype=torch.float32)
    config = peft.LoraConfig(r=4, init_lora_weights=False, **TARGETS["attention_and_experts"])
    model = peft.get_peft_model(base, config)
    expected = logits(model, batch)
    model.merge_and_unload().save_pretrained(tmp_path, layout="hub")
    upstream = transformers.Qwen3VLMoeForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(logits(upstream, batch), expected, rtol=0, atol=5e-5 * expected.abs().max().item())


def test_vision_adapter_is_upstreams(tiny_hub: Path, tiny_processor: Any, tmp_path: Path) -> None:
    """Random adapters on the whole tower, the patch projection (a Conv3d by name) among them."""
    torch.manual_seed(0)
    batch = padded_batch(tiny_processor)
    base = Qwen3VLMoeForCausalLM.from_pretrained(tiny_hub, dtype=torch.float32)
    targets = r"model\.visual\..*(qkv|proj|linear_fc1|linear_fc2)"
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, init_lora_weights=False, target_modules=targets))
    assert any("patch_embed.proj.lora_A" in name for name, _ in model.named_parameters())
    expected = logits(model, batch)
    with model.disable_adapter():
        assert (logits(model, batch) - expected).abs().max() > 1.0
    model.save_pretrained(tmp_path)
    upstream = transformers.Qwen3VLMoeForConditionalGeneration.from_pretrained(tiny_hub, dtype=torch.float32)
    loaded = peft.PeftModel.from_pretrained(upstream, str(tmp_path))
    torch.testing.assert_close(logits(loaded, batch), expected, rtol=0, atol=5e-5 * expected.abs().max().item())


@pytest.mark.parametrize("head", ["adapter", "copy", "bias", "hook"])
def test_what_is_attached_to_the_head_takes_part_in_training(
    tiny_hub: Path, tiny_processor: Any, head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss and gradients of an adapter on lm_head, of PEFT's trained copy of it, of a bias and a hook: upstream's. Only
    the copy is a plain product, which the chunked loss may compute."""
    chunked: list[int] = []
    loss = modeling_qwen3_vl_moe.linear_cross_entropy
    counted = lambda *args, **kwargs: (chunked.append(1), loss(*args, **kwargs))[1]  # noqa: E731
    monkeypatch.setattr(modeling_qwen3_vl_moe, "linear_cross_entropy", counted)
    batch = padded_batch(tiny_processor)
    found = []
    for kind in (Qwen3VLMoeForCausalLM, transformers.Qwen3VLMoeForConditionalGeneration):
        model = kind.from_pretrained(tiny_hub, dtype=torch.float32)
        torch.manual_seed(0)
        if head == "bias":
            model.requires_grad_(False)
            model.lm_head.bias = torch.nn.Parameter(torch.randn(model.lm_head.out_features))
        elif head == "hook":
            model.lm_head.register_forward_hook(lambda module, args, output: 0.5 * output)
        else:
            where = {"adapter": {"target_modules": ["lm_head"]}, "copy": {"modules_to_save": ["lm_head"]}}[head]
            config = {"target_modules": ["q_proj"], "init_lora_weights": False} | where
            model = peft.get_peft_model(model, peft.LoraConfig(r=4, **config))
        output = model.train()(**batch)
        output.loss.backward()
        trained = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append((output.loss.detach(), {name: g for name, g in trained.items() if "lm_head" in name}))
    (ours, mine), (upstream, theirs) = found
    torch.testing.assert_close(ours, upstream, rtol=1e-5, atol=0)
    assert mine.keys() == theirs.keys() and mine
    for name, gradient in mine.items():
        assert (gradient - theirs[name]).norm() <= 1e-4 * theirs[name].norm(), name
    assert bool(chunked) == (head == "copy")


def why_not_load_adapter() -> str:
    """Why this transformers loads no adapter here, or nothing."""
    if Version(transformers.__version__) < Version("5.10"):
        return "5.9's own load_adapter builds a conversion without operations for this model"
    needed = transformers.integrations.peft.MIN_PEFT_VERSION
    return f"this transformers wants PEFT {needed}" if Version(peft.__version__) < Version(needed) else ""


@pytest.mark.skipif(bool(why_not_load_adapter()), reason=why_not_load_adapter())
def test_transformers_load_adapter(tiny_hub: Path, tiny_processor: Any, tmp_path: Path) -> None:
    """An adapter that transformers saved, loaded by `load_adapter` and by its folder alone."""
    batch = padded_batch(tiny_processor)
    upstream = transformers.Qwen3VLMoeForConditionalGeneration.from_pretrained(tiny_hub, dtype=torch.float32)
    torch.manual_seed(0)
    upstream.add_adapter(peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    upstream.peft_config["default"].base_model_name_or_path = str(tiny_hub)
    upstream.save_pretrained(tmp_path)
    wanted = logits(upstream, batch)
    ours = Qwen3VLMoeForCausalLM.from_pretrained(tiny_hub, dtype=torch.float32)
    before = logits(ours, batch)
    ours.load_adapter(str(tmp_path))
    for model in (ours, Qwen3VLMoeForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)):
        torch.testing.assert_close(logits(model, batch), wanted, rtol=0, atol=5e-5 * wanted.abs().max().item())
    assert (wanted - before).abs().max() > 0.1
