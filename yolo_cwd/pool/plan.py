# SPDX-License-Identifier: AGPL-3.0-or-later
"""Decides who labels which images, with which classes, and in which folder the labels are."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from ultralytics import YOLO
from ultralytics.data.utils import img2label_paths
from ultralytics.utils.checks import check_model_file_from_stem
from ultralytics.utils.downloads import attempt_download_asset

from yolo_cwd.config import ConfigError, Settings, listed
from yolo_cwd.digits import cache_folder
from yolo_cwd.pool.images import content_of, fingerprint, identity, images_of_data
from yolo_cwd.pool.labels import Form, Own
from yolo_cwd.run.distributed import first_here_first
from yolo_cwd.run.request import arguments_of_run, data_of

VERSION = 2  # part of the key: raise it whenever what is written changes
OF_DATA = ("data", "imgsz", "single_cls", "classes", "fraction", "split")  # what a resumed run has in its checkpoint
VALUES_OF_BOX = 6  # most in a line of a label file for it to be a box and no outline, as Ultralytics has it
PAINTABLE = {1, 3}  # numbers of channels of images that can be written as they were read


class Plan(NamedTuple):
    """Who labels what, and where the labels go.

    Attributes:
        teacher: The model that labels; None if the images get no labels.
        settings: The checked options.
        form: What labels look like.
        args: The arguments of the training.
        folder: The folder for images and labels.
        own: The existing labels of the images; images without any are not in it.
    """

    teacher: YOLO | None
    settings: Settings
    form: Form
    args: Any
    folder: Path
    own: Mapping[Path, Own] = {}

    @property
    def labels(self) -> str:
        """The folder in which Ultralytics looks for labels."""
        return self.form.folder

    @property
    def doing(self) -> str:
        """What happens to the images, in a word."""
        return "labelling" if self.teacher else "gathering"

    def name(self, image: Path) -> str:
        """Return the name of an image's files; it depends on the existing labels."""
        if image not in self.own:
            return identity(image)
        return fingerprint(identity(image), self.own[image].content, sorted(self.form.classes.items()))[:16]


def whole_teacher(settings: Settings, task: str | None) -> YOLO:
    """Return the teacher with its head.

    Args:
        settings: The checked options; the restricted loader has already admitted the teacher.
        task: The task to label for; None for the teacher's own.

    Raises:
        ConfigError: If it cannot label for the task.
    """
    teacher, why = settings.teacher, "cannot label images"
    asking = " and ".join(settings.labelling)
    instead = "train with pool_weight=0" if asking == "unlabeled" else f"leave {asking} out"
    if not isinstance(teacher, str):
        raise ConfigError(f"teacher={type(teacher).__name__}: {why} as an object; give the path of its checkpoint")
    if not teacher.lower().endswith(".pt"):
        raise ConfigError(f"teacher={teacher}: {why}, it is not trained; give a .pt checkpoint, or {instead}")
    model = YOLO(str(_file_of(teacher)))
    if task and model.task != task:
        raise ConfigError(
            f"teacher={teacher}: a model for task={model.task} {why} for task={task}; give a teacher for {task}, or "
            f"{instead}"
        )
    return model


def _file_of(teacher: str) -> Path:
    return Path(attempt_download_asset(check_model_file_from_stem(teacher)))


def changed(args: Any, **changes: Any) -> SimpleNamespace:
    """Return a copy of a training's arguments with some of them changed."""
    return SimpleNamespace(**{**vars(args), **changes})


def shown(settings: Settings) -> str:
    """Return the value of `unlabeled` for a message."""
    text = ",".join(settings.unlabeled)
    return text if len(text) <= 100 else f"{text[:97]}..."


def as_begun(args: Any) -> Any:
    """Return the arguments of a run; where the pool depends on them, a resumed run keeps those of its checkpoint."""
    if not args.resume:
        return args
    begun = arguments_of_run(args.resume)
    return changed(args, **{name: begun[name] for name in OF_DATA if name in begun})


def plan_of(settings: Settings, task: str | None, args: Any) -> tuple[Plan, dict[str, Any]]:
    """Return the plan for labelling a pool, and the data set; nothing is labelled yet.

    Raises:
        ConfigError: If the teacher cannot label for the data.
    """
    if task and "unlabeled" not in settings.labelling:
        return _plan_without_labels(settings, task, args)
    with first_here_first():
        teacher = whole_teacher(settings, task)
        data = data_of(changed(args, single_cls=False)) if args.data else _data_like(teacher)
    form = form_of(teacher, data, settings, _translation(teacher, data, settings, bool(args.single_cls)))
    form = form._replace(outlined=form.task == "detect" and _outlined(data))
    raw_ids = sorted(form.raw_ids.items())
    said = sorted(form.classes.items()), form.point_values, raw_ids, data.get("masks_dir"), form.outlined
    folder = folder_of("unlabeled", settings, form.task, said, args.imgsz)
    return Plan(teacher, settings, form, args, folder), data


def _outlined(data: Mapping[str, Any]) -> bool:
    """Return whether the training images of a data set are labelled with outlines; the first label decides."""
    for label in img2label_paths(list(map(str, images_of_data(data).train))):
        with suppress(OSError, UnicodeDecodeError):
            if first := Path(label).read_text(encoding="utf-8").strip().partition("\n")[0].split():
                return len(first) > VALUES_OF_BOX
    return False


