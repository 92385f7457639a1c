"""Which sample comes when, for any number of data ranks, and how to go on after a stop.

All ranks follow one endless sequence of places (epoch, place in that epoch's shuffle). Rank r of R takes its elements
r, r + R, r + 2R, ... A rank's position is how many it has taken and which of those still wait in its packer. From all
ranks' positions follows exactly which places were trained on; the others, in order, are the beginning of the sequence
that any other number of ranks goes on with. So no sample is lost or doubled, whatever the meshes before and after.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import count

import torch

Place = tuple[int, int]
"""(epoch, place in the epoch's shuffle)."""


@lru_cache(maxsize=2)
def _shuffle(seed: int, epoch: int, size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(size, generator=generator)


@dataclass
class Position:
    """What one data rank has done of its part of a sequence."""

    taken: int = 0
    """Elements it has taken."""
    waiting: list[int] = field(default_factory=list)
    """Indices in the sequence of those it has not trained on yet, in the order in which they wait."""


@dataclass(frozen=True)
class SampleOrder:
    """The endless sequence: `first`, then every place of every epoch from `start` on.

    Args:
        size: samples in an epoch.
        seed: of the shuffles; None keeps the files' order.
        epochs: how many there are; None never ends.
        start: places counted over all epochs, epoch x size + place.
    """

    size: int
    seed: int | None
    epochs: int | None = None
    first: tuple[Place, ...] = ()
    start: int = 0

    def at(self, index: int) -> Place | None:
        """The place at an index of the sequence; None behind its end."""
        if index < len(self.first):
            return self.first[index]
        epoch, place = divmod(self.start + index - len(self.first), self.size)
        return None if self.epochs is not None and epoch >= self.epochs else (epoch, place)

    def indices(self, rank: int, ranks: int, taken: int = 0) -> Iterator[int]:
        """Indices that a rank takes, the first `taken` of them left out."""
        for index in count(rank + taken * ranks, ranks):
            if self.at(index) is None:
                return
            yield index

    def number(self, index: int) -> int:
        """The sample that stands at an index."""
        place = self.at(index)
        assert place is not None
        return place[1] if self.seed is None else int(_shuffle(self.seed, place[0], self.size)[place[1]])

    def after(self, positions: Sequence[Position]) -> "SampleOrder":
        """The sequence that remains when each of the ranks stands at its position."""
        ranks = len(positions)
        low, high = (ranks * pick(position.taken for position in positions) for pick in (min, max))
        left = {index for position in positions for index in position.waiting}
        left |= {index for index in range(low, high) if index // ranks >= positions[index % ranks].taken}
        left |= set(range(high, len(self.first)))
        places = [self.at(index) for index in sorted(left)]
        start = self.start + max(0, high - len(self.first))
        return SampleOrder(self.size, self.seed, self.epochs, tuple(p for p in places if p is not None), start)
