"""The trainer's parts by hand: options, learning rates, floating-point operations, router statistics."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

from modeling.qwen3_vl_moe import Qwen3VLMoeForCausalLM
from modeling.training.flops import FlopCounter
from modeling.training.metrics import drop_later_lines
from modeling.training.optimizer import Schedule, freeze_parts, make_optimizer, part_of
from modeling.training.options import TrainOptions, parse_options
from modeling.training.routing import RouterMeter
from tests.distributed.toy import toy_config
from tests.features import pack
from tests.training.runs import options_of

NEEDED = ["--model", "m", "--out", "o", "--data", "d"]


def toy_options(**changes: Any) -> TrainOptions:
    return options_of(Path("m"), Path("d"), Path("o"), **changes)


# Options


def test_the_command_line_wins_over_the_file_over_the_defaults(tmp_path: Path):
    file = tmp_path / "run.yaml"
    file.write_text("lr: 1e-3\nmax-steps: 7\nshuffle: false\nfreeze: [vit, merger]\ndata: [a.jsonl, b.jsonl]\n")
    options = parse_options(["--config", str(file), "--model", "m", "--out", "o", "--max-steps", "9"], None)
    assert (options.lr, options.max_steps, options.shuffle) == (1e-3, 9, False)
    assert (options.freeze, options.data) == (["vit", "merger"], ["a.jsonl", "b.jsonl"])
    assert options.clip == TrainOptions(model="m", out="o", data=["d"]).clip


def test_json_is_a_config_file_too_and_what_a_run_writes_reads_back(tmp_path: Path):
    file = tmp_path / "run.json"
    file.write_text('{"model": "m", "out": "o", "data": ["d"], "lr": 3e-5, "lora": "attention"}')
    options = parse_options(["--config", str(file)], None)
    assert options.lr == 3e-5 and options.lora == "attention"
    again = tmp_path / "config.yaml"
    again.write_text(options.to_yaml())
    assert parse_options(["--config", str(again)], None) == options
    assert yaml.safe_load(options.to_yaml()) == dataclasses.asdict(options)


@pytest.mark.parametrize(
    ("arguments", "file", "expected"),
    [
        (["--out", "o", "--data", "d"], "", "--model is missing"),
        (["--model", "m", "--out", "o"], "", "--data is missing"),
        ([*NEEDED, "--accumulation", "0"], "", "accumulation=0; it is at least 1"),
        ([*NEEDED, "--clip", "-1"], "", "clip=-1.0; it is at least 0"),
        ([*NEEDED, "--lr", "-1"], "", "lr=-1.0; it is at least 0"),
        ([*NEEDED, "--beta1", "1.5"], "", "beta1=1.5; it is between 0 and 1"),
        ([*NEEDED, "--moe-backend", "foo"], "", "invalid choice: 'foo'"),
        (NEEDED, "lr: abc", "lr is a number, got 'abc'"),
        (NEEDED, "seed: true", "seed is a int, got True"),
        (NEEDED, "lr: [1", "is not YAML"),
        ([*NEEDED, "--loss-chunk-size", "-1"], "", "loss_chunk_size=-1; it is at least 0"),
        ([*NEEDED, "--keep-qkv-blocks", "-1"], "", "keep_qkv_blocks=-1; it is at least 0"),
        ([*NEEDED, "--max-length", "9000"], "", "max_length=9000 exceeds pack_tokens=8192"),
        ([*NEEDED, "--freeze", "vit", "merger", "lm"], "", "every part is frozen"),
        ([*NEEDED, "--freeze", "vit", "--lora", "attention"], "", "leave out freeze"),
        ([*NEEDED, "--freeze", "tower"], "", "invalid choice: 'tower'"),
        (NEEDED, "learning_rate: 1", "unknown option 'learning_rate'"),
        (NEEDED, "max_steps: many", "max_steps is a int, got 'many'"),
        (NEEDED, "schedule: linear", "schedule='linear'; choose among 'cosine', 'constant'"),
        (NEEDED, "- x", "must hold option: value lines"),
    ],
)
def test_wrong_options_are_usage_errors(
    arguments: list[str], file: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    if file:
        (tmp_path / "run.yaml").write_text(file)
        arguments = ["--config", str(tmp_path / "run.yaml"), *arguments]
    with pytest.raises(SystemExit) as stopped:
        parse_options(arguments, None)
    assert stopped.value.code == 2
    assert expected in capsys.readouterr().err


# Optimizer


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0, {0: 1.0, 50: 1.0, 99: 1.0}),
        ("constant", 4, {0: 0.25, 1: 0.5, 3: 1.0, 4: 1.0, 99: 1.0}),
        ("cosine", 0, {0: 1.0, 50: 0.55, 100: 0.1, 200: 0.1}),
        ("cosine", 20, {9: 0.5, 19: 1.0, 20: 1.0, 60: 0.55, 100: 0.1}),
    ],
)
def test_schedules_by_hand(schedule: str, warmup: int, expected: dict[int, float]):
    options = toy_options(schedule=schedule, warmup_steps=warmup, max_steps=100, min_lr_ratio=0.1)
    optimizer = torch.optim.AdamW([{"params": [torch.zeros(1)], "lr": 2.0}, {"params": [torch.zeros(2)], "lr": 3.0}])
    rates = Schedule(optimizer, options)
    for step, factor in expected.items():
        rates.set(step)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([2 * factor, 3 * factor])


def test_each_part_has_its_rate_and_only_matrices_decay():
    model = Qwen3VLMoeForCausalLM(toy_config())
    assert part_of("model.visual.blocks.0.attn.qkv.weight") == "vit"
    assert part_of("model.visual.deepstack_merger_list.1.norm.bias") == "merger"
    assert part_of("model.visual.merger.linear_fc1.weight") == "merger"
    assert part_of("model.language_model.layers.0.mlp.gate.weight") == part_of("lm_head.weight") == "lm"
    freeze_parts(model, ["merger"])
    options = toy_options(lr=1.0, lr_vit=0.0, lr_lm=0.5, weight_decay=0.1)
    optimizer = make_optimizer(model, options, "cpu")
    names = {id(p): name for name, p in model.named_parameters()}
    seen = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            seen[names[id(parameter)]] = (group["lr"], group["weight_decay"])
    for name, parameter in model.named_parameters():
        decay = 0.1 if parameter.ndim > 1 else 0.0
        expected = {"vit": (0.0, decay), "lm": (0.5, decay), "merger": None}[part_of(name)]
        assert seen.get(name) == expected, name
    freeze_parts(model, ["vit", "lm"])
    with pytest.raises(ValueError, match="no parameter is left to train"):
        make_optimizer(model, options, "cpu")


# FLOPs


def feature(length: int, grid: tuple[int, int, int]) -> dict[str, torch.Tensor]:
    tokens = grid[0] * grid[1] * grid[2] // 4
    ids = torch.arange(length) + 1
    mask = torch.zeros(length, dtype=torch.bool)
    mask[1 : 1 + tokens] = True
    return {
        "input_ids": ids.masked_fill(mask, 0),
        "labels": ids.clone(),
        "image_mask": mask,
        "pixel_values": torch.randn(4 * tokens, 3 * 2 * 4 * 4),
        "image_grid_thw": torch.tensor([grid]),
    }


def test_operations_are_those_that_torch_counts():
    """Every matrix product of a forward, counted by torch as it runs, sequence by sequence and frame by frame. Torch
    sees whole attention matrices where the causal half is needed. Three experts, all chosen: the reference loop pads an
    expert's rows where they are few."""
    model = Qwen3VLMoeForCausalLM(toy_config(moe_implementation="eager", num_experts=3)).eval()
    model.set_attn_implementation("eager")
    features = [feature(30, (1, 4, 8)), feature(21, (1, 6, 4))]
    batch = pack(features, model)
    batch.pop("labels")
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(**batch)
    ours = FlopCounter(model.config)
    text = model.config.text_config
    lengths, grids = [30, 21], [(1, 4, 8), (1, 6, 4)]
    causal_half = 2 * sum(length**2 for length in lengths) * text.num_attention_heads * text.head_dim
    tower, mergers = ours.encoder(grids)
    forward = ours.language(lengths, predictions=sum(lengths)) + text.num_hidden_layers * causal_half + tower + mergers
    assert counter.get_total_flops() == forward


