"""bfloat16: no further from the fp32 reference than upstream's own bfloat16 run on the same input.

Rounding now and then flips a near-tie between two experts, in either model, at different tokens; one flip moves a small
model's output by more than all other rounding together, so that comparing two unpinned runs compares luck. Here both
models route as the reference did, each with its own probabilities; flips themselves are counted in the last test.
"""

from pathlib import Path

import pytest
import torch

from tests.features import InputsOf
from tests.media import CASES
from tests.parity.harness import (
    gradients,
    labels_of,
    load_pair,
    pinned,
    reference_choices,
    relative_error,
    top_choices,
)

NO_WORSE = 1.1


@pytest.fixture(scope="module")
def bf16_pair(tiny_hub: Path) -> tuple:
    return load_pair(tiny_hub, dtype=torch.bfloat16)


@pytest.mark.parametrize("case", CASES)
def test_logits(bf16_pair: tuple, upstream: torch.nn.Module, inputs_of: InputsOf, case: str) -> None:
    inputs = inputs_of(case)
    choices, errors = reference_choices(upstream, inputs), []
    with torch.no_grad():
        reference = upstream(**inputs).logits
        for model in bf16_pair:
            with pinned(model, choices):
                errors.append(relative_error(model(**inputs).logits.float(), reference))
    assert errors[0] <= NO_WORSE * errors[1], f"{errors[0]:.5f} against upstream's {errors[1]:.5f}"


def test_gradients(bf16_pair: tuple, upstream: torch.nn.Module, inputs_of: InputsOf) -> None:
    """All parameters' gradients as one vector: single ones are noise at this precision."""
    inputs = inputs_of("image", "text", "mixed")
    labels, choices = labels_of(inputs), reference_choices(upstream, inputs)
    _, reference = gradients(upstream, inputs, labels)
    whole = torch.cat([grad.flatten() for grad in reference.values()])
    errors = []
    for model in bf16_pair:
        with pinned(model, choices):
            _, found = gradients(model, inputs, labels)
        errors.append(relative_error(torch.cat([found[name].float().flatten() for name in reference]), whole))
    assert errors[0] <= NO_WORSE * errors[1], f"{errors[0]:.5f} against upstream's {errors[1]:.5f}"


def test_router_sees_what_upstreams_sees(bf16_pair: tuple, upstream: torch.nn.Module) -> None:
    """The MoE blocks alone, unpinned, on the same 4,000 tokens: the same flips, and less error elsewhere."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(1, 4000, upstream.config.text_config.hidden_size, generator=generator).bfloat16()
    layers = [model.model.language_model.layers for model in (*bf16_pair, upstream)]
    for mine, theirs, exact in zip(*layers, strict=True):
        if not hasattr(mine.mlp, "experts"):
            continue
        with torch.no_grad():
            reference = exact.mlp(tokens.float())
            errors = [relative_error(out.float(), reference) for out in (mine.mlp(tokens)[0], theirs.mlp(tokens))]
            logits = [block.mlp.gate(tokens)[0].float() for block in (mine, theirs)]
        assert torch.equal(logits[0], logits[1])
        assert errors[0] <= NO_WORSE * errors[1]


def test_flips_are_near_ties(bf16_pair: tuple, upstream: torch.nn.Module, inputs_of: InputsOf) -> None:
    """Unpinned, the whole model flips few choices, and not many more than upstream does."""
    flips = [0, 0]
    for case in CASES:
        inputs = inputs_of(case)
        keep = inputs["attention_mask"].bool()
        with torch.no_grad():
            reference = top_choices(upstream(**inputs, output_router_logits=True).router_logits, 4, keep)
            for number, model in enumerate(bf16_pair):
                found = top_choices(model(**inputs, output_router_logits=True).router_logits, 4, keep)
                flips[number] += int((found != reference).any(-1).sum())
    # Two counts of some forty rare events differ by their square roots.
    assert flips[0] <= flips[1] + 2 * (2 * flips[1]) ** 0.5, f"{flips[0]} against upstream's {flips[1]}"
