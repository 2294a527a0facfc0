# SPDX-License-Identifier: AGPL-3.0-or-later
"""Sentences and pictures join a training by Ultralytics' own callbacks; the training knows nothing of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ultralytics.utils import LOGGER, RANK, YAML, colorstr

from yolo_cwd.view import plots, report

OTHER_CLASSES = "the teacher's classes are not those of the data; a teacher trained on such data teaches more"


def attach(trainer: Any) -> None:
    """Let a `DistillingTrainer` say and show what it does, in the first process alone."""
    if RANK in {-1, 0}:
        trainer.add_callback("on_train_start", announce)
        trainer.add_callback("on_train_epoch_end", show_first_epoch)
        trainer.callbacks["on_train_end"][:0] = [show_end, conclude]  # loggers collect the pictures at the end


def announce(trainer: Any) -> None:
    """Say what is distilled, record the settings in `cwd.yaml`, and keep figures of the start for the pictures."""
    student, teacher = Path(trainer.state.options["student"]).stem, trainer.teacher
    _say(trainer, report.beginning(student, trainer))
    settings = {**trainer.state.options, "teacher": teacher.label}
    if trainer.cwd.cwd and teacher.names != trainer.data["names"]:
        _say(trainer, OTHER_CLASSES)
    YAML.save(trainer.save_dir / "cwd.yaml", settings)
    if _drawn(trainer):
        plots.remember_start(trainer)


def show_first_epoch(trainer: Any) -> None:
    """Draw the maps after the first epoch."""
    if _drawn(trainer):
        plots.show_first_epoch(trainer)


def show_end(trainer: Any) -> None:
    """Draw the pictures of a complete training."""
    if _drawn(trainer):
        plots.show_end(trainer)


def conclude(trainer: Any) -> None:
    """Say what came of it."""
    with plots.never_fatal("sentence on the outcome"):
        _say(trainer, report.outcome(report.read_curves(trainer.csv, trainer.weights_by_level)))


def _drawn(trainer: Any) -> bool:
    return bool(trainer.args.plots and trainer.cwd.cwd)


def _say(trainer: Any, sentence: str) -> None:
    if trainer.args.verbose:
        LOGGER.info(f"{colorstr('CWD:')} {sentence}")
