"""Upstream's processor under this model's name, and `process_sample`: one chat sample to one training feature.

A sample is a dict with `messages` in the format of the Hugging Face chat templates:

    {"messages": [
        {"role": "user", "content": [{"type": "image", "image": "cat.png"}, {"type": "text", "text": "Who is this?"}]},
        {"role": "assistant", "content": "Chelsea, a cat."}]}

Media are paths (relative ones count from the JSONL file's folder) or objects: a PIL image; for a video, frames
(T, height, width, 3) with `video_metadata`. Text, placeholders and timestamps are the processor's own; what is added is
what training needs: labels on assistant turns alone, positions, masks, and a length limit that leaves images whole.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import av
import jinja2
import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import Qwen3VLProcessor as Qwen3VLMoeProcessor
from transformers.video_utils import VideoMetadata

from modeling.data.collator import IGNORE_INDEX
from modeling.qwen3_vl_moe.position_ids import IMAGE_INPUT_INDEX, VIDEO_INPUT_INDEX

ON_CUT_IMAGE = ("drop", "error")
MEDIA_KEYS = ("image", "images", "video", "videos")  # where other formats keep what here stands in a message
VIDEO_KEYS = {"fps", "num_frames", "video_metadata"}
WEIGHT_KEYS = ("loss", "loss_weight", "train", "weight")  # every assistant's turn is trained on alike
# A message that holds one of these could open a turn or an image of its own.
CONTROL_TOKENS = (
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
_CONTROL = re.compile("|".join(map(re.escape, CONTROL_TOKENS)))
# What PIL raises for files that are no images, cut short, or absurdly large.
_IMAGE_ERRORS = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


def _media_path(value: Any, media_root: Path | None) -> Path:
    if not isinstance(value, str | Path):
        raise ValueError(f"an image or video is a path or an object of pixels, got {type(value).__name__}")
    if str(value).startswith(("http://", "https://", "data:")):
        raise ValueError(f"{str(value)[:60]!r} is not a file: download the media first and name the path")
    path = Path(str(value).removeprefix("file://"))
    return path if media_root is None else media_root / path


def load_image(value: Any, media_root: Path | None = None) -> Image.Image:
    """A PIL image, or the path of one, as RGB, turned upright where its EXIF data say how it was taken.

    Raises:
        ValueError: no such file, not an image, or a broken one.
    """
    try:
        if isinstance(value, Image.Image):
            return ImageOps.exif_transpose(value).convert("RGB")
        with Image.open(_media_path(value, media_root)) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except _IMAGE_ERRORS as error:
        raise ValueError(f"image {value!r:.80} cannot be read: {error}") from error


def load_video(
    value: Any, video_processor: Any, media_root: Path | None = None, **sampling: Any
) -> tuple[np.ndarray, VideoMetadata]:
    """Decode the frames that the video processor samples.

    Args:
        value: path of a video.
        sampling: `fps` or `num_frames`, where the sample asks for other than the processor's own.

    Returns:
        Frames (T, height, width, 3) uint8 and their metadata, from which the processor makes timestamps.

    Raises:
        ValueError: no such file, not a video, or fewer frames than its header tells.
    """
    path = _media_path(value, media_root)
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError(f"video {value!r} holds no video stream")
            stream = container.streams.video[0]
            # Some containers do not count their frames.
            total = stream.frames or sum(1 for packet in container.demux(stream) if packet.size)
            if not stream.average_rate or not total:
                raise ValueError(f"video {value!r} has {total} frames and the rate {stream.average_rate}")
            metadata = VideoMetadata(
                total_num_frames=total,
                fps=float(stream.average_rate),
                duration=total / float(stream.average_rate),
                height=stream.height,
                width=stream.width,
            )
            indices = video_processor.sample_frames(metadata=metadata, **sampling).tolist()
            container.seek(0)
            wanted = set(indices)
            decoded: dict[int, np.ndarray] = {}
            for number, frame in enumerate(container.decode(stream)):
                if number in wanted:
                    decoded[number] = frame.to_ndarray(format="rgb24")
                if number >= indices[-1]:
                    break
    except (av.FFmpegError, OSError) as error:
        raise ValueError(f"video {value!r} cannot be read: {error}") from error
    missing = sorted(wanted - decoded.keys())
    if missing:
        raise ValueError(f"video {value!r} ends early: its header counts {total} frames, but {missing[0]} is not there")
    metadata.frames_indices = indices
    return np.stack([decoded[index] for index in indices]), metadata


def check_messages(messages: Any) -> list[dict[str, Any]]:
    """Messages with every content as a list of parts, {"type": "text" | "image" | "video", ...}.

    Raises:
        ValueError: what is wrong, with the message's number.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"'messages' must be a list of at least one message, got {messages!r:.80}")
    checked = []
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or "content" not in message:
            raise ValueError(f"message {number} needs a 'role' and a 'content', got {message!r:.80}")
        weights = WEIGHT_KEYS if message["role"] == "assistant" else ()
        if unread := [key for key in weights if message.get(key) not in (None, 1)]:
            raise ValueError(
                f"message {number}: {unread[0]}={message[unread[0]]!r} would not be read, every assistant's turn is "
                "trained on; leave the message out, or the key"
            )
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, list):
            raise ValueError(f"message {number}: content is a string or a list of parts, got {type(parts).__name__}")
        for part in parts:
            _check_part(part, number, message["role"])
        checked.append({**message, "content": [dict(part) for part in parts]})
    return checked


