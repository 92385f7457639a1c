"""[QWEN3_VL_MOE_TEST_DEVICE=cuda] python -m tests.distributed.report [--world 2 4 8]

The table of the README: for every mesh the worst error over all kinds of batch, against upstream in one process, fp32.
The same cells as `test_matrix.py` on the same device (`device.py`), printed instead of judged.
"""

import argparse
import sys
import time

import torch

from tests.distributed.device import DEVICE, missing_devices
from tests.distributed.oracle import reference
from tests.distributed.pool import Pool
from tests.distributed.ranks import gradients_of
from tests.distributed.test_matrix import MESHES, gradient_errors
from tests.distributed.toy import NAMES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=int, nargs="+", default=[2, 4, 8], help="numbers of ranks")
    worlds = parser.parse_args().world
    torch.set_num_threads(1)
    print(f"{len(NAMES)} kinds of batch: {', '.join(NAMES)}\n")
    print("| ranks | dp_shard | dp_replicate | sp | ep | loss | worst parameter's gradient | clipping norm |")
    print("|---|---|---|---|---|---|---|---|")
    started, cells = time.monotonic(), 0
    for world in worlds:
        lacking = missing_devices(world, DEVICE)
        if lacking is not None:
            print(f"not run: {world} ranks: {lacking}", file=sys.stderr)
            continue
        pool = Pool(world, device=DEVICE)
        for mesh in (mesh for mesh in MESHES if mesh.world == world):
            loss, gradient, norm = 0.0, 0.0, 0.0
            for kind in NAMES:
                result, expected = pool.run(gradients_of, mesh, kind)[0], reference(kind)
                loss = max(loss, abs(result["loss"] / expected.loss - 1))
                gradient = max(gradient, *gradient_errors(result, expected).values())
                norm = max(norm, abs(result["norm"] / expected.norm - 1))
                cells += 1
                print(f"\r{cells} cells, {time.monotonic() - started:.0f} s", end="", file=sys.stderr)
            print("\r", end="", file=sys.stderr)
            sizes = f"{world} | {mesh.shard} | {mesh.replicate} | {mesh.sp} | {mesh.ep}"
            print(f"| {sizes} | {loss:.1e} | {gradient:.1e} | {norm:.1e} |", flush=True)
        pool.close()


if __name__ == "__main__":
    main()
