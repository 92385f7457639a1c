"""One pool of ranks per world size and device, shared by every distributed test of a session."""

from collections.abc import Callable, Iterator
from functools import partial

import pytest

from tests.distributed.device import DEVICE, missing_devices
from tests.distributed.pool import Pool


@pytest.fixture(scope="session")
def pools() -> Iterator[Callable[..., Pool]]:
    """`pools(world_size)` gives the pool of that many ranks on the CPU; `pools(world_size, device)`, on a device."""
    made: dict[tuple[int, str], Pool] = {}

    def get(world_size: int, device: str = "cpu") -> Pool:
        if (world_size, device) not in made:
            made[world_size, device] = Pool(world_size, device=device)
        return made[world_size, device]

    yield get
    for pool in made.values():
        pool.close()


@pytest.fixture(scope="session")
def device_pools(pools) -> Callable[[int], Pool]:
    """`pools` on the device that the session tests (`device.py`); with too few of them the test is skipped."""
    return partial(pool_or_skip, pools, device=DEVICE)


def pool_or_skip(pools: Callable[..., Pool], world_size: int, device: str) -> Pool:
    """The pool; the running test is skipped where so many ranks cannot run."""
    reason = missing_devices(world_size, device)
    if reason is not None:
        pytest.skip(reason)
    return pools(world_size, device)
