"""Samples packed into one row: equal to upstream sample by sample, and strangers to each other bit for bit."""

import pytest
import torch

from tests.features import InputsOf, feature_of, pack, segments
from tests.parity.harness import GRADIENT_BOUND, LOGITS_BOUND, gradients, labels_of, load_pair, relative_error

SAMPLES = ("image", "text", "video", "two_images")


@pytest.mark.parametrize("padding", [0, 7])
def test_equals_upstream_sample_by_sample(pair: tuple, inputs_of: InputsOf, padding: int) -> None:
    ours, upstream = pair
    singles = [inputs_of(name) for name in SAMPLES]
    length = sum(inputs["input_ids"].shape[1] for inputs in singles)
    batch = pack([feature_of(inputs, ours) for inputs in singles], ours, pad_to_length=length + padding)
    with torch.no_grad():
        out = ours(**batch, output_router_logits=True)
        references = [upstream(**inputs, output_router_logits=True) for inputs in singles]
    for name, where, reference in zip(SAMPLES, segments(batch), references, strict=True):
        assert relative_error(out.logits[:, where], reference.logits) <= LOGITS_BOUND, name
        for layer, reference_layer in zip(out.router_logits, reference.router_logits, strict=True):
            assert torch.equal(
                layer[where].topk(4).indices.sort().values, reference_layer.topk(4).indices.sort().values
            )


def test_gradients_equal_the_sum_over_samples(pair: tuple, inputs_of: InputsOf) -> None:
    """The packed loss is the mean over all labels, so upstream's samples are weighted by their share of them."""
    ours, upstream = pair
    singles = [inputs_of(name) for name in SAMPLES]
    batch = pack([feature_of(inputs, ours) for inputs in singles], ours, pad_to_length=400)
    labels = batch.pop("labels")
    loss, found = gradients(ours, batch, labels)
    counts = [int((labels_of(inputs)[:, 1:] != -100).sum()) for inputs in singles]
    expected_loss, expected = 0.0, {name: torch.zeros_like(grad) for name, grad in found.items()}
    for inputs, count in zip(singles, counts, strict=True):
        sample_loss, sample_grads = gradients(upstream, inputs, labels_of(inputs))
        expected_loss += sample_loss * count / sum(counts)
        for name, grad in sample_grads.items():
            expected[name] += grad * (count / sum(counts))
    assert abs(loss - expected_loss) / expected_loss <= LOGITS_BOUND
    for name, reference in expected.items():
        assert relative_error(found[name], reference) <= GRADIENT_BOUND, name


@pytest.mark.parametrize(("attention", "moe"), [("sdpa", "fused"), ("eager", "eager")])
@pytest.mark.parametrize("changed", ["tokens", "pixels", "video"])
def test_a_neighbour_changes_nothing(tiny_hub, inputs_of: InputsOf, attention: str, moe: str, changed: str) -> None:
    """Sample A's values change, not its length; B's logits stay the same bits, and so do its image features."""
    ours, _ = load_pair(tiny_hub, attention, moe)
    features = [feature_of(inputs_of("video" if changed == "video" else "image"), ours)]
    features.append(feature_of(inputs_of("two_images"), ours))
    before = pack(features, ours)
    generator = torch.Generator().manual_seed(1)
    if changed == "tokens":
        text = ~features[0]["image_mask"]
        fresh = torch.randint(1000, 100_000, features[0]["input_ids"].shape, generator=generator)
        features[0]["input_ids"] = torch.where(text, fresh, features[0]["input_ids"])
    else:
        key = "pixel_values_videos" if changed == "video" else "pixel_values"
        features[0][key] = torch.randn(features[0][key].shape, generator=generator)
    after = pack(features, ours)
    mine, neighbour = segments(before)[1], segments(before)[0]
    with torch.no_grad():
        first, second = ours(**before).logits, ours(**after).logits
    assert torch.equal(first[:, mine], second[:, mine])
    assert not torch.equal(first[:, neighbour], second[:, neighbour])


def test_vision_tower_keeps_images_apart(ours: torch.nn.Module, inputs_of: InputsOf) -> None:
    inputs = inputs_of("two_images")
    grid, pixels = inputs["image_grid_thw"], inputs["pixel_values"]
    first_patches, first_tokens = int(grid[0].prod()), int(grid[0].prod()) // 4
    changed = pixels.clone()
    changed[:first_patches] = torch.randn(first_patches, pixels.shape[1], generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        before, after = ours.model.visual(pixels, grid_thw=grid), ours.model.visual(changed, grid_thw=grid)
    assert torch.equal(before.pooler_output[first_tokens:], after.pooler_output[first_tokens:])
    assert not torch.equal(before.pooler_output[:first_tokens], after.pooler_output[:first_tokens])
    for one, other in zip(before.deepstack_features, after.deepstack_features, strict=True):
        assert torch.equal(one[first_tokens:], other[first_tokens:])


def test_no_square_mask_is_built(ours: torch.nn.Module, inputs_of: InputsOf, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' mask creation is not even called for a packed row."""
    from modeling.qwen3_vl_moe import modeling_qwen3_vl_moe

    def refuse(**kwargs: object) -> None:
        raise AssertionError("a mask was asked for")

    monkeypatch.setattr(modeling_qwen3_vl_moe, "create_causal_mask", refuse)
    batch = pack([feature_of(inputs_of("image"), ours), feature_of(inputs_of("text"), ours)], ours)
    with torch.no_grad():
        assert ours(**batch).logits.isfinite().all()


def test_precomputed_metadata_gives_the_same_bits(ours: torch.nn.Module, inputs_of: InputsOf) -> None:
    """What the collator prepares is what the forward works out alone."""
    batch = pack([feature_of(inputs_of("mixed"), ours), feature_of(inputs_of("video"), ours)], ours)
    without = {key: value for key, value in batch.items() if key != "multimodal_metadata"}
    with torch.no_grad():
        assert torch.equal(ours(**batch).logits, ours(**without).logits)


def test_positions_that_begin_anew_tell_samples_apart(ours: torch.nn.Module, inputs_of: InputsOf) -> None:
    """As transformers' padding-free collator packs: one row, positions (1, S), no boundaries, no mask."""
    first, second = (inputs_of(case)["input_ids"] for case in ("text", "video"))
    second = second.clamp(max=1000)  # text again
    lengths = first.shape[1], second.shape[1]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    with torch.no_grad():
        packed = ours(input_ids=torch.cat([first, second], 1), position_ids=positions, use_cache=False).logits
        alone = ours(input_ids=second).logits
    torch.testing.assert_close(packed[:, lengths[0] :], alone, rtol=0, atol=1e-5 * alone.abs().max().item())


@pytest.mark.parametrize("training", [True, False])
def test_shift_labels_stand_in_for_labels(ours: torch.nn.Module, inputs_of: InputsOf, training: bool) -> None:
    """By transformers' name: position i's own target, in place of `labels` where both are given."""
    inputs = inputs_of("text")
    labels = inputs["input_ids"]
    targets = labels.roll(-3, 1)
    with torch.no_grad():
        logits = ours.eval()(**inputs).logits
        wanted = torch.nn.functional.cross_entropy(logits[0], targets[0])
        found = ours.train(training)(**inputs, labels=labels, shift_labels=targets).loss
    ours.eval()
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)
