"""Outputs and every parameter's gradient, against upstream, on real photos and a real clip."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.media import CASES
from tests.parity.harness import compare, load_pair, relative_error

PADDED = ("text", "image", "video", "two_images")


@pytest.mark.parametrize("case", CASES)
def test_one_sample(ours: torch.nn.Module, upstream: torch.nn.Module, inputs_of: Callable, case: str) -> None:
    compare(ours, upstream, inputs_of(case)).check()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch(ours: torch.nn.Module, upstream: torch.nn.Module, inputs_of: Callable, side: str) -> None:
    compare(ours, upstream, inputs_of(*PADDED, padding_side=side)).check()


@pytest.mark.parametrize(("attention", "moe"), [("eager", "fused"), ("sdpa", "eager"), ("eager", "eager")])
def test_other_implementations(tiny_hub: Path, inputs_of: Callable, attention: str, moe: str) -> None:
    compare(*load_pair(tiny_hub, attention, moe), inputs_of("mixed")).check()


def test_gradient_checkpointing(ours: torch.nn.Module, upstream: torch.nn.Module, inputs_of: Callable) -> None:
    ours.gradient_checkpointing_enable()
    try:
        compare(ours, upstream, inputs_of("mixed")).check()
    finally:
        ours.gradient_checkpointing_disable()


def test_load_balancing_loss_joins_the_loss(pair: tuple, inputs_of: Callable) -> None:
    """Padding excluded; the coefficient is the config's."""
    inputs = inputs_of("text", "image")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    losses, aux = [], []
    for model in pair:
        with torch.no_grad():
            out = model(**inputs, labels=labels, output_router_logits=True)
        losses.append(out.loss)
        aux.append(out.aux_loss)
    # Means over a few hundred fp32 terms.
    torch.testing.assert_close(aux[0], aux[1], rtol=2e-6, atol=0)
    torch.testing.assert_close(losses[0], losses[1], rtol=2e-6, atol=0)


def test_balancing_loss_gradient(pair: tuple, inputs_of: Callable) -> None:
    inputs = inputs_of("text", "image")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    found = []
    for model in pair:
        model.zero_grad(set_to_none=True)
        model(**inputs, labels=labels, output_router_logits=True).aux_loss.backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if name.endswith("mlp.gate.weight")})
        model.zero_grad(set_to_none=True)
    assert found[0].keys() == found[1].keys() and found[0]
    for name, reference in found[1].items():
        assert reference.norm() > 0, name
        assert relative_error(found[0][name], reference) <= 5e-6, name


def test_eval_loss_and_kept_logits(pair: tuple, inputs_of: Callable) -> None:
    inputs = inputs_of("image")
    ours, upstream = pair
    with torch.no_grad():
        whole, reference = (model(**inputs, labels=inputs["input_ids"]) for model in (ours, upstream))
        last, index = ours(**inputs, logits_to_keep=3), ours(**inputs, logits_to_keep=torch.tensor([0, 5]))
    torch.testing.assert_close(whole.loss, reference.loss, rtol=2e-6, atol=0)
    # The same rows through a smaller matrix product may round differently.
    torch.testing.assert_close(last.logits, whole.logits[:, -3:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(index.logits, whole.logits[:, [0, 5]], rtol=1e-5, atol=1e-5)


def test_training_returns_the_eval_loss_without_logits(ours: torch.nn.Module, inputs_of: Callable) -> None:
    inputs = inputs_of("image")
    with torch.no_grad():
        eval_loss = ours(**inputs, labels=inputs["input_ids"]).loss
        ours.train()
        out = ours(**inputs, labels=inputs["input_ids"])
        ours.eval()
    assert out.logits is None
    torch.testing.assert_close(out.loss, eval_loss, rtol=2e-6, atol=0)


def test_num_items_divides_the_summed_loss(ours: torch.nn.Module, inputs_of: Callable) -> None:
    inputs = inputs_of("text")
    labels = inputs["input_ids"]
    counted = labels.numel() - 1
    with torch.no_grad():
        mean = ours(**inputs, labels=labels).loss
        for training in (False, True):
            ours.train(training)
            given = ours(**inputs, labels=labels, num_items_in_batch=2 * counted).loss
            ours.eval()
            torch.testing.assert_close(given, mean / 2, rtol=2e-6, atol=0)


def test_inputs_embeds(pair: tuple, inputs_of: Callable) -> None:
    """Placeholders are found in the embeddings when there are no ids."""
    inputs = inputs_of("image")
    ours, upstream = pair
    ids = inputs.pop("input_ids")
    positions, _ = ours.model.get_rope_index(ids, image_grid_thw=inputs["image_grid_thw"])
    found = []
    for model in (ours, upstream):
        embeds = model.get_input_embeddings()(ids)
        with torch.no_grad():
            found.append(model(**inputs, inputs_embeds=embeds, position_ids=positions).logits)
    assert relative_error(*found) <= 2e-6


def test_attention_weights_and_tuple_output(tiny_hub: Path, inputs_of: Callable) -> None:
    ours, upstream = load_pair(tiny_hub, "eager")
    inputs = inputs_of("image")
    with torch.no_grad():
        weights, reference = (model(**inputs, output_attentions=True).attentions for model in (ours, upstream))
        as_tuple = ours(**inputs, return_dict=False)
        as_dict = ours(**inputs)
    assert len(weights) == len(reference) == ours.config.text_config.num_hidden_layers
    for ours_layer, upstream_layer in zip(weights, reference, strict=True):
        torch.testing.assert_close(ours_layer, upstream_layer, rtol=1e-5, atol=1e-6)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], as_dict.logits)


def test_image_features(pair: tuple, inputs_of: Callable) -> None:
    """The public feature functions: one tensor per image, deepstack too where upstream splits it."""
    inputs = inputs_of("two_images")
    with torch.no_grad():
        found, reference = (
            model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]) for model in pair
        )
    assert len(found.pooler_output) == 2 and len(found.deepstack_features) == 3
    for image, upstream_image in zip(found.pooler_output, reference.pooler_output, strict=True):
        assert relative_error(image, upstream_image) <= 2e-6
    for layer, upstream_layer in zip(found.deepstack_features, reference.deepstack_features, strict=True):
        whole = torch.cat(upstream_layer) if isinstance(upstream_layer, tuple) else upstream_layer
        assert relative_error(torch.cat(layer), whole) <= 2e-6


def test_every_gradient_is_alive(ours: torch.nn.Module, inputs_of: Callable) -> None:
    """No parameter is compared on zeros alone: deepstack, every expert and the ViT learn from these inputs."""
    from tests.parity.harness import gradients, labels_of

    inputs = inputs_of(*PADDED)
    _, found = gradients(ours, inputs, labels_of(inputs))
    dead = [name for name, grad in found.items() if grad.norm() == 0]
    assert not dead
    for name, grad in found.items():
        if ".experts." in name:
            assert (grad.flatten(1).norm(dim=1) > 0).float().mean() > 0.9, name
