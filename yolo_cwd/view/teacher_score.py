# SPDX-License-Identifier: AGPL-3.0-or-later
"""How good the teacher of a run is: its score on the validation images, and where its student is beside it.

It is scored once, before the first epoch. The training does not notice it.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ultralytics import YOLO
from ultralytics.nn.tasks import BaseModel
from ultralytics.utils import RANK

from yolo_cwd.log import say
from yolo_cwd.run.random_state import random_numbers_untouched
from yolo_cwd.run.results import read_rows
from yolo_cwd.run.score import score
from yolo_cwd.run.teacher_stage import as_checkpoint
from yolo_cwd.tasks import Score, Task

OTHER_NAMES = "its classes are not those of the data, in their order"


def find(trainer: Any) -> None:
    """Score the teacher of a run that begins, or say why it has no score; not without validation."""
    if trainer.start_epoch or not trainer.args.val or not trainer.settings.cwd:
        return
    try:
        with random_numbers_untouched(), _alone(), tempfile.TemporaryDirectory() as folder:
            trainer.state.score, why_not = _score(trainer, Path(folder))
    except Exception as error:  # without a score, a training is as good
        why_not = f"{type(error).__name__}: {error}"
    if trainer.args.verbose:
        sentence = f"the teacher has no score here: {why_not}"
        if trainer.state.score is not None:
            sentence = f"the teacher scores {_points(trainer.state.score, trainer.task.score)} on the validation images"
        trainer.add_callback("on_train_start", lambda _: say(sentence))  # after what is distilled


def watch(trainer: Any) -> None:
    """Say so where a student overtakes its teacher for the first time."""
    teacher, measure = trainer.state.score, trainer.task.score
    if teacher is None or not trainer.args.verbose or not trainer.csv.is_file():
        return
    rows = read_rows(trainer.csv)
    better = [bool(row.get(measure.column)) and measure.sign * (row[measure.column] - teacher) > 0 for row in rows]
    if rows and rows[-1]["epoch"] == trainer.epoch + 1 and better[-1] and not any(better[:-1]):
        student = _points(rows[-1][measure.column], measure)
        say(f"epoch {trainer.epoch + 1}: the student has overtaken its teacher, with {student} to {100 * teacher:.1f}")


def difference(student: Sequence[float], teacher: float | None, measure: Score) -> str:
    """Say how the best epoch of a student is beside its teacher; nothing if one of both has no score.

    Args:
        student: The student's score by epoch, 0 where it was not validated.
        teacher: The teacher's.
        measure: Which score it is.
    """
    known = [value for value in student if value]
    if teacher is None or not known:
        return ""
    best = max(known, key=lambda value: measure.sign * value)
    lead = 100 * measure.sign * (best - teacher)
    place = f"{abs(lead):.1f} {'ahead of' if lead > 0 else 'behind'}" if round(abs(lead), 1) else "level with"
    return (
        f"student {100 * best:.1f}, teacher {100 * teacher:.1f} points of {measure.label}: "
        f"the student ends {place} its teacher"
    )


def _points(value: float, measure: Score) -> str:
    return f"{100 * value:.1f} points of {measure.label}"


def _score(trainer: Any, folder: Path) -> tuple[float | None, str]:
    """Return the teacher's score, or None and the reason."""
    source = trainer.settings.teacher
    if isinstance(source, str | Path):
        if Path(source).suffix in {".yaml", ".yml"}:
            return None, "it is not trained"
    elif not isinstance(getattr(source, "model", source), BaseModel) and not isinstance(source, BaseModel):
        return None, "Ultralytics cannot validate its network"
    else:
        as_checkpoint(source, folder / "teacher.pt")
        source = folder / "teacher.pt"
    model = YOLO(source)
    if why_not := _mismatch(model, trainer.task, trainer.data["names"]):
        return None, why_not
    arguments = {**vars(trainer.args), "device": str(trainer.device), "quantize": None}
    return float(score(model, arguments, trainer.args.split, folder)["score"]), ""


def _mismatch(model: Any, task: Task, names: dict[int, str]) -> str:
    if model.task != task.name:
        return f"it is a model for task={model.task}"
    return OTHER_NAMES if task.name != "depth" and model.names != names else ""


@contextmanager
def _alone() -> Iterator[None]:
    """Let Ultralytics validate in this process alone, though others train with it and wait for it."""
    names = ("RANK", "LOCAL_RANK") if RANK != -1 else ()
    modules = [module for name, module in list(sys.modules.items()) if name.startswith("ultralytics.")]
    kept = [(module, name, vars(module)[name]) for module in modules for name in names if name in vars(module)]
    try:
        for module, name, _ in kept:
            setattr(module, name, -1)
        yield
    finally:
        for module, name, value in kept:
            setattr(module, name, value)
