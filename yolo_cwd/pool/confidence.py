# SPDX-License-Identifier: AGPL-3.0-or-later
"""Chooses the confidence from which a teacher's labels are as precise as `pool_precision` asks.

The teacher labels the validation images of the data as it labels a pool, and Ultralytics' validator says which of these
labels are right: of the right class, and with an IoU of 0.5 or more (of masks or key points where the task has them).
What it says is kept in our cache folder, so that a teacher is measured once, whatever precision is asked for.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from ultralytics.data.utils import img2label_paths, polygons2masks
from ultralytics.models import yolo
from ultralytics.utils import LOGGER, colorstr
from ultralytics.utils.metrics import OKS_SIGMA
from ultralytics.utils.ops import xywh2xyxy, xyxyxyxy2xywhr

from yolo_cwd.config import ConfigError, Settings
from yolo_cwd.pool import complete, store
from yolo_cwd.pool.images import identity, images_of_data, list_images, with_progress
from yolo_cwd.pool.labels import MAPS, ROWS, Array, Form
from yolo_cwd.pool.plan import Plan, folder_of, form_of, plan_of
from yolo_cwd.run.distributed import first_here_first
from yolo_cwd.run.files import write_whole
from yolo_cwd.run.request import is_trained

FLOOR = 0.01  # lowest confidence that is looked at
STEPS = 1000  # to 1: a confidence that is chosen has three decimals
FEW = 20  # fewer labels than this say little about the others
DRAWN = 320  # pixels, both sides of the masks that are compared
VALIDATORS = {  # with their name for what is right
    "detect": (yolo.detect.DetectionValidator, "tp"),
    "segment": (yolo.segment.SegmentationValidator, "tp_m"),
    "pose": (yolo.pose.PoseValidator, "tp_p"),
    "obb": (yolo.obb.OBBValidator, "tp"),
}


class Curve(NamedTuple):
    """How precise a teacher's labels are by confidence.

    Attributes:
        confidences: Where the number of labels changes, in ascending order.
        labels: The number of labels of at least this confidence, for each of them; never 0.
        right: How many of these are right.
        objects: The number of objects that there are.
    """

    confidences: list[float]
    labels: list[int]
    right: list[int]
    objects: int


class Truth(NamedTuple):
    """The labels of an image.

    Attributes:
        kinds: The class of each object [N].
        boxes: Its box [N, 4]: centre and size, as fractions of the image.
        shapes: Its outline, or the corners of its box [K, 2], as fractions of the image.
        points: Its key points [N, K, 3], in tasks that have them.
    """

    kinds: Array
    boxes: Array
    shapes: Sequence[Array]
    points: Array | None


def chosen(settings: Settings, task: str, args: Any) -> Settings:
    """Return the options with the confidence that `pool_precision` asks for as `pool_conf`.

    Args:
        settings: The checked options; unchanged if they ask for no labels by the teacher.
        task: The task of the student.
        args: The arguments of the training.

    Raises:
        ConfigError: If there is no such confidence, or if it cannot be measured.
    """
    value = settings.pool_precision
    if value is None or not settings.labelling:
        return settings
    refuse_maps(settings, task)
    if not args.data:
        raise ConfigError(
            f"pool_precision={value:g}: is measured on the validation images of a data set; give data=, or pool_conf "
            "instead"
        )
    curve = _known(*_plan(settings, task, args))
    conf, labels, right = _lowest(curve, value)
    precise, found = f"{100 * right / labels:.1f} %", f"{100 * right / curve.objects:.1f} %"
    said = (
        f"pool_precision={value:g}: confidence {conf:g} is chosen; on the validation images {precise} of {labels:,} "
        f"labels are right there (precision), {found} of the objects are found (recall)"
    )
    if labels < FEW:
        LOGGER.warning(f"{colorstr('CWD:')} {said}; so few labels say little")
    else:
        LOGGER.info(f"{colorstr('CWD:')} {said}")
    return replace(settings, pool_conf=conf, pool_unsure=min(conf, settings.pool_unsure), pool_precision=None)


def refuse_maps(settings: Settings, task: str) -> None:
    """Refuse a precision of labels that have no confidence.

    Raises:
        ConfigError: If one is asked for.
    """
    if settings.pool_precision is not None and settings.labelling and task in MAPS:
        raise ConfigError(
            f"pool_precision={settings.pool_precision:g}: labels of task={task} are maps, which have no confidence; "
            "leave pool_precision out"
        )


def curve_of(confidences: Sequence[float], right: Sequence[bool], objects: int) -> Curve:
    """Return how precise labels are by confidence.

    Args:
        confidences: The confidence of each label.
        right: Whether it is right.
        objects: The number of objects that there are.
    """
    found, good = np.asarray(confidences, float), np.asarray(right, bool)
    steps = np.unique(np.floor(found * STEPS) / STEPS)
    labels, hits = (len(part) - np.searchsorted(np.sort(part), steps) for part in (found, found[good]))
    return Curve(steps.tolist(), labels.tolist(), hits.tolist(), objects)


def _lowest(curve: Curve, value: float) -> tuple[float, int, int]:
    """Return the lowest confidence at which labels reach a precision, the number of labels there, and of right ones."""
    rows = list(zip(curve.confidences, curve.labels, curve.right, strict=True))
    for conf, labels, right in rows:
        if right / labels >= value:
            return conf, labels, right
    best, at = max(((right / labels, conf) for conf, labels, right in rows), default=(0.0, 0.0))
    within = np.floor(best * STEPS) / STEPS
    remedy = f"pool_precision={within:g} or less, or " if within else ""
    reached = f"reach {best:.4g} at most (from confidence {at:g} on)" if best else "are never right"
    raise ConfigError(
        f"pool_precision={value:g}: the teacher's labels {reached} on the validation images; give {remedy}"
        "pool_conf instead"
    )


def _plan(settings: Settings, task: str, args: Any) -> tuple[Plan, dict[str, Any]]:
    """Return who labels what, with the data's classes as the training has them, and the data set."""
    if "unlabeled" in settings.labelling:
        list_images(settings.unlabeled, "unlabeled")  # refuse these before the teacher is measured
        plan, data = plan_of(settings, task, args)
    else:
        with first_here_first():
            teacher, data = complete.teacher_and_data(settings, task, args)
        classes = complete.classes_to_add(teacher, data["names"], set())
        plan = Plan(teacher, settings, form_of(teacher, data, settings, classes), args, Path())
    classes = {theirs: ours for theirs, ours in plan.form.classes.items() if is_trained(ours, args)}
    if args.single_cls:
        classes = dict.fromkeys(classes, 0)
    everything = replace(settings, pool_conf=FLOOR, pool_unsure=FLOOR)
    return plan._replace(settings=everything, form=plan.form._replace(classes=classes)), data


