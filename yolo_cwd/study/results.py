# SPDX-License-Identifier: AGPL-3.0-or-later
"""The results of a comparison, one file for each complete run: written once, and read with distrust.

Folders are copied, synchronized and looked at: foreign files among the results, and torn ones, are no results.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from yolo_cwd.run.files import write_atomic

FOLDER, TEACHER = "results", "teacher"
OF_RUN = {"arm", "seed", "seconds", "score", "second", "classes", "curve"}
OF_TEACHER = {"score", "second", "classes"}


def write(folder: Path, name: str, scores: dict[str, Any] | None) -> None:
    """Write the scores of a complete run (its name is arm and seed) or of the teacher (None if it has none)."""
    write_atomic(folder / FOLDER / f"{name}.json", json.dumps(scores, indent=1))


def of_run(folder: Path, name: str) -> dict[str, Any] | None:
    """Return the scores of a run; None if it is not complete."""
    try:
        return _of_run(folder / FOLDER / f"{name}.json")
    except (OSError, ValueError):
        return None


def of_runs(folder: Path) -> list[dict[str, Any]]:
    """Return the scores of all complete runs, in the order of their names."""
    names = sorted(file.stem for file in (folder / FOLDER).glob("*.json"))
    return [scores for name in names if (scores := of_run(folder, name))]


def of_teacher(folder: Path) -> tuple[bool, dict[str, Any] | None]:
    """Return whether the teacher has been dealt with, and its scores (None if it has none)."""
    try:
        scores = json.loads((folder / FOLDER / f"{TEACHER}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False, None
    return scores is None or _has(scores, OF_TEACHER), scores if _has(scores, OF_TEACHER) else None


def _of_run(file: Path) -> dict[str, Any] | None:
    scores: Any = json.loads(file.read_text(encoding="utf-8"))
    return scores if _has(scores, OF_RUN) and f"{scores['arm']}-{scores['seed']}" == file.stem else None


def _has(scores: Any, names: set[str]) -> bool:
    return isinstance(scores, dict) and names <= scores.keys()
