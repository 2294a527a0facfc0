# SPDX-License-Identifier: AGPL-3.0-or-later
"""Whether a teacher knows the classes of the data, and whether it can be trained on them first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ultralytics.data.utils import add_polygon_background, img2label_paths

from yolo_cwd.config import ConfigError
from yolo_cwd.run.request import data_of, is_trained
from yolo_cwd.run.teacher_record import images_of
from yolo_cwd.tasks import OTHER_TRAINERS, TASKS, Task, task_and_head

ITEM = {0: "item"}  # the one class of single_cls
SEARCHED = 1000  # images among which a label is looked for
VALUES_OF_BOX = 5
VALUES_OF_OUTLINE = 7  # the fewest: a class and three points


def lacking(teacher: Mapping[int, str], data: Mapping[str, Any], args: Any, task: Task) -> list[str]:
    """Return the trained classes of the data that a teacher does not know; without classes, as for depth, none.

    Args:
        teacher: The teacher's classes by index.
        data: The data set as Ultralytics resolves it, without `single_cls`.
        args: The arguments of the training.
        task: The student's task.
    """
    known = set(teacher.values())
    if task.name == "depth" or (args.single_cls and known == set(ITEM.values())):
        return []
    classes = (add_polygon_background({**data}) if task.name == "semantic" else data)["names"]
    return [name for i, name in sorted(classes.items()) if is_trained(i, args) and name not in known]


def data_with_classes(args: Any) -> dict[str, Any]:
    """Return the data set of a training as Ultralytics resolves it, with its own classes whatever `single_cls` is.

    Raises:
        ConfigError: If it cannot be used.
    """
    return data_of(SimpleNamespace(**{**vars(args), "single_cls": False}))


def trainable_task(network: Any, head: Any) -> tuple[str | None, str]:
    """Return the task that Ultralytics can train a teacher for, or None and the reason why it cannot.

    Args:
        network: The teacher's network, one of Ultralytics'.
        head: The head of it; None if the network is not one of Ultralytics'.
    """
    if head is None:
        return None, "is a network of its own kind"
    if other := OTHER_TRAINERS.get(type(head).__name__):
        return None, f"is a model for {other}, which Ultralytics trains otherwise"
    name, _ = task_and_head(network)
    return (name, "") if name in TASKS else (None, "is a model for no dense task")


def require_labels(task: str, student: Task, data: Mapping[str, Any], named: Any, argument: str, lacks: str) -> None:
    """Refuse to train a teacher for a task that the labels of the data are not for.

    Args:
        task: The teacher's task.
        student: The student's.
        data: The data set as Ultralytics resolves it.
        named: What the user named it by.
        argument: The teacher as the user gave it.
        lacks: The classes that it does not know, in words.

    Raises:
        ConfigError: If they are not.
    """
    if task != student.name and (missing := _missing(task, data)):
        raise ConfigError(
            f"{argument}: does not know {lacks}, and cannot learn it: a model for task={task} needs {missing}, which "
            f"data={named} has not; give a teacher for task={student.name}, or teacher_epochs=0 to take it as it is"
        )


def _missing(task: str, data: Mapping[str, Any]) -> str:
    """Return what a training for a task needs and the labels of the data do not have; nothing if they have it."""
    if task == "depth":
        return "" if any(map(Path.is_file, _depth_files(data))) else "depth maps"
    if task == "pose":
        return "" if data.get("kpt_shape") else "key points"
    if task == "semantic" and data.get("masks_dir"):
        return ""
    width = next(_widths(data), 0)
    if not width:
        return "labels of objects" if data.get("masks_dir") or any(map(Path.is_file, _depth_files(data))) else ""
    outlines = width >= VALUES_OF_OUTLINE and not data.get("kpt_shape")
    if task == "detect":
        return "" if outlines or width == VALUES_OF_BOX else "boxes or outlines alone"
    return "" if outlines else "outlines"


def _widths(data: Mapping[str, Any]) -> Iterator[int]:
    """Yield the number of values in the first line of every label file that has one."""
    for file in map(Path, img2label_paths(images_of(data, "train")[:SEARCHED])):
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
        yield from [len(line.split()) for line in lines if line.strip()][:1]


def _depth_files(data: Mapping[str, Any]) -> list[Path]:
    images = images_of(data, "train")[:SEARCHED]
    return [Path(file) for end in (".png", ".npy") for file in img2label_paths(images, "depth", end)]
