"""process_sample on real media: what is learned, where images go, what is cut, and what is said about bad samples."""

import io
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from modeling.data.collator import IGNORE_INDEX
from modeling.qwen3_vl_moe.position_ids import get_rope_index, make_position_id_func
from modeling.qwen3_vl_moe.processing_qwen3_vl_moe import Qwen3VLMoeProcessor, load_image, process_sample
from scripts.make_example_data import clip_path
from tests.media import assistant, load_clip, load_photo, user

Process = Callable[..., dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def process(tiny_processor: Any) -> Process:
    function = partial(process_sample, processor=tiny_processor, position_id_func=make_position_id_func(2))
    return lambda messages, **options: function({"messages": messages}, **options)


@pytest.fixture(scope="module")
def cat_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("media") / "cat.png"
    load_photo("chelsea", 96).save(path)
    return path


def learned(feature: dict[str, torch.Tensor], processor: Any) -> str:
    labels = feature["labels"]
    return processor.tokenizer.decode(labels[labels != IGNORE_INDEX])


def test_the_processor_is_upstreams(tiny_processor: Any):
    assert isinstance(tiny_processor, Qwen3VLMoeProcessor)


def test_loss_on_assistant_turns_alone(process: Process, tiny_processor: Any):
    chat = [
        {"role": "system", "content": "Talk like an assistant."},
        user("Say assistant."),
        assistant("First answer."),
        user("Again?"),
        assistant("Second answer."),
    ]
    feature = process(chat)
    assert learned(feature, tiny_processor) == "First answer.<|im_end|>\nSecond answer.<|im_end|>\n"
    labels, ids = feature["labels"], feature["input_ids"]
    assert torch.equal(labels[labels != IGNORE_INDEX], ids[labels != IGNORE_INDEX])
    # The header that a generation prompt ends with is not learned.
    first = int((labels != IGNORE_INDEX).nonzero()[0])
    assert tiny_processor.tokenizer.decode(ids[first - 3 : first]) == "<|im_start|>assistant\n"


def test_the_token_stream_is_the_processors(process: Process, tiny_processor: Any):
    """Ids, pixels and grids are what upstream's processor gives for the same chat, placeholders replaced by 0."""
    photo = load_photo("coffee", 96)
    chat = [user(photo, "What?"), assistant("Coffee.")]
    feature = process(chat)
    text = tiny_processor.apply_chat_template(chat, tokenize=False)
    expected = tiny_processor(text=[text], images=[photo], return_tensors="pt")
    ids = expected["input_ids"][0]
    placeholder = ids == tiny_processor.image_token_id
    assert torch.equal(feature["image_mask"], placeholder) and not feature["video_mask"].any()
    assert torch.equal(feature["input_ids"], ids.masked_fill(placeholder, 0))
    torch.testing.assert_close(feature["pixel_values"], expected["pixel_values"], rtol=0, atol=0)
    assert torch.equal(feature["image_grid_thw"], expected["image_grid_thw"])
    assert int(placeholder.sum()) == int(feature["image_grid_thw"].prod()) // 4


@pytest.mark.parametrize("kind", ["image", "video"])
def test_positions_and_shapes(process: Process, tiny_processor: Any, kind: str):
    if kind == "image":
        chat = [user(load_photo("rocket", 96), "What?"), assistant("A rocket.")]
    else:
        clip = load_clip(num_frames=4, max_side=96)
        part = {"type": "video", "video": clip.frames, "video_metadata": clip.metadata()}
        chat = [{"role": "user", "content": [part]}, assistant("Cyclists.")]
    feature = process(chat)
    length = feature["input_ids"].numel()
    shapes = {key: tuple(feature[key].shape) for key in ("labels", "attention_mask", "position_ids", f"{kind}_mask")}
    assert shapes == {"labels": (length,), "attention_mask": (length,), "position_ids": (3, length)} | {
        f"{kind}_mask": (length,)
    }
    marked = torch.where(feature[f"{kind}_mask"], 7, feature["input_ids"])
    marked[(marked == 7) & ~feature[f"{kind}_mask"]] = 8
    expected, _ = get_rope_index(
        marked[None],
        feature.get("image_grid_thw"),
        feature.get("video_grid_thw"),
        spatial_merge_size=2,
        image_token_id=7 if kind == "image" else -1,
        video_token_id=7 if kind == "video" else -1,
    )
    assert torch.equal(feature["position_ids"], expected[:, 0])
    suffix = "_videos" if kind == "video" else ""
    assert feature[f"pixel_values{suffix}"].shape == (int(feature[f"{kind}_grid_thw"].prod()), 3 * 2 * 16 * 16)


def test_video_from_a_file_has_timestamps(process: Process, tiny_processor: Any):
    """Two frames a second of ten seconds at 25 per second: 20 frames in pairs, each pair told by its mean time."""
    part = {"type": "video", "video": str(clip_path())}
    feature = process([{"role": "user", "content": [part]}, assistant("Cyclists.")])
    assert feature["video_grid_thw"][0, 0] == 10
    text = tiny_processor.tokenizer.decode(feature["input_ids"][~feature["video_mask"]])
    assert text.count("seconds>") == 10 and "<0.3 seconds>" in text and "<9.7 seconds>" in text
    fewer = process([{"role": "user", "content": [part | {"num_frames": 4}]}, assistant("Cyclists.")])
    assert fewer["video_grid_thw"][0, 0] == 2


def test_paths_count_from_the_media_root(process: Process, cat_file: Path, monkeypatch: pytest.MonkeyPatch):
    def chat(path: str) -> list[dict[str, Any]]:
        return [{"role": "user", "content": [{"type": "image", "path": path}]}, assistant("A cat.")]

    reference = process([user(Image.open(cat_file)), assistant("A cat.")])
    for path, root in (
        (cat_file.name, cat_file.parent),
        (str(cat_file), Path("elsewhere")),
        (f"file://{cat_file}", None),
    ):
        feature = process(chat(path), media_root=root)
        assert torch.equal(feature["pixel_values"], reference["pixel_values"])


def two_images() -> list[dict[str, Any]]:
    return [
        user(load_photo("coffee", 96), "What?"),
        assistant("Coffee."),
        user(load_photo("chelsea", 96), "And that?"),
        assistant("A cat."),
    ]


def test_every_limit_leaves_images_whole(process: Process, tiny_processor: Any):
    """At every length: nothing beyond the limit, as many placeholders as the grids say, the last token is a target."""
    whole = process(two_images())
    full, first_target = whole["labels"].numel(), int((whole["labels"] != IGNORE_INDEX).nonzero()[0])
    seen = set()
    for limit in range(first_target + 1, full + 1):
        feature = process(two_images(), max_length=limit)
        length = feature["input_ids"].numel()
        images = len(feature["image_grid_thw"])
        seen.add(images)
        assert length <= limit
        assert torch.equal(feature["input_ids"], whole["input_ids"][:length])
        assert torch.equal(feature["position_ids"], whole["position_ids"][:, :length])
        assert int(feature["image_mask"].sum()) * 4 == int(feature["image_grid_thw"].prod(-1).sum())
        assert len(feature["pixel_values"]) == int(feature["image_grid_thw"].prod(-1).sum())
        assert length == full or feature["labels"][-1] != IGNORE_INDEX
    assert seen == {1, 2}


def test_a_limit_inside_an_image_can_be_an_error(process: Process):
    whole = process(two_images())
    placeholders = whole["image_mask"].nonzero().flatten()
    inside, behind = int(placeholders[-2]) + 1, int(placeholders[-1]) + 1
    with pytest.raises(ValueError, match=f"{whole['labels'].numel()} tokens, and the limit of {inside} falls inside"):
        process(two_images(), max_length=inside, on_cut_image="error")
    process(two_images(), max_length=behind, on_cut_image="error")
    process(two_images(), max_length=inside, on_cut_image="drop")
    with pytest.raises(ValueError, match="on_cut_image='keep'"):
        process(two_images(), on_cut_image="keep")


def test_a_limit_before_the_first_answer_is_an_error(process: Process):
    with pytest.raises(ValueError, match="no assistant token is among the first 12"):
        process(two_images(), max_length=12)


def broken_png() -> Image.Image:
    buffer = io.BytesIO()
    load_photo("coffee", 96).save(buffer, "png")
    return Image.open(io.BytesIO(buffer.getvalue()[:2000]))


def message(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}, assistant("Yes.")]


