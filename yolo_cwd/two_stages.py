# SPDX-License-Identifier: AGPL-3.0-or-later
"""One run of two stages: the teacher is trained first, and takes its place above the student."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from ultralytics.utils import LOGGER

from yolo_cwd.method.distillation import Distillation
from yolo_cwd.method.teacher import load_teacher
from yolo_cwd.run.random_state import random_numbers_untouched
from yolo_cwd.run.teacher_stage import TeacherStage, time_left


def train_teacher(trainer: Any, stage: TeacherStage) -> None:
    """Train the teacher of a run, and let the run go on with the trained one.

    Args:
        trainer: The `CWDTrainer`, not set up yet.
        stage: The teacher's training.

    Raises:
        ConfigError: If the student cannot learn from this teacher, or if Ultralytics refuses its training.
    """
    begin = time.monotonic()
    with _kept_if_resumable(trainer, stage):
        _rehearse(trainer)
        stage.announce(trainer.save_dir, trainer.epochs)
        trainer.distillation = None  # its memory is for the one in training
        weights = str(stage.run(trainer.args, trainer.given_options, trainer.save_dir))
    trainer.folder.made.clear()  # a trained teacher is worth keeping, whatever becomes of its student
    if trainer.args.time:
        trainer.args.time = time_left(trainer.args, begin)
    trainer.settings = replace(trainer.settings, teacher=weights)
    trainer.distillation = Distillation(trainer.settings, load_teacher(weights, trainer.settings.trust_teacher))
    options = {name: value for name, value in trainer.given_options.items() if name != "teacher_epochs"}
    trainer.given_options = {**options, "teacher": weights}
    trainer.resume = trainer.resume or trainer.ddp  # a launch would first remove the folder, with the teacher in it
    stage.hand_over(trainer)


def _rehearse(trainer: Any) -> None:
    """Match the student with the teacher as it is, so that what cannot be distilled is refused before it is trained."""
    student, disabled = trainer.model, LOGGER.disabled
    LOGGER.disabled = True
    try:
        with random_numbers_untouched():
            trainer.setup_model()
    finally:
        LOGGER.disabled = disabled
    trainer.model = student


@contextmanager
def _kept_if_resumable(trainer: Any, stage: TeacherStage) -> Iterator[None]:
    """Remove the run's folder if an error passes through before the teacher has a complete epoch."""
    try:
        yield
    except BaseException:
        if stage.can_go_on() is None:
            with trainer.folder.removed_on_failure():
                raise
        raise
