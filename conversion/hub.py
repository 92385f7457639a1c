"""INPUT as a folder, whether it is one or the id of a repository on the Hugging Face Hub."""

import re
from pathlib import Path

from conversion.errors import InputError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Copies of the weights in other formats.
_IGNORED = ["*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.onnx", "*.h5", "*.msgpack", "original/*"]


def resolve_input(text: str, revision: str | None = None) -> tuple[Path, str]:
    """The folder to read, and what to record as its origin; downloads a Hub id through huggingface_hub's cache.

    An interrupted download goes on where it stopped when it is asked for again. Raises InputError when `text` is
    neither a folder nor a Hub id, and when the Hub cannot be reached and the cache does not hold all of it.
    """
    path = Path(text)
    if path.exists():
        if not path.is_dir():
            raise InputError(f"{text} is a file; give the folder that holds config.json and the .safetensors files")
        return path, str(path.resolve())
    if not _HUB_ID.fullmatch(text):
        raise InputError(f"{text}: no such folder, and not of the form of a Hub id (owner/name)")
    # Imported here: it takes memory that a conversion of a folder does not need.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    # httpx's, by whichever package name huggingface_hub has it.
    transport_error: type[Exception] = HfHubHTTPError.__bases__[0]
    try:
        folder = Path(snapshot_download(text, revision=revision, ignore_patterns=_IGNORED))
    except LocalEntryNotFoundError as error:
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"{text} is no folder here, and the Hub cannot be reached for a repository of that name, of which the "
            f"cache holds no complete copy ({reason})"
        ) from None
    except (transport_error, OSError, HFValidationError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"{text} cannot be downloaded from the Hub: {reason}") from None
    return folder, f"hub:{text}@{folder.name}"