def _check_part(part: Any, number: int, role: str) -> None:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind not in ("text", "image", "video"):
        raise ValueError(f"message {number}: a part is of type text, image or video, got {part!r:.80}")
    if kind != "text":
        if role == "assistant":
            raise ValueError(f"message {number}: an assistant's turn cannot hold the {kind} that the model would write")
        known = {"type", kind, "path", "url"} | (VIDEO_KEYS if kind == "video" else set())
        if unread := sorted(key for key, value in part.items() if key not in known and value is not None):
            raise ValueError(f"message {number}: {', '.join(unread)} of the {kind} part would not be read; remove them")
        if _media(part) is None:
            raise ValueError(f"message {number}: the {kind} part names no file; give {kind!r}, 'path' or 'url'")
    elif not isinstance(part.get("text"), str):
        raise ValueError(f"message {number}: a text part needs a string 'text', got {part.get('text')!r:.80}")
    elif found := _CONTROL.search(part["text"]):
        raise ValueError(f"message {number}: the text contains the control token {found.group()}; remove or escape it")


def _media(part: Mapping[str, Any]) -> Any:
    """What a part names, under its type, `path` or `url`."""
    return next((part[key] for key in (part["type"], "path", "url") if part.get(key) is not None), None)


def _run_processor(
    processor: Any, messages: list[dict[str, Any]], tools: Any, media_root: Path | None
) -> Mapping[str, Any]:
    """The processor's outputs for one chat, (1, L) and pixels."""
    parts = [part for message in messages for part in message["content"]]
    images = [load_image(_media(part), media_root) for part in parts if part["type"] == "image"]
    videos, metadata = [], []
    for part in (part for part in parts if part["type"] == "video"):
        value = _media(part)
        if isinstance(value, str | Path):
            sampling = {key: part[key] for key in ("fps", "num_frames") if key in part}
            value, own = load_video(value, processor.video_processor, media_root, **sampling)
        elif "video_metadata" in part:
            own = part["video_metadata"]
        else:
            raise ValueError("a video given as frames needs 'video_metadata' (fps, frames_indices) for its timestamps")
        videos.append(value)
        metadata.append(own)
    arguments: dict[str, Any] = {}
    if videos:
        arguments = {"videos": videos, "video_metadata": metadata, "do_sample_frames": False}
    try:
        text = processor.apply_chat_template(messages, tools=tools, tokenize=False)
        text.encode()  # JSON can hold half of a surrogate pair, UTF-8 cannot
    except UnicodeEncodeError as error:
        raise ValueError(f"the text is no Unicode: {error}") from error
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template refuses the messages: {error}") from error
    return processor(text=[text], images=images or None, return_tensors="pt", **arguments)


def assistant_labels(input_ids: torch.Tensor, tokenizer: Any) -> torch.Tensor:
    """Labels (L,): assistant turns' own tokens, their <|im_end|> and the newline behind it; -100 elsewhere.

    The header `<|im_start|>assistant\\n` is the prompt's, never a target. VeOmni's template marks the same tokens.
    """
    start, end, assistant = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>", "assistant"])
    ids = input_ids.tolist()
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    opened = [i for i, token in enumerate(ids) if token == start]
    for turn, following in zip(opened, [*opened[1:], len(ids)], strict=True):
        if ids[turn + 1 : turn + 2] != [assistant]:
            continue
        if end not in ids[turn:following]:
            raise ValueError("the chat template left an assistant's turn without <|im_end|>; it cannot be trained on")
        labels[turn + 3 : following] = input_ids[turn + 3 : following]
    return labels


def _kept_length(labels: torch.Tensor, placeholders: torch.Tensor, max_length: int | None, on_cut_image: str) -> int:
    """Tokens to keep of a sample: all, or up to the last target that fits.

    What follows that target teaches nothing, so an image that the limit falls into, which some later turn was to be
    about, goes as a whole.
    """
    length = labels.numel()
    if max_length is None or length <= max_length:
        return length
    cut = bool(placeholders[max_length - 1] and placeholders[max_length])
    if cut and on_cut_image == "error":
        raise ValueError(
            f"the sample has {length} tokens, and the limit of {max_length} falls inside an image or video; raise the "
            "limit, lower the processor's pixels, or let such images be dropped"
        )
    targets = (labels[:max_length] != IGNORE_INDEX).nonzero()
    if not targets.numel():
        raise ValueError(
            f"the sample has {length} tokens, and no assistant token is among the first {max_length}; raise the limit "
            "or lower the processor's pixels"
        )
    return int(targets[-1]) + 1


