"""scripts/quickstart.py: from nothing to a reply, with a non-zero exit when the models disagree."""

from pathlib import Path

import pytest
import torch

from scripts import parity_report, quickstart
from tests import media


@pytest.fixture(autouse=True)
def _small_chats(monkeypatch: pytest.MonkeyPatch) -> None:
    chats = [{name: media.case_messages(name) for name in ("text", "image", "video")}]
    monkeypatch.setattr(parity_report, "report_chats", lambda: chats)
    monkeypatch.setattr(quickstart, "NEW_TOKENS", 4)


def test_quickstart_runs_and_may_be_run_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "left over").write_text("from an earlier run")
    assert quickstart.main([str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "Everything agrees" in printed and "transformers generates the same tokens" in printed
    assert (tmp_path / "parity.png").exists() and (tmp_path / "veomni" / "config.json").exists()


def test_quickstart_fails_when_replies_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    replies = iter([torch.tensor([1, 2]), torch.tensor([1, 3])])
    monkeypatch.setattr(quickstart, "generate", lambda model, inputs: next(replies))
    monkeypatch.setattr(quickstart, "compare", lambda hub, converted, out: True)
    assert quickstart.main([str(tmp_path)]) == 1
    assert "FAILED  transformers generates other tokens" in capsys.readouterr().out
