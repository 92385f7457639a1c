"""The data stream: every sample once, in an order that depends on nothing but the seed, through stops and bad lines."""

import json
import random
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from modeling.data.collator import SequenceParallelCollator
from modeling.data.jsonl import Feature, JsonlFiles
from modeling.data.order import Position, SampleOrder
from modeling.data.packing import Packer
from modeling.data.streaming import Pack, PackedStream
from modeling.qwen3_vl_moe.position_ids import make_position_id_func
from modeling.qwen3_vl_moe.processing_qwen3_vl_moe import process_sample
from scripts.make_example_data import example_chats, make_example_data
from tests.media import load_photo


def as_feature(sample: Mapping[str, Any], folder: Path) -> Feature:
    """A transform without a processor: {"id": i, "tokens": n} -> n tokens that spell i."""
    if sample["tokens"] < 0:
        raise ValueError(f"sample {sample['id']} is broken")
    ids = torch.full((sample["tokens"],), sample["id"])
    return {"input_ids": ids, "labels": ids.clone()}


def as_ids(features: list[Feature]) -> dict[str, Any]:
    return {"ids": [int(feature["input_ids"][0]) for feature in features]}


@pytest.fixture(scope="module")
def numbers(tmp_path_factory: pytest.TempPathFactory) -> JsonlFiles:
    """101 samples of 5 to 60 tokens in three files, with blank lines between them."""
    folder = tmp_path_factory.mktemp("numbers")
    draw = random.Random(3)
    paths = []
    for part in range(3):
        ids = range(101)[part * 40 : (part + 1) * 40]
        paths.append(folder / f"{part}.jsonl")
        lines = [json.dumps({"id": i, "tokens": draw.randint(5, 60)}) + "\n" * draw.randint(1, 2) for i in ids]
        paths[-1].write_text("".join(lines).rstrip("\n"))
    return JsonlFiles(paths)


def stream_of(files: JsonlFiles, **options: Any) -> PackedStream:
    arguments = {"budget": 128, "buffer": 8, "prefetch": 0, "epochs": 1} | options
    return PackedStream(files, as_feature, as_ids, **arguments)


def ids_of(packs: list[Pack]) -> list[list[int]]:
    return [pack.batch["ids"] for pack in packs]


def flat(packs: list[Pack]) -> list[int]:
    return [i for ids in ids_of(packs) for i in ids]


def test_lines_are_found(numbers: JsonlFiles):
    assert len(numbers) == 101
    for i in (0, 39, 40, 100):
        path, line = numbers.locate(i)
        assert numbers.read(i)["id"] == i
        assert json.loads(path.read_text().splitlines()[line - 1])["id"] == i


def test_missing_and_empty_files_are_errors(tmp_path: Path):
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match=r"do not exist or are folders: .*gone\.jsonl"):
        JsonlFiles([tmp_path / "empty.jsonl", tmp_path / "gone.jsonl"])
    with pytest.raises(ValueError, match="hold 0 samples"):
        JsonlFiles([tmp_path / "empty.jsonl"])
    with pytest.raises(ValueError, match="none were named"):
        JsonlFiles([])


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_each_epoch_has_every_sample_once(numbers: JsonlFiles, ranks: int):
    packs = [list(stream_of(numbers, dp_rank=rank, dp_size=ranks, epochs=3)) for rank in range(ranks)]
    counts = Counter(i for own in packs for i in flat(own))
    assert counts == Counter(dict.fromkeys(range(101), 3))
    assert all(pack.tokens <= 128 for own in packs for pack in own)


