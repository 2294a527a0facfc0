# SPDX-License-Identifier: AGPL-3.0-or-later
"""Files that nobody ever sees half-written, even after a kill: written under another name, flushed, and renamed."""

from __future__ import annotations

import csv
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ultralytics.engine import trainer as ultralytics_trainer

from yolo_cwd.run.shared import SharedChange

PATIENCE = 2.0  # seconds to wait until a reader closes a file: Windows refuses to replace an open one
CHECKPOINTS = ".unfinished"  # the folder in which checkpoints are written
LEFTOVER = re.compile(r"\.[^.]+\.pt\.\d+")  # a checkpoint or state of ours that a kill has kept from its name


@contextmanager
def written_whole(file: Path) -> Iterator[Path]:
    """Yield the path to write a file at, beside its place; then give it its name, or remove it if that fails."""
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        yield unfinished
        put(unfinished, file)
    finally:
        unfinished.unlink(missing_ok=True)


def write_whole(file: Path, content: str | bytes) -> None:
    """Write a file so that nobody ever sees a part of it, even after a kill."""
    with written_whole(file) as unfinished:
        unfinished.write_bytes(content.encode() if isinstance(content, str) else content)


def put(unfinished: Path, file: Path) -> None:
    """Give a complete file its name, once its content has reached the disk."""
    with unfinished.open("r+b") as opened:  # Windows flushes only files open for writing
        os.fsync(opened.fileno())
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            unfinished.replace(file)
            return
        except PermissionError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


@contextmanager
def checkpoints_written_whole(trainer: Any) -> Iterator[None]:
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


def _strip_whole() -> Callable[[], None]:
    strip = ultralytics_trainer.strip_optimizer

    def strip_whole(file: Path, s: str = "", updates: dict[str, Any] | None = None) -> Any:
        with written_whole(file) as unfinished:
            shutil.copyfile(file, unfinished)
            return strip(_Aside(unfinished, file), s, updates)

    def undo() -> None:
        ultralytics_trainer.strip_optimizer = strip

    ultralytics_trainer.strip_optimizer = strip_whole
    return undo


# Lets Ultralytics, which strips finished checkpoints in place, strip them so that they are never torn.
optimizers_stripped_whole = SharedChange(_strip_whole)


def remove_leftovers(folder: Path) -> None:
    """Remove what a kill has left of checkpoints in a folder, and nothing else: it may be any folder of the user's."""
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    for file in folder.iterdir():
        if LEFTOVER.fullmatch(file.name):
            file.unlink(missing_ok=True)


def drop_rows_after(table: Path, epoch: int) -> None:
    """Drop the rows of a `results.csv` that belong to a later epoch (counted from 1) or that a kill has torn."""
    lines = table.read_text(encoding="utf-8").splitlines() if table.exists() else []
    if not lines:  # emptied by a power cut, perhaps: Ultralytics writes the header into a new file alone
        table.unlink(missing_ok=True)
        return
    header, *rows = lines
    epochs = [row.split(",")[0].strip() if row.count(",") == header.count(",") else "" for row in rows]
    kept = [row for row, e in zip(rows, epochs, strict=True) if e.isdecimal() and int(e) <= epoch]
    write_whole(table, "\n".join([header, *kept]) + "\n")


def widen(table: Path, columns: Sequence[str]) -> list[str]:
    """Give a `results.csv` these columns, with nan in its old rows, and return all that it has, others last.

    A newer release may resume a run, or another teacher with other classes take over.
    """
    if not table.exists():
        return list(columns)
    with table.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    columns = list(dict.fromkeys([*columns, *(rows[0] if rows else ())]))
    if rows and list(rows[0]) != columns:
        lines = [",".join(row.get(name) or "nan" for name in columns) for row in rows]
        write_whole(table, "\n".join([",".join(columns), *lines]) + "\n")
    return columns
