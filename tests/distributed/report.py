"""[QWEN3_VL_MOE_TEST_DEVICE=cuda] python -m tests.distributed.report [--world 2 4 8] [--bf16]

The table of the README: for every mesh the worst error over all kinds of batch, against upstream in one process, fp32.
The same cells as `test_matrix.py` on the same device (`device.py`), printed instead of judged.
--bf16 prints those of `test_bf16_matrix.py` instead: the errors of bf16, and relative to those of one rank.
"""

import argparse
import sys
import time
from functools import partial

import torch

from tests.distributed.device import DEVICE, missing_devices
from tests.distributed.oracle import reference
from tests.distributed.pool import Pool
from tests.distributed.ranks import Mesh, gradients_of
from tests.distributed.test_bf16_matrix import bf16_error
from tests.distributed.test_matrix import MESHES, gradient_errors
from tests.distributed.toy import NAMES


def fp32_cell(pool: Pool, mesh: Mesh, kind: str) -> tuple[float, float, float]:
    """Errors of the loss, of the worst parameter's gradient, and of the clipping norm."""
    result, expected = pool.run(gradients_of, mesh, kind)[0], reference(kind)
    loss, norm = abs(result["loss"] / expected.loss - 1), abs(result["norm"] / expected.norm - 1)
    return loss, max(gradient_errors(result, expected).values()), norm


def bf16_cell(pool: Pool, mesh: Mesh, kind: str, alone: dict[str, float]) -> tuple[float, float, float]:
    """The error of all gradients, one rank's, and their ratio."""
    error = bf16_error(pool, mesh, kind)
    return error, alone[kind], error / alone[kind]


def one_rank() -> dict[str, float]:
    """The error of each kind on one rank of the device."""
    pool = Pool(1, device=DEVICE)
    errors = {kind: bf16_error(pool, Mesh(), kind) for kind in NAMES}
    pool.close()
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=int, nargs="+", default=[2, 4, 8], help="numbers of ranks")
    parser.add_argument("--bf16", action="store_true", help="bf16 against one rank, in place of fp32")
    arguments = parser.parse_args()
    worlds = [world for world in arguments.world if missing_devices(world, DEVICE) is None]
    for world in set(arguments.world) - set(worlds):
        print(f"not run: {world} ranks: {missing_devices(world, DEVICE)}", file=sys.stderr)
    if not worlds:
        sys.exit(1)
    torch.set_num_threads(1)
    print(f"{len(NAMES)} kinds of batch on {DEVICE}: {', '.join(NAMES)}\n")
    columns, style, measure = ("loss", "worst parameter's gradient", "clipping norm"), ".1e", fp32_cell
    if arguments.bf16:
        columns, style = ("all gradients, bf16", "one rank's", "ratio"), ".4f"
        measure = partial(bf16_cell, alone=one_rank())
    print(f"| ranks | dp_shard | dp_replicate | sp | ep | {' | '.join(columns)} |")
    print("|---|---|---|---|---|---|---|---|")
    started, cells = time.monotonic(), 0
    for world in worlds:
        pool = Pool(world, device=DEVICE)
        for mesh in (mesh for mesh in MESHES if mesh.world == world):
            worst = (0.0, 0.0, 0.0)
            for kind in NAMES:
                worst = tuple(map(max, worst, measure(pool, mesh, kind)))
                cells += 1
                print(f"\r{cells} cells, {time.monotonic() - started:.0f} s", end="", file=sys.stderr)
            print("\r", end="", file=sys.stderr)
            sizes = f"{world} | {mesh.shard} | {mesh.replicate} | {mesh.sp} | {mesh.ep}"
            print(f"| {sizes} | {' | '.join(format(value, style) for value in worst)} |", flush=True)
        pool.close()


if __name__ == "__main__":
    main()