def test_the_seed_decides_the_order(numbers: JsonlFiles):
    orders = [flat(list(stream_of(numbers, seed=seed))) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    epochs = flat(list(stream_of(numbers, epochs=2, buffer=1, budget=60)))
    assert epochs[:101] != epochs[101:] and sorted(epochs[:101]) == sorted(epochs[101:])
    assert flat(list(stream_of(numbers, seed=None, buffer=1, budget=60))) == list(range(101))


def test_samples_are_named_by_file_and_line(numbers: JsonlFiles):
    for pack in stream_of(numbers):
        for name, i in zip(pack.samples, pack.batch["ids"], strict=True):
            path, line = name.rsplit(":", 1)
            assert json.loads(Path(path).read_text().splitlines()[int(line) - 1])["id"] == i


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("stop", [0, 1, 4, 11])
def test_resume_on_the_same_ranks_is_exact(numbers: JsonlFiles, stop: int, prefetch: int):
    """Behind any pack, in mid-epoch, the same packs follow as without the stop; by way of JSON, like a checkpoint."""
    for rank in range(2):
        options = {"dp_size": 2, "epochs": 2, "prefetch": prefetch}
        undisturbed = list(stream_of(numbers, dp_rank=rank, **options))
        resumed = stream_of(numbers, dp_rank=rank, **options)
        states = [list(stream_of(numbers, dp_rank=r, **options))[stop].position for r in range(2)]
        resumed.resume(json.loads(json.dumps(states)))
        assert ids_of(list(resumed)) == ids_of(undisturbed[stop + 1 :])


def test_resume_with_workers_is_exact(numbers: JsonlFiles):
    """Features that workers had made ahead are made again; their number may change."""
    undisturbed = ids_of(list(stream_of(numbers)))
    packs = iter(stream_of(numbers, workers=2, prefetch=2))
    position = [next(packs) for _ in range(5)][-1].position
    packs.close()
    resumed = stream_of(numbers, workers=1, prefetch=2)
    resumed.resume([position])
    assert ids_of(list(resumed)) == undisturbed[5:]


def run(files: JsonlFiles, ranks: int, steps: int | None, states: list[Any] | None, bad: int = 0) -> tuple:
    """Train `steps` packs on each of `ranks` from `states`: (samples seen, positions)."""
    seen: list[int] = []
    positions = []
    for rank in range(ranks):
        stream = stream_of(files, dp_rank=rank, dp_size=ranks, epochs=3)
        if states is not None:
            stream.resume(states)
        packs = []
        for pack in stream:
            packs.append(pack)
            if len(packs) == steps:
                break
        seen += flat(packs)
        positions.append(packs[-1].position)
    return seen, json.loads(json.dumps(positions))


@pytest.mark.parametrize("ranks", [(2, 4, 1), (3, 1, 2), (4, 4, 3)])
def test_resume_on_other_ranks_loses_and_doubles_nothing(numbers: JsonlFiles, ranks: tuple[int, ...]):
    """Stopped twice in mid-epoch, each time going on with another number of data ranks."""
    total: Counter[int] = Counter()
    states = None
    for number, steps in zip(ranks, (5, 7, None), strict=True):
        seen, states = run(numbers, number, steps, states)
        total.update(seen)
        assert max(total.values()) <= 3
    assert total == Counter(dict.fromkeys(range(101), 3))


def test_the_remaining_order_by_hand():
    """Two ranks over places 0..9: rank 0 took 0 2 4 and 2 still waits; rank 1 took 1 3 5 7, 7 waits."""
    order = SampleOrder(size=10, seed=None, epochs=1)
    rest = order.after([Position(3, [2]), Position(4, [7])])
    places = [rest.at(i) for i in range(6)]
    assert places == [(0, 2), (0, 6), (0, 7), (0, 8), (0, 9), None]
    again = rest.after([Position(1, []), Position(1, [1])])
    assert [again.at(i) for i in range(5)] == [(0, 6), (0, 7), (0, 8), (0, 9), None]


def test_other_data_cannot_be_resumed(numbers: JsonlFiles):
    position = next(iter(stream_of(numbers))).position
    with pytest.raises(ValueError, match="had 101 samples and seed 0, this one has 101 and 5"):
        stream_of(numbers, seed=5).resume([position])


def test_packing_by_hand():
    packer: Packer[str] = Packer(budget=10, capacity=5)
    for tokens, name in ((3, "a"), (6, "b"), (4, "c"), (7, "d"), (1, "e")):
        assert not packer.full
        packer.add(tokens, name)
    assert packer.full
    assert packer.take() == ["a", "d"]
    assert packer.take() == ["b", "c"]
    assert packer.take() == ["e"]
    assert packer.take() == []
    with pytest.raises(ValueError, match="11 tokens does not fit a budget of 10"):
        packer.add(11, "f")


# With the real processor.


@pytest.fixture(scope="module")
def transform(tiny_processor: Any) -> "partial[Feature]":
    return partial(transform_chat, tiny_processor)


def transform_chat(processor: Any, sample: Mapping[str, Any], folder: Path) -> Feature:
    return process_sample(sample, processor, make_position_id_func(2), max_length=512, media_root=folder)


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> JsonlFiles:
    return JsonlFiles([make_example_data(tmp_path_factory.mktemp("example"))])


def test_the_example_has_photos_and_a_clip(example: JsonlFiles):
    chats = example_chats()
    assert len(chats) == len(example) >= 30
    kinds = Counter(
        part["type"] for chat in chats for turn in chat if isinstance(turn["content"], list) for part in turn["content"]
    )
    assert kinds["image"] >= 30 and kinds["video"] >= 3


def test_order_and_content_do_not_depend_on_workers(example: JsonlFiles, transform: "partial[Feature]"):
    """No worker, one and two spawned ones give the same batches, tensor by tensor."""
    collator = SequenceParallelCollator(pad_to_length=512)
    runs = []
    for workers in (0, 1, 2):
        stream = PackedStream(example, transform, collator, budget=512, epochs=1, workers=workers, buffer=16)
        runs.append(list(stream))
    for packs in runs[1:]:
        for pack, reference in zip(packs, runs[0], strict=True):
            assert pack.samples == reference.samples and pack.position == reference.position
            for key, value in reference.batch.items():
                if isinstance(value, torch.Tensor):
                    assert torch.equal(pack.batch[key], value), key
                else:
                    assert pack.batch[key] == value, key
    assert sum(len(pack.samples) for pack in runs[0]) == len(example)


def test_padding_share_on_the_example(example: JsonlFiles, transform: "partial[Feature]"):
    """Over six epochs in packs of 512 tokens less than 3% is padding, on either of two data ranks."""
    for rank in range(2):
        stream = PackedStream(example, transform, as_ids, budget=512, epochs=6, dp_rank=rank, dp_size=2)
        *packs, rest = list(stream)
        padding = 1 - sum(pack.tokens for pack in packs) / (512 * len(packs))
        assert len(packs) >= 8 and padding < 0.03, f"{padding:.1%} of {len(packs)} packs, {rest.tokens} tokens left"


BROKEN = (
    '{"messages": [{"role": "user"',
    '{"messages": [{"role": "user", "content": "no answer"}]}',
    '{"messages": [{"role": "user", "content": [{"type": "image", "image": "gone.png"}]}, '
    '{"role": "assistant", "content": "x"}]}',
    '{"messages": [{"role": "user", "content": [{"type": "image", "image": "half.png"}]}, '
    '{"role": "assistant", "content": "x"}]}',
    '["not", "an", "object"]',
)


@pytest.fixture(scope="module")
def thousand(tmp_path_factory: pytest.TempPathFactory) -> tuple[JsonlFiles, list[int]]:
    """1,000 lines of which 50 are broken, and the numbers of those lines."""
    folder = tmp_path_factory.mktemp("thousand")
    load_photo("coffee", 64).save(folder / "cup.png")
    (folder / "half.png").write_bytes((folder / "cup.png").read_bytes()[:1500])
    lines = []
    for i in range(1000):
        parts = [{"type": "text", "text": f"Number {i}?"}]
        if i % 20 == 7:
            parts.append({"type": "image", "image": "cup.png"})
        chat = [{"role": "user", "content": parts}, {"role": "assistant", "content": f"It is {i}."}]
        lines.append(json.dumps({"messages": chat}))
    broken = sorted(random.Random(1).sample(range(1000), 50))
    for count, i in enumerate(broken):
        lines[i] = BROKEN[count % len(BROKEN)]
    (folder / "chats.jsonl").write_text("\n".join(lines))
    return JsonlFiles([folder / "chats.jsonl"]), [i + 1 for i in broken]


def test_a_thousand_samples_with_fifty_broken(thousand: tuple[JsonlFiles, list[int]], transform: "partial[Feature]"):
    """Skipped and counted, each with its line and cause; all others come, once; nothing hangs."""
    files, broken = thousand
    packs = []
    for rank in range(2):
        packs += list(PackedStream(files, transform, as_ids, 512, dp_rank=rank, dp_size=2, epochs=1, workers=rank))
    bad = [sample for pack in packs for sample in pack.bad]
    assert sorted(sample.line for sample in bad) == broken
    good = sorted(int(name.rsplit(":", 1)[1]) for pack in packs for name in pack.samples)
    assert good == sorted(set(range(1, 1001)) - set(broken))
    causes = " ".join(sample.cause for sample in bad)
    for expected in ("Expecting", "no assistant turn", "gone.png", "half.png", "one JSON object, got list"):
        assert causes.count(expected) >= 10, expected


def test_fail_names_file_line_and_cause(thousand: tuple[JsonlFiles, list[int]], transform: "partial[Feature]"):
    files, broken = thousand
    stream = PackedStream(files, transform, as_ids, 512, seed=None, on_bad_sample="fail")
    with pytest.raises(ValueError, match=rf"chats\.jsonl:{broken[0]}: not JSON: Expecting"):
        list(stream)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_data_that_is_all_broken_is_an_error(tmp_path: Path, prefetch: int):
    path = tmp_path / "bad.jsonl"
    path.write_text("".join(json.dumps({"id": i, "tokens": -1}) + "\n" for i in range(9)))
    with pytest.raises(ValueError, match=r"none of 10 samples in a row could be used; the first of them:") as caught:
        list(stream_of(JsonlFiles([path]), epochs=None, prefetch=prefetch))
    named = str(caught.value).splitlines()[1:]
    assert len(set(named)) == 5 and all("bad.jsonl:" in line and "is broken" in line for line in named)


def test_stopping_early_leaves_no_thread_waiting(numbers: JsonlFiles):
    import threading

    before = threading.active_count()
    for pack in stream_of(numbers, epochs=None, prefetch=2):
        assert pack.samples
        break
    assert threading.active_count() == before


def test_a_file_is_told_from_another(tmp_path: Path):
    """Resuming needs the same samples, not only as many; where they lie does not matter."""
    lines = [json.dumps({"id": i, "tokens": 20}) + "\n" for i in range(30)]
    for name, content in (("a", lines), ("copy", lines), ("b", [*lines[:-1], lines[0]])):
        (tmp_path / name).write_text("".join(content))
    state = next(iter(stream_of(JsonlFiles([tmp_path / "a"])))).position
    stream_of(JsonlFiles([tmp_path / "copy"])).resume([state])
    with pytest.raises(ValueError, match="as many samples as the stopped run's, 30, but other ones"):
        stream_of(JsonlFiles([tmp_path / "b"])).resume([state])


def test_arrays_and_byte_order_marks(tmp_path: Path):
    (tmp_path / "marked.jsonl").write_text('{"id": 1}\n{"id": 2}\n', encoding="utf-8-sig")
    files = JsonlFiles([tmp_path / "marked.jsonl"])
    assert [files.read(i)["id"] for i in range(2)] == [1, 2]
    for array in ('[\n {"id": 1},\n {"id": 2}\n]', '[{"id": 1}, {"id": 2}]'):
        (tmp_path / "array.json").write_text(array)
        with pytest.raises(ValueError, match=r"array\.json is one JSON array; write its samples as JSONL"):
            JsonlFiles([tmp_path / "array.json"])
