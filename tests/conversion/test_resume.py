"""Whatever stops a conversion, its output never looks whole, and --resume ends with the bytes of an undisturbed run."""

import errno
import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from conversion import hf_to_veomni, shard_io, verify
from conversion.checkpoint import HF_INDEX, JOURNAL, MANIFEST, open_checkpoint
from conversion.errors import InputError
from tests.conversion import crash
from tests.conversion.synthetic import toy_config, write_checkpoint

OPTIONS = ["--quiet", "--max-shard-size", "60KB", "--workers", "2"]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("resume") / "in"
    write_checkpoint(folder, "hub", toy_config())
    return folder


@pytest.fixture(scope="module")
def expected(source) -> dict[str, bytes]:
    """The files of an undisturbed run."""
    output = source.parent / "undisturbed"
    assert hf_to_veomni.main([str(source), str(output), *OPTIONS]) == 0
    files = contents(output)
    assert sum(name.endswith(".safetensors") for name in files) > 5
    return files


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def check_interrupted(output: Path, expected: dict[str, bytes]) -> None:
    """No reader takes the folder for a whole checkpoint, unless it is one."""
    if not output.exists():
        return
    there = contents(output)
    for name, data in there.items():
        if name.endswith(".safetensors"):
            assert data == expected[name], f"{name} has its final name, but not its final content"
    if HF_INDEX in there:
        # The index, by which transformers finds a checkpoint, comes when all weights are there.
        assert all(there.get(name) == data for name, data in expected.items() if name not in (MANIFEST,))
    if MANIFEST not in there or JOURNAL in there:
        with pytest.raises(InputError):
            open_checkpoint(output)
    else:
        assert there == expected


def resume_and_check(source: Path, output: Path, expected: dict[str, bytes]) -> None:
    assert hf_to_veomni.main([str(source), str(output), *OPTIONS, "--resume"]) == 0
    assert contents(output) == expected


def test_killed_before_every_step(tmp_path, source, expected):
    counted = tmp_path / "steps"
    process = crash.start([str(source), str(tmp_path / "whole"), *OPTIONS], counted=counted)
    process.join()
    assert process.exitcode == 0
    steps = int(counted.read_text())
    assert steps > 50
    for step in range(1, steps + 1):
        output = tmp_path / "out"
        process = crash.start([str(source), str(output), *OPTIONS], die_at=step)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        check_interrupted(output, expected)
        resume_and_check(source, output, expected)
        shutil.rmtree(output, ignore_errors=True)


def test_killed_at_random_moments(tmp_path, source, expected):
    arguments = [str(source), str(tmp_path / "timed"), *OPTIONS]
    started = time.monotonic()
    crash.start(arguments).join()
    seconds = time.monotonic() - started
    moments = random.Random(0)
    killed = 0
    for i in range(50):
        output = tmp_path / f"out{i}"
        process = crash.start([str(source), str(output), *OPTIONS])
        process.join(moments.uniform(0, seconds))
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        check_interrupted(output, expected)
        resume_and_check(source, output, expected)
        shutil.rmtree(output)
    assert killed > 10


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals(tmp_path, source, expected, number):
    stopped = 0
    for i in range(20):
        output = tmp_path / f"out{i}"
        process = crash.start([str(source), str(output), *OPTIONS])
        while process.is_alive() and not (output / JOURNAL).exists():
            time.sleep(0.001)
        time.sleep(0.002 * i)
        os.kill(process.pid, number)
        process.join()
        if process.exitcode:
            assert process.exitcode == 128 + number
            stopped += 1
            check_interrupted(output, expected)
        resume_and_check(source, output, expected)
        if stopped == 3:
            return
    pytest.fail(f"only {stopped} of 20 runs were stopped before they were done")


def fail_after(monkeypatch, name: str, calls: int, number: int) -> None:
    """The system call os.`name` of shard_io fails with `number` after some calls."""
    real, count = getattr(os, name), 0

    def failing(*args):
        nonlocal count
        count += 1
        if count > calls:
            raise OSError(number, os.strerror(number))
        return real(*args)

    monkeypatch.setattr(shard_io.os, name, failing)