def _visuals(outputs: Mapping[str, Any], kind: str, tokens: int, merge: int) -> dict[str, torch.Tensor]:
    """Pixels and grids of the images (or videos) whose placeholders are among the first `tokens` of their kind."""
    pixel_key, grid_key = (
        ("pixel_values", "image_grid_thw")
        if kind == "image"
        else (
            "pixel_values_videos",
            "video_grid_thw",
        )
    )
    if grid_key not in outputs:
        return {}
    grids = outputs[grid_key]
    ends = (grids.prod(-1) // merge**2).cumsum(0)
    count = int((ends <= tokens).sum())
    if (int(ends[count - 1]) if count else 0) != tokens:
        raise ValueError(
            f"{tokens} {kind} tokens are kept, which are no whole {kind}s of {ends.diff(prepend=ends[:1] * 0)}"
        )
    if not count:
        return {}
    patches = int(grids[:count].prod(-1).sum())
    return {pixel_key: outputs[pixel_key][:patches].clone(), grid_key: grids[:count].clone()}


def process_sample(
    sample: Mapping[str, Any],
    processor: Any,
    position_id_func: Callable[..., dict[str, torch.Tensor]],
    *,
    max_length: int | None = None,
    on_cut_image: str = "drop",
    media_root: Path | None = None,
) -> dict[str, torch.Tensor]:
    """A chat sample as a training feature (ARCHITECTURE: "Feature and batch contract").

    Args:
        sample: a dict with `messages`, and `tools` for the chat template; see the module's docstring.
        processor: `Qwen3VLMoeProcessor`, with its chat template.
        position_id_func: from `model.get_position_id_func()`.
        max_length: tokens to keep. A longer sample ends with the last target that fits; an image is kept whole or goes.
        on_cut_image: "drop" the image that the limit falls into, or "error".
        media_root: folder that relative paths count from; None takes the working directory.

    Returns:
        On the CPU: input_ids, labels, attention_mask (L,) int64, position_ids (3, L) int64, image_mask and video_mask
        (L,) bool; where there are images or videos pixel_values, pixel_values_videos (P, C) float32 and image_grid_thw,
        video_grid_thw (n, 3) int64.

    Raises:
        ValueError: whatever is wrong with the sample; says what.
    """
    if on_cut_image not in ON_CUT_IMAGE:
        raise ValueError(f"on_cut_image={on_cut_image!r}; choose one of {', '.join(map(repr, ON_CUT_IMAGE))}.")
    if beside := [key for key in MEDIA_KEYS if sample.get(key)]:
        raise ValueError(
            f"{', '.join(beside)} beside messages would not be read; name each where it stands in a message's content: "
            '{"type": "image", "image": "path"}'
        )
    messages = check_messages(sample.get("messages"))
    outputs = _run_processor(processor, messages, sample.get("tools") or None, media_root)
    ids = outputs["input_ids"][0]
    image_mask, video_mask = ids == processor.image_token_id, ids == processor.video_token_id
    labels = assistant_labels(ids, processor.tokenizer)
    if not (labels[1:] != IGNORE_INDEX).any():
        raise ValueError("the sample has no assistant turn with text, so there is nothing to learn")
    length = _kept_length(labels, image_mask | video_mask, max_length, on_cut_image)
    ids, labels, image_mask, video_mask = (x[:length] for x in (ids, labels, image_mask, video_mask))
    visuals = {
        **_visuals(outputs, "image", int(image_mask.sum()), processor.image_processor.merge_size),
        **_visuals(outputs, "video", int(video_mask.sum()), processor.video_processor.merge_size),
    }
    marked = ids.masked_fill(image_mask, IMAGE_INPUT_INDEX).masked_fill(video_mask, VIDEO_INPUT_INDEX)
    positions = position_id_func(
        input_ids=marked[None],
        image_grid_thw=visuals.get("image_grid_thw"),
        video_grid_thw=visuals.get("video_grid_thw"),
        attention_mask=torch.ones_like(marked)[None],
    )["position_ids"]  # (3, 1, L)
    return {
        "input_ids": ids.masked_fill(image_mask | video_mask, 0),
        "labels": labels.clone(),
        "attention_mask": torch.ones_like(ids),
        "position_ids": positions[:, 0].clone(),
        "image_mask": image_mask.clone(),
        "video_mask": video_mask.clone(),
        **visuals,
    }


__all__ = ["Qwen3VLMoeProcessor", "process_sample"]
