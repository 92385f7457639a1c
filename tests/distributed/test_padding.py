"""What padding holds never reaches a real token: bitwise, under sequence parallelism, at every place that is padded."""

from typing import Any

import pytest
import torch

from modeling.data.collator import SequenceParallelCollator
from modeling.distributed.parallel_state import ParallelState, use_parallel_state
from modeling.distributed.parallelize import parallelize_model
from tests.distributed.ranks import Mesh, build, features_of, single_process_model, state_of

# Samples whose rows end inside a slice, and whose patches do not fill one: text, image and video padding all exist.
CASES = {"video": [3], "packed": [0, 1, 5], "mostly padding": [2]}
FILLS = ("as collated", "other tokens", "large values", "last token repeated")


def refill(batch: dict[str, Any], state: ParallelState, patches: dict[str, int], how: str) -> None:
    """Overwrite this rank's padding: tokens, positions and patches."""
    length = batch["input_ids"].shape[1]
    real = length * (state.sp_size - state.sp_rank) - batch["tail_padding_length"]
    real = min(max(real, 0), length)
    generator = torch.Generator().manual_seed(FILLS.index(how))
    if how == "as collated":
        return
    tail = batch["input_ids"][:, real:]
    tail.copy_(torch.randint(0, 180, tail.shape, generator=generator) if how != "last token repeated" else 7)
    batch["position_ids"][:, :, real:] = torch.randint(0, 900, (1, 3, length - real), generator=generator)
    for key, whole in patches.items():
        rows = batch[key].shape[0]
        first = min(max(whole - state.sp_rank * rows, 0), rows)
        scale = 1e4 if how == "large values" else 1.0
        batch[key][first:] = torch.randn(rows - first, batch[key].shape[1], generator=generator) * scale


def logits_of_real_tokens(mesh: Mesh, samples: list[int], pad_to_length: int) -> list[Any]:
    """Per filling, this rank's logits of real tokens."""
    state = state_of(mesh)
    collator = SequenceParallelCollator(
        state.sp_size, state.sp_rank, single_process_model().get_metadata_collate_func(), pad_to_length
    )
    features = [features_of("mixed")[i] for i in samples]
    patches = {
        key: sum(f[key].shape[0] for f in features if key in f)
        for key in ("pixel_values", "pixel_values_videos")
        if any(key in f for f in features)
    }
    results = []
    with use_parallel_state(state), torch.no_grad():
        model = parallelize_model(build().eval())
        for how in FILLS:
            batch = collator(features)
            assert batch["tail_padding_length"] > 0
            refill(batch, state, patches, how)
            batch.pop("labels")
            logits = model(**batch).logits[0]
            real = logits.shape[0] * (state.sp_size - state.sp_rank) - batch["tail_padding_length"]
            results.append(logits[: max(real, 0)].numpy())
    return results


@pytest.mark.parametrize("mesh", [Mesh(1, sp=2), Mesh(1, sp=2, ep=2)], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_padding_content_changes_nothing(pools, mesh: Mesh, case: str):
    per_rank = pools(2).run(logits_of_real_tokens, mesh, CASES[case], 150)
    assert sum(results[0].size for results in per_rank) > 0
    for results in per_rank:
        for how, result in zip(FILLS[1:], results[1:], strict=True):
            assert (result == results[0]).all(), f"{how}: off by {abs(result - results[0]).max():.1e}"
