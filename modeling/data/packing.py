"""Packing by token budget: the oldest waiting sample first, then whatever fills the rest best.

Looking only at samples that wait in a small buffer keeps the stream a stream, and taking the oldest first keeps any of
them from waiting for ever. A pack depends on the order of samples alone, so a run that resumes forms the same packs.
"""

from dataclasses import dataclass, field
from typing import Generic, TypeVar

Item = TypeVar("Item")


@dataclass
class Packer(Generic[Item]):
    """Args: budget: tokens a pack may hold. capacity: samples that wait before a pack is formed."""

    budget: int
    capacity: int = 64
    waiting: list[tuple[int, Item]] = field(default_factory=list)
    """(tokens, item), oldest first."""

    @property
    def full(self) -> bool:
        return len(self.waiting) >= self.capacity

    def add(self, tokens: int, item: Item) -> None:
        """Raises ValueError for a sample that no pack can hold."""
        if tokens > self.budget:
            raise ValueError(
                f"a sample of {tokens} tokens does not fit a budget of {self.budget}; raise the budget or lower the "
                "length limit."
            )
        self.waiting.append((tokens, item))

    def take(self) -> list[Item]:
        """One pack from what waits; empty when nothing does."""
        pack: list[Item] = []
        room = self.budget
        while True:
            fitting = [i for i, (tokens, _) in enumerate(self.waiting) if tokens <= room]
            if not fitting:
                return pack
            # The first is the oldest; after it the largest that fits, of equals the oldest.
            chosen = fitting[0] if not pack else max(fitting, key=lambda i: (self.waiting[i][0], -i))
            tokens, item = self.waiting.pop(chosen)
            pack.append(item)
            room -= tokens
