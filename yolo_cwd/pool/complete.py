# SPDX-License-Identifier: AGPL-3.0-or-later
"""Reads the labels of the training images, and finds the classes that a teacher knows and no label has.

Images labeled for new classes leave the old ones out, and a student would learn that these are background. So each gets
its existing labels and the teacher's objects of those classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from ultralytics import YOLO
from ultralytics.data.utils import img2label_paths, verify_image_label
from ultralytics.utils.ops import xywh2xyxy

from yolo_cwd.config import ConfigError, Settings, listed, unusable_data
from yolo_cwd.pool.images import READERS, unrepaired, with_progress
from yolo_cwd.pool.labels import ExistingLabels, corners_of
from yolo_cwd.tasks import TASKS, Task


class ImageLabels(NamedTuple):
    """An image and its labels, as Ultralytics reads them.

    Attributes:
        image: The image.
        has_file: Whether it has a label file.
        existing: Its labels; None if it cannot be used.
        class_ids: The class of each of them.
        message: What Ultralytics says about it.
    """

    image: Path
    has_file: bool
    existing: ExistingLabels | None
    class_ids: Sequence[int]
    message: str


class LabeledImages(NamedTuple):
    """The training images of a data set.

    Attributes:
        existing: The existing labels of each image; images that Ultralytics cannot use are not in it.
        classes: The data's class for each of the teacher's classes, of those that no label has.
        warnings: What the user should know about the images.
    """

    existing: dict[Path, ExistingLabels]
    classes: dict[int, int]
    warnings: list[str]

    @property
    def outlined(self) -> bool:
        """Whether objects are labeled with outlines; Ultralytics reads no data with both outlines and boxes."""
        return any(labels.outlined for labels in self.existing.values())


def refuse_incompletable(task: Task, args: Any) -> None:
    """Refuse labels that cannot be completed, whoever the teacher is.

    Raises:
        ConfigError: If the task has none with objects, or if there are no data.
    """
    if task.has_maps:
        raise ConfigError(
            f"complete_labels=True: labels of task={task.name} are maps, in which every pixel has a value already; "
            "leave complete_labels out"
        )
    if not args.data:
        raise ConfigError("complete_labels=True: is about the labels of a data set; give data=")


def labeled_images(
    images: Sequence[Path], teacher: YOLO, data: Mapping[str, Any], settings: Settings, args: Any
) -> LabeledImages:
    """Read the labels of the training images by Ultralytics' rules, and find the classes that they lack.

    All images are read, whatever `fraction` is: a class that is labeled in one image counts as labeled in all.

    Args:
        images: The images.
        teacher: The teacher with its head.
        data: The data set.
        settings: The checked options.
        args: The arguments of the training.

    Raises:
        ConfigError: If no image can be used, or if there is no class to add.
    """
    found = read_labels(list(dict.fromkeys(images)), TASKS[teacher.task], data, bool(args.single_cls))
    existing = {read.image: read.existing for read in found if read.existing}
    labeled = {class_id for read in found for class_id in read.class_ids}
    unusable = [read.message for read in found if not read.existing]
    if not existing:
        raise unusable_data(args.data, ValueError(f"no training image can be used: {listed(unusable, 1)}"))
    warnings = [f"training images that cannot be used: {listed(unusable, 8)}"] if unusable else []
    if missing := sum(not read.has_file for read in found):
        files = f"{missing} of {len(found)} training images have no label file"
        warnings.append(f"{files}, and have no other objects than the teacher's")
    classes = classes_to_add(teacher, data["names"], labeled)
    absent = [name for class_id, name in data["names"].items() if class_id not in labeled | set(classes.values())]
    if absent:
        warnings.append(f"no label has {listed(absent, 8)}, and {settings.teacher} does not know them either")
    return LabeledImages(existing, classes, warnings)


def read_labels(images: Sequence[Path], task: Task, data: Mapping[str, Any], single_class: bool) -> list[ImageLabels]:
    """Read the labels of images by Ultralytics' rules.

    Args:
        images: The images.
        task: The task that they are labeled for.
        data: The data set.
        single_class: Whether all classes are one.
    """
    rules = task.name == "pose", len(data["names"]), *data.get("kpt_shape", (0, 0)), single_class

    def read(image: Path, label: str) -> ImageLabels:
        has_file = Path(label).is_file()
        content = Path(label).read_bytes() if has_file else b""
        with unrepaired(image) as checked:
            usable, rows, _, outlines, *_, message = verify_image_label((str(checked), label, "", *rules))
        message = message.replace(str(checked), str(image))
        if not usable:
            return ImageLabels(image, has_file, None, (), message)
        boxes = list(corners_of(xywh2xyxy(rows[:, 1:])))
        labels = ExistingLabels(content, outlines or boxes, bool(outlines))
        return ImageLabels(image, has_file, labels, rows[:, 0].astype(int).tolist(), message)

    labels = img2label_paths(list(map(str, images)))
    with ThreadPoolExecutor(READERS) as threads:
        return with_progress(threads.map(read, images, labels), len(images), "reading the labels")


def classes_to_add(teacher: YOLO, names: Mapping[int, str], labeled: set[int]) -> dict[int, int]:
    """Return the data's class for each of the teacher's classes, of those that no label has.

    Args:
        teacher: The teacher.
        names: The data's classes.
        labeled: Those that labels have.

    Raises:
        ConfigError: If there is none.
    """
    unlabeled = {name: class_id for class_id, name in names.items() if class_id not in labeled}
    classes = {i: unlabeled[name] for i, name in teacher.names.items() if name in unlabeled}
    if not classes:
        there = [name for class_id, name in names.items() if class_id in labeled]
        raise ConfigError(
            f"complete_labels=True: the teacher knows no class of the data without labels (labeled: "
            f"{listed(there)}; the teacher's: {listed(list(teacher.names.values()))}); name the old classes in the "
            "data's YAML as the teacher does"
        )
    return classes
