# SPDX-License-Identifier: AGPL-3.0-or-later
"""Lets the teacher label the images of a training: refuses what it cannot label, counts what it would, and labels it.

There are two kinds of images. Those of a pool (`unlabeled`) have no labels, and join the training images. Those of the
data (`complete_labels`) keep their labels, and get the teacher's objects of classes that no label has.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from ultralytics import YOLO
from ultralytics.data.utils import img2label_paths

from yolo_cwd import bccd
from yolo_cwd.config import ConfigError, Settings, exists, listed
from yolo_cwd.log import say, warn
from yolo_cwd.pool.complete import LabeledImages, classes_to_add, labeled_images, refuse_incompletable
from yolo_cwd.pool.format import are_outlined, classes_by_name, data_like, format_of, refuse_polygons
from yolo_cwd.pool.images import (
    Split,
    abbreviated,
    evenly,
    fingerprint,
    identity,
    images_of_data,
    is_readable,
    list_images,
    select_images,
)
from yolo_cwd.pool.labels import LabelFormat
from yolo_cwd.pool.lists import (
    Pool,
    is_complete,
    plain_data,
    read_pool,
    share,
    summary_of,
    write_list,
    write_pool,
)
from yolo_cwd.pool.store import Plan, folder_for, label_images, writing_alone
from yolo_cwd.pool.teacher import mean_confidence, whole_teacher
from yolo_cwd.run.distributed import local_zero_first
from yolo_cwd.run.request import arguments_of_run, data_of
from yolo_cwd.tasks import TASKS, Task

__all__ = ["Labeler", "Pool"]

OF_DATA = ("data", "imgsz", "single_cls", "classes", "fraction", "split")  # what a resumed run has in its checkpoint
COMPARED = 64  # validation images to measure the teacher's usual confidence on


class Labeler:
    """Labels the images of one training by its teacher; it reads the teacher and resolves the data once.

    In several processes, each calls the same methods in the same order. The first of each machine labels, and the
    others find the labels.
    """

    def __init__(self, settings: Settings, task: Task | None, args: Any, argument: str = "unlabeled") -> None:
        """Keep what is asked for; nothing is read yet.

        Args:
            settings: The checked options; they ask for labels.
            task: The task of the student; None for the teacher's.
            args: The arguments of the training. If `data` is None, labels have the teacher's classes.
            argument: The argument that names the images of `settings.unlabeled`, for messages.
        """
        self.settings, self.args = settings, restore_arguments(args)
        self._task, self._argument = task, argument
        self._teacher: YOLO | None = None
        self._data: dict[str, Any] | None = None
        self._split = Split([], [])
        self._will_be_trained = False

    @property
    def task(self) -> Task:
        """The task to label for; the teacher's, which is then read, if none was given."""
        if self._task is None:
            self._task = TASKS[self._read_teacher().task]
        return self._task

    def refuse(self, will_be_trained: bool = False) -> None:
        """Refuse what cannot be labeled, without looking into any image.

        Args:
            will_be_trained: Whether the teacher is still to be trained on the data, and so knows its classes only
                then.

        Raises:
            ConfigError: If the teacher cannot label for the data, or if there is nothing to label.
        """
        settings, self._will_be_trained = self.settings, will_be_trained
        _refuse_size(self.args.imgsz)
        if settings.unlabeled:
            list_images(settings.unlabeled, self._argument)
        if settings.complete_labels:
            refuse_incompletable(self.task, self.args)
        self._resolve(teacher=not will_be_trained)
        if settings.unlabeled and self._data:
            refuse_polygons(self.task, self._data, f"{self._argument}={abbreviated(settings)}")
        if not will_be_trained:
            self._check_classes()

    def survey(self) -> dict[str, str]:
        """Return in words what would be labeled, by the option that asks for it; nothing is written.

        Raises:
            ConfigError: If there is nothing to label.
        """
        settings, args, found = self.settings, self.args, {}
        self.refuse(self._will_be_trained)
        data = self._data_of_labels()
        if settings.complete_labels:
            labeled = self._labeled_images()
            number = sum(image in labeled.existing for image in share(self._split.train, args.fraction, data))
            added = listed([data["names"][class_id] for class_id in labeled.classes.values()], 8)
            completed = f"the labels of {number:,} images will be completed with: {added}"
            found["complete_labels"] = "; ".join([completed, *labeled.warnings])
        if settings.unlabeled:
            images, labeled_number = list_images(settings.unlabeled, self._argument), len(self._labeled(data))
            selected = select_images(settings, images, self._split, labeled_number, self._argument)
            found["unlabeled"] = selected.describe()
        return found

    def label(self, teacher: str | None = None) -> Pool:
        """Label everything, and return what to train on; existing labels are used again.

        Args:
            teacher: The path of the teacher, if it has been trained since.

        Raises:
            ConfigError: If the teacher cannot label for the data, or if there is nothing to label.
        """
        if teacher:
            self.settings, self._teacher = replace(self.settings, teacher=teacher), None
        self.refuse()
        completed = self._complete() if self.settings.complete_labels else None
        if completed and not self.settings.unlabeled:
            return completed
        return self._label_pool(completed.train if completed else ())

    def usual_confidence(self) -> float:
        """Return the mean confidence of the objects the teacher finds in validation images; 0 if there are none."""
        images = [image for image in evenly(self._split.held_out, COMPARED) if is_readable(image)]
        return mean_confidence(self._read_teacher(), images, self.args, self.settings.pool_conf)

    def release(self) -> None:
        """Free the memory of the teacher."""
        self._teacher = None
        gc.collect()
        torch.cuda.empty_cache()

    def _resolve(self, teacher: bool = True) -> None:
        """Read the teacher, and resolve the data set; the first process of each machine may have to download them."""
        if (self._teacher or not teacher) and self._data is not None:
            return
        with local_zero_first():
            if teacher:
                self._read_teacher()
            if self._data is None:
                name = bccd.resolve(self.args.data, self.task.name)
                changed = SimpleNamespace(
                    **{**vars(self.args), "data": name, "task": self.task.name, "single_cls": False}
                )
                self._data = data_of(changed) if name else {}
                self._split = images_of_data(self._data)

    def _read_teacher(self) -> YOLO:
        if self._teacher is None:
            asking = " and ".join(self.settings.labeling)
            self._teacher = whole_teacher(self.settings, self._task, asking)
        return self._teacher

    def _data_of_labels(self) -> dict[str, Any]:
        """Return the data set, or without any the description of one with the teacher's classes."""
        return self._data or data_like(self._read_teacher())

    def _check_classes(self) -> None:
        teacher, data = self._read_teacher(), self._data_of_labels()
        if self.settings.complete_labels:
            classes = classes_to_add(teacher, data["names"], set())
            format_of(teacher, data, self.settings, classes, outlined=False)
        if self.settings.unlabeled:
            self._pool_format()

    def _labeled(self, data: Mapping[str, Any]) -> list[Path]:
        """Return the images of the data that are trained on."""
        return share(self._split.train, self.args.fraction, data)

    def _labeled_images(self) -> LabeledImages:
        words = self._read_teacher(), self._data_of_labels(), self.settings, self.args
        return labeled_images(self._split.train, *words)

    def _pool_format(self) -> LabelFormat:
        """Return what labels of the pool look like."""
        teacher, data = self._read_teacher(), self._data_of_labels()
        classes = classes_by_name(teacher, data, self.settings, bool(self.args.single_cls))
        outlined = are_outlined(self._split.train, self.task, data)
        return format_of(teacher, data, self.settings, classes, outlined)

    def _label_pool(self, others: Sequence[str]) -> Pool:
        """Return the images of the pool, labeled, beside the training images of the data or what stands for them."""
        form = self._pool_format()
        folder = folder_for("unlabeled", self.settings, self.args, form.plain())
        plan = Plan(self._read_teacher(), self.settings, self.args, folder, form)
        asked = f"{self._argument}={abbreviated(self.settings)}"
        pool = _made_once(folder, asked, lambda: self._list_pool(plan, others))
        say(f"{pool.summary.describe()}; in {pool.folder}")
        if pool.summary.left_out:
            tell = warn if pool.summary.scored_on else say
            tell(f"images of {self._argument}= that are left out: {pool.summary.left_out}")
        return pool

    def _list_pool(self, plan: Plan, others: Sequence[str]) -> Path:
        """Return the file that says what is in the pool; make it, and the lists beside it, if one is missing."""
        settings, data, split = self.settings, self._data_of_labels(), self._split
        images, labeled = list_images(settings.unlabeled, self._argument), self._labeled(data)
        description = plain_data(data)
        states = [_state(image) for part in (images, labeled, split.held_out) for image in part]
        file = plan.folder / "lists" / f"{fingerprint(states, settings.pool_ratio, description, *others)[:16]}.json"
        if is_complete(file, plan.form):
            return file
        selected = select_images(settings, images, split, len(labeled), self._argument)
        records = label_images(plan, selected.images)
        train = list(others) or _as_list(description.get("train"))
        if self.args.fraction != 1 and train and not others:
            train = [write_list(file.with_name(f"{file.stem}-labeled.txt"), labeled)]
        summary = summary_of(records, plan.form, data["names"], selected.left_out(), selected.held_out)
        write_pool(file, plan, train, records, description, summary)
        return file

    def _complete(self) -> Pool:
        """Return the training images of the data with completed labels."""
        data = self._data_of_labels()
        decisive = self.task.name, sorted(data["names"].items()), data.get("kpt_shape")
        folder = folder_for("completed", self.settings, self.args, *decisive)
        completed = _made_once(folder, "complete_labels=True", lambda: self._list_completed(folder))
        say(f"{completed.summary.describe_completed()}; in {folder}")
        for warning in completed.summary.warnings:
            warn(warning)
        return completed

    def _list_completed(self, folder: Path) -> Path:
        """Return the file that says what is completed; make it, and the list beside it, if one is missing."""
        args, data, images = self.args, self._data_of_labels(), self._split.train
        labels = [Path(file) for file in img2label_paths(list(map(str, images)))]
        description, names = plain_data(data), data["names"]
        states = [_state(file) for file in (*images, *labels)]
        key = fingerprint(states, args.fraction, bool(args.single_cls), description)[:16]
        file, teacher = folder / "lists" / f"{key}.json", self._read_teacher()
        if is_complete(file, format_of(teacher, data, self.settings, {}, outlined=False)):
            return file
        labeled = self._labeled_images()
        form = format_of(teacher, data, self.settings, labeled.classes, labeled.outlined)
        plan = Plan(teacher, self.settings, args, folder, form, labeled.existing)
        records = label_images(plan, [image for image in self._labeled(data) if image in labeled.existing])
        already = sum(record["already_labeled"] for record in records)
        left_out = f"{already:,} that are labeled as something else" if already else ""
        summary = summary_of(records, form, names, left_out)
        objects = {names[class_id]: 0 for class_id in labeled.classes.values()} | summary.objects
        summary = summary._replace(objects=objects, warnings=labeled.warnings)
        write_pool(file, plan, [], records, description, summary)
        return file


def _refuse_size(imgsz: Any) -> None:
    """Refuse an image size at which a teacher can see nothing.

    Raises:
        ConfigError: If it is one.
    """
    sides = imgsz if isinstance(imgsz, list | tuple) else [imgsz]
    if not all(str(side).isdecimal() and int(side) > 0 for side in sides):
        raise ConfigError(f"imgsz={imgsz}: a teacher that labels needs some pixels; give imgsz=640")


def restore_arguments(args: Any) -> Any:
    """Return the arguments of a run; where labels depend on them, a resumed run keeps those of its checkpoint."""
    if not args.resume:
        return args
    begun = arguments_of_run(args.resume)
    return SimpleNamespace(**{**vars(args), **{name: begun[name] for name in OF_DATA if name in begun}})


def _made_once(folder: Path, argument: str, make: Callable[[], Path]) -> Pool:
    """Return the pool in a folder that one process at a time makes; `make` returns the file that says what is in it."""
    with writing_alone(folder, argument):
        return read_pool(folder, make())


def _state(file: Path) -> str:
    return identity(file) if exists(file) else str(file)


def _as_list(value: Any) -> list[str]:
    return [] if not value else list(value) if isinstance(value, list) else [value]
