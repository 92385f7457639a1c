"""The parity check must fail on models that are wrong in the ways people's models have been wrong."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from modeling.qwen3_vl_moe import modeling_qwen3_vl_moe as fork
from tests.features import InputsOf, feature_of, pack, segments
from tests.parity.harness import LOGITS_BOUND, compare, load_pair, relative_error


@pytest.fixture
def copies(tiny_hub: Path) -> tuple:
    """A pair of this test's own, to be broken."""
    return load_pair(tiny_hub)


def swap_gate_and_up(model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in model.modules():
        if isinstance(module, fork.Qwen3VLMoeTextExperts):
            gate, up = module.gate_up_proj.data.chunk(2, dim=1)
            module.gate_up_proj.data = torch.cat((up, gate), dim=1)


def shift_deepstack(model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """What belongs behind layer i is added behind layer i + 1."""
    add_at, waiting = fork.add_at, []

    def late(hidden_states: torch.Tensor, indices: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        waiting.append(embeds)
        return hidden_states if len(waiting) == 1 else add_at(hidden_states, indices, waiting.pop(0))

    monkeypatch.setattr(fork, "add_at", late)


def swap_height_and_width(model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    original = model.model.get_rope_index

    def swapped(*args: object, **kwargs: object) -> tuple[torch.Tensor, torch.Tensor]:
        positions, deltas = original(*args, **kwargs)
        return positions[[0, 2, 1]], deltas

    monkeypatch.setattr(model.model, "get_rope_index", swapped)


def leave_router_weights_unnormalised(model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: torch.nn.Module, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits = torch.nn.functional.linear(hidden_states.reshape(-1, self.hidden_dim), self.weight)
        weights, indices = logits.softmax(-1, dtype=torch.float).topk(self.top_k, dim=-1)
        return logits, weights, indices

    monkeypatch.setattr(fork.Qwen3VLMoeTextTopKRouter, "forward", forward)


def swap_vision_rows_and_columns(model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    rotary = model.model.visual.rotary_pos_emb
    original = rotary.forward
    monkeypatch.setattr(rotary, "forward", lambda position_ids: original(position_ids.flip(-1)))


def detach_deepstack(model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Right outputs, wrong gradients."""
    add_at = fork.add_at
    monkeypatch.setattr(fork, "add_at", lambda hidden, indices, embeds: add_at(hidden, indices, embeds.detach()))


BREAKAGES: list[Callable] = [
    swap_gate_and_up,
    shift_deepstack,
    swap_height_and_width,
    leave_router_weights_unnormalised,
    swap_vision_rows_and_columns,
    detach_deepstack,
]


@pytest.mark.parametrize("break_it", BREAKAGES, ids=lambda function: function.__name__)
def test_the_check_fails_on(
    copies: tuple, inputs_of: InputsOf, monkeypatch: pytest.MonkeyPatch, break_it: Callable
) -> None:
    break_it(copies[0], monkeypatch)
    with pytest.raises(AssertionError, match="differ"):
        compare(*copies, inputs_of("image")).check()


def test_the_check_passes_on_an_unbroken_copy(copies: tuple, inputs_of: InputsOf) -> None:
    compare(*copies, inputs_of("image")).check()


def test_the_packing_check_fails_on_leaking_samples(copies: tuple, inputs_of: InputsOf) -> None:
    """One boundary removed: two samples attend to each other."""
    ours, upstream = copies
    singles = [inputs_of("image"), inputs_of("text")]
    batch = pack([feature_of(inputs, ours) for inputs in singles], ours)
    where = segments(batch)
    batch["cu_seq_lens_q"] = batch["cu_seq_lens_q"][[0, -1]]
    batch["max_length_q"] = int(batch["cu_seq_lens_q"][-1])
    with torch.no_grad():
        out = ours(**batch).logits[:, where[1]]
        assert relative_error(out, upstream(**singles[1]).logits) > 100 * LOGITS_BOUND
