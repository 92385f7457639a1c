"""Adapters: the hooks give what PEFT's own mechanism gives, and merging changes no output."""

import pytest
import torch
from peft import get_peft_model

from modeling.qwen3_vl_moe import Qwen3VLMoeForCausalLM
from modeling.training.lora import add_lora, lora_config, merge_and_remove
from tests.distributed.ranks import build
from tests.distributed.toy import samples_of


def start_adapters(model: torch.nn.Module) -> None:
    """Neither factor zero, the same for every model."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for _, parameter in sorted((n, p) for n, p in model.named_parameters() if "lora_" in n):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def loss_and_gradients(model: torch.nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    sample = samples_of("image")[0]
    loss = model(**sample, labels=sample["input_ids"]).loss
    loss.backward()
    names = {name.removeprefix("base_model.model."): p for name, p in model.named_parameters()}
    return loss.detach(), {name: p.grad for name, p in names.items() if p.grad is not None}


def test_hooks_give_what_peft_gives():
    """Loss and every gradient, against PEFT's parametrization on the same model; only adapters have gradients."""
    ours = add_lora(build(), lora_config("attention+experts", 4, 8)).train()
    peft = get_peft_model(build(), lora_config("attention+experts", 4, 8)).train()
    start_adapters(ours)
    start_adapters(peft)
    loss, gradients = loss_and_gradients(ours)
    expected_loss, expected = loss_and_gradients(peft)
    torch.testing.assert_close(loss, expected_loss)
    assert gradients.keys() == expected.keys() and all("lora_" in name for name in gradients)
    assert sum("experts" in name for name in gradients) == 3 * 2 * 2  # three MoE layers, two weights, A and B
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_merging_changes_no_output():
    model = add_lora(build(), lora_config("attention+experts", 4, 8)).eval()
    start_adapters(model)
    sample = samples_of("image")[0]
    with torch.no_grad():
        before = model(**sample).logits
        plain = build().eval()(**sample).logits
        merged = merge_and_remove(model)
        after = merged(**sample).logits
    assert (before - plain).norm() > 1e-2 * plain.norm()
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    assert merged.state_dict().keys() == build().state_dict().keys()


def test_experts_of_another_kind_are_refused():
    model = Qwen3VLMoeForCausalLM(build().config)
    config = lora_config("attention", 4, 8)
    config.target_parameters = ["lm_head.weight"]
    with pytest.raises(ValueError, match="known for experts only, not Linear"):
        add_lora(model, config)
