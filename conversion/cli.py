"""What the two converter command lines share: options, the run itself, exit codes."""

import argparse
import os
import re
import sys
import time
from pathlib import Path

from conversion.checkpoint import open_checkpoint
from conversion.convert import Settings, check_folders, run_plan
from conversion.errors import ConversionError
from conversion.layout import LAYOUTS, Stamp
from conversion.plan import make_plan

DTYPES = {"bfloat16": "BF16", "bf16": "BF16", "float16": "F16", "fp16": "F16", "float32": "F32", "fp32": "F32"}
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def byte_size(text: str) -> int:
    """'5GB', '512MB', '1.5GiB' or plain bytes as a number of bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]I?B)?", text.strip().upper())
    if match is None or match[2] not in (None, *_UNITS) or float(match[1]) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size above zero; write it as 5GB, 512MB or 1.5GiB")
    return int(float(match[1]) * _UNITS[match[2] or ""])


def positive(text: str) -> int:
    """A whole number above zero."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above zero")
    return int(text)


def build_parser(doc: str, targets: tuple[str, ...], default: str) -> argparse.ArgumentParser:
    """The options of hf_to_veomni.py and veomni_to_hf.py, which differ in their targets."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", help="folder of the checkpoint")
    parser.add_argument("output", type=Path, help="folder to write; apart from the input")
    parser.add_argument("--target", choices=targets, default=default, help=f"layout to write (default {default})")
    if "ep-sharded" in targets:
        parser.add_argument("--ep-size", type=positive, help="expert ranks of an ep-sharded output")
    parser.add_argument("--source-layout", choices=LAYOUTS, help="the input's layout, where nothing tells it")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="cast every weight (default: as stored)")
    parser.add_argument("--max-shard-size", type=byte_size, default=byte_size("5GB"), help="default 5GB")
    parser.add_argument("--workers", type=positive, default=os.cpu_count(), help="threads (default: the cores)")
    parser.add_argument("--keep-unknown", action="store_true", help="copy tensors that are not the model's")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    parser.add_argument("--quiet", action="store_true", help="print errors only")
    return parser


def convert(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Run a conversion as the parsed `args` say."""
    ep_size = vars(args).get("ep_size")
    if (args.target == "ep-sharded") != (ep_size is not None):
        parser.error("--target ep-sharded and --ep-size N belong together")
    started = time.monotonic()
    check_folders(Path(args.input), args.output, args.overwrite)
    source = open_checkpoint(Path(args.input), args.source_layout)
    target = Stamp(args.target, ep_size or 1)
    plan = make_plan(source, target, DTYPES.get(args.dtype), args.max_shard_size, args.keep_unknown)
    options = {"target": args.target, "ep_size": ep_size, "dtype": args.dtype, "max_shard_size": args.max_shard_size}
    run_plan(plan, args.output, Settings(workers=args.workers), options)
    if not args.quiet:
        seconds = time.monotonic() - started
        print(
            f"{source.layout.layout} -> {target.layout}: {plan.data_bytes / 1e9:.2f} GB in {len(plan.files)} file(s), "
            f"{seconds:.1f} s, {plan.data_bytes / 1e9 / seconds:.2f} GB/s: {args.output}"
        )


def run(doc: str, targets: tuple[str, ...], default: str, argv: list[str] | None = None) -> int:
    """The whole of a converter's main: parse, convert, print what failed; returns the exit code."""
    parser = build_parser(doc, targets, default)
    args = parser.parse_args(argv)
    try:
        convert(args, parser)
    except ConversionError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0
