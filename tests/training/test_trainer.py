"""The trainer in one process: stops and resumes, exact means, what it refuses, what it leaves behind."""

import json
import math
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemWriter

from modeling.data.collator import IGNORE_INDEX, SequenceParallelCollator
from modeling.data.streaming import Pack
from modeling.distributed.parallel_state import set_parallel_state
from modeling.qwen3_vl_moe import Qwen3VLMoeConfig
from modeling.training.checkpoints import Checkpoints
from modeling.training.metrics import MetricsWriter
from modeling.training.optimizer import make_optimizer
from modeling.training.options import TrainOptions
from modeling.training.plots import read_lines
from modeling.training.trainer import NonFiniteLoss, StepPlan, Trainer, stop_signal
from scripts import train as script
from scripts.make_tiny_checkpoint import make_tiny_checkpoint
from tests.training.runs import arguments_of, at_step, curve, options_of, read_json, run

STEPS = 7


@pytest.fixture(scope="module")
def undisturbed(tiny_hub: Path, chats: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of STEPS steps with everything on that a run leaves behind."""
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    options = options_of(
        tiny_hub, chats, out, max_steps=STEPS, save_every=3, tensorboard=True, plots=True, export=True, keep=2
    )
    assert run(options) == 0
    return out


def test_what_a_run_leaves(undisturbed: Path, tiny_hub: Path):
    lines = read_lines(undisturbed / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert all(line["tokens_per_second"] > 0 and line["tflops"] > 0 and line["mfu"] is None for line in lines)
    router = read_lines(undisturbed / "router.jsonl")
    assert [line["step"] for line in router] == [3, 6] and router[0]["layers"] == [0, 1, 2, 4]
    for loads, violations, entropies in zip(
        router[0]["load"], router[0]["max_violation"], router[0]["entropy"], strict=True
    ):
        assert math.isclose(sum(loads), 1, abs_tol=1e-4)
        assert math.isclose(violations, 16 * max(loads) - 1, abs_tol=1e-3)
        assert 0 < entropies <= math.log(16)
    names = {path.name for path in undisturbed.iterdir()}
    assert {"config.yaml", "loss.png", "experts.png", "throughput.png", "tensorboard", f"export-{STEPS}"} <= names
    assert sorted(path.name for path in (undisturbed / "checkpoints").iterdir()) == ["step-00000006", "step-00000007"]


def test_tensorboard_has_the_same(undisturbed: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(undisturbed / "tensorboard"), size_guidance={"histograms": 0}).Reload()
    lines = read_lines(undisturbed / "metrics.jsonl")
    for name in ("loss", "tokens_per_second", "tflops", "memory_gb", "lr", "padding"):
        seen = [(event.step, event.value) for event in events.Scalars(f"train/{name}")]
        assert seen == [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in lines], name
    router = read_lines(undisturbed / "router.jsonl")
    assert [event.value for event in events.Scalars("router/entropy/4")] == pytest.approx(
        [line["entropy"][3] for line in router], rel=1e-6
    )
    assert [event.step for event in events.Histograms("router/load/0")] == [3, 6]


# Whatever changes no result: the same curve but for rounding. The last computes in bfloat16.
SAME = {
    "fused optimizer, selective recomputation": ({"optimizer": "fused", "recompute": "selective"}, 1e-5),
    "spawned workers, balanced encoder": ({"workers": 2, "prefetch": 3, "balance_encoder": True}, 1e-5),
    "parameters kept gathered, full recomputation": ({"reshard_after_forward": False, "recompute": "full"}, 1e-5),
    "mixed precision": ({"compute_dtype": "bfloat16"}, 2e-2),
}


@pytest.mark.parametrize("name", SAME)
def test_settings_that_change_no_result(name: str, undisturbed: Path, tiny_hub: Path, chats: Path, tmp_path: Path):
    changes, tolerance = SAME[name]
    assert run(options_of(tiny_hub, chats, tmp_path / "run", max_steps=STEPS, **changes)) == 0
    for line, expected in zip(curve(tmp_path / "run"), curve(undisturbed), strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=tolerance)
        assert line["samples"] == expected["samples"]


def test_the_export_is_the_hubs_layout(undisturbed: Path, tiny_hub: Path):
    """Same names, shapes and dtypes as the checkpoint that training began with, other values, and its processors."""
    trained, before = ({}, {})
    for found, folder in ((trained, undisturbed / f"export-{STEPS}"), (before, tiny_hub)):
        for file in folder.glob("*.safetensors"):
            found.update(load_file(file))
    assert {k: (v.shape, v.dtype) for k, v in trained.items()} == {k: (v.shape, v.dtype) for k, v in before.items()}
    assert sum(not torch.equal(trained[name], before[name]) for name in before) > len(before) // 2
    assert (undisturbed / f"export-{STEPS}" / "chat_template.jinja").exists()
    config = read_json(undisturbed / f"export-{STEPS}" / "config.json")
    assert config["architectures"] == ["Qwen3VLMoeForConditionalGeneration"]
    assert config == read_json(tiny_hub / "config.json"), "spelled as published, and without the run's own settings"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_saves_and_the_resumed_curve_is_bitwise(
    undisturbed: Path, tiny_hub: Path, chats: Path, tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
):
    """Stopped at a step drawn anew each time; metrics, parameters and data go on as if nothing was."""
    out = tmp_path / "run"
    options = options_of(tiny_hub, chats, out, max_steps=STEPS, prefetch=2)
    after = random.SystemRandom().randint(1, STEPS - 3)
    print(f"stopped after step {after}")
    with monkeypatch.context() as patch, at_step(after, partial(signal.raise_signal, number)):
        patch.setattr(signal, "getsignal", lambda _: signal.SIG_DFL)  # this process may ignore Ctrl-C
        assert run(options) == 0
    assert [path.name for path in (out / "checkpoints").iterdir()] == [f"step-{after:08d}"]
    assert run(options) == 0
    assert curve(out) == curve(undisturbed)
    assert read_lines(out / "router.jsonl") == read_lines(undisturbed / "router.jsonl")


@pytest.fixture
def interrupt() -> Iterator[Callable[[Any], None]]:
    """Sets Ctrl-C's handler as a process finds it at its start; this one may have been started to ignore it."""
    former = signal.getsignal(signal.SIGINT)
    yield lambda handler: signal.signal(signal.SIGINT, handler)
    signal.signal(signal.SIGINT, former)


def test_a_second_interrupt_is_not_waited_with(interrupt: Callable[[Any], None]):
    interrupt(signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt), stop_signal() as received:
        signal.raise_signal(signal.SIGINT)
        assert received == [signal.SIGINT]
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_ignored_interrupt_stays_ignored(interrupt: Callable[[Any], None]):
    interrupt(signal.SIG_IGN)
    with stop_signal() as received:
        signal.raise_signal(signal.SIGINT)
        assert not received
        signal.raise_signal(signal.SIGTERM)
        assert received == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_sigkill_falls_back_to_the_newest_checkpoint(undisturbed: Path, tiny_hub: Path, chats: Path, tmp_path: Path):
    """Killed behind any step with a checkpoint at every second: what was logged behind it is logged again."""
    out = tmp_path / "run"
    after, delay = random.SystemRandom().randint(1, STEPS - 2), random.SystemRandom().uniform(0, 0.5)
    print(f"killed {delay:.3f} s after step {after}")
    options = options_of(tiny_hub, chats, out, max_steps=STEPS, save_every=2)
    code = f"from tests.training import runs; runs.killed_behind({after}, {delay}, {STEPS}, {arguments_of(options)})"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    # What a kill in mid-write leaves: it must be neither read nor in the way.
    (out / "checkpoints" / "step-00000006.partial").mkdir(parents=True, exist_ok=True)
    assert run(options) == 0
    assert curve(out) == curve(undisturbed)


def test_export_by_command(undisturbed: Path, tiny_hub: Path, chats: Path, tmp_path: Path):
    out = tmp_path / "run"
    (out).mkdir()
    (out / "checkpoints").symlink_to(undisturbed / "checkpoints")
    gone = chats.with_name("gone.jsonl")  # the data may have moved
    options = options_of(tiny_hub, gone, out, export_only=True, export_layout="fused", export_dtype="bfloat16")
    assert run(options) == 0
    exported = {}
    for file in (out / f"export-{STEPS}").glob("*.safetensors"):
        exported.update(load_file(file))
    assert exported["model.language_model.layers.0.mlp.experts.gate_up_proj"].shape == (16, 80, 64)
    assert all(value.dtype == torch.bfloat16 for value in exported.values())
    assert not (out / "metrics.jsonl").exists() and not (out / "config.yaml").exists()


def test_an_export_by_command_replaces_and_needs_no_mesh(
    undisturbed: Path, tiny_hub: Path, chats: Path, tmp_path: Path
):
    out = tmp_path / "run"
    out.mkdir()
    (out / "checkpoints").symlink_to(undisturbed / "checkpoints")
    for layout in ("hub", "per-expert"):
        # The mesh of a run on other ranks, as its config.yaml has it.
        mesh = {"ep": 8, "sp": 2, "dp_shard": 4, "dp_replicate": 2}
        own = {"loss_chunk_size": 7, "keep_qkv_blocks": 2, "moe_backend": "grouped_mm"}
        assert run(options_of(tiny_hub, chats, out, export_only=True, export_layout=layout, **mesh, **own)) == 0
        (written,) = [path for path in out.iterdir() if path.name != "checkpoints" and path.is_dir()]
        with safe_open(next(written.glob("*.safetensors")), framework="pt") as file:
            assert file.metadata()["veomni_layout"] == layout
        # The run's choices are not the model's.
        exported, source = (Qwen3VLMoeConfig.from_pretrained(folder) for folder in (written, tiny_hub))
        for choice in ("loss_chunk_size", "moe_backend"):
            assert getattr(exported.text_config, choice) == getattr(source.text_config, choice)
        assert exported.vision_config.keep_qkv_blocks == source.vision_config.keep_qkv_blocks


def test_refused_runs_leave_the_config_and_say_why(
    undisturbed: Path, tiny_hub: Path, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    before = (undisturbed / "config.yaml").read_text()
    assert run(options_of(tiny_hub, chats, undisturbed, max_steps=STEPS, lr=1.0, resume=False)) == 1
    assert run(options_of(tiny_hub, chats, undisturbed, max_steps=STEPS, lora="attention")) == 1
    assert "of a run with other options: lora none then, attention now" in capsys.readouterr().err
    assert run(options_of(tiny_hub, chats, undisturbed, max_steps=STEPS, freeze=["vit"])) == 1
    assert "freeze [] then, ['vit'] now" in capsys.readouterr().err
    assert (undisturbed / "config.yaml").read_text() == before
    adapter = tmp_path / "adapter-2"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    for model, why in (
        (tmp_path / "nowhere", "nowhere: no such folder"),
        (adapter, "is an adapter; give the model beside it"),
        (undisturbed, f"holds no config.json, but export-{STEPS}; give one of these"),
        (tmp_path, "holds no config.json; give the folder"),
    ):
        assert run(options_of(model, chats, tmp_path / "run", max_steps=1)) == 1
        assert why in capsys.readouterr().err and not (tmp_path / "run").exists()
    (tmp_path / "file").touch()
    assert run(options_of(tiny_hub, chats, tmp_path / "file", max_steps=1)) == 1
    assert capsys.readouterr().err.startswith("error: ")


def test_a_damaged_checkpoint_says_which_is_older(
    undisturbed: Path, tiny_hub: Path, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for name, damage in (("progress.json", "{"), ("__0_0.distcp", "")):
        out = tmp_path / name
        shutil.copytree(undisturbed / "checkpoints", out / "checkpoints")
        newest, older = sorted((out / "checkpoints").iterdir(), reverse=True)
        (newest / name).write_text(damage)
        assert run(options_of(tiny_hub, chats, out, max_steps=STEPS + 1)) == 1
        error = capsys.readouterr().err
        assert str(newest) in error and f"To go on from step {int(older.name[-8:])}, remove that folder." in error


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_checkpoint_that_cannot_be_written(
    asynchronous: bool, tiny_hub: Path, chats: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
):
    """As on a full disk: one line, the checkpoint before stays, the partial one is not taken for whole."""
    out = tmp_path / "run"
    real = FileSystemWriter.write_data

    def write(self: Any, *args: Any) -> Any:
        if "step-00000004" in str(self.path):
            raise OSError(28, "No space left on device")
        return real(self, *args)

    monkeypatch.setattr(FileSystemWriter, "write_data", write)
    options = options_of(tiny_hub, chats, out, max_steps=6, save_every=2, async_save=asynchronous)
    assert run(options) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and "step-00000004 could not be written (OSError: [Errno 28] No space" in error
    assert [path.name for path in sorted((out / "checkpoints").iterdir()) if path.suffix == ""] == ["step-00000002"]


def test_nothing_to_export(tiny_hub: Path, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run(options_of(tiny_hub, chats, tmp_path / "run", export_only=True)) == 1
    assert f"error: {tmp_path / 'run'} has no checkpoint to export; train first." in capsys.readouterr().err


def test_epochs_end_the_run(tiny_hub: Path, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """One pass: every sample once, packs left half full at the end, what is over is no micro-batch; the bar tells."""
    options = options_of(
        tiny_hub, chats, tmp_path / "run", epochs=1, accumulation=3, pack_tokens=900, max_steps=50, peak_tflops=0.5
    )
    assert run(options) == 0
    last = read_lines(tmp_path / "run" / "metrics.jsonl")[-1]
    assert last["samples"] == 36 and last["step"] < 3
    assert last["mfu"] == pytest.approx(last["tflops"] / 0.5)
    bar = capsys.readouterr().err
    assert all(word in bar for word in ("loss=", "tok/s=", "mfu=", "GB=", "epochs end at step")), bar


@pytest.mark.parametrize("policy", ["skip", "fail"])
def test_bad_samples(policy: str, tiny_hub: Path, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    lines = chats.read_text().splitlines()
    path = chats.with_name(f"{policy}.jsonl")
    path.write_text("\n".join([lines[0], '{"messages": [', *lines[1:4], '{"messages": []}']))
    options = options_of(tiny_hub, path, tmp_path / "run", epochs=2, on_bad_sample=policy, shuffle=False)
    code = run(options)
    if policy == "fail":
        assert code == 1
        assert f"error: {path}:2: not JSON: Expecting value" in capsys.readouterr().err
        return
    assert code == 0
    assert curve(tmp_path / "run")[-1]["samples"] == 8
    assert "8 samples" in (out := capsys.readouterr().out) and "bad samples left out: 4 times" in out
    bad = read_lines(tmp_path / "run" / "bad_samples.0.jsonl")  # each once, not in every epoch
    assert [(line["line"], line["file"]) for line in bad] == [(2, str(path)), (6, str(path))]


def test_an_earlier_run_is_not_overwritten(undisturbed: Path, tiny_hub: Path, chats: Path, capsys: Any):
    assert run(options_of(tiny_hub, chats, undisturbed, max_steps=STEPS, resume=False)) == 1
    assert "holds checkpoints of an earlier run" in capsys.readouterr().err


# One trainer, step by step.


class Made:
    """A trainer and what it was made of; `close` ends its process group."""

    def __init__(self, options: TrainOptions) -> None:
        self.options = options
        self.state = script.start_processes(options)
        self.model, _ = script.build_model(options, self.state)
        self.optimizer = make_optimizer(self.model, options, "cpu")
        stream = script.build_stream(options, self.model, self.state)
        checkpoints = Checkpoints(Path(options.out) / "checkpoints", self.state, 1, False)
        Path(options.out).mkdir(parents=True)
        self.trainer = Trainer(self.model, self.optimizer, stream, checkpoints, options, self.state)
        self.model.train()

    def gradients(self) -> dict[str, torch.Tensor]:
        whole = {name: p.grad.full_tensor().clone() for name, p in self.model.named_parameters() if p.grad is not None}
        self.optimizer.zero_grad(set_to_none=True)
        return whole

    def close(self) -> None:
        set_parallel_state(None)
        torch.distributed.destroy_process_group()


@pytest.fixture
def make(tiny_hub: Path, chats: Path, tmp_path: Path) -> Any:
    made: list[Made] = []

    def build(**changes: Any) -> Made:
        made.append(Made(options_of(tiny_hub, chats, tmp_path / f"{len(made)}", **changes)))
        return made[-1]

    yield build
    for one in made:
        one.close()


def test_accumulation_of_four_is_one_large_batch(make: Any):
    """Gradients within 1e-5 of their norm, with 2 to 60 targets in a micro-batch; the mean of means would differ."""
    made = make(accumulation=4, balancing=0.0, pack_tokens=700, pad=False)
    stream = made.trainer.stream
    features = []
    for number, targets in ((4, 2), (0, 9), (30, 20), (12, 60)):
        feature = dict(stream.transform(stream.files.read(number), stream.files.paths[0].parent))
        length = feature["labels"].numel()
        feature["labels"] = feature["input_ids"].masked_fill(
            feature["image_mask"] | feature["video_mask"], IGNORE_INDEX
        )
        feature["labels"][: max(0, length - targets)] = IGNORE_INDEX
        features.append(feature)
    collate = SequenceParallelCollator(metadata_collate_func=made.model.get_metadata_collate_func())
    packs = [Pack(collate([feature]), ["x:1"], 1, [], {}) for feature in features]
    counts = [pack.batch["num_valid_labels"] for pack in packs]
    assert max(counts) >= 8 * min(counts), counts
    large = Pack(collate(features), ["x:1"] * 4, 1, [], {})
    assert large.batch["num_valid_labels"] == sum(counts)

    def plan(packs: list[Pack]) -> StepPlan:
        return StepPlan(packs, sum(counts), 1, 1, 0, 1.0, 1, False)

    losses = sum(share[0] for share in made.trainer.accumulate(plan(packs)))
    accumulated = made.gradients()
    made.trainer.options.accumulation = 1
    (share,) = made.trainer.accumulate(plan([large]))
    torch.testing.assert_close(losses, share[0], rtol=1e-6, atol=0)
    for name, expected in made.gradients().items():
        error = (accumulated[name] - expected).norm() / expected.norm().clamp(min=1e-12)
        assert error < 1e-5 or expected.norm() < 1e-7, f"{name}: {error:.1e}"


@pytest.mark.parametrize("kept", [1, 99])
def test_options_of_memory_reach_the_model(make: Any, kept: int):
    model = make(loss_chunk_size=7, keep_qkv_blocks=kept).model
    assert model.config.text_config.loss_chunk_size == 7
    keeps = [block.keep_qkv for block in model.model.visual.blocks]
    assert sum(keeps) == min(kept, len(keeps)) and keeps[-1]


def test_frozen_parts_and_rates_of_their_own(make: Any):
    """A frozen tower stays bit for bit, a rate of 0 too; the rest moves."""
    made = make(freeze=["vit"], lr_merger=0.0, max_steps=1, weight_decay=0.1)
    before = {name: p.full_tensor().clone() for name, p in made.model.named_parameters()}
    with MetricsWriter(Path(made.options.out), False, 0, 1, False) as writer:
        assert made.trainer.run(writer)
    for name, parameter in made.model.named_parameters():
        same = torch.equal(parameter.full_tensor(), before[name])
        if "visual." in name:
            assert same, name
    moved = ("model.language_model.layers.0.mlp.experts.down_proj", "lm_head.weight")
    assert not any(torch.equal(dict(made.model.named_parameters())[name].full_tensor(), before[name]) for name in moved)
    assert made.trainer.flops.vit_passes == 1 and made.trainer.flops.merger_passes == 3


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_stops_and_names_the_samples(make: Any, value: float):
    made = make(max_steps=3, accumulation=2)
    with torch.no_grad():
        weight = made.model.model.language_model.layers[1].self_attn.q_proj.weight
        weight.to_local()[0, 0] = value
    before = made.model.lm_head.weight.to_local().clone()
    with (
        MetricsWriter(Path(made.options.out), True, 0, 3, False) as writer,
        pytest.raises(NonFiniteLoss, match="step 1"),
    ):
        made.trainer.run(writer)
    found = read_json(Path(made.options.out) / "non_finite_step_1.json")
    batches = found["ranks"][0]["micro_batches"]
    assert len(batches) == 2 and not any(math.isfinite(batch["loss_share"]) for batch in batches)
    assert all(sample.split(":")[0].endswith("chats.jsonl") for batch in batches for sample in batch["samples"])
    assert torch.equal(made.model.lm_head.weight.to_local(), before)
    assert made.trainer.checkpoints.steps() == []


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    chats = [
        {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"It is {i}."}]}
        for i in range(40)
    ]
    path.write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    return path


def test_a_run_without_images_goes_on(tiny_hub: Path, texts: Path, tmp_path: Path):
    """The vision tower gets no gradient, and so no optimizer state of its own: the checkpoint has one all the same."""
    make = partial(options_of, tiny_hub, texts, pack_tokens=64, schedule="constant", warmup_steps=0)
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert run(make(whole, max_steps=4)) == 0
    assert run(make(halves, max_steps=2)) == 0
    assert run(make(halves, max_steps=4)) == 0
    assert curve(halves) == curve(whole) and len(curve(whole)) == 4
    assert run(make(whole, max_steps=4, export_only=True)) == 0
    assert (whole / "export-4" / "config.json").exists()


def test_mergers_alone_on_text(tiny_hub: Path, texts: Path, tmp_path: Path):
    """Nothing that is trained takes part: the parameters stay as they are, and the run goes on."""
    options = options_of(tiny_hub, texts, tmp_path, pack_tokens=64, max_steps=2, freeze=["vit", "lm"])
    assert run(options) == 0
    options.max_steps = 3
    assert run(options) == 0
    assert [line["grad_norm"] for line in curve(tmp_path)] == [0.0, 0.0, 0.0]
    counts = torch.distributed.checkpoint.FileSystemReader(tmp_path / "checkpoints" / "step-00000003")
    steps = {k: torch.zeros(()) for k in counts.read_metadata().state_dict_metadata if k.endswith(".step")}
    torch.distributed.checkpoint.load(steps, storage_reader=counts)
    assert steps and not any(steps.values())  # AdamW has not taken the steps that nothing was in


def test_adapters_go_on_as_they_were(tiny_hub: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Another scale, or other weights underneath, would be another model."""
    out = tmp_path / "run"
    make = partial(options_of, data=texts, out=out, pack_tokens=64, max_steps=1, lora="attention")
    assert run(make(model=tiny_hub, lora_alpha=64)) == 0
    assert run(make(model=tiny_hub, export_only=True)) == 1
    assert "lora_alpha 64 then, 32 now" in capsys.readouterr().err
    other = make_tiny_checkpoint(tmp_path / "other", seed=7)
    assert run(make(model=other, lora_alpha=64, max_steps=2)) == 1
    assert "weights of --model" in capsys.readouterr().err
