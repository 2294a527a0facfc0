# SPDX-License-Identifier: AGPL-3.0-or-later
"""A training that is set up as if to begin, in a folder that is removed again, without the loggers noticing."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from ultralytics.utils import LOGGER
from ultralytics.utils.torch_utils import unset_deterministic

from yolo_cwd.config import refused_as
from yolo_cwd.method.prepare import choose_precision
from yolo_cwd.method.student import keeping_shape
from yolo_cwd.run.refusal import refusal, require_models
from yolo_cwd.tasks import Task
from yolo_cwd.trainer import CWDTrainer

SCRATCH = {  # keeps everything a rehearsal writes in its folder, and only the images of a step in memory
    "name": "run",
    "plots": False,
    "verbose": False,
    "save_period": -1,
    "cache": False,
    "workers": 0,
    "multi_scale": 0.0,
}


class NoCallbacks:
    """A trainer that runs no callbacks, since Ultralytics' loggers would start a run of their own."""

    def run_callbacks(self, event: str) -> None:
        """Do nothing."""


def plain_dry_run(task: Task) -> type[Any]:
    """Return Ultralytics' own trainer for a task, without callbacks; a pruned student keeps its shape."""
    return type("PlainRehearsal", (NoCallbacks, keeping_shape(task.trainer)), {})


class DistilledDryRun(NoCallbacks, CWDTrainer):
    """A distilled training that checks everything that can be refused, and skips what takes time."""

    def label_images(self) -> None:
        """Count what the teacher would label, without labeling it."""
        if self.labeler:
            self.labeler.survey()
            self.labeler.release()

    def _prepare(self) -> None:
        if self.distillation.is_on:
            dataset = self.test_loader.dataset
            choose_precision(self.distillation.teacher, self.settings.teacher_dtype, dataset, self.device)


@contextmanager
def silence() -> Iterator[None]:
    """Keep Ultralytics from reporting a training that never happens."""
    level = LOGGER.level
    LOGGER.setLevel("ERROR")
    try:
        with redirect_stdout(sys.stderr):  # progress bars are not findings
            yield
    finally:
        LOGGER.setLevel(level)
        unset_deterministic()


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Yield a folder for a rehearsal, in silence."""
    with silence(), tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def set_up(trainer_class: type[Any], words: dict[str, Any], folder: Path) -> Any:
    """Return a trainer that is ready for its first step.

    Args:
        trainer_class: Its class.
        words: Its arguments and options.
        folder: A temporary folder.

    Raises:
        ConfigError: If the training could not begin.
    """
    require_models(words)
    given = {name: value for name, value in words.items() if name != "save_dir"}
    with refused_as(lambda error: refusal(error, words)):
        trainer = trainer_class(overrides={**given, **SCRATCH, "project": str(folder)})
        trainer._setup_train()
    return trainer
