"""What the two converter command lines share: options, the run itself, exit codes."""

import argparse
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from conversion.budget import make_budget
from conversion.checkpoint import open_checkpoint
from conversion.companions import find_companions
from conversion.convert import Settings, check_folders, measure_disk, run_plan
from conversion.errors import ConversionError, UsageError
from conversion.hub import resolve_input
from conversion.layout import LAYOUTS, Stamp
from conversion.manifest import dump
from conversion.plan import make_plan
from conversion.report import describe_plan, findings_lines, summary, summary_line
from conversion.transpose import choose_kernel

DTYPES = {"bfloat16": "BF16", "bf16": "BF16", "float16": "F16", "fp16": "F16", "float32": "F32", "fp32": "F32"}
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def byte_size(text: str) -> int:
    """'5GB', '512MB', '1.5GiB' or plain bytes as a number of bytes."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?)\s*([KMGT]I?B)?", text.strip().upper())
    if match is None or match[2] not in (None, *_UNITS) or float(match[1]) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size above zero; write it as 5GB, 512MB or 1.5GiB")
    return max(1, int(float(match[1]) * _UNITS[match[2] or ""]))


def positive(text: str) -> int:
    """A whole number above zero."""
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above zero")
    return int(text)


def build_parser(doc: str, targets: tuple[str, ...], default: str) -> argparse.ArgumentParser:
    """The options of hf_to_veomni.py and veomni_to_hf.py, which differ in their targets."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("input", help="folder of the checkpoint, or its id on the Hugging Face Hub")
    add("output", type=Path, help="folder to write, apart from the input")
    add("--target", choices=targets, default=default, help=f"layout to write (default {default})")
    if "ep-sharded" in targets:
        add("--ep-size", type=positive, metavar="N", help="expert ranks of an ep-sharded output")
    add("--source-layout", choices=LAYOUTS, help="the input's layout, where nothing tells it")
    add("--revision", help="of a Hub id: branch, tag or commit")
    add("--dtype", choices=tuple(DTYPES), help="cast every weight (default: as stored)")
    add("--allow-overflow", action="store_true", help="accept values that become infinite by the cast")
    add("--max-shard-size", type=byte_size, default=byte_size("5GB"), metavar="SIZE", help="bytes per file (5GB)")
    add("--max-ram", type=byte_size, default=byte_size("4GB"), metavar="SIZE", help="bound on resident memory (4GB)")
    add("--workers", type=positive, default=os.cpu_count(), metavar="N", help="threads (default: the cores)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where to transpose (default cpu)")
    add("--keep-unknown", action="store_true", help="copy tensors that are not the model's")
    add("--dry-run", action="store_true", help="print what would be read and written, and stop")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="go on with an unfinished output")
    existing.add_argument("--overwrite", action="store_true", help="replace an existing output")
    add("--quiet", action="store_true", help="print errors and notes on bad values only")
    add("--json", metavar="FILE", help="write a summary as JSON; - for the standard output")
    return parser


def check_summary_file(file: str | None) -> None:
    """Raise UsageError for a --json that could not be written when hours of work are done."""
    if file in (None, "-"):
        return
    path = Path(file)
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UsageError(f"--json {path} cannot be written; name a file in a folder that exists and is yours to write")


def convert(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Run a conversion as the parsed `args` say."""
    ep_size = vars(args).get("ep_size")
    if (args.target == "ep-sharded") != (ep_size is not None):
        parser.error("--target ep-sharded and --ep-size N belong together")
    check_summary_file(args.json)
    started = time.monotonic()
    log = (lambda message: None) if args.quiet else (lambda message: print(message, file=sys.stderr))
    settings = Settings(args.workers, args.resume, args.overwrite, args.allow_overflow, args.quiet, log)
    folder, origin = resolve_input(args.input, args.revision)
    if not args.dry_run:
        check_folders(folder, args.output, settings)
    source = open_checkpoint(folder, args.source_layout)
    companions = find_companions(folder)
    target = Stamp(args.target, ep_size or 1)
    plan = make_plan(source, target, DTYPES.get(args.dtype), args.max_shard_size, args.keep_unknown)
    kernel = choose_kernel(plan.transposed_bytes, args.device)
    budget = make_budget(plan, args.max_ram, args.workers)
    disk = measure_disk(plan, companions, args.output)
    if args.dry_run:
        print(describe_plan(plan, companions, budget, kernel, disk, args.workers))
        disk.check()
        return
    disk.check()
    for name in companions.left_out:
        log(f"left out: {name}")
    options = {
        "target": args.target,
        "ep_size": ep_size,
        "source_layout": args.source_layout,
        "dtype": DTYPES.get(args.dtype),
        "max_shard_size": args.max_shard_size,
        "keep_unknown": args.keep_unknown,
        "allow_overflow": args.allow_overflow,
    }
    outcome = run_plan(plan, companions, args.output, budget, kernel, settings, origin, options)
    for line in findings_lines(outcome.records):
        print(f"note: {line}", file=sys.stderr)
    content = summary(plan, outcome, time.monotonic() - started, str(args.output))
    if args.json == "-":
        print(dump(content).decode(), end="")
    elif not args.quiet:
        print(summary_line(content))
    if args.json not in (None, "-"):
        Path(args.json).write_bytes(dump(content))


class Stopped(KeyboardInterrupt):
    """SIGINT or SIGTERM came."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.signal = signal.Signals(number)


def _stop(number: int, frame: FrameType | None) -> None:
    raise Stopped(number)


def run(doc: str, targets: tuple[str, ...], default: str, argv: list[str] | None = None) -> int:
    """The whole of a converter's main: parse, convert, print what failed; returns the exit code."""
    parser = build_parser(doc, targets, default)
    args = parser.parse_args(argv)
    return run_command(lambda: convert(args, parser), "; the same command with --resume goes on")


def run_command(command: Callable[[], None], when_stopped: str = "") -> int:
    """Run `command`; print what failed or stopped it; return the exit code."""
    before = {number: signal.signal(number, _stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        command()
    except ConversionError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}" if error.filename else f"error: {error}", file=sys.stderr)
        return 1
    except Stopped as stopped:
        print(f"error: stopped by {stopped.signal.name}{when_stopped}", file=sys.stderr)
        return 128 + stopped.signal
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0
