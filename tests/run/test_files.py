"""Files on systems with other rules: no flush of what is open for reading, no replacing of what is open, no UTF-8."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ultralytics.utils import LOGGER

from yolo_cwd.run import files
from yolo_cwd.run.files import atomic_checkpoints, atomic_strip, write_atomic
from yolo_cwd.run.results import drop_rows_after
from yolo_cwd.tasks import TASKS
from yolo_cwd.view.report import read_curves

fcntl = pytest.importorskip("fcntl", reason="how a file has been opened cannot be asked here")


@pytest.fixture
def flushed(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What has been flushed to the disk, by an `fsync` that is as strict as that of Windows."""
    contents: list[bytes] = []
    fsync = os.fsync

    def strict(descriptor: int) -> None:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        fsync(descriptor)
        contents.append(Path(f"/proc/self/fd/{descriptor}").read_bytes())

    monkeypatch.setattr(os, "fsync", strict)
    return contents


@pytest.mark.parametrize("content", ["größer", b"\x00\xff"], ids=["text", "bytes"])
def test_content_is_on_the_disk_before_it_has_its_name(
    content: str | bytes, flushed: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = content.encode("utf-8") if isinstance(content, str) else content
    replace = Path.replace
    at_rename: list[list[bytes]] = []
    monkeypatch.setattr(Path, "replace", lambda *a: (at_rename.append([*flushed]), replace(*a)))
    write_atomic(tmp_path / "file", content)
    assert at_rename == [[expected]]
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == {"file": expected}


@pytest.mark.parametrize(
    ("number", "passes"), [(errno.EINVAL, True), (errno.ENOSYS, True), (errno.EIO, True), (errno.ENOSPC, False)]
)
def test_a_file_system_that_refuses_to_flush_ends_no_training(
    number: int, passes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []

    def refuse(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(LOGGER, "warning", warnings.append)
    monkeypatch.setattr(os, "fsync", refuse)
    if not passes:
        with pytest.raises(OSError, match=os.strerror(number)):
            write_atomic(tmp_path / "a", "content")
        assert not list(tmp_path.iterdir())
        return
    for name in ("a", "b"):
        write_atomic(tmp_path / name, "content")
    assert {f.name: f.read_text() for f in tmp_path.iterdir()} == {"a": "content", "b": "content"}
    assert len(warnings) == 1


def test_checkpoints_are_on_the_disk_before_they_have_their_names(
    flushed: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = SimpleNamespace(wdir=tmp_path, last=tmp_path / "last.pt", best=tmp_path / "best.pt")
    moved: list[str] = []
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda source, to: (moved.append(to.name), replace(source, to)))
    with atomic_checkpoints(trainer):
        for file in (trainer.last, trainer.best, trainer.wdir / "epoch3.pt", trainer.wdir / "z.pt"):
            file.write_bytes(file.name.encode())
    assert sorted(flushed) == sorted(name.encode() for name in moved)
    assert sorted(moved) == ["best.pt", "epoch3.pt", "last.pt", "z.pt"]
    assert moved[-1] == "last.pt", "whoever finds the new one finds the others"


def test_a_checkpoint_is_stripped_aside(flushed: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def strip(file: Any, s: str, updates: Any) -> str:
        assert (tmp_path / "best.pt").read_bytes() == b"with an optimizer"
        Path(file).write_bytes(b"without")
        return "stripped"

    monkeypatch.setattr(files.ultralytics_trainer, "strip_optimizer", strip)
    (tmp_path / "best.pt").write_bytes(b"with an optimizer")
    with atomic_strip():
        assert files.ultralytics_trainer.strip_optimizer(tmp_path / "best.pt") == "stripped"
    assert files.ultralytics_trainer.strip_optimizer is strip
    assert flushed == [b"without"]
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == {"best.pt": b"without"}


def test_the_log_names_the_file_that_is_there(
    checkpoints: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, content in {"last.pt": (checkpoints / "small.pt").read_bytes(), "torn.pt": b"torn"}.items():
        (tmp_path / name).write_bytes(content)
        with atomic_strip():
            files.ultralytics_trainer.strip_optimizer(tmp_path / name)
    assert f"Optimizer stripped from {tmp_path / 'last.pt'}, " in caplog.text
    assert f"Skipping {tmp_path / 'torn.pt'}, " in caplog.text
    assert "/.last.pt" not in caplog.text
    assert sorted(file.name for file in tmp_path.iterdir()) == ["last.pt", "torn.pt"]
    assert torch.load(tmp_path / "last.pt", weights_only=False)["epoch"] == -1


@pytest.fixture
def open_elsewhere(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], list[float]]:
    """Let files be replaced after so many seconds of a clock of our own; return the times of all attempts."""
    clock = [100.0]
    attempts: list[float] = []
    replace = Path.replace

    def wait(seconds: float) -> None:
        clock[0] += seconds

    monkeypatch.setattr(files, "time", SimpleNamespace(monotonic=lambda: clock[0], sleep=wait))

    def release_after(seconds: float) -> list[float]:
        def refuse(source: Path, to: Path) -> Path:
            attempts.append(clock[0] - 100)
            if attempts[-1] < seconds:
                raise PermissionError(13, "The process cannot access the file because it is being used")
            return replace(source, to)

        monkeypatch.setattr(Path, "replace", refuse)
        return attempts

    return release_after


def test_a_reader_is_waited_for(open_elsewhere: Callable[[float], list[float]], tmp_path: Path) -> None:
    attempts = open_elsewhere(0.2)
    write_atomic(tmp_path / "file", "new")
    assert len(attempts) > 2
    assert 0.2 <= attempts[-1] < 0.3
    assert [f.read_text(encoding="utf-8") for f in tmp_path.iterdir()] == ["new"]


def test_a_reader_that_stays_is_not_waited_for_for_ever(
    open_elsewhere: Callable[[float], list[float]], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("old", encoding="utf-8")
    attempts = open_elsewhere(1e9)
    with pytest.raises(PermissionError):
        write_atomic(tmp_path / "file", "new")
    assert files.PATIENCE <= attempts[-1] < files.PATIENCE + 1
    assert {f.name: f.read_text(encoding="utf-8") for f in tmp_path.iterdir()} == {"file": "old"}


def test_what_a_kill_has_left_goes_and_what_is_the_users_stays(tmp_path: Path) -> None:
    """A checkpoint may have been moved anywhere, such as into the user's home or a repository."""
    ours = ".cwd.pt.123", ".last.pt.7", ".epoch12.pt.4567"
    theirs = ".git/config", ".ssh/id", ".env", ".env.1", ".last.pt", ".pt.1", "last.pt", "cwd.pt", "x.pt.1"
    for name in (*ours, *theirs, ".unfinished/last.pt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name, encoding="utf-8")
    files.remove_leftovers(tmp_path)
    assert sorted(str(f.relative_to(tmp_path)) for f in tmp_path.rglob("*") if f.is_file()) == sorted(theirs)
    assert not (tmp_path / ".unfinished").exists()


@pytest.mark.usefixtures("ascii_locale")
def test_rows_under_another_locale(tmp_path: Path) -> None:
    table = tmp_path / "größer.csv"
    table.write_bytes("epoch,train/cwd_weight,größe\n1,5,1\n2,4,1\n3,3,1\n".encode())
    drop_rows_after(table, 2)
    assert table.read_bytes() == "epoch,train/cwd_weight,größe\n1,5,1\n2,4,1\n".encode()
    assert read_curves(table, {}, TASKS["detect"].score).weight == [5, 4]
