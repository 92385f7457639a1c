"""The example chats, once per session, and runs of the trainer on the tiny checkpoint."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.distributed.pool import Pool


@pytest.fixture(scope="session")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example's JSONL, its media beside it."""
    from scripts.make_example_data import make_example_data

    return make_example_data(tmp_path_factory.mktemp("example"), max_side=96)


@pytest.fixture(scope="session")
def pools() -> Iterator[Callable[[int], Pool]]:
    """`pools(world_size)`: gloo ranks that wait for work."""
    made: dict[int, Pool] = {}

    def get(world_size: int) -> Pool:
        if world_size not in made:
            made[world_size] = Pool(world_size)
        return made[world_size]

    yield get
    for pool in made.values():
        pool.close()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums in one order, so that bitwise tests mean what they say."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