BAD: dict[str, tuple[Any, str]] = {
    "no messages": (None, "'messages' must be a list"),
    "empty": ([], "'messages' must be a list"),
    "no role": ([{"content": "x"}], "message 0 needs a 'role'"),
    "number as content": ([{"role": "user", "content": 3}], "message 0: content is a string or a list"),
    "unknown part": (message({"type": "audio", "audio": "x"}), "message 0: a part is of type text, image or video"),
    "text without text": (message({"type": "text"}), "message 0: a text part needs a string 'text'"),
    "no file named": (message({"type": "image"}), "message 0: the image part names no file"),
    "no such image": (message({"type": "image", "image": "gone.png"}), "image 'gone.png' cannot be read.*No such file"),
    "no such video": (message({"type": "video", "video": "gone.mp4"}), "video 'gone.mp4' cannot be read.*No such file"),
    "not an image": (message({"type": "image", "image": __file__}), "cannot be read: cannot identify image file"),
    "not a video": (message({"type": "video", "video": __file__}), "cannot be read.*Invalid data"),
    "a URL": (message({"type": "image", "image": "https://x.org/a.png"}), "not a file: download the media first"),
    "broken image": (message({"type": "image", "image": broken_png()}), "cannot be read"),
    "frames without times": (
        message({"type": "video", "video": np.zeros((4, 32, 32, 3), np.uint8)}),
        "needs 'video_metadata'",
    ),
    "control token": (message({"type": "text", "text": "a<|image_pad|>"}), r"message 0: .* token <\|image_pad\|>"),
    "no assistant": ([{"role": "user", "content": "x"}], "no assistant turn"),
    "image by the assistant": (
        [{"role": "assistant", "content": [{"type": "image", "image": "x.png"}]}],
        "message 0: an assistant's turn cannot hold the image",
    ),
    "unknown role": ([{"role": "narrator", "content": "x"}, assistant("y")], "chat template refuses.*narrator"),
}


