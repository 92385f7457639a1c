"""How much memory a run may take, and how it is divided.

The bound is on the peak resident size (VmHWM) of the process. Reading and writing are plain system calls, so files
count nothing; what counts is the interpreter with its libraries, the plan, and the arenas that pieces are made in.
"""

import resource
import sys
from dataclasses import dataclass
from pathlib import Path

from conversion.errors import UsageError
from conversion.plan import Plan, unit_bytes

# A piece of this size stays in the last-level cache between the steps it goes through; larger ones gain nothing.
PIECE_BYTES = 16 * 2**20
# For what is allocated beside the arenas: the journal and manifest, hash states, thread stacks, casts' temporaries.
RESERVE = 48 * 2**20


@dataclass(frozen=True)
class Budget:
    """`slots` arenas of `arena_bytes`, for pieces of about `piece_memory`; `peak` is the sum of it all."""

    slots: int
    arena_bytes: int
    piece_memory: int
    peak: int


def resident_bytes() -> int:
    """The process's resident size now."""
    return _status("VmRSS")


def peak_bytes() -> int:
    """The process's peak resident size.

    Not from getrusage where it can be helped: its ru_maxrss counts what the parent process had before the exec.
    """
    return _status("VmHWM")


def _status(field: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except FileNotFoundError:  # no procfs; the peak is an upper bound of both
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def make_budget(plan: Plan, max_ram: int, workers: int) -> Budget:
    """Divide `max_ram` bytes for `plan`, beside what the process takes now: everything should be imported by then.

    Raises UsageError when not even one piece fits, with the least that does.
    """
    units = [unit_bytes(tensor) for file in plan.files for tensor in file.tensors]
    # Arrays in an arena are aligned; a piece of small experts is made of several.
    arena = max([PIECE_BYTES, *units]) + 64 * 1024
    fixed = resident_bytes() + RESERVE
    room = max_ram - fixed
    if room < arena:  # small experts need no full piece; the largest one must fit
        arena = max(units, default=0) + 64 * 1024
    if room < arena or peak_bytes() > max_ram:
        least = -(-max(fixed + arena, peak_bytes() + RESERVE) // 10**6)
        raise UsageError(f"--max-ram {max_ram // 10**6}MB is too little for this checkpoint; use at least {least}MB")
    # One for each thread (see conversion.write), half as many waiting for their turn to be hashed, one being hashed.
    slots = min(3 * workers + 1, room // arena)
    return Budget(slots, arena, arena - 64 * 1024, fixed + slots * arena)
