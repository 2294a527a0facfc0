"""Folders that are built once, digests of files, the cache folder, and what a killed or failed writing leaves."""

import errno
import hashlib
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ultralytics.utils import LOGGER

from yolo_cwd.run import files
from yolo_cwd.run.files import atomic_checkpoints, atomic_path, build_once, cache_folder, content_of, write_atomic


def test_the_cache_folder_is_the_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert cache_folder() == Path("/cache/yolo_cwd")
    for unset in (lambda: monkeypatch.setenv("XDG_CACHE_HOME", ""), lambda: monkeypatch.delenv("XDG_CACHE_HOME")):
        unset()
        assert cache_folder() == Path("/home/a/.cache/yolo_cwd")


def names(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*"))


def test_a_folder_is_built_once_and_beside_its_place(tmp_path: Path) -> None:
    """The folders above it are made; nobody sees it before it is complete."""
    folder = tmp_path / "a" / "b" / "set"
    seen: list[Path] = []

    def fill(unfinished: Path) -> None:
        seen.append(unfinished)
        assert (list(unfinished.iterdir()), folder.exists()) == ([], False)
        (unfinished / "file").write_text("x")

    for _ in range(2):
        build_once(folder, fill)
    assert len(seen) == 1
    assert seen[0].parent == folder.parent
    assert seen[0].name.startswith(".set-")
    assert names(tmp_path) == ["a", "a/b", "a/b/set", "a/b/set/file"]
    build_once(tmp_path / "a" / "other", lambda unfinished: None)  # beside what is there
    assert (tmp_path / "a" / "other").is_dir()


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), ValueError("bad"), KeyboardInterrupt()], ids=repr)
def test_a_build_that_fails_leaves_nothing(error: BaseException, tmp_path: Path) -> None:
    def fill(unfinished: Path) -> None:
        (unfinished / "file").touch()
        raise error

    with pytest.raises(type(error)) as raised:
        build_once(tmp_path / "set", fill)
    assert raised.value is error
    assert names(tmp_path) == []


def test_of_two_builds_at_once_the_first_stays(tmp_path: Path) -> None:
    def fill(unfinished: Path) -> None:
        (unfinished / "mine").touch()
        (tmp_path / "set").mkdir()
        (tmp_path / "set" / "theirs").touch()

    build_once(tmp_path / "set", fill)
    assert names(tmp_path) == ["set", "set/theirs"]


def test_a_digest_is_of_the_whole_content(tmp_path: Path) -> None:
    for content in (b"", b"a", b"a" * (2**20 + 1), bytes(3 * 2**20)):
        (tmp_path / "file").write_bytes(content)
        assert content_of(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_a_file_has_its_name_only_if_it_could_be_written(tmp_path: Path) -> None:
    def write_half() -> None:
        with atomic_path(tmp_path / "file") as unfinished:
            unfinished.write_text("half")
            assert unfinished == tmp_path / f".file.{os.getpid()}"
            raise KeyError

    (tmp_path / "file").write_text("old")
    with pytest.raises(KeyError):
        write_half()
    assert names(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "old"


def test_a_refused_flush_is_told_once_for_each_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(LOGGER, "warning", warnings.append)
    (tmp_path / "other").mkdir()

    def refuse(number: int) -> None:
        def fsync(descriptor: int) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "fsync", fsync)

    refuse(errno.EINVAL)
    for file in ("a", "b", "other/a"):
        write_atomic(tmp_path / file, file)
        assert (tmp_path / file).read_text() == file
    end = "files cannot be flushed to the disk (Invalid argument); a power cut may tear them"
    assert [line.partition(" ")[2] for line in warnings] == [f"{f}: {end}" for f in (tmp_path, tmp_path / "other")]
    for number in (errno.ENOSPC, errno.EDQUOT):
        refuse(number)
        with pytest.raises(OSError, match=os.strerror(number)):
            write_atomic(tmp_path / "a", "new")
        assert (tmp_path / "a").read_text() == "a", "a full disk keeps what is there"


def test_checkpoints_that_could_not_be_written_leave_the_old_ones(tmp_path: Path) -> None:
    """And the trainer's own paths, whatever an earlier kill has left."""
    own = {"wdir": tmp_path, "last": tmp_path / "last.pt", "best": tmp_path / "best.pt"}
    trainer: Any = SimpleNamespace(**own)

    def write_half() -> None:
        with atomic_checkpoints(trainer):
            assert names(tmp_path) == [".unfinished"]
            folder = tmp_path / ".unfinished"
            assert vars(trainer) == {"wdir": folder, "last": folder / "last.pt", "best": folder / "best.pt"}
            trainer.last.touch()
            raise KeyError

    (tmp_path / ".unfinished" / "deep").mkdir(parents=True)
    (tmp_path / ".unfinished" / "epoch7.pt").touch()
    with pytest.raises(KeyError):
        write_half()
    assert vars(trainer) == own
    assert names(tmp_path) == []


def test_a_strip_gets_all_that_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And another place if it is asked for one; nothing is left of a strip that fails."""
    asked: list[Any] = []

    def strip(file: Any, s: str, updates: Any) -> str:
        asked.append((str(file), Path(file).parent, s, updates))
        if s == "fail":
            raise KeyError
        return f"stripped {s}"

    monkeypatch.setattr(files.ultralytics_trainer, "strip_optimizer", strip)
    (tmp_path / "best.pt").write_bytes(b"with")
    with files.atomic_strip():
        ours: Any = files.ultralytics_trainer.strip_optimizer
        assert ours(tmp_path / "best.pt") == "stripped "
        assert ours(tmp_path / "best.pt", "b.pt", {"a": 1}) == "stripped b.pt"
        with pytest.raises(KeyError):
            ours(tmp_path / "best.pt", s="fail")
    best = str(tmp_path / "best.pt")
    assert asked == [(best, tmp_path, "", None), (best, tmp_path, "b.pt", {"a": 1}), (best, tmp_path, "fail", None)]
    assert names(tmp_path) == ["best.pt"]


def test_two_processes_may_remove_what_a_kill_has_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one was faster: with the folder, and with a file that both have seen."""
    monkeypatch.setattr(Path, "iterdir", lambda folder: iter([folder / ".last.pt.7"]))
    files.remove_leftovers(tmp_path)
