"""Whose rounding is it? Against upstream in float64, this model's fp32 errors are no larger than upstream's own."""

from pathlib import Path

import pytest
import torch
from transformers import Qwen3VLMoeForConditionalGeneration as Upstream

from tests.features import InputsOf
from tests.parity.harness import gradients, labels_of, relative_error

# Both errors are sums of many roundings of either sign; they agree to some tens of percent, not better.
NO_WORSE = 1.3


@pytest.mark.parametrize("case", ["image", "video"])
def test_gradients_as_accurate_as_upstreams(pair: tuple, tiny_hub: Path, inputs_of: InputsOf, case: str) -> None:
    # Upstream's grouped experts have no float64 kernel; its loop over experts does.
    exact = Upstream.from_pretrained(tiny_hub, dtype=torch.float64, experts_implementation="eager")
    inputs = inputs_of(case)
    labels = labels_of(inputs)
    doubled = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    _, reference = gradients(exact, doubled, labels)
    errors = []
    for model in pair:
        _, found = gradients(model, inputs, labels)
        each = torch.tensor([relative_error(found[name], reference[name]) for name in reference])
        errors.append(each.median().item())
    assert errors[0] <= NO_WORSE * errors[1], f"{errors[0]:.2e} against upstream's {errors[1]:.2e}"
