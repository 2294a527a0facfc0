# SPDX-License-Identifier: AGPL-3.0-or-later
"""The trainer that users name: the method (method/trainer.py) for the student's task, with its sentences and pictures.

Ultralytics has one trainer per task, all derived from the detection trainer. Ours is combined with the student's.
"""

from __future__ import annotations

from typing import Any

from ultralytics.utils import DEFAULT_CFG_DICT

from yolo_cwd.method.trainer import DistillingTrainer
from yolo_cwd.run.request import task_of
from yolo_cwd.tasks import TASKS, task_of_trainer
from yolo_cwd.two_stages import train_teacher
from yolo_cwd.view.attach import attach


class CWDTrainer(DistillingTrainer):
    """Train a model with channel-wise distillation (Shu et al., ICCV 2021, arXiv 2011.13256).

    Takes every argument of Ultralytics' trainer for the student's task (detect, segment, pose, obb, semantic or depth),
    plus the options of `cfg/default.yaml`. An instance is also an instance of that trainer.

    Examples:
        >>> YOLO("yolov8n.pt").train(trainer=CWDTrainer, teacher="yolov8l.pt", data="coco8.yaml", epochs=10)
        >>> YOLO("yolov8n-seg.pt").train(trainer=CWDTrainer, teacher="yolov8l-seg.pt", data="coco8-seg.yaml")
        >>> CWDTrainer(overrides={"model": "yolov8n.pt", "teacher": "yolov8l.pt", "data": "coco8.yaml"}).train()
    """

    def __new__(
        cls,
        cfg: Any = DEFAULT_CFG_DICT,
        overrides: dict[str, Any] | None = None,
        _callbacks: dict[str, Any] | None = None,
    ) -> CWDTrainer:
        """Make a trainer for the student's task."""
        trainer: CWDTrainer = super().__new__(_for_task(cls, task_of(cfg, overrides or {}).name))
        return trainer

    def __init__(
        self,
        cfg: Any = DEFAULT_CFG_DICT,
        overrides: dict[str, Any] | None = None,
        _callbacks: dict[str, Any] | None = None,
    ) -> None:
        """Set the training up; see `DistillingTrainer` for the arguments and errors."""
        super().__init__(cfg, overrides, _callbacks)
        attach(self)

    def run_callbacks(self, event: str) -> None:
        """Run the callbacks of an event; the loggers begin with the student once its teacher is trained."""
        if self.stage is None or not self.stage.holds_back(self, event):
            super().run_callbacks(event)

    def train(self) -> None:
        """Train the teacher first, if it does not know the data; then train the student."""
        if self.stage is not None:
            train_teacher(self, self.stage)
        super().train()


def _for_task(trainer: type[CWDTrainer], name: str) -> type[CWDTrainer]:
    """Return a trainer class combined with Ultralytics' trainer for a task.

    It keeps its name: if Ultralytics starts several processes, each imports the trainer by that name and ends up here.
    """
    if task_of_trainer(trainer).name == name:
        return trainer
    place = {"__module__": trainer.__module__, "__qualname__": trainer.__qualname__, "__doc__": trainer.__doc__}
    return type(trainer.__name__, (trainer, TASKS[name].trainer), place)
