"""Both models on the tiny checkpoint, loaded once per session, and processor inputs by name."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.media import case_inputs
from tests.parity.harness import load_pair


@pytest.fixture(scope="session")
def pair(tiny_hub: Path) -> tuple:
    """(ours, upstream), sdpa, fused experts, from the published layout."""
    return load_pair(tiny_hub)


@pytest.fixture(scope="session")
def ours(pair: tuple) -> torch.nn.Module:
    return pair[0]


@pytest.fixture(scope="session")
def upstream(pair: tuple) -> torch.nn.Module:
    return pair[1]


@pytest.fixture(scope="session")
def inputs_of(tiny_processor: Any) -> Callable[..., dict[str, torch.Tensor]]:
    """`inputs_of("image", "video", padding_side="left")`: the cases as one batch of tensors."""

    def get(*names: str, padding_side: str = "right") -> dict[str, torch.Tensor]:
        return dict(case_inputs(tiny_processor, *names, padding_side=padding_side))

    return get


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Reductions in one order, so that bitwise tests mean what they say."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
