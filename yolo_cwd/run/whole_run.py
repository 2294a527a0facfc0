# SPDX-License-Identifier: AGPL-3.0-or-later
"""What the trainers of a student and of its teacher share: any task, any process, and runs that outlast a kill."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.utils import RANK
from ultralytics.utils.torch_utils import unwrap_model

from yolo_cwd.run.files import atomic_strip
from yolo_cwd.run.interrupted import require_fit
from yolo_cwd.run.results import drop_rows_after
from yolo_cwd.run.torchrun import JointEvaluation, ProcessTrainer
from yolo_cwd.tasks import TASKS


class WholeRun(DetectionTrainer):
    """What a trainer of ours does to resume where a checkpoint stands, and to end with whole checkpoints."""

    wdir: Path
    csv: Path
    save_dir: Path
    model: Any
    start_epoch: int
    ddp: bool
    resume: bool

    def resume_training(self, ckpt: Any) -> None:
        """Go on where the checkpoint stands; epochs that were begun after it are run again."""
        if self.resume and ckpt:
            require_fit(unwrap_model(self.model), ckpt, self.data["names"], self.args.data, Path(self.args.resume))
        super().resume_training(ckpt)
        if self.resume and RANK in {-1, 0}:
            drop_rows_after(self.csv, self.start_epoch)

    def final_eval(self) -> None:
        """Strip and score the checkpoints as Ultralytics does."""
        with atomic_strip():
            super().final_eval()


Trainer = TypeVar("Trainer", bound=WholeRun)


def for_task(trainer: type[Trainer], name: str) -> type[Trainer]:
    """Return a trainer class combined with Ultralytics' trainer for a task, and in a process of `torchrun` with ours.

    It keeps its name: processes that an older Ultralytics starts import the trainer by that name, and end up here.
    """
    bases: tuple[type, ...] = (trainer, TASKS[name].trainer)
    if RANK != -1:
        bases = (trainer, ProcessTrainer, TASKS[name].trainer, JointEvaluation)
    if all(issubclass(trainer, base) for base in bases):
        return trainer
    place = {"__module__": trainer.__module__, "__qualname__": trainer.__qualname__, "__doc__": trainer.__doc__}
    return type(trainer.__name__, bases, place)
