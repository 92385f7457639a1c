"""Convert a checkpoint to the layouts this model trains from.

    python conversion/hf_to_veomni.py INPUT OUTPUT [--target fused|ep-sharded] [--ep-size N]

INPUT is a folder; its layout is told from its files. Exit 0 done, 1 the input is bad, 2 the words are off.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):  # run from a bare checkout
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from conversion.cli import run


def main(argv: list[str] | None = None) -> int:
    """Parse `argv`, convert, return the exit code."""
    return run(__doc__, ("fused", "ep-sharded"), "fused", argv)


if __name__ == "__main__":
    sys.exit(main())
