"""One pool of ranks per world size, shared by every distributed test of a session."""

from collections.abc import Callable, Iterator

import pytest

from tests.distributed.pool import Pool


@pytest.fixture(scope="session")
def pools() -> Iterator[Callable[[int], Pool]]:
    """`pools(world_size)` gives the pool of that many ranks. One stands at a time: idle ranks cost memory."""
    made: dict[int, Pool] = {}

    def get(world_size: int) -> Pool:
        if world_size not in made:
            made[world_size] = Pool(world_size)
        return made[world_size]

    yield get
    for pool in made.values():
        pool.close()
