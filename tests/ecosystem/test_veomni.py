"""VeOmni 0.1.12 itself, in an environment of its own: `bash scripts/veomni_env.sh`, then

    .venv-veomni/bin/python -m pytest tests/ecosystem/test_veomni.py

Its builder builds this project's model, its data pipeline feeds it, its loss arithmetic trains it, and its collator's
batches are ours, key by key. Its own implementation of the model, on the same batch, is the independent witness.
"""

import importlib.util
import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

if importlib.util.find_spec("veomni") is None:
    pytest.skip("VeOmni is not installed here; `bash scripts/veomni_env.sh` makes an environment that has it",
                allow_module_level=True)  # fmt: skip

from conversion.hf_to_veomni import main as hf_to_veomni
from conversion.veomni_to_hf import main as veomni_to_hf
from modeling.data.collator import SequenceParallelCollator
from modeling.qwen3_vl_moe import Qwen3VLMoeForCausalLM
from modeling.qwen3_vl_moe.processing_qwen3_vl_moe import Qwen3VLMoeProcessor, process_sample
from tests.ecosystem.veomni_ranks import MESHES, cpu_ops, join, run_rank
from tests.features import feature_of
from tests.media import assistant, case_inputs, load_photo, user

Feature = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def veomni(tmp_path_factory: pytest.TempPathFactory, tiny_hub: Path) -> Iterator[SimpleNamespace]:
    """VeOmni in a world of one rank, as its trainers start it, and its own implementation of the model."""
    logging.disable(logging.WARNING)
    join(0, 1, tmp_path_factory.mktemp("rendezvous") / "store")
    from veomni import data, models
    from veomni.distributed.parallel_plan import ParallelPlan
    from veomni.distributed.parallel_state import init_parallel_state
    from veomni.models import loader  # the registries

    from modeling.registry import register_with_veomni

    init_parallel_state(device_type="cpu")
    found = SimpleNamespace(data=data, models=models, loader=loader, ParallelPlan=ParallelPlan)
    found.own_model = build(found, tiny_hub, moe="eager").train()
    register_with_veomni()
    yield found
    dist.destroy_process_group()
    logging.disable(logging.NOTSET)


def build(veomni: Any, folder: Path, moe: str = "fused_triton") -> Any:
    return veomni.models.build_foundation_model(
        str(folder), str(folder), torch_dtype="float32", init_device="cpu", ops_implementation=cpu_ops(moe)
    )


@pytest.fixture(scope="module")
def theirs(veomni: Any, tiny_hub: Path) -> Any:
    """This project's model, built and loaded by VeOmni."""
    return build(veomni, tiny_hub).train()


@pytest.fixture(scope="module")
def ours(tiny_hub: Path) -> Any:
    return Qwen3VLMoeForCausalLM.from_pretrained(tiny_hub, dtype=torch.float32).train()


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("photos")
    paths = {name: str(folder / f"{name}.png") for name in ("coffee", "chelsea")}
    for name, path in paths.items():
        load_photo(name).save(path)
    return paths


# (photo or None, question, answer): one with an image, one of another size and length, one of text alone.
CHATS = (
    ("coffee", "What stands on the table?", "A cup of coffee and a spoon."),
    ("chelsea", "Who is this?", "Chelsea, a cat. 她很可爱。"),
    (None, "Why is the sky blue?", "Because air scatters short waves more than long ones."),
)


def veomni_features(veomni: Any, model: Any, processor: Any, photos: dict[str, str]) -> list[Feature]:
    """CHATS through VeOmni's own chat template and process_sample."""
    transform = veomni.data.build_data_transform(
        "qwen3_vl_moe",
        processor=processor,
        chat_template=veomni.data.build_chat_template("qwen3vl", processor),
        position_id_func=model.get_position_id_func(),
    )
    features = []
    for photo, question, answer in CHATS:
        turns = [{"from": "human", "value": ("<image>" if photo else "") + question}, {"from": "gpt", "value": answer}]
        sample = {"source": "sharegpt4v_sft", "conversations": turns, "images": [photos[photo]] if photo else []}
        features += transform(sample)
    return features


def our_features(model: Any, processor: Any, photos: dict[str, str]) -> list[Feature]:
    features = []
    for photo, question, answer in CHATS:
        messages = [user(question), assistant(answer)]
        if photo:
            messages[0]["content"].insert(0, {"type": "image", "image": photos[photo]})
        features.append(process_sample({"messages": messages}, processor, model.get_position_id_func()))
    return features


def copies(features: list[Feature]) -> list[Feature]:
    """VeOmni's collator writes into the labels it is given."""
    return [{key: value.clone() for key, value in feature.items()} for feature in features]


