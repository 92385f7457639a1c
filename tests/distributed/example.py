"""torchrun --nproc-per-node 4 tests/distributed/example.py CHECKPOINT

The few lines that a training program needs, as its own process group: started by torchrun, one step, on the CPU
or on the device that `device.py` reads.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # from a checkout, installed or not

from modeling.data.collator import SequenceParallelCollator
from modeling.distributed.checkpoint import load_checkpoint
from modeling.distributed.parallel_state import init_parallel_state
from modeling.distributed.parallelize import clip_grad_norm_, parallelize_model
from modeling.qwen3_vl_moe import Qwen3VLMoeConfig, Qwen3VLMoeForCausalLM
from tests.distributed.device import DEVICE, to_device
from tests.distributed.ranks import features_of, summed


def main(path: str) -> None:
    ps = init_parallel_state(dp_shard_size=2, sp_size=2, ep_size=4, device_type=DEVICE)
    with torch.device("meta"):
        model = Qwen3VLMoeForCausalLM(Qwen3VLMoeConfig.from_pretrained(path))
    model = parallelize_model(model)
    load_checkpoint(model, path, dtype=torch.bfloat16)
    features = features_of("mixed")[ps.dp_rank * 4 : ps.dp_rank * 4 + 4]
    batch = SequenceParallelCollator(ps.sp_size, ps.sp_rank, model.get_metadata_collate_func())(features)
    loss = model(**to_device(batch, ps.device_type)).loss
    loss.backward()
    norm = clip_grad_norm_(model, 1.0)
    total = summed(loss)
    if ps.rank == 0:
        print(f"loss {total:.4f} norm {norm.item():.4f}")


if __name__ == "__main__":
    main(sys.argv[1])
