"""Compare two checkpoints bit for bit, in whichever layouts they are, or check one against its manifest.

    python conversion/verify.py A B
    python conversion/verify.py --hashes A

Exit 0 equal, 1 a checkpoint is bad, 2 the words are off, 3 they differ: the first difference of each tensor is named.
"""

import argparse
import os
import sys
from pathlib import Path

if __package__ in (None, ""):  # run from a bare checkout
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from conversion.budget import PIECE_BYTES
from conversion.checkpoint import open_checkpoint
from conversion.cli import positive, run_command
from conversion.compare import Difference, check_hashes, compare, read_manifest
from conversion.errors import VerificationError
from conversion.hub import resolve_input
from conversion.layout import LAYOUTS
from conversion.progress import Progress

SHOWN = 20


def build_parser() -> argparse.ArgumentParser:
    """The options of verify.py."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("a", help="folder of a checkpoint, or its id on the Hugging Face Hub")
    parser.add_argument("b", nargs="?", help="the other one")
    parser.add_argument("--hashes", action="store_true", help="check A against its veomni_manifest.json")
    parser.add_argument("--layout-a", choices=LAYOUTS, help="A's layout, where nothing tells it")
    parser.add_argument("--layout-b", choices=LAYOUTS, help="B's layout, where nothing tells it")
    parser.add_argument("--workers", type=positive, default=min(8, os.cpu_count() or 1), metavar="N", help="threads")
    parser.add_argument("--quiet", action="store_true", help="print differences only")
    return parser


def verify(args: argparse.Namespace) -> None:
    """Run as the parsed `args` say. Raises VerificationError, which names the differences."""
    folder_a, _ = resolve_input(args.a)
    if args.hashes:
        manifest = read_manifest(folder_a)
        total = sum(record.size for record in manifest.weights + manifest.companions)
        with Progress(total, args.quiet) as progress:
            differences = check_hashes(folder_a, manifest, args.workers, progress.advance)
        equal = f"{args.a}: {len(manifest.weights)} file(s), {total / 1e9:.2f} GB, as the manifest says"
    else:
        folder_b, _ = resolve_input(args.b)
        a, b = open_checkpoint(folder_a, args.layout_a), open_checkpoint(folder_b, args.layout_b)
        total = sum(location.info.nbytes for location in a.stored.values())
        with Progress(total, args.quiet) as progress:
            differences = compare(a, b, 2 * PIECE_BYTES, args.workers, progress.advance)
        equal = (
            f"equal: {args.a} ({a.layout.layout}) and {args.b} ({b.layout.layout}), {len(a.logical)} tensors, "
            f"{total / 1e9:.2f} GB"
        )
    if differences:
        raise VerificationError(_listed(differences))
    if not args.quiet:
        print(equal)


def _listed(differences: list[Difference]) -> str:
    lines = [f"{len(differences)} difference(s)", *map(str, differences[:SHOWN])]
    return "\n  ".join(lines + [f"… and {len(differences) - SHOWN} more"] * (len(differences) > SHOWN))


def main(argv: list[str] | None = None) -> int:
    """Parse `argv`, verify, return the exit code."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.hashes == (args.b is not None):
        parser.error("give two checkpoints to compare, or one with --hashes")
    return run_command(lambda: verify(args))


if __name__ == "__main__":
    sys.exit(main())