def _plan_without_labels(settings: Settings, task: str, args: Any) -> tuple[Plan, dict[str, Any]]:
    """Return the plan for a pool that teaches by the teacher's maps alone; what the teacher knows does not matter."""
    with first_here_first():
        data = data_of(changed(args, single_cls=False))
    polygons = task == "semantic" and not data.get("masks_dir")
    form = Form("segment" if polygons else task, {}, _label_folder(task, data))
    folder = cache_folder() / "unlabeled" / fingerprint(VERSION, form.task, form.folder)[:16]
    return Plan(None, settings, form, args, folder), data


def folder_of(kind: str, settings: Settings, task: str, said: Any, imgsz: int) -> Path:
    """Return the folder for a teacher's labels under the options that decide what it says.

    Args:
        kind: The folder's name for images of this kind: unlabeled or completed.
        settings: The checked options.
        task: The task to label for.
        said: Plain values that tell what labels look like.
        imgsz: The size at which the teacher sees images.
    """
    asked = settings.pool_conf, settings.pool_unsure, imgsz
    key = fingerprint(VERSION, content_of(_file_of(settings.teacher)), task, said, asked)[:16]
    return cache_folder() / kind / key


def _data_like(teacher: YOLO) -> dict[str, Any]:
    """Return the description of a data set with the teacher's own classes."""
    shape = {"kpt_shape": list(teacher.model.model[-1].kpt_shape)} if teacher.task == "pose" else {}
    masks = {"masks_dir": "masks"} if teacher.task == "semantic" else {}
    channels = teacher.model.yaml.get("channels", 3)
    return {"names": dict(teacher.names), "channels": channels, **shape, **masks}


def form_of(teacher: YOLO, data: Mapping[str, Any], settings: Settings, translation: Mapping[int, int]) -> Form:
    """Return what labels of a teacher for a data set look like.

    Args:
        teacher: The teacher with its head.
        data: The data set, as Ultralytics has resolved it.
        settings: The checked options.
        translation: The data's class for each of the teacher's classes.

    Raises:
        ConfigError: If it cannot make them.
    """
    task, name = teacher.task, f"teacher={settings.teacher}"
    channels = teacher.model.yaml.get("channels", 3)
    if channels != data.get("channels", 3):
        raise ConfigError(
            f"{name}: takes images of {channels} channels, the data have {data.get('channels', 3)}; "
            "choose a teacher trained on such images"
        )
    most = settings.pool_conf if settings.pool_precision is None else 1.0  # not chosen yet
    if channels not in PAINTABLE and settings.pool_unsure < most:
        raise ConfigError(
            f"pool_unsure={settings.pool_unsure:g}: images of {channels} channels cannot be painted over; give "
            f"pool_unsure={most:g} to paint none"
        )
    if task == "semantic" and not data.get("masks_dir"):
        raise ConfigError(
            f"unlabeled={shown(settings)}: class maps are written as images, the data have polygons; give data with "
            "masks_dir"
        )
    if task == "pose" and (ours := data.get("kpt_shape", [0])[0]) != (theirs := teacher.model.model[-1].kpt_shape[0]):
        raise ConfigError(f"{name}: has {theirs} key points, the data have {ours}; give a teacher trained on such data")
    classes = dict(translation)
    if task == "semantic" and len(data["names"]) == 1:  # its maps have 1 where the class is, and 0 elsewhere
        classes[1] = 1
    raw = _raw_ids(data) if task == "semantic" else {}
    return Form(task, classes, _label_folder(task, data), int(data.get("kpt_shape", [0, 3])[1]), raw)


def _label_folder(task: str, data: Mapping[str, Any]) -> str:
    return {"semantic": data.get("masks_dir"), "depth": "depth"}.get(task) or "labels"


def _translation(teacher: YOLO, data: Mapping[str, Any], settings: Settings, single_class: bool) -> dict[int, int]:
    """Return the data's class for each of the teacher's classes with the same name; none if labels have no classes."""
    theirs, ours = teacher.names, data["names"]
    if teacher.task == "depth":
        return {}
    if single_class and list(theirs.values()) == ["item"]:  # Ultralytics' name for the one class of such a model
        return {0: 0}
    by_name = {name: i for i, name in ours.items()}
    known = {i: by_name[name] for i, name in theirs.items() if name in by_name}
    missing = [name for i, name in ours.items() if i not in known.values()]
    if missing and (settings.pool_classes != "known" or not known):
        remedy = "pool_classes=known" if known else "train with pool_weight=0"
        raise ConfigError(
            f"teacher={settings.teacher}: does not know {listed(missing)} of the data, and would call "
            f"them background in unlabelled images; give a teacher that does, or {remedy}"
        )
    return known


def _raw_ids(data: Mapping[str, Any]) -> dict[int, int]:
    """Return the value in the data's class maps for each class: `label_mapping` reversed."""
    mapping = {int(raw): kind for raw, kind in (data.get("label_mapping") or {}).items()}
    return {kind: raw for raw, kind in mapping.items() if isinstance(kind, int) and 0 <= raw < 256}