def _known(plan: Plan, data: Mapping[str, Any]) -> Curve:
    """Return the teacher's curve; measure it if that has not been done."""
    images = images_of_data({"val": data.get("val")}).held_out
    labels = [Path(file) for file in img2label_paths(list(map(str, images)))]
    args = plan.args
    state = [identity(file) for file in (*images, *labels) if file.exists()]
    forms = len(data["names"]), data.get("kpt_shape"), data.get("kpt_oks_sigmas")
    said = state, sorted(plan.form.classes.items()), forms, args.classes, bool(args.single_cls)
    folder = folder_of("confidences", plan.settings, plan.form.task, said, args.imgsz)
    file = folder.with_suffix(".json")
    with store.writing_alone(folder, f"pool_precision={plan.settings.pool_precision:g}"):
        if not file.exists():
            write_whole(file, json.dumps(_measured(plan, data, images)._asdict()))
    return Curve(**json.loads(file.read_text(encoding="utf-8")))


def _measured(plan: Plan, data: Mapping[str, Any], images: Sequence[Path]) -> Curve:
    """Let the teacher label the validation images, and compare its labels with theirs."""
    task, args = plan.form.task, plan.args
    truths = _truths(images, plan, data)
    objects = sum(len(truth.kinds) for truth in truths.values())
    if not objects:
        raise ConfigError(
            f"pool_precision={plan.settings.pool_precision:g}: the validation images of data={args.data} have no "
            "usable labels; label some of them, or give pool_conf instead"
        )
    LOGGER.info(f"{colorstr('CWD:')} {plan.settings.teacher} labels {len(truths)} validation images, to be compared")
    with tempfile.TemporaryDirectory() as passing:
        validator = VALIDATORS[task][0](save_dir=Path(passing))
        if task == "pose":
            validator.sigma = _sigma(data)
        results = store.predictions(plan._replace(folder=Path(passing)), list(truths))
        judged = (_judged(result.cpu(), truths[result.path], plan.form, validator) for result in results)
        rows = [row for part in with_progress(judged, len(truths), "comparing labels") for row in part]
    return curve_of([conf for conf, _ in rows], [right for _, right in rows], objects)