def test_build_foundation_model_builds_this_class(theirs: Any, ours: Any) -> None:
    assert isinstance(theirs, Qwen3VLMoeForCausalLM)
    assert type(theirs).__name__ == "Qwen3VLMoeForConditionalGeneration"  # what config.json will say
    expected = ours.state_dict()
    assert theirs.state_dict().keys() == expected.keys()
    for name, value in theirs.state_dict().items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("layout", ["fused", "per-expert"])
def test_veomni_loads_other_layouts(veomni: Any, ours: Any, tiny_hub: Path, tmp_path: Path, layout: str) -> None:
    main = hf_to_veomni if layout == "fused" else veomni_to_hf
    assert main([str(tiny_hub), str(tmp_path / layout), "--target", layout, "--quiet"]) == 0
    loaded = build(veomni, tmp_path / layout).state_dict()
    for name, value in ours.state_dict().items():
        assert torch.equal(value, loaded[name]), name


def test_incomplete_and_foreign_tensors_are_errors(theirs: Any) -> None:
    state = theirs.state_dict()
    converter = theirs._create_checkpoint_tensor_converter(theirs)
    for name, value in list(state.items())[1:]:
        assert converter.convert(name, value).name == name
    with pytest.raises(ValueError, match="1 missing from the checkpoint"):
        converter.finalize()
    with pytest.raises(ValueError, match="1 unknown to the model: lm_head"):
        converter.convert("lm_head.bias", torch.zeros(3))
    with pytest.raises(ValueError, match="1 of another shape"):
        converter.convert("model.language_model.norm.weight", torch.zeros(3))


def test_registries_hold_config_and_processor(veomni: Any, theirs: Any, tiny_hub: Path) -> None:
    assert isinstance(veomni.models.build_processor(str(tiny_hub)), Qwen3VLMoeProcessor)
    assert isinstance(theirs.config, veomni.loader.MODEL_CONFIG_REGISTRY["qwen3_vl_moe"]())
    with pytest.raises(ValueError, match="Qwen3VLMoeModel"):
        veomni.loader.MODELING_REGISTRY["qwen3_vl_moe"]("Qwen3VLMoeModel")


def test_parallel_plan_is_veomnis_inside_and_ours_outside(veomni: Any, theirs: Any, ours: Any) -> None:
    assert isinstance(theirs.get_parallel_plan(), veomni.ParallelPlan)
    assert not isinstance(ours.get_parallel_plan(), veomni.ParallelPlan)
    assert theirs.get_parallel_plan().extra_parallel_plan == ours.get_parallel_plan().extra_parallel_plan


def test_features_are_veomnis(veomni: Any, theirs: Any, tiny_processor: Any, photos: dict[str, str]) -> None:
    got = our_features(theirs, tiny_processor, photos)
    expected = veomni_features(veomni, theirs, tiny_processor, photos)
    for feature, reference in zip(got, expected, strict=True):
        # Token types are what image_mask and video_mask say.
        assert torch.equal(reference.pop("mm_token_type_ids"), feature["image_mask"] + 2 * feature["video_mask"])
        assert feature.keys() == reference.keys()
        for key, value in reference.items():
            assert torch.equal(feature[key], value) and feature[key].dtype == value.dtype, key


def test_their_batch_gives_our_loss(
    veomni: Any, theirs: Any, ours: Any, tiny_processor: Any, photos: dict[str, str]
) -> None:
    """VeOmni's process_sample and collator into the model VeOmni built; ours throughout; VeOmni's own model."""
    features = veomni_features(veomni, theirs, tiny_processor, photos)
    collator = veomni.data.MainCollator(metadata_collate_func=theirs.get_metadata_collate_func())
    loss = theirs(**collator(copies(features)), use_cache=False).loss
    batch = SequenceParallelCollator(metadata_collate_func=ours.get_metadata_collate_func())(
        our_features(ours, tiny_processor, photos)
    )
    assert torch.equal(loss, ours(**batch).loss)

    witness = veomni.own_model
    assert type(witness).__module__.startswith("veomni.")
    collator = veomni.data.MainCollator(metadata_collate_func=witness.get_metadata_collate_func())
    # One at a time: with sdpa, the only kernel it has on a CPU, its packed samples attend to each other.
    counts = torch.tensor([int((feature["labels"][1:] != -100).sum()) for feature in features])
    losses = [witness(**collator(copies([feature])), use_cache=False).loss for feature in features]
    expected = (torch.stack(losses) * counts).sum() / counts.sum()
    # Two implementations in float32; other orders of summation.
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)


# What only one side's batch holds. VeOmni's: token types, which nothing reads once positions are there, and a second
# name of cu_seq_lens_q for other models. Ours: the counts that save a look at the device.
ONLY_THEIRS = {"mm_token_type_ids", "linear_attn_cu_seq_lens_q"}
ONLY_OURS = {"num_valid_labels", "tail_padding_length"}


