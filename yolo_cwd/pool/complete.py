# SPDX-License-Identifier: AGPL-3.0-or-later
"""Completes the labels of the training images with a teacher that knows the old classes beside the new ones.

Images labelled for new classes leave the old ones out, and a student would learn that these are background. The images
go into our own folder (store.py), each with its existing labels and the teacher's objects of those classes that no
label has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from ultralytics import YOLO
from ultralytics.data.utils import img2label_paths, verify_image_label
from ultralytics.utils import LOGGER, colorstr
from ultralytics.utils.ops import xywh2xyxy

from yolo_cwd.config import ConfigError, Settings, listed, unusable_data
from yolo_cwd.pool import store
from yolo_cwd.pool.images import READERS, fingerprint, identity, images_of_data, list_images, with_progress
from yolo_cwd.pool.labels import MAPS, Form, Own, corners_of
from yolo_cwd.pool.plan import Plan, changed, folder_of, form_of, plan_of, whole_teacher
from yolo_cwd.pool.store import Pool
from yolo_cwd.run.distributed import first_here_first
from yolo_cwd.run.request import data_of


class Read(NamedTuple):
    """An image and its labels, as Ultralytics reads them.

    Attributes:
        image: The image.
        file: Whether it has a label file.
        own: Its labels; None if it cannot be used.
        rows: The class and the box of each object [N, 5]; None without labels.
        points: The key points [N, K, 3]; None in other tasks.
        message: What Ultralytics says about it.
    """

    image: Path
    file: bool
    own: Own | None
    rows: Any
    points: Any
    message: str


class Labelled(NamedTuple):
    """The training images of a data set.

    Attributes:
        own: The existing labels of each image; images that Ultralytics cannot use are not in it.
        classes: The data's class for each of the teacher's classes, of those that no label has.
        warnings: What the user should know about the images.
    """

    own: dict[Path, Own]
    classes: dict[int, int]
    warnings: list[str]


def prepare(settings: Settings, task: str | None, args: Any) -> Pool:
    """Return everything that the teacher labels for a training: the data's images, and those of `unlabeled`.

    Args:
        settings: The checked options; they ask for at least one of the two.
        task: The task of the student; None for the teacher's.
        args: The arguments of the training, as it was begun.

    Raises:
        ConfigError: If the teacher cannot label for the data, or if there is nothing to label.
    """
    if not settings.complete_labels:
        return store.prepare(settings, task, args)
    if not settings.unlabeled:
        return _complete(settings, task, args)
    list_images(settings.unlabeled, "unlabeled")  # refuse these before the others are labelled
    plan, data = plan_of(settings, task, args)
    return store.label_pool(plan, data, _complete(settings, task, args).train)


def count(settings: Settings, task: str, args: Any) -> str:
    """Return in words which labels would be completed, without labelling.

    Args:
        settings: The checked options.
        task: The task of the student.
        args: The arguments of the training, including `data`.

    Raises:
        ConfigError: If there is nothing to complete.
    """
    teacher, data = teacher_and_data(settings, task, args)
    images = images_of_data(data).train
    read = _read(images, teacher, data, settings, args)
    number = sum(image in read.own for image in store.share(images, args.fraction, data))
    added = listed([data["names"][kind] for kind in read.classes.values()], 8)
    return "; ".join([f"the labels of {number:,} images will be completed with: {added}", *read.warnings])


def _complete(settings: Settings, task: str | None, args: Any) -> Pool:
    """Return the training images of the data with completed labels."""
    with first_here_first():
        teacher, data = teacher_and_data(settings, task, args)
    said = sorted(data["names"].items()), data.get("kpt_shape")
    folder = folder_of("completed", settings, teacher.task, said, args.imgsz)
    completed = store.made_once(folder, "complete_labels=True", lambda: _lists(folder, teacher, data, settings, args))
    LOGGER.info(f"{colorstr('CWD:')} {_told(completed.found)}; in {folder}")
    for warning in completed.found.warnings:
        LOGGER.warning(f"{colorstr('CWD:')} {warning}")
    return completed


def teacher_and_data(settings: Settings, task: str | None, args: Any) -> tuple[YOLO, dict[str, Any]]:
    """Return the teacher and the data set whose labels it completes.

    Raises:
        ConfigError: If it cannot.
    """
    teacher = whole_teacher(settings, task)
    if teacher.task in MAPS:
        raise ConfigError(
            f"complete_labels=True: labels of task={teacher.task} are maps, in which every pixel has a value already; "
            "leave complete_labels out"
        )
    if not args.data:
        raise ConfigError("complete_labels=True: is about the labels of a data set; give data=")
    return teacher, data_of(changed(args, single_cls=False))


def _lists(folder: Path, teacher: YOLO, data: dict[str, Any], settings: Settings, args: Any) -> Path:
    """Return the file that says what is completed; make it, and the list beside it, if missing."""
    images = images_of_data(data).train
    labels = [Path(file) for file in img2label_paths(list(map(str, images)))]
    what = [identity(file) for file in (*images, *labels) if file.exists()]
    description = store.described(data)
    key = fingerprint(what, args.fraction, bool(args.single_cls), description)[:16]
    file = folder / "lists" / f"{key}.json"
    if store.is_whole(file, Form(teacher.task, {})):
        return file
    read = _read(images, teacher, data, settings, args)
    form = form_of(teacher, data, settings, read.classes)
    plan = Plan(teacher, settings, form, args, folder, read.own)
    chosen = [image for image in store.share(images, args.fraction, data) if image in read.own]
    records = store.label_images(plan, chosen)
    labelled = sum(record["labelled"] for record in records)
    left_out = f"{labelled:,} that are labelled as something else" if labelled else ""
    found = store.found_in(records, form, data["names"], left_out)
    objects = {data["names"][kind]: 0 for kind in read.classes.values()} | found.objects
    found = found._replace(objects=objects, warnings=read.warnings)
    return store.write_lists(file, plan, [], records, description, found)


def _read(images: Sequence[Path], teacher: YOLO, data: Mapping[str, Any], settings: Settings, args: Any) -> Labelled:
    """Read the labels of the training images by Ultralytics' rules, and find the classes that they lack.

    All images are read, whatever `fraction` is: a class that is labelled in one image counts as labelled in all.
    """
    found = read_labels(list(dict.fromkeys(images)), teacher.task, data, bool(args.single_cls))
    own = {read.image: read.own for read in found if read.own}
    kinds = {kind for read in found if read.own for kind in read.rows[:, 0].astype(int).tolist()}
    unusable = [read.message for read in found if not read.own]
    if not own:
        raise unusable_data(args.data, ValueError(f"no training image can be used: {listed(unusable, 1)}"))
    warnings = [f"training images that cannot be used: {listed(unusable, 8)}"] if unusable else []
    if missing := sum(not read.file for read in found):
        files = f"{missing} of {len(found)} training images have no label file"
        warnings.append(f"{files}, and have no other objects than the teacher's")
    classes = classes_to_add(teacher, data["names"], kinds)
    absent = [name for kind, name in data["names"].items() if kind not in kinds | set(classes.values())]
    if absent:
        warnings.append(f"no label has {listed(absent, 8)}, and {settings.teacher} does not know them either")
    return Labelled(own, classes, warnings)


def read_labels(images: Sequence[Path], task: str, data: Mapping[str, Any], single_class: bool) -> list[Read]:
    """Read the labels of images by Ultralytics' rules.

    Args:
        images: The images.
        task: The task that they are labelled for.
        data: The data set.
        single_class: Whether all classes are one.
    """
    rules = task == "pose", len(data["names"]), *data.get("kpt_shape", (0, 0)), single_class

    def read(image: Path, label: str) -> Read:
        file = Path(label).is_file()
        content = Path(label).read_bytes() if file else b""
        usable, rows, _, outlines, points, *_, message = verify_image_label((str(image), label, "", *rules))
        if not usable:
            return Read(image, file, None, None, None, message)
        boxes = list(corners_of(xywh2xyxy(rows[:, 1:])))
        return Read(image, file, Own(content, outlines or boxes, bool(outlines)), rows, points, message)

    labels = img2label_paths(list(map(str, images)))
    with ThreadPoolExecutor(READERS) as threads:
        return with_progress(threads.map(read, images, labels), len(images), "reading the labels")


def classes_to_add(teacher: YOLO, names: Mapping[int, str], kinds: set[int]) -> dict[int, int]:
    """Return the data's class for each of the teacher's classes, of those that no label has.

    Args:
        teacher: The teacher.
        names: The data's classes.
        kinds: Those that labels have.

    Raises:
        ConfigError: If there is none.
    """
    unlabelled = {name: kind for kind, name in names.items() if kind not in kinds}
    classes = {i: unlabelled[name] for i, name in teacher.names.items() if name in unlabelled}
    if not classes:
        labelled = [name for kind, name in names.items() if kind in kinds]
        raise ConfigError(
            f"complete_labels=True: the teacher knows no class of the data without labels (labelled: "
            f"{listed(labelled)}; the teacher's: {listed(list(teacher.names.values()))}); name the old classes in the "
            "data's YAML as the teacher does"
        )
    return classes


def _told(found: store.Found) -> str:
    objects = listed([f"{name} {number:,}" for name, number in found.objects.items()], 8)
    left_out = found.left_out and f", without {found.left_out}"
    said = f"the labels of {found.images:,} images are completed by the teacher: {objects}{left_out}"
    return f"{said}, {found.painted:,} images with uncertain ones painted over"