@pytest.mark.parametrize("key", ["images", "video"])
def test_media_beside_the_messages_are_not_left_out_silently(tiny_processor: Any, key: str):
    sample = {"messages": [{"role": "user", "content": "<image> What?"}, assistant("A cat.")], key: ["cat.png"]}
    with pytest.raises(ValueError, match=f"{key} beside messages would not be read"):
        process_sample(sample, tiny_processor, make_position_id_func(2))
    process_sample(sample | {key: []}, tiny_processor, make_position_id_func(2))


@pytest.mark.parametrize("name", BAD)
def test_bad_samples_are_named(process: Process, name: str):
    messages, expected = BAD[name]
    with pytest.raises(ValueError, match=expected):
        process(messages)


def test_works_in_spawned_workers(tiny_processor: Any):
    function = partial(process_sample, processor=tiny_processor, position_id_func=make_position_id_func(2))
    sample = {"messages": [user("x"), assistant("y")]}
    copy = pickle.loads(pickle.dumps(function))
    assert torch.equal(copy(sample)["labels"], function(sample)["labels"])


def test_photos_are_turned_upright(process: Process, tmp_path: Path):
    """A camera writes the turn into EXIF; transformers' own loader obeys it too."""
    photo = load_photo("chelsea", 96).resize((128, 64))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    photo.save(tmp_path / "phone.png", exif=exif)
    for given in ("phone.png", Image.open(tmp_path / "phone.png")):
        feature = process(message({"type": "image", "image": given}), media_root=tmp_path)
        grid = feature["image_grid_thw"][0].tolist()
        assert grid[1] > grid[2], given
    upstream = transformers.image_utils.load_image(str(tmp_path / "phone.png"))
    assert np.array_equal(np.asarray(load_image("phone.png", tmp_path)), np.asarray(upstream))


def test_tools_reach_the_template(tiny_processor: Any):
    """The tiny checkpoint's renders none, and says so."""
    sample = {"messages": [user("Hello?"), assistant("Hi.")], "tools": [{"type": "function"}]}
    with pytest.raises(ValueError, match="this chat template renders no tools"):
        process_sample(sample, processor=tiny_processor, position_id_func=make_position_id_func(2))


@pytest.mark.parametrize(
    ("messages", "why"),
    [
        (message({"type": "image", "image": "x.png", "max_pixels": 9}), "max_pixels of the image part would not be"),
        (message({"type": "video", "video": "x.mp4", "nframes": 8}), "nframes of the video part would not be read"),
        ([user("Hello?"), {**assistant("Hi."), "weight": 0}], "weight=0 would not be read"),
        ([user("Hello \ud800?"), assistant("Hi.")], "the text is no Unicode"),
        (message({"type": "image", "image": "data:image/png;base64," + "A" * 9999}), "is not a file: download"),
    ],
    ids=["max_pixels", "nframes", "weight", "surrogate", "data-uri"],
)
def test_what_would_not_be_read_is_refused(process: Process, messages: list[dict[str, Any]], why: str):
    with pytest.raises(ValueError, match=why) as caught:
        process(messages)
    assert len(str(caught.value)) < 300
    given = {**assistant("Hi."), "weight": 1}
    assert process([{**user("Hello?"), "weight": 0}, given])["labels"].max() > 0