@pytest.mark.parametrize(
    ("call", "number", "message"),
    [
        ("pwrite", errno.ENOSPC, "writing to {output} failed: No space left on device"),
        ("pwrite", errno.EIO, "writing to {output} failed: Input/output error"),
        ("preadv", errno.EIO, "failed: Input/output error"),
    ],
)
def test_a_failing_disk(tmp_path, source, expected, monkeypatch, capsys, call, number, message):
    output = tmp_path / "out"
    with monkeypatch.context() as patched:
        fail_after(patched, call, 60, number)
        assert hf_to_veomni.main([str(source), str(output), *OPTIONS]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message.format(output=output) in error
    check_interrupted(output, expected)
    assert any(name.endswith(".safetensors") for name in contents(output))
    resume_and_check(source, output, expected)


def test_a_full_disk_for_real(tmp_path, source, expected, capsys):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {mounted.stderr.decode().strip()}")
    try:
        assert hf_to_veomni.main([str(source), str(disk / "out"), *OPTIONS]) == 1
        assert "choose another disk" in capsys.readouterr().err
        assert not (disk / "out").exists()
        # Room when it is asked about, none when it is written.
        assert subprocess.run(["mount", "-o", "remount,size=2m", str(disk)]).returncode == 0
        (disk / "other").write_bytes(bytes(1_700_000))
        real = os.statvfs
        try:
            os.statvfs = lambda path: os.statvfs_result((4096, 4096, *[10**6] * 6, 0, 255))
            assert hf_to_veomni.main([str(source), str(disk / "out"), *OPTIONS]) == 1
        finally:
            os.statvfs = real
        assert "No space left on device" in capsys.readouterr().err
        check_interrupted(disk / "out", expected)
        (disk / "other").unlink()
        resume_and_check(source, disk / "out", expected)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def half_done(source: Path, output: Path, monkeypatch) -> list[str]:
    """An output that stopped in the middle; the names of its finished files."""
    with monkeypatch.context() as patched:
        fail_after(patched, "pwrite", 100, errno.EIO)
        assert hf_to_veomni.main([str(source), str(output), *OPTIONS]) == 1
    lines = (output / JOURNAL).read_text().splitlines()[1:]
    return [json.loads(line)["name"] for line in lines]


def test_resume_keeps_what_is_proven_and_rewrites_what_is_not(tmp_path, source, expected, monkeypatch, capsys):
    output = tmp_path / "out"
    finished = half_done(source, output, monkeypatch)
    assert len(finished) >= 4
    kept, flipped, cut, gone = (output / name for name in finished[:4])
    with open(flipped, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    os.truncate(cut, cut.stat().st_size - 8)
    gone.unlink()
    before = kept.stat().st_ino
    capsys.readouterr()
    options = [option for option in OPTIONS if option != "--quiet"]
    assert hf_to_veomni.main([str(source), str(output), *options, "--resume"]) == 0
    error = capsys.readouterr().err
    for path in (flipped, cut, gone):
        assert f"{path.name} is not what it was when it was finished; it is written again" in error
    assert f"{len(finished) - 3} of {len([n for n in expected if n.endswith('.safetensors')])} files are done" in error
    assert contents(output) == expected
    assert kept.stat().st_ino == before


def test_a_torn_journal_line_is_a_file_not_done(tmp_path, source, expected, monkeypatch):
    output = tmp_path / "out"
    half_done(source, output, monkeypatch)
    journal = output / JOURNAL
    os.truncate(journal, journal.stat().st_size - 20)
    resume_and_check(source, output, expected)


def test_resume_of_a_finished_output_proves_it_again(tmp_path, source, expected, capsys):
    output = tmp_path / "out"
    resume_and_check(source, output, expected)  # nothing there yet: it begins
    resume_and_check(source, output, expected)
    name = sorted(name for name in expected if name.endswith(".safetensors"))[2]
    (output / name).write_bytes(expected[name][:-1] + b"\0")
    capsys.readouterr()
    assert verify.main(["--hashes", str(output), "--quiet"]) == 3
    assert name in capsys.readouterr().err
    resume_and_check(source, output, expected)
    assert verify.main(["--hashes", str(output), "--quiet"]) == 0


def test_resume_refuses_another_conversion(tmp_path, source, monkeypatch, capsys):
    output = tmp_path / "out"
    half_done(source, output, monkeypatch)
    before = contents(output)
    for options in (["--dtype", "float32"], ["--target", "ep-sharded", "--ep-size", "2"], ["--max-shard-size", "50KB"]):
        assert hf_to_veomni.main([str(source), str(output), *OPTIONS, "--resume", *options]) == 2
        assert "was begun from another source, or with another target" in capsys.readouterr().err
    changed = tmp_path / "changed"
    shutil.copytree(source, changed)
    shard = sorted(changed.glob("*.safetensors"))[0]
    os.utime(shard, ns=(0, 0))
    assert hf_to_veomni.main([str(changed), str(output), *OPTIONS, "--resume"]) == 2
    assert contents(output) == before


def test_overwrite_replaces_and_leaves_no_old_weights(tmp_path, source, expected):
    output = tmp_path / "out"
    assert hf_to_veomni.main([str(source), str(output), "--quiet"]) == 0
    assert hf_to_veomni.main([str(source), str(output), *OPTIONS]) == 2
    assert hf_to_veomni.main([str(source), str(output), *OPTIONS, "--overwrite"]) == 0
    assert contents(output) == expected


def test_two_runs_at_once(tmp_path, source, capsys):
    output = tmp_path / "out"
    output.mkdir()
    fd = os.open(output, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    try:
        assert hf_to_veomni.main([str(source), str(output), *OPTIONS]) == 2
        assert f"another conversion is writing to {output}" in capsys.readouterr().err
    finally:
        os.close(fd)
    assert list(output.iterdir()) == []
