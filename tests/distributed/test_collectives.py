"""What one step sends: counted and weighed against the design, in one order on all ranks, whatever their data."""

from collections import Counter
from math import ceil, prod

import pytest
import torch

from modeling.data.collator import SequenceParallelCollator
from modeling.distributed.parallel_state import use_parallel_state
from modeling.distributed.sequence_parallel import padded_length
from tests.distributed.ranks import Mesh, Options, batch_of, build, features_of, make_parallel, single_process_model
from tests.distributed.recorder import Collective, CollectiveRecorder, HostReadRecorder
from tests.distributed.toy import TEXT, VISION

MESH = Mesh(
    2, sp=2, ep=2
)  # four ranks; parameters over all, experts over pairs, each expert's rows over the other pairs
BYTES = 4
MOE_LAYERS = TEXT["num_hidden_layers"] - len(TEXT["mlp_only_layers"])


def record(mesh: Mesh, kind: str, options: Options) -> list[Collective]:
    """The collectives of a second step; the first may set things up."""
    model, state = make_parallel(mesh, options)
    with use_parallel_state(state):
        for _ in range(2):
            batch = batch_of(kind, state)
            with CollectiveRecorder(state) as recorder:
                model(**batch, output_router_logits=options.balancing).loss.backward()
            model.zero_grad()
    return recorder.calls


def shard_bytes(unit: str, ranks: int) -> int:
    """One rank's part of the parameters of a unit: names below `unit` that no inner unit takes, rows rounded up."""
    inner = ("layers.", "blocks.", "merger", "deepstack_merger_list", "embed_tokens", "mlp.experts")
    total = 0
    for name, value in build().state_dict().items():
        below = name.removeprefix(f"{unit}.") if unit else name.removeprefix("model.").removeprefix("language_model.")
        own = name.startswith(f"{unit}.") if unit else not name.startswith("model.visual.")
        if own and not any(below.startswith(word) or f".{word}" in f".{below}" for word in inner):
            total += ceil(value.shape[0] / ranks) * prod(value.shape[1:]) * BYTES
    return total


def expected_parameter_traffic(ranks: int) -> tuple[Counter, Counter]:
    """(all-gather, reduce-scatter) of parameters over the fsdp group: bytes a rank sends -> number of calls.

    Gathered once in forward and once in backward; the root, which keeps what it has, in forward only. The vision tower
    runs twice, for images and for videos, and its gradients are reduced when both are done. Its own parameters wait for
    the end of backward, because its input has no gradient, so they are gathered once there.
    """
    layers = [f"model.language_model.layers.{i}" for i in range(TEXT["num_hidden_layers"])]
    vision = [f"model.visual.blocks.{i}" for i in range(VISION["depth"])] + ["model.visual.merger"]
    vision += [f"model.visual.deepstack_merger_list.{i}" for i in range(len(VISION["deepstack_visual_indexes"]))]
    times = {"": 1, "model.language_model.embed_tokens": 2, "model.visual": 3}
    times |= dict.fromkeys(layers, 2) | dict.fromkeys(vision, 4)
    gathers, reductions = Counter(), Counter()
    for unit, count in times.items():
        gathers[shard_bytes(unit, ranks)] += count
        reductions[shard_bytes(unit, ranks) * ranks] += 1
    return gathers, reductions


