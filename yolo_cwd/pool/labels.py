# SPDX-License-Identifier: AGPL-3.0-or-later
"""Turns a teacher's predictions on an image into labels that Ultralytics trains on, and into the image to go with them.

An object that the teacher is not sure of is neither a label nor background. It is painted over with the grey that
Ultralytics pads images with, so that the loss does not punish a student that finds it.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image
from ultralytics.data.utils import exif_size

Array = npt.NDArray[Any]

GRAY = 114  # what Ultralytics pads images with
COVERED = 0.5  # with this share of its box in that of a certain object, an uncertain one is the same object
SAME = 0.5  # two boxes that share this much of the larger one show the same object
SEEN = 0.5  # lowest confidence of a key point that counts as visible
IGNORED = 255  # class of pixels that do not count
SUFFIXES = {"semantic": ".png", "depth": ".npy"}  # of the files that hold the labels of these tasks
MAPS = SUFFIXES.keys()  # tasks in which every pixel has a label


class Label(NamedTuple):
    """The label of one image.

    Attributes:
        content: The content of its file.
        classes: The number of the teacher's objects of each class; of pixels, in tasks where every pixel has a class.
        confidences: The confidence of each of these objects.
        certain: The corners [4, 2] of the box of each object, in pixels.
        uncertain: The same for the objects to paint over.
        labelled: The number of the teacher's objects that were already labelled, as something else.
    """

    content: bytes
    classes: Counter[int]
    confidences: Sequence[float] = ()
    certain: Sequence[Array] = ()
    uncertain: Sequence[Array] = ()
    labelled: int = 0


class Own(NamedTuple):
    """The existing labels of an image.

    Attributes:
        content: The content of its label file; it stays in front, byte for byte.
        shapes: The corners of the box of each object, or its outline [K, 2], as fractions of the image.
        outlined: Whether the shapes are outlines; Ultralytics reads no file that has both.
    """

    content: bytes = b""
    shapes: Sequence[Array] = ()
    outlined: bool = False


NOTHING = Own()


class Form(NamedTuple):
    """What the labels of a data set look like.

    Attributes:
        task: One of Ultralytics' tasks.
        classes: The data's class for each of the teacher's classes; others are left out.
        folder: The name of the labels' folder, which is beside that of the images.
        point_values: Numbers per key point: 2, or 3 with its visibility.
        raw_ids: The value in a class map for a class of the data, where it differs from the class number.
        outlined: Whether boxes are written as outlines, since the data's labels are: beside a box Ultralytics drops
            the outlines of all images.
    """

    task: str
    classes: Mapping[int, int]
    folder: str = "labels"
    point_values: int = 3
    raw_ids: Mapping[int, int] = {}
    outlined: bool = False

    @property
    def suffix(self) -> str:
        """The suffix of label files."""
        return SUFFIXES.get(self.task, ".txt")


def label_of(result: Any, form: Form, conf: float, own: Own = NOTHING) -> Label:
    """Return the label of one image; its existing labels win over the teacher.

    Args:
        result: Ultralytics' prediction, with objects of every confidence that matters.
        form: What labels look like.
        conf: Lowest confidence of a certain object.
        own: The existing labels of the image.
    """
    result = result.cpu()
    if form.task == "semantic":
        return _class_map(result, form)
    if form.task == "depth":
        return _depth_map(result)
    found = result.obb if form.task == "obb" else result.boxes
    kinds, confidences = found.cls.int().tolist(), found.conf.tolist()
    corners = found.xyxyxyxy.numpy() if form.task == "obb" else corners_of(found.xyxy.numpy())
    labelled = _boxes_around(own.shapes, result.orig_shape, turned=form.task == "obb")
    ours = [i for i, kind in enumerate(kinds) if kind in form.classes]
    sure = [i for i in ours if confidences[i] >= conf]
    certain = [i for i in sure if not _is_among(corners[i], labelled)]
    row_of = ROWS["segment" if (own.outlined or form.outlined) and form.task == "detect" else form.task]
    rows = [(form.classes[kinds[i]], *row_of(result, i, form)) for i in certain]
    content = "".join(f"{kind} {' '.join(f'{x:.6f}' for x in row)}\n" for kind, *row in rows)
    gap = "\n" if rows and own.content and not own.content.endswith(b"\n") else ""
    there = [*labelled, *corners[certain]]
    return Label(
        content=own.content + (gap + content).encode(),
        classes=Counter(int(row[0]) for row in rows),
        confidences=[confidences[i] for i in certain],
        certain=there,
        uncertain=[corners[i] for i in ours if confidences[i] < conf and not _covered(corners[i], there)],
        labelled=len(sure) - len(certain),
    )


def no_label(image: Path, form: Form) -> Label:
    """Return the label of an image that has none: no object, or a map in which no pixel counts."""
    if form.task not in MAPS:
        return Label(b"", Counter())
    with Image.open(image) as opened:
        size = exif_size(opened)[::-1]
    if form.task == "depth":
        return Label(_array_file(np.zeros(size, np.float32)), Counter())
    return Label(cv2.imencode(".png", np.full(size, IGNORED, np.uint8))[1].tobytes(), Counter())


def _box(result: Any, i: int, _: Form) -> list[float]:
    box: list[float] = result.boxes.xywhn[i].tolist()
    return box


def _polygon(result: Any, i: int, _: Form) -> list[float]:
    """Return the outline of a mask, or of the box if the mask has no outline."""
    outline = result.masks.xyn[i] if result.masks is not None else []
    if len(outline) < 3:
        outline = corners_of(result.boxes.xyxyn.numpy()[[i]])[0]
    points: list[float] = np.asarray(outline).clip(0, 1).ravel().tolist()
    return points


def _oriented_box(result: Any, i: int, _: Form) -> list[float]:
    """Return the corners of a box, clipped if Ultralytics would otherwise refuse the image with all its labels."""
    corners = result.obb.xyxyxyxyn[i].numpy()  # [4, 2]
    low, high = corners.min(axis=0), corners.max(axis=0)
    if (low + high).min() < 0 or (low + high).max() > 2 or (high - low).max() > 1:
        corners = corners.clip(0, 1)
    points: list[float] = corners.ravel().tolist()
    return points


def _pose(result: Any, i: int, form: Form) -> list[float]:
    points = result.keypoints.xyn[i].numpy().clip(0, 1)  # [K, 2]
    if form.point_values == 3:
        confidence = result.keypoints.conf
        seen = np.ones(len(points), bool) if confidence is None else confidence[i].numpy() >= SEEN
        points = np.column_stack([points * seen[:, None], 2.0 * seen])
    return [*_box(result, i, form), *points.ravel().tolist()]


ROWS: dict[str, Callable[[Any, int, Form], list[float]]] = {  # what follows the class in a line of a label file
    "detect": _box,
    "segment": _polygon,
    "obb": _oriented_box,
    "pose": _pose,
}


def _class_map(result: Any, form: Form) -> Label:
    semantic = result.semantic_mask
    values = np.asarray(getattr(semantic, "data", semantic)).squeeze()
    table = np.full(max(256, int(values.max()) + 1), IGNORED, np.uint8)
    for theirs, ours in form.classes.items():
        table[theirs] = ours
    kinds = table[values.astype(int)]
    counts = Counter({int(k): int(n) for k, n in zip(*np.unique(kinds, return_counts=True), strict=True)})
    del counts[IGNORED]
    ids = np.arange(256, dtype=np.uint8)
    for ours, raw in form.raw_ids.items():
        ids[ours] = raw
    return Label(cv2.imencode(".png", ids[kinds])[1].tobytes(), counts)


def _depth_map(result: Any) -> Label:
    depth = result.depth
    values = np.asarray(getattr(depth, "data", depth), np.float32).squeeze()
    return Label(_array_file(values), Counter())


def _array_file(values: Array) -> bytes:
    np.save(buffer := io.BytesIO(), values)
    return buffer.getvalue()


def corners_of(boxes: Array) -> Array:
    """Return the corners [N, 4, 2] of upright boxes [N, 4]."""
    x1, y1, x2, y2 = boxes.T
    return np.stack([x1, y1, x2, y1, x2, y2, x1, y2], axis=1).reshape(-1, 4, 2)


def _boxes_around(shapes: Sequence[Array], size: tuple[int, int], turned: bool) -> list[Array]:
    """Return the corners [4, 2], in pixels, of the box around each shape [K, 2].

    Args:
        shapes: Points as fractions of the image.
        size: Height and width of the image.
        turned: Whether the boxes have an angle.
    """
    points = [(shape * size[::-1]).astype(np.float32) for shape in shapes]
    if turned:
        return [cv2.boxPoints(cv2.minAreaRect(p)) for p in points]
    return [corners_of(np.concatenate([p.min(axis=0), p.max(axis=0)])[None])[0] for p in points]


def _area(box: Array) -> float:
    return float(cv2.contourArea(box.astype(np.float32)))


def _shared(box: Array, other: Array) -> float:
    return float(cv2.intersectConvexConvex(box.astype(np.float32), other.astype(np.float32))[0])


def _covered(box: Array, certain: Sequence[Array]) -> bool:
    """Return whether so much of a box lies in a certain one that both are likely to show the same object."""
    return any(_shared(box, c) >= COVERED * _area(box) for c in certain)


def _is_among(box: Array, labelled: Sequence[Array]) -> bool:
    """Return whether a box shows a labelled object; a helmet in the box of its wearer is a different one."""
    return any(_shared(box, other) >= SAME * max(_area(box), _area(other)) for other in labelled)


def painted(image: Array, uncertain: Sequence[Array], certain: Sequence[Array]) -> Array:
    """Return a copy of an image [H, W, C] with uncertain objects painted grey, except where a certain one is.

    Args:
        image: The image.
        uncertain: Corners [4, 2] of the objects to paint over.
        certain: Corners [4, 2] of the objects that stay.
    """
    over = np.zeros(image.shape[:2], np.uint8)
    for value, boxes in ((1, uncertain), (0, certain)):
        for box in boxes:
            cv2.fillPoly(over, [np.round(box).astype(np.int32)], value)
    copy = image.copy()
    copy[over.astype(bool)] = GRAY
    return copy