def assert_same(key: str, got: Any, expected: Any) -> None:
    if isinstance(expected, torch.Tensor):
        assert torch.equal(got, expected) and got.dtype == expected.dtype, key
    elif isinstance(expected, dict):
        assert got.keys() == expected.keys(), key
        for name, value in expected.items():
            assert_same(f"{key}.{name}", got[name], value)
    else:
        assert got == expected and type(got) is type(expected), key


@pytest.mark.parametrize(("sp_size", "pad_to_length"), [(1, None), (1, 300), (2, None), (7, None), (2, 301)])
def test_collators_agree_key_by_key(
    veomni: Any,
    theirs: Any,
    tiny_processor: Any,
    photos: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    sp_size: int,
    pad_to_length: int | None,
) -> None:
    from veomni.data import data_collator

    features = veomni_features(veomni, theirs, tiny_processor, photos)
    # Its own video loader needs codecs that are not installed here; the contract of a feature is the same.
    features.append(feature_of(case_inputs(tiny_processor, "video"), theirs))
    metadata = theirs.get_metadata_collate_func()
    padded = 0
    for sp_rank in range(sp_size):
        state = SimpleNamespace(sp_enabled=sp_size > 1, sp_size=sp_size, sp_rank=sp_rank)
        monkeypatch.setattr(data_collator, "get_parallel_state", lambda state=state: state)
        expected = veomni.data.MainCollator(pad_to_length=pad_to_length or False, metadata_collate_func=metadata)(
            copies(features)
        )
        got = SequenceParallelCollator(sp_size, sp_rank, metadata, pad_to_length)(copies(features))
        padded = int(expected.pop("tail_padding_length", 0))  # theirs: where there is any, as a tensor
        assert got["tail_padding_length"] == padded
        assert got.keys() - expected.keys() == ONLY_OURS | ({"labels_shifted"} if sp_size > 1 else set())
        assert expected.keys() - got.keys() == ONLY_THEIRS - ({"mm_token_type_ids"} - expected.keys())
        for key in expected.keys() & got.keys():
            assert_same(key, got[key], expected[key])
    assert padded or (sp_size < 7 and pad_to_length is None), "the lengths were to need padding"


def test_a_sample_that_opens_with_an_image_is_one_segment_here(veomni: Any, theirs: Any) -> None:
    """A wanted difference: positions that are 0 do not mark a sample's start. VeOmni cuts such a sample into pieces."""
    grid = torch.tensor([[1, 4, 4]])
    ids = torch.tensor([-200] * 4 + [7, 8, 9])
    position_ids = theirs.get_position_id_func()(input_ids=ids[None], image_grid_thw=grid)["position_ids"][:, 0]
    feature = {
        "input_ids": ids.clamp(min=0),
        "labels": torch.arange(7),
        "attention_mask": torch.ones_like(ids),
        "position_ids": position_ids,
        "image_mask": ids == -200,
        "video_mask": torch.zeros(7, dtype=torch.bool),
        "pixel_values": torch.zeros(16, 1536),
        "image_grid_thw": grid,
    }
    theirs_batch = veomni.data.MainCollator()(copies([feature, feature]))
    ours_batch = SequenceParallelCollator()(copies([feature, feature]))
    assert ours_batch["cu_seq_lens_q"].tolist() == [0, 7, 14]
    assert theirs_batch["cu_seq_lens_q"].tolist() == [0, 1, 2, 3, 7, 8, 9, 10, 14]


def test_training_step_on_two_ranks(
    veomni: Any, ours: Any, tiny_hub: Path, tiny_processor: Any, photos: dict[str, str], tmp_path: Path
) -> None:
    """Loss and gradients under VeOmni's meshes, with its loss weights, are those of one process."""
    features = our_features(ours, tiny_processor, photos)[1:]  # one rank of two has an image, the other none
    collator = SequenceParallelCollator(metadata_collate_func=ours.get_metadata_collate_func())
    ours.zero_grad()
    loss = ours(**collator(features)).loss
    loss.backward()
    mp.spawn(run_rank, args=(2, tiny_hub, tmp_path, features), nprocs=2)
    for mesh in MESHES:
        result = torch.load(tmp_path / f"{mesh}.pt")
        # float32 sums in another order, against the largest entry of each gradient.
        assert abs(result["loss"] - loss.item()) < 1e-5 * loss.item(), mesh
        for name, parameter in ours.named_parameters():
            scale = parameter.grad.abs().max().item()
            difference = (result["gradients"][name] - parameter.grad).abs().max().item()
            assert difference <= 2e-5 * scale, f"{mesh} {name}: {difference} of {scale}"