def test_one_step_sends_what_the_design_names(pools):
    calls = pools(4).run(record, MESH, "mixed", Options())[0]
    by_kind: dict[tuple[str, str], Counter] = {}
    for call in calls:
        by_kind.setdefault((call.kind, call.group), Counter())[call.sent] += 1

    gathers, reductions = expected_parameter_traffic(MESH.world)
    assert by_kind.pop(("all-gather", "fsdp")) == gathers
    assert by_kind.pop(("reduce-scatter", "fsdp")) == reductions
    experts, hidden, width = TEXT["num_experts"], TEXT["hidden_size"], TEXT["moe_intermediate_size"]
    own_experts = 3 * width * hidden * experts // MESH.ep * BYTES  # gate, up and down, all rows
    assert by_kind.pop(("all-gather", "ep_fsdp")) == {own_experts // 2: 2 * MOE_LAYERS}
    assert by_kind.pop(("reduce-scatter", "ep_fsdp")) == {own_experts: MOE_LAYERS}
    # The number of valid labels, one int64.
    assert by_kind.pop(("all-reduce", "fsdp")) == {8: 1}

    features = features_of("mixed")[:4]  # data rank 0
    tokens = padded_length(sum(len(f["input_ids"]) for f in features), MESH.sp) // MESH.sp  # s
    exchange: Counter = Counter()
    for key in ("pixel_values", "pixel_values_videos"):
        patches = sum(f[key].shape[0] for f in features if key in f)
        patches = padded_length(patches, 4 * MESH.sp) // MESH.sp  # p
        row = patches * VISION["hidden_size"] * BYTES
        exchange[3 * row] += 2 * VISION["depth"]  # query, key and value there, and their gradients back
        exchange[row] += 2 * VISION["depth"]
        exchange[patches // 4 * hidden * BYTES] += 2  # features for the fill-back
        deepstack = len(VISION["deepstack_visual_indexes"]) * patches // 4 * hidden * BYTES
        assert by_kind[("all-gather", "sp")][deepstack] == 1
        assert by_kind[("reduce-scatter", "sp")][deepstack * MESH.sp] == 1
    assert by_kind.pop(("all-gather", "sp")).total() == by_kind.pop(("reduce-scatter", "sp")).total() == 2
    exchange[tokens * hidden * BYTES] += 4  # the embeddings, before and after the fill-back
    heads, key_heads = TEXT["num_attention_heads"], TEXT["num_key_value_heads"]
    exchange[tokens * (heads + 2 * key_heads) * TEXT["head_dim"] * BYTES] += 2 * TEXT["num_hidden_layers"]
    exchange[tokens * heads * TEXT["head_dim"] * BYTES] += 2 * TEXT["num_hidden_layers"]
    assert by_kind.pop(("all-to-all", "sp")) == exchange

    routed = by_kind.pop(("all-to-all", "ep"))
    rows = tokens * TEXT["num_experts_per_tok"]
    assert routed[experts * BYTES] == MOE_LAYERS  # counts, int32, in forward only
    assert routed[rows * hidden * BYTES] == 2 * MOE_LAYERS  # rows to their experts, and the gradients of what came back
    assert routed[rows * BYTES] == MOE_LAYERS  # routing weights to the experts in backward
    assert routed.total() == 7 * MOE_LAYERS  # with what comes back: forward, rows' gradients, weights' gradients
    assert not by_kind, f"collectives that the design does not name: {by_kind}"


@pytest.mark.parametrize(
    ("mesh", "options"),
    [
        (MESH, Options()),
        (Mesh(4, ep=4), Options(balancing=True)),
        (Mesh(2, replicate=2, ep=2), Options(parallelize={"recompute": "full"})),
        (Mesh(2, sp=2, ep=4), Options(encoder_balance=True)),
        (Mesh(4), Options(frozen="visual")),
    ],
    ids=["plain", "balancing loss", "recompute", "encoder balancer", "frozen vision"],
)
def test_every_rank_in_one_order_whatever_its_data(pools, mesh: Mesh, options: Options):
    """Text only, images on one rank, everything everywhere: the same collectives, on every rank."""
    orders = set()
    for kind in ("text", "images on one rank", "mixed"):
        for calls in pools(4).run(record, mesh, kind, options):
            orders.add(tuple((call.kind, call.group) for call in calls))
    assert len(orders) == 1


# Functions that work on host data by construction, or that run on CPUs only.
HOST_CODE = {
    "vision_metadata": "grids of a dummy image, CPU tensors",
    "get_metadata": "the same",
    "_equal_runs": "attention without a variable-length kernel: CPU",
    "_segments": "grouped matrix product without a kernel: CPU",
    "route_by_expert": "checks its input on CPUs",
    "check_packing": "likewise, boundaries that lie there",
    "_check": "likewise, of the loss",
    "_check_num_valid": "likewise, of the loss",
}


def host_reads(mesh: Mesh, kind: str, options: Options) -> dict[tuple[str, str], int]:
    model, state = make_parallel(mesh, options)
    if kind == "bare text":
        collate = SequenceParallelCollator(
            state.sp_size, state.sp_rank, single_process_model().get_metadata_collate_func()
        )
        batch = collate([{key: f[key] for key in ("input_ids", "labels")} for f in features_of("text")])
    else:
        batch = batch_of(kind, state)
    with use_parallel_state(state), HostReadRecorder(set(HOST_CODE)) as recorder:
        loss = model(**batch, output_router_logits=options.balancing).loss
        forward = dict(recorder.reads)
        loss.backward()
    assert dict(recorder.reads) == forward, "backward reads values on the host"
    return forward


@pytest.mark.parametrize("kind", ["mixed", "bare text", "padded"])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_the_host_waits_once_per_expert_exchange(pools, kind: str, recompute: str):
    """Forward and backward, recomputation included, read no value but the sizes of each MoE layer's exchange."""
    options = Options(balancing=True, parallelize={"recompute": recompute})
    for reads in pools(4).run(host_reads, MESH, kind, options):
        assert reads == {("tolist", "plan_exchange"): MOE_LAYERS}
    for reads in pools(4).run(host_reads, Mesh(2, sp=2), kind, options):
        assert reads == {}


def test_the_recorder_sees_what_it_should():
    x = torch.arange(4)
    with HostReadRecorder(set()) as recorder:
        x[x > 1]
        x.sum().item()
        x.tolist()
        x.nonzero()
        x.cpu()
        bool(x[0] > 1)
        x.to("cpu")
    names = Counter()
    for (name, _), count in recorder.reads.items():
        names[name] += count
    assert set(names) == {"__getitem__", "item", "tolist", "nonzero", "cpu", "__bool__", "to"}
