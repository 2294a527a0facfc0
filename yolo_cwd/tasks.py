# SPDX-License-Identifier: AGPL-3.0-or-later
"""The dense tasks of Ultralytics, with the trainer for each and the scores that judge its models."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn
from ultralytics.models import yolo
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn.tasks import guess_model_task, load_checkpoint, yaml_model_load

from yolo_cwd.config import ConfigError
from yolo_cwd.log import warn

OTHER_TRAINERS = {  # heads whose models Ultralytics trains with a trainer other than their task's
    "RTDETRDecoder": "RT-DETR",
    "WorldDetect": "YOLO-World",
    "YOLOEDetect": "YOLOE",
    "YOLOESegment": "YOLOE",
    "YOLOESegment26": "YOLOE",
}


class Score(NamedTuple):
    """A score from 0 to 1.

    Attributes:
        column: What Ultralytics calls it in `results.csv` and in the results of a validation.
        label: What people call it.
        sign: 1 if higher is better, -1 if lower is.
    """

    column: str
    label: str
    sign: int = 1


class Task(NamedTuple):
    """A dense task.

    Attributes:
        name: What Ultralytics calls it.
        suffix: How the names of its models end.
        builtin: Whether Ultralytics' own distillation supports it.
        trainer: Ultralytics' trainer for it.
        score: The score that judges its models.
        second: A second score to look at.
        label_folder: The folder in which Ultralytics looks for its labels, beside that of the images.
        label_suffix: The suffix of the files that hold them.
    """

    name: str
    suffix: str
    builtin: bool
    trainer: type[DetectionTrainer]
    score: Score
    second: Score
    label_folder: str = "labels"
    label_suffix: str = ".txt"

    @property
    def has_maps(self) -> bool:
        """Whether its labels are maps, in which every pixel has a value, and not rows of objects."""
        return self.label_suffix != ".txt"


MAP, MAP50 = Score("metrics/mAP50-95(B)", "mAP50-95"), Score("metrics/mAP50(B)", "mAP50")
BOXES = Score(MAP.column, "box mAP50-95")
MASKS, POSES = Score("metrics/mAP50-95(M)", "mask mAP50-95"), Score("metrics/mAP50-95(P)", "pose mAP50-95")
IOU, PIXELS = Score("metrics/mIoU", "mIoU"), Score("metrics/pixel_acc", "pixel accuracy")
ERROR, NEAR = Score("metrics/abs_rel", "relative error", sign=-1), Score("metrics/delta1", "delta1")
ALL = (
    Task("detect", "", True, DetectionTrainer, MAP, MAP50),
    Task("segment", "-seg", True, yolo.segment.SegmentationTrainer, MASKS, BOXES),
    Task("pose", "-pose", True, yolo.pose.PoseTrainer, POSES, BOXES),
    Task("obb", "-obb", True, yolo.obb.OBBTrainer, MAP, MAP50),
    Task("semantic", "-sem", False, yolo.semantic.SemanticSegmentationTrainer, IOU, PIXELS, "masks", ".png"),
    Task("depth", "-depth", False, yolo.depth.DepthTrainer, ERROR, NEAR, "depth", ".npy"),
)
TASKS = {task.name: task for task in ALL}


def task_of_trainer(trainer: type) -> Task:
    """Return the task that a trainer is for: detection, unless it derives from the trainer of another task."""
    return next((task for task in ALL[1:] if issubclass(trainer, task.trainer)), ALL[0])


def task_of_student(student: Any, asked: str | None = None) -> Task:
    """Return the task that a student is for; as in Ultralytics, the model outweighs the argument `task`.

    Args:
        student: A name, a path, or the model itself.
        asked: The argument `task`.

    Raises:
        ConfigError: If it is for none of the dense tasks, or if Ultralytics has a separate trainer for it.
    """
    name, head = task_and_head(student)
    if head in OTHER_TRAINERS:
        raise ConfigError(
            f"student={student}: {OTHER_TRAINERS[head]} has a trainer of its own; give it as teacher=, and as student "
            "a YOLO such as yolov8n.pt"
        )
    name = name or asked or ALL[0].name
    if name not in TASKS:
        raise ConfigError(f"task={name}: has no pyramid to distill; give a model for {', '.join(TASKS)}")
    if asked and asked != name:
        warn(f"task={asked}: {student} is a model for task={name}, and is trained for it")
    return TASKS[name]


def count_classes(model: nn.Module) -> int:
    """Return the number of classes of a model's head; 0 if it has none."""
    return int(getattr(model.model[-1], "nc", 0))  # type: ignore[index]


def task_and_head(student: Any) -> tuple[str | None, str]:
    """Return the task of a model (None if unknown) and the class name of its head."""
    path = Path(str(student))
    with suppress(Exception):  # the building of the model reports any fault
        if path.suffix in {".yaml", ".yml"}:
            description = yaml_model_load(student)
        else:
            model = student if isinstance(student, nn.Module) else load_checkpoint(path.resolve(strict=True))[0]
            description = model.yaml
        head = description["head"][-1][2]
        return None if head in OTHER_TRAINERS else guess_model_task(description), head
    suffixes = {task.suffix: task.name for task in ALL[1:]} | {"-cls": "classify"}
    return next((name for suffix, name in suffixes.items() if suffix in path.stem), None), ""
