# SPDX-License-Identifier: AGPL-3.0-or-later
"""Files that nobody ever sees half-written, even after a kill: written under another name, flushed, and renamed."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from ultralytics.engine import trainer as ultralytics_trainer

from yolo_cwd.log import warn

PATIENCE = 2.0  # seconds to wait until a reader closes a file: Windows refuses to replace an open one
CHECKPOINTS = ".unfinished"  # the folder in which checkpoints are written
LEFTOVER = re.compile(r"\.[^.]+\.pt\.\d+")  # a checkpoint or state of ours that a kill has kept from its name


def cache_folder() -> Path:
    """Return the user's cache folder, for files that can be made again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "yolo_cwd"


@contextmanager
def atomic_path(file: Path) -> Iterator[Path]:
    """Yield the path to write a file at, beside its place; then give it its name, or remove it if that fails."""
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        yield unfinished
        put(unfinished, file)
    finally:
        unfinished.unlink(missing_ok=True)


def write_atomic(file: Path, content: str | bytes) -> None:
    """Write a file so that nobody ever sees a part of it, even after a kill."""
    with atomic_path(file) as unfinished:
        unfinished.write_bytes(content.encode() if isinstance(content, str) else content)


def build_once(folder: Path, fill: Callable[[Path], None]) -> None:
    """Build a folder under another name and rename it when complete, unless it is there.

    So a killed build leaves nothing that looks like it, and two builds at once do not disturb each other.

    Args:
        folder: The folder.
        fill: Writes its content into the empty folder that it is given.
    """
    if folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        fill(unfinished)
        unfinished.rename(folder)
    except OSError:
        if not folder.exists():  # otherwise another process was first, with the same content
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def content_of(file: Path) -> str:
    """Return a digest of a file's content."""
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def put(unfinished: Path, file: Path) -> None:
    """Give a complete file its name, once its content has reached the disk."""
    with unfinished.open("r+b") as opened:  # Windows flushes only files open for writing
        _flush(opened.fileno(), file)
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            unfinished.replace(file)
            return
        except PermissionError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def _flush(descriptor: int, file: Path) -> None:
    """Flush a file to the disk; network and FUSE mounts may refuse that, which must not end a training."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:  # found out only now
            raise
        _warn_of_refused_flush(str(file.parent), str(error.strerror))


@cache
def _warn_of_refused_flush(folder: str, reason: str) -> None:
    warn(f"{folder}: files cannot be flushed to the disk ({reason}); a power cut may tear them")


@contextmanager
def atomic_checkpoints(trainer: Any) -> Iterator[None]:
    """Let a trainer of Ultralytics, which writes its checkpoints in place, write them elsewhere; then move them.

    `last.pt` is moved last.
    """
    folder, last, best = trainer.wdir, trainer.last, trainer.best
    unfinished = folder / CHECKPOINTS
    shutil.rmtree(unfinished, ignore_errors=True)  # left by a kill
    unfinished.mkdir(parents=True)
    trainer.wdir, trainer.last, trainer.best = unfinished, unfinished / last.name, unfinished / best.name
    try:
        yield
        for file in sorted(unfinished.iterdir(), key=lambda f: f.name == last.name):
            put(file, folder / file.name)
    finally:
        trainer.wdir, trainer.last, trainer.best = folder, last, best
        shutil.rmtree(unfinished, ignore_errors=True)


class _Aside:
    """The path of a temporary file that prints as its final name."""

    def __init__(self, unfinished: Path, file: Path) -> None:
        self.unfinished, self.file = unfinished, file

    def __fspath__(self) -> str:
        return str(self.unfinished)

    def __str__(self) -> str:
        return str(self.file)


@contextmanager
def atomic_strip() -> Iterator[None]:
    """Let Ultralytics, which strips finished checkpoints in place, strip them so that they are never torn."""
    strip = ultralytics_trainer.strip_optimizer

    def strip_whole(file: Path, s: str = "", updates: dict[str, Any] | None = None) -> Any:
        with atomic_path(file) as unfinished:
            shutil.copyfile(file, unfinished)
            return strip(_Aside(unfinished, file), s, updates)

    ultralytics_trainer.strip_optimizer = strip_whole
    try:
        yield
    finally:
        ultralytics_trainer.strip_optimizer = strip


def remove_leftovers(folder: Path) -> None:
    """Remove what a kill has left of checkpoints in a folder, and nothing else: it may be any folder of the user's."""
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    for file in folder.iterdir():
        if LEFTOVER.fullmatch(file.name):
            file.unlink(missing_ok=True)
