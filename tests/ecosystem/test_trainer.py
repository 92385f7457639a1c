"""transformers' Trainer on this model and this project's collator: it trains, and resumes to the same weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import Trainer, TrainingArguments

from modeling.data.collator import SequenceParallelCollator
from modeling.qwen3_vl_moe import Qwen3VLMoeForCausalLM
from tests.ecosystem.chats import features

STEPS, RESUMED_AT = 20, 14


def make_trainer(checkpoint: Path, processor: Any, out: Path) -> Trainer:
    model = Qwen3VLMoeForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        lr_scheduler_type="linear",
        save_strategy="steps",
        save_steps=RESUMED_AT,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,  # the collator wants all of a feature
        seed=7,
    )
    collator = SequenceParallelCollator(metadata_collate_func=model.get_metadata_collate_func())
    return Trainer(model, arguments, train_dataset=features(processor, model), data_collator=collator)


@pytest.fixture(scope="module")
def undisturbed(tiny_hub: Path, tiny_processor: Any, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    trainer = make_trainer(tiny_hub, tiny_processor, tmp_path_factory.mktemp("trainer"))
    trainer.train()
    return trainer


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_trainer_trains(undisturbed: Trainer) -> None:
    curve = losses(undisturbed)
    assert len(curve) == undisturbed.state.global_step == STEPS
    assert curve[-1] < curve[0] / 3, curve


def test_accumulated_loss_is_the_token_mean(undisturbed: Trainer, tiny_hub: Path, tiny_processor: Any) -> None:
    """The four chats are one step, in two batches of unequal length; the first loss is the mean over all tokens."""
    model = Qwen3VLMoeForCausalLM.from_pretrained(tiny_hub, dtype=torch.float32).train()
    collator = SequenceParallelCollator(metadata_collate_func=model.get_metadata_collate_func())
    with torch.no_grad():
        expected = model(**collator(features(tiny_processor, model))).loss.item()
    assert losses(undisturbed)[0] == pytest.approx(expected, rel=1e-4)


def test_resumed_run_ends_at_the_same_weights(undisturbed: Trainer, tiny_hub: Path, tiny_processor: Any) -> None:
    folder = Path(undisturbed.args.output_dir)
    resumed = make_trainer(tiny_hub, tiny_processor, folder)
    resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{RESUMED_AT}"))
    assert losses(resumed) == losses(undisturbed)
    expected = undisturbed.model.state_dict()
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_upstream_loads_what_the_trainer_saved(undisturbed: Trainer, tiny_processor: Any) -> None:
    last = Path(undisturbed.args.output_dir) / f"checkpoint-{STEPS}"
    upstream = transformers.Qwen3VLMoeForConditionalGeneration.from_pretrained(last, dtype=torch.float32)
    expected = undisturbed.model.state_dict()
    for name, value in upstream.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_evaluation_has_a_loss(tiny_hub: Path, tiny_processor: Any, tmp_path: Path) -> None:
    """transformers' Trainer looks for the labels by the names of forward's arguments."""
    trainer = make_trainer(tiny_hub, tiny_processor, tmp_path)
    assert trainer.label_names == ["labels"]
    data = trainer.train_dataset
    found = trainer.evaluate(torch.utils.data.Subset(data, range(2)))["eval_loss"]
    batch = trainer.data_collator([data[0], data[1]])
    with torch.no_grad():
        wanted = trainer.model.eval()(**batch).loss
    assert found == pytest.approx(wanted.item(), rel=1e-6)
