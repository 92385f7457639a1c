"""What the commands say: the dry run's plan, progress, summaries, Hub ids."""

import fcntl
import json
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import HFValidationError

from conversion import hf_to_veomni, progress, veomni_to_hf
from conversion.progress import Progress, duration
from scripts.benchmarks.benchmark_conversion import make_checkpoint, published_config
from tests.conversion.synthetic import assert_same, read_logical, write_checkpoint

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "in"
    write_checkpoint(folder, "hub")
    return folder


def test_dry_run_writes_nothing_and_tells_everything(tmp_path, source, capsys):
    words = [str(source), str(tmp_path / "out"), "--max-shard-size", "100KB", "--dry-run"]
    assert hf_to_veomni.main([*words, "--target", "ep-sharded", "--ep-size", "2"]) == 0
    shown = capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    assert hf_to_veomni.main([*words[:-1], "--target", "ep-sharded", "--ep-size", "2", "--quiet"]) == 0
    assert f"{source}: hub, 2 file(s), 0.00 GB" in shown
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert f"to ep-sharded (ep size 2): {len(files)} file(s), 0.00 GB, 3 companion file(s)" in shown
    for path in files:  # what was planned is what was written, to the byte
        line = next(line for line in shown.splitlines() if line.startswith(path.name))
        assert line.split()[-1] == f"{path.stat().st_size:,}"
    for word in ("disk:", "memory: at most", "time:   about"):
        assert word in shown


def test_dry_run_of_the_235B_model(tmp_path, capsys):
    """A sparse checkpoint of the published shape, 471 GB: the plan, and that the disk is too small for it."""
    total = make_checkpoint(tmp_path / "in", published_config("235B"), sparse=True)
    assert 470e9 < total < 472e9
    command = [sys.executable, str(REPO / "conversion/hf_to_veomni.py"), "in", "out", "--dry-run", "--max-ram", "512MB"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode in (0, 1), done.stderr
    assert done.stdout.count(".safetensors") == 96 and "471.34 GB" in done.stdout
    assert done.returncode == 0 or "choose another disk" in done.stderr
    assert not (tmp_path / "out").exists()


def test_summary_as_json(tmp_path, source, capsys):
    words = [str(source), str(tmp_path / "out")]
    assert hf_to_veomni.main([*words, "--json", "-"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["source_layout"], printed["target_layout"], printed["tensors"]) == ("hub", "fused", 105)
    assert printed["written_bytes"] == sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert hf_to_veomni.main([*words, "--resume", "--json", str(tmp_path / "summary.json")]) == 0
    assert "1 file(s) (1 reused), 0.00 GB written" in capsys.readouterr().out
    written = json.loads((tmp_path / "summary.json").read_text())
    assert written["files_reused"] == 1 and written["written_bytes"] == 0


def test_a_summary_that_cannot_be_written_stops_before_the_work(tmp_path, source, capsys):
    for file in (tmp_path / "nowhere" / "summary.json", tmp_path):
        assert hf_to_veomni.main([str(source), str(tmp_path / "out"), "--json", str(file)]) == 2
        assert f"--json {file} cannot be written" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_quiet_is_quiet(tmp_path, source, capfd):
    assert hf_to_veomni.main([str(source), str(tmp_path / "out"), "--quiet"]) == 0
    assert capfd.readouterr() == ("", "")


def test_plain_lines_without_a_terminal(capsys, monkeypatch):
    now = iter([0.0, 4.0, 12.0, 13.0, 25.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    with Progress(100 * 10**9, quiet=False, done=10 * 10**9) as shown:
        for _ in range(4):
            shown.advance(6 * 10**9)
    assert capsys.readouterr().err.splitlines() == [
        "22.0 of 100.0 GB, 1.00 GB/s, 1 min 18 s left",
        "34.0 of 100.0 GB, 0.96 GB/s, 1 min 9 s left",
    ]


def test_durations():
    assert [duration(s) for s in (0.4, 59.4, 61, 3600, 7512)] == ["0 s", "59 s", "1 min 1 s", "1 h 0 min", "2 h 5 min"]


def test_a_bar_on_a_terminal(tmp_path, source):
    """In a real pseudo-terminal: bytes, rate and time left."""
    main, other = pty.openpty()
    fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    command = [sys.executable, str(REPO / "conversion/hf_to_veomni.py"), str(source), str(tmp_path / "out")]
    process = subprocess.Popen(command, stderr=other, stdout=subprocess.PIPE)
    os.close(other)
    shown = b""
    try:
        while block := os.read(main, 1 << 16):
            shown += block
    except OSError:  # the terminal's other side is closed
        pass
    os.close(main)
    assert process.wait() == 0
    assert b"100%" in shown and b"B/s]" in shown


def test_hub_ids_are_downloaded(tmp_path, capsys, monkeypatch):
    commit = "0123456789abcdef"
    logical = write_checkpoint(tmp_path / "cache" / commit, "hub")
    asked = []

    def snapshot_download(repo_id, revision, ignore_patterns):
        asked.append((repo_id, revision))
        assert "*.bin" in ignore_patterns
        return str(tmp_path / "cache" / commit)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    words = ["owner/Qwen3-VL-30B-A3B", str(tmp_path / "out"), "--revision", "main", "--quiet"]
    assert hf_to_veomni.main(words) == 0
    assert asked == [("owner/Qwen3-VL-30B-A3B", "main")]
    manifest = json.loads((tmp_path / "out" / "veomni_manifest.json").read_text())
    assert manifest["source"]["origin"] == f"hub:owner/Qwen3-VL-30B-A3B@{commit}"
    assert_same(read_logical(tmp_path / "out"), logical)


def test_hub_ids_offline(tmp_path, capsys, monkeypatch):
    """huggingface_hub's own answer when it may not ask the network: nothing of that name in the cache."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for command in (hf_to_veomni, veomni_to_hf):
        assert command.main(["owner/no-such-model", str(tmp_path / "out")]) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: owner/no-such-model is no folder here, and the Hub cannot be reached")
        assert error.count("\n") == 1


@pytest.mark.parametrize("error", [HFValidationError("bad name"), ConnectionError("reset by peer"), OSError("disk")])
def test_downloads_that_fail(tmp_path, capsys, monkeypatch, error):
    def snapshot_download(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert hf_to_veomni.main(["owner/model", str(tmp_path / "out")]) == 1
    assert f"owner/model cannot be downloaded from the Hub: {error}" in capsys.readouterr().err
