"""Convert a checkpoint to the layouts that published checkpoints and other tools use.

    python conversion/veomni_to_hf.py INPUT OUTPUT [--target hub|fused|per-expert]

INPUT is a folder; its layout is told from its files. Exit 0 done, 1 the input is bad, 2 the words are off.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):  # run from a bare checkout
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from conversion.cli import run


def main(argv: list[str] | None = None) -> int:
    """Parse `argv`, convert, return the exit code."""
    return run(__doc__, ("hub", "fused", "per-expert"), "hub", argv)


if __name__ == "__main__":
    sys.exit(main())
