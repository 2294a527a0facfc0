# SPDX-License-Identifier: AGPL-3.0-or-later
"""Decides what a teacher's labels for a data set look like: with which classes, in which form, in which folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ultralytics import YOLO
from ultralytics.data.utils import img2label_paths

from yolo_cwd.config import ConfigError, Settings, listed
from yolo_cwd.pool.labels import LabelFormat
from yolo_cwd.tasks import TASKS, Task

VALUES_OF_BOX = 6  # most in a row for it to be a box and no outline, as Ultralytics has it


def data_like(teacher: YOLO) -> dict[str, Any]:
    """Return the description of a data set with the teacher's own classes."""
    shape = {"kpt_shape": list(teacher.model.model[-1].kpt_shape)} if teacher.task == "pose" else {}
    masks = {"masks_dir": TASKS["semantic"].label_folder} if teacher.task == "semantic" else {}
    channels = teacher.model.yaml.get("channels", 3)
    return {"names": dict(teacher.names), "channels": channels, **shape, **masks}


def refuse_polygons(task: Task, data: Mapping[str, Any], asking: str) -> None:
    """Refuse data whose class maps are drawn from polygons.

    Raises:
        ConfigError: If they are.
    """
    if task.name == "semantic" and not data.get("masks_dir"):
        raise ConfigError(
            f"{asking}: class maps are written as images, the data have polygons; give data with masks_dir"
        )


def format_of(
    teacher: YOLO, data: Mapping[str, Any], settings: Settings, classes: Mapping[int, int], outlined: bool
) -> LabelFormat:
    """Return what labels of a teacher for a data set look like.

    Args:
        teacher: The teacher with its head.
        data: The data set, as Ultralytics has resolved it.
        settings: The checked options.
        classes: The data's class for each of the teacher's classes.
        outlined: Whether boxes are written as outlines.

    Raises:
        ConfigError: If it cannot make them.
    """
    task, name = TASKS[teacher.task], f"teacher={settings.teacher}"
    channels = teacher.model.yaml.get("channels", 3)
    if channels != data.get("channels", 3):
        raise ConfigError(
            f"{name}: takes images of {channels} channels, the data have {data.get('channels', 3)}; "
            "choose a teacher trained on such images"
        )
    points, values = data.get("kpt_shape") or (0, 3)
    if task.name == "pose" and points != (theirs := teacher.model.model[-1].kpt_shape[0]):
        raise ConfigError(
            f"{name}: has {theirs} key points, the data have {points}; give a teacher trained on such data"
        )
    single_map = task.name == "semantic" and len(data["names"]) == 1  # 1 where the class is, and 0 elsewhere
    return LabelFormat(
        task,
        {**classes, 1: 1} if single_map else dict(classes),
        folder=(data.get("masks_dir") if task.name == "semantic" else "") or task.label_folder,
        point_values=int(values),
        point_columns=_point_columns(data) if task.name != "pose" else 0,
        raw_ids=_raw_ids(data) if task.name == "semantic" else {},
        outlined=outlined,
    )


def are_outlined(images: Sequence[Path], task: Task, data: Mapping[str, Any]) -> bool:
    """Return whether boxes for images are best written as outlines, since they are labeled so; the first label decides.

    Args:
        images: The training images of a data set.
        task: The task to label for.
        data: The data set.
    """
    if task.name != "detect":
        return False
    for label in img2label_paths(list(map(str, images))):
        with suppress(OSError, UnicodeDecodeError):
            if first := Path(label).read_text(encoding="utf-8").strip().partition("\n")[0].split():
                return len(first) > VALUES_OF_BOX and len(first) != _point_columns(data)
    return False


def _point_columns(data: Mapping[str, Any]) -> int:
    """Return the number of columns of a row that Ultralytics takes for a box with key points; 0 if there is none."""
    points, values = data.get("kpt_shape") or (0, 0)
    return 5 + points * values if points else 0


def classes_by_name(teacher: YOLO, data: Mapping[str, Any], settings: Settings, single_class: bool) -> dict[int, int]:
    """Return the data's class for each of the teacher's classes with the same name; none if labels have no classes.

    Args:
        teacher: The teacher with its head.
        data: The data set.
        settings: The checked options.
        single_class: Whether all classes are one.

    Raises:
        ConfigError: If the teacher lacks a class that it must know.
    """
    theirs, ours = teacher.names, data["names"]
    if teacher.task == "depth":
        return {}
    if single_class and list(theirs.values()) == ["item"]:  # Ultralytics' name for the one class of such a model
        return {0: 0}
    by_name = {name: i for i, name in ours.items()}
    known = {i: by_name[name] for i, name in theirs.items() if name in by_name}
    missing = [name for i, name in ours.items() if i not in known.values()]
    if missing and (settings.pool_classes != "known" or not known):
        remedy = "pool_classes=known" if known else "leave unlabeled out"
        raise ConfigError(
            f"teacher={settings.teacher}: does not know {listed(missing)} of the data, and would call "
            f"them background in unlabeled images; give a teacher that does, or {remedy}"
        )
    return known


def _raw_ids(data: Mapping[str, Any]) -> dict[int, int]:
    """Return the value in the data's class maps for each class: `label_mapping` reversed."""
    mapping = {int(raw): class_id for raw, class_id in (data.get("label_mapping") or {}).items()}
    return {class_id: raw for raw, class_id in mapping.items() if isinstance(class_id, int) and 0 <= raw < 256}
