"""Real media for the tests: see scripts/sample_media.py, which quickstart and the parity report use too."""

from scripts.sample_media import (
    CASES,
    PHOTOS,
    Clip,
    assistant,
    case_inputs,
    case_messages,
    chat_inputs,
    load_clip,
    load_photo,
    user,
)

__all__ = [
    "CASES",
    "PHOTOS",
    "Clip",
    "assistant",
    "case_inputs",
    "case_messages",
    "chat_inputs",
    "load_clip",
    "load_photo",
    "user",
]