def test_frozen_parts_count_less():
    config = toy_config()
    model = Qwen3VLMoeForCausalLM(config)
    batch = pack([feature(30, (1, 4, 8))], model, pad_to_length=64)
    tower, mergers = FlopCounter(config).encoder([(1, 4, 8)])
    language = FlopCounter(config).language([30], 10)
    assert FlopCounter(config).count(batch, 10) == 3 * (tower + mergers + language)
    assert FlopCounter(config, vit=False).count(batch, 10) == tower + 3 * (mergers + language)
    assert FlopCounter(config, vit=False, merger=False, lora=True).count(batch, 10) == tower + mergers + 2 * language


# Router


def test_router_statistics_by_hand():
    """Two layers, four experts, top-2: layer 0 sends all to experts 0 and 1, layer 1 is even; padding is left out."""
    sure = torch.tensor([[9.0, 8.0, -50.0, -50.0]]).repeat(6, 1)
    even = torch.zeros(6, 4)
    even[torch.arange(6), torch.arange(6) % 4] = 1e-6
    even[torch.arange(6), (torch.arange(6) + 1) % 4] = 5e-7
    meter = RouterMeter(num_experts=4, top_k=2)
    meter.add((sure, even), real_tokens=4)
    meter.add((sure, even), real_tokens=0)
    statistics = meter.read(None)
    assert statistics.load.tolist() == [[0.5, 0.5, 0, 0], [0.25] * 4]
    assert statistics.max_violation == pytest.approx([1.0, 0.0])
    p = 1 / (1 + math.exp(-1))
    assert statistics.entropy == pytest.approx([-p * math.log(p) - (1 - p) * math.log(1 - p), math.log(4)], abs=1e-5)


def test_lines_behind_the_checkpoint_are_dropped(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    drop_later_lines(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    drop_later_lines(tmp_path / "none", 2)
