"""The teacher's score: before the first epoch, when it is overtaken, and at the end."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from staging import Train
from test_state import StopError, interrupt_after
from test_teacher_stage import same
from ultralytics.engine.trainer import BaseTrainer

from yolo_cwd import CWDTrainer
from yolo_cwd.run.state import load_state
from yolo_cwd.tasks import TASKS
from yolo_cwd.view import plots, teacher_score
from yolo_cwd.view.teacher_score import difference


def scored(monkeypatch: pytest.MonkeyPatch, *students: float, teacher: float) -> None:
    """Let the teacher and the epochs of the student have these scores."""
    monkeypatch.setattr(teacher_score, "_score", lambda *_: (teacher, ""))
    validate = BaseTrainer.validate

    def of_epoch(self: Any) -> Any:
        metrics, fitness = validate(self)
        return {**metrics, TASKS["detect"].score.column: students[min(self.epoch, len(students) - 1)]}, fitness

    monkeypatch.setattr(BaseTrainer, "validate", of_epoch)


def test_a_run_ends_with_both_scores(train: Train, monkeypatch: pytest.MonkeyPatch, said: Callable[[], str]) -> None:
    scored(monkeypatch, 0.1, 0.3, 0.2, 0.4, teacher=0.25)
    drawn: list[Any] = []
    monkeypatch.setattr(plots, "draw_levels", lambda _, curves: drawn.append(curves))
    monkeypatch.setattr(plots, "draw_channels", lambda *_: None)
    train(epochs=4, val=True, verbose=True, plots=True)
    lines = said()
    assert "the teacher scores 25.0 points of mAP50-95" in lines
    assert "epoch 2: the student has overtaken its teacher, with 30.0 points of mAP50-95 to 25.0" in lines
    assert lines.count("overtaken") == 1
    assert "student 40.0, teacher 25.0 points of mAP50-95: the student ends 15.0 ahead of its teacher" in lines
    assert (drawn[0].teacher, drawn[0].score, drawn[0].label) == (0.25, [0.1, 0.3, 0.2, 0.4], "mAP50-95")


def test_the_score_survives_a_resume(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: Callable[[], str]
) -> None:
    scored(monkeypatch, 0.1, 0.3, 0.4, teacher=0.25)
    with pytest.raises(StopError):
        train(name="run", epochs=3, val=True, verbose=True, callbacks={"on_fit_epoch_end": interrupt_after(2)})
    said()
    monkeypatch.setattr(teacher_score, "_score", lambda *_: pytest.fail("scored again"))
    last = tmp_path / "runs" / "run" / "weights" / "last.pt"
    assert load_state(last).score == 0.25
    CWDTrainer(overrides={"resume": str(last)}).train()
    lines = said()
    assert "overtaken" not in lines
    assert "ends 15.0 ahead of its teacher" in lines


def test_scoring_changes_nothing(staged: Train, monkeypatch: pytest.MonkeyPatch, said: Callable[[], str]) -> None:
    words = {"epochs": 2, "val": True, "mosaic": 1.0}
    full = staged(**words, verbose=True)
    assert "the teacher scores" in said()
    assert full.state.score is not None
    monkeypatch.setattr(teacher_score, "find", lambda trainer: None)
    without = staged(**words)
    assert without.state.score is None
    assert same(full.last, without.last)


@pytest.mark.parametrize(
    ("teacher", "why"),
    [
        ("teacher", "the teacher has no score here: its classes are not those of the data, in their order"),
        ("segment", "the teacher has no score here: it is a model for task=segment"),
    ],
)
def test_a_teacher_without_a_score(
    teacher: str, why: str, staged: Train, models: dict[str, str], said: Callable[[], str]
) -> None:
    staged(teacher=models[teacher], teacher_epochs=0, val=True, verbose=True)
    assert why in said()
    staged(teacher=models[teacher], teacher_epochs=0, verbose=True)
    assert "the teacher has no score" not in said(), "without validation"


@pytest.mark.parametrize(
    ("task", "student", "teacher", "expected"),
    [
        ("detect", [0.1, 0.473], 0.528, "student 47.3, teacher 52.8 points of mAP50-95: the student ends 5.5 behind"),
        ("depth", [0.3, 0.2], 0.25, "the student ends 5.0 ahead of its teacher"),
        ("detect", [0.5], 0.5, "the student ends level with its teacher"),
        ("detect", [0.0], 0.5, ""),
        ("detect", [0.5], None, ""),
    ],
)
def test_the_last_sentence(task: str, student: list[float], teacher: float | None, expected: str) -> None:
    said = difference(student, teacher, TASKS[task].score)
    assert expected in said
    assert bool(expected) == bool(said)
