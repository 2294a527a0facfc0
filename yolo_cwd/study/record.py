# SPDX-License-Identifier: AGPL-3.0-or-later
"""The record of a comparison, `comparison.yaml`: what its results are of, so that no others join them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from yolo_cwd.config import ConfigError, first_line, listed
from yolo_cwd.run.files import write_atomic
from yolo_cwd.run.refusal import unwritable
from yolo_cwd.study.comparison import Comparison
from yolo_cwd.study.content import versions
from yolo_cwd.study.summary import RECORD

PARTS = {"task": str, "teacher": str, "split": str, "seeds": list, "arguments": dict, "arms": dict}
PARTS |= {"content": dict, "versions": dict}  # what every record has


def joined(comparison: Comparison, content: dict[str, str], complete: bool = False) -> dict[str, Any]:
    """Return the record of a comparison, with the arms and seeds that its folder has already.

    Args:
        comparison: The comparison.
        content: What its files hold, by `contents`.
        complete: Whether it has no run left, so that versions do not matter.

    Raises:
        ConfigError: If the folder holds another comparison, or one of other files or versions.
    """
    ours: dict[str, Any] = json.loads(json.dumps(comparison.record()))
    ours |= {"content": content, "versions": versions()}
    theirs = _read(comparison.folder)
    if theirs is None:
        return ours
    folder = f"folder={comparison.folder}"
    if differing := _differences(ours, theirs):
        raise ConfigError(f"{folder}: holds a comparison with other {', '.join(differing)}; give another folder=")
    known = theirs["content"]
    if changed := [name for name, value in content.items() if known.get(name, value) != value]:
        raise ConfigError(
            f"{folder}: the files have changed since its comparison began: {listed(changed)}; give another folder=, or "
            "put back what they were"
        )
    begun_with = theirs["versions"]
    if not complete and begun_with != ours["versions"]:
        before, now = (" and ".join(f"{name} {v}" for name, v in of.items()) for of in (begun_with, ours["versions"]))
        raise ConfigError(
            f"{folder}: its comparison began with {before}, and this is {now}; give another folder=, or install those"
        )
    seeds = [*theirs["seeds"], *(seed for seed in ours["seeds"] if seed not in theirs["seeds"])]
    joint = {"arms": theirs["arms"] | ours["arms"], "seeds": seeds, "content": known | content}
    return {**ours, **joint, "versions": begun_with}


def claim(comparison: Comparison, content: dict[str, str]) -> None:
    """Make the folder, or add new arms and seeds to the comparison in it.

    Args:
        comparison: The comparison.
        content: What its files hold, by `contents`.

    Raises:
        ConfigError: If it cannot be written to, or if it holds another comparison.
    """
    try:
        for name in ("runs", "results", "locks"):
            (comparison.folder / name).mkdir(parents=True, exist_ok=True)
        with locked(comparison.folder, "comparison", wait=True):
            write_atomic(comparison.folder / RECORD, yaml.safe_dump(joined(comparison, content), sort_keys=False))
    except OSError as error:
        raise unwritable(error, "folder", comparison.folder) from error


@contextmanager
def locked(folder: Path, name: str, wait: bool = False) -> Iterator[bool]:
    """Hold a lock of a comparison's folder, and yield whether it is ours.

    Args:
        folder: The folder.
        name: What is locked.
        wait: Whether to wait while another process has it.
    """
    lock = FileLock(folder / "locks" / f"{name}.lock")
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def _read(folder: Path) -> dict[str, Any] | None:
    """Return the record in a folder; None if there is none.

    Raises:
        ConfigError: If it cannot be read.
    """
    file = folder / RECORD
    if not file.exists():
        return None
    try:
        record = yaml.safe_load(file.read_text(encoding="utf-8"))
        reason = "it is empty" if record is None else "it describes no comparison"
    except (OSError, ValueError, yaml.YAMLError) as error:
        record, reason = None, first_line(error)
    if not isinstance(record, dict) or not all(isinstance(record.get(name), kind) for name, kind in PARTS.items()):
        raise ConfigError(
            f"folder={folder}: its {RECORD} cannot be used ({reason}), so nobody knows what its results are of; "
            "restore that file, or give another folder="
        )
    return record


def _differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Return the names of what differs between two records, except arms and seeds that only one of them has."""
    here, there = ({**r["arguments"], "teacher": r["teacher"], "split": r["split"]} for r in (ours, theirs))
    both = ours["arms"].keys() & theirs["arms"]
    arms = [f"arm {arm}" for arm in both if not _same(ours["arms"][arm], theirs["arms"][arm])]
    values = [name for name in here | there if name not in here.keys() & there or not _same(here[name], there[name])]
    return sorted(values) + sorted(arms)


def _same(here: Any, there: Any) -> bool:
    """Return whether two values are equal, or name the same file, as `a.pt` and `/runs/a.pt` may."""
    if isinstance(here, dict) and isinstance(there, dict):
        return here.keys() == there.keys() and all(_same(here[key], there[key]) for key in here)
    try:
        return here == there or Path(here).samefile(there)
    except (OSError, TypeError):
        return False
