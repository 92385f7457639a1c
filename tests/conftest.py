"""What every test shares: no network, and one tiny checkpoint per session."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def tiny_hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint in the published layout, fp32, seed 0. Read only: write elsewhere."""
    from scripts.make_tiny_checkpoint import make_tiny_checkpoint

    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "hub")


@pytest.fixture(scope="session")
def tiny_fused(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model in the `fused` layout, stamped."""
    from scripts.make_tiny_checkpoint import make_tiny_checkpoint

    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "fused", layout="fused")


@pytest.fixture(scope="session")
def tiny_processor(tiny_hub: Path) -> Any:
    """The Qwen3VLProcessor of `tiny_hub`."""
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(tiny_hub)