def _truths(images: Sequence[Path], plan: Plan, data: Mapping[str, Any]) -> dict[str, Truth]:
    """Return the labels of each image, of the classes that the training has."""
    args, truths = plan.args, {}
    for read in complete.read_labels(images, plan.form.task, data, single_class=False):
        if read.own:
            kept = [i for i, kind in enumerate(read.rows[:, 0]) if is_trained(kind, args)]
            kinds = read.rows[kept, 0] * (not args.single_cls)
            shapes = [read.own.shapes[i] for i in kept]
            points = None if read.points is None else read.points[kept]
            truths[str(read.image)] = Truth(kinds, read.rows[kept, 1:], shapes, points)
    return truths


def _judged(result: Any, truth: Truth, form: Form, validator: Any) -> list[tuple[float, bool]]:
    """Return the confidence of each of the teacher's labels for an image, and whether it is right."""
    task, found = form.task, result.obb if form.task == "obb" else result.boxes
    ours = [i for i in found.conf.argsort(descending=True).tolist() if int(found.cls[i]) in form.classes]
    size = np.array(result.orig_shape[::-1], np.float32)  # width, height
    labels = {"cls": torch.tensor([form.classes[int(found.cls[i])] for i in ours])}
    real = {"cls": torch.from_numpy(truth.kinds)}
    if task == "obb":
        labels["bboxes"] = found.xywhr[ours]
        corners = [xyxyxyxy2xywhr((shape * size).astype(np.float32).reshape(1, -1)) for shape in truth.shapes]
        real["bboxes"] = torch.from_numpy(np.concatenate(corners or [np.zeros((0, 5), np.float32)]))
    else:
        labels["bboxes"] = found.xyxy[ours]
        real["bboxes"] = xywh2xyxy(torch.from_numpy(truth.boxes * np.tile(size, 2)))
    if task == "segment":
        labels["masks"] = _drawn([np.array(ROWS[task](result, i, form)) for i in ours])
        real["masks"] = _drawn([shape.ravel() for shape in truth.shapes])
    if truth.points is not None:
        labels["keypoints"] = result.keypoints.xy[ours]
        real["keypoints"] = torch.from_numpy(truth.points * np.array([*size, 1], np.float32))
    right = validator._process_batch(labels, real)[VALIDATORS[task][1]][:, 0]  # with an IoU of 0.5 or more
    return list(zip(found.conf[ours].tolist(), right.tolist(), strict=True))


def _drawn(outlines: Sequence[Array]) -> torch.Tensor:
    """Return masks [N, H, W] of outlines, given as fractions of the image."""
    return torch.from_numpy(polygons2masks((DRAWN, DRAWN), [x * DRAWN for x in outlines], color=1)).float()


def _sigma(data: Mapping[str, Any]) -> Array:
    """Return how far each key point may be off, as Ultralytics has it."""
    points = data["kpt_shape"][0]
    if given := data.get("kpt_oks_sigmas"):
        return np.asarray(given, np.float32).ravel()
    usual: Array = OKS_SIGMA
    return usual if list(data["kpt_shape"]) == [17, 3] else np.ones(points) / points
