# SPDX-License-Identifier: AGPL-3.0-or-later
"""Attaches sentences and pictures to a training through Ultralytics' callbacks; the training is unaware of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ultralytics.utils import RANK, YAML

from yolo_cwd.log import say, warn
from yolo_cwd.view import plots, report, teacher_score

UNTRAINED = "a model file has random weights, and teaches nothing; give a checkpoint, such as yolov8l.pt"


def attach(trainer: Any) -> None:
    """Make a `CWDTrainer` say and show what it does, in the first of the processes that train."""
    if RANK not in {-1, 0} or trainer.ddp:  # a launching one hands its callbacks on to all that it starts
        return
    trainer.add_callback("on_pretrain_routine_end", teacher_score.find)
    trainer.add_callback("on_train_start", announce)
    trainer.add_callback("on_fit_epoch_end", teacher_score.watch)
    at_end = [conclude]
    if trainer.args.plots and trainer.settings.cwd:
        trainer.add_callback("on_train_start", plots.remember_start)
        trainer.add_callback("on_train_epoch_end", plots.show_first_epoch)
        at_end = [plots.show_end, conclude]
    trainer.callbacks["on_train_end"][:0] = at_end  # before the loggers, which then collect the pictures


def announce(trainer: Any) -> None:
    """Say what is distilled, and record the settings in `cwd.yaml`."""
    student, teacher = Path(trainer.state.options["student"]).stem, trainer.distillation.teacher
    _say(trainer, report.beginning(student, trainer))
    if trainer.settings.cwd and Path(teacher.label).suffix in {".yaml", ".yml"}:
        warn(f"{teacher.argument}: {UNTRAINED}")
    if missing := report.without_labels(trainer):
        _say(trainer, missing)
    YAML.save(trainer.save_dir / "cwd.yaml", {**trainer.state.options, "teacher": teacher.label})


def conclude(trainer: Any) -> None:
    """Say how the run went."""
    with plots.never_fatal("sentence on the outcome"):
        curves = report.read_curves(trainer.csv, trainer.distillation.shares, trainer.task.score)
        _say(trainer, report.outcome(curves, trainer.task.score))
        if sentence := teacher_score.difference(curves.score, trainer.state.score, trainer.task.score):
            _say(trainer, sentence)


def _say(trainer: Any, sentence: str) -> None:
    if trainer.args.verbose:
        say(sentence)
