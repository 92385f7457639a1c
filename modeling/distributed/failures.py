"""All ranks fail, or none: a rank that raises on its own leaves the others waiting in a collective for ever."""

from contextlib import AbstractContextManager
from types import TracebackType

import torch.distributed as dist


class RankFailure(RuntimeError):
    """Some rank failed; the message, the same on every rank, says which and why."""


class fail_together(AbstractContextManager["fail_together"]):
    """Around work that may fail on one rank and holds no collective: reading data, opening files.

        with fail_together(state.world_group):
            batch = next(batches)

    On leaving the block the ranks exchange what went wrong, and if anything did, all of them raise `RankFailure` with
    the list; the cause is attached where it happened. One small all-gather per use; in one process errors pass through.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        if self.group is None or isinstance(error, KeyboardInterrupt | SystemExit):
            return None
        messages: list[str | None] = [None] * dist.get_world_size(self.group)
        own = None if error is None else f"{type(error).__name__}: {error}"
        dist.all_gather_object(messages, own, group=self.group)
        failed = [f"rank {rank}: {message}" for rank, message in enumerate(messages) if message is not None]
        if failed:
            # Ranks on one file system often fail alike; one line says it.
            alike = len(failed) == len(messages) and len(set(messages)) == 1
            raise RankFailure(f"all ranks: {messages[0]}" if alike else "\n".join(failed)) from error
        return None
