# SPDX-License-Identifier: AGPL-3.0-or-later
"""Turns a teacher's predictions on an image into a label that Ultralytics trains on."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from yolo_cwd.tasks import Task

Array = npt.NDArray[Any]

SAME = 0.5  # two boxes that share this much of the larger one show the same object
SEEN = 0.5  # lowest confidence of a key point that counts as visible
IGNORED = 255  # class of pixels that do not count


class Label(NamedTuple):
    """The label of one image.

    Attributes:
        content: The content of its file.
        classes: The number of the teacher's objects of each class; of pixels, in tasks where every pixel has a class.
        confidences: The confidence of each of these objects.
        already_labeled: The number of the teacher's objects that have a label of another class.
    """

    content: bytes
    classes: Counter[int]
    confidences: Sequence[float] = ()
    already_labeled: int = 0


class ExistingLabels(NamedTuple):
    """The existing labels of an image.

    Attributes:
        content: The content of its label file; it stays in front, byte for byte.
        shapes: The corners of the box of each object, or its outline [K, 2], as fractions of the image.
        outlined: Whether the shapes are outlines.
    """

    content: bytes = b""
    shapes: Sequence[Array] = ()
    outlined: bool = False


NO_LABELS = ExistingLabels()


class LabelFormat(NamedTuple):
    """What the labels of a data set look like.

    Attributes:
        task: The task.
        classes: The data's class for each of the teacher's classes; others are left out.
        folder: The name of the labels' folder, which is beside that of the images.
        point_values: Numbers per key point: 2, or 3 with its visibility.
        point_columns: Number of columns of a row that would be taken for a box with key points, in tasks without any;
            0 if there is none.
        raw_ids: The value in a class map for a class of the data, where it differs from the class number.
        outlined: Whether boxes are written as outlines, since the data's labels are: beside a box Ultralytics drops
            the outlines of all images.
    """

    task: Task
    classes: Mapping[int, int]
    folder: str = "labels"
    point_values: int = 3
    point_columns: int = 0
    raw_ids: Mapping[int, int] = {}
    outlined: bool = False

    def plain(self) -> tuple[Any, ...]:
        """Return all of it as plain values in a fixed order."""
        mappings = sorted(self.classes.items()), sorted(self.raw_ids.items())
        return (self.task.name, *mappings, self.folder, self.point_values, self.point_columns, self.outlined)


def label_of(result: Any, form: LabelFormat, conf: float, existing: ExistingLabels = NO_LABELS) -> Label:
    """Return the label of one image; its existing labels win over the teacher.

    Args:
        result: Ultralytics' prediction, on the CPU.
        form: What labels look like.
        conf: Lowest confidence of an object.
        existing: The existing labels of the image.
    """
    if form.task.name == "semantic":
        return _class_map(result, form)
    if form.task.name == "depth":
        return _depth_map(result)
    turned = form.task.name == "obb"
    found = result.obb if turned else result.boxes
    class_ids, confidences = found.cls.int().tolist(), found.conf.tolist()
    corners = found.xyxyxyxy.numpy() if turned else corners_of(found.xyxy.numpy())
    labeled = _boxes_around(existing.shapes, result.orig_shape, turned)
    sure = [i for i, c in enumerate(class_ids) if c in form.classes and confidences[i] >= conf]
    new = [i for i in sure if not _is_among(corners[i], labeled)]
    rows = [(form.classes[class_ids[i]], *_row(result, i, form)) for i in new]
    content = "".join(f"{class_id} {' '.join(f'{x:.6f}' for x in row)}\n" for class_id, *row in rows)
    gap = "\n" if rows and existing.content and not existing.content.endswith(b"\n") else ""
    return Label(
        content=existing.content + (gap + content).encode(),
        classes=Counter(int(row[0]) for row in rows),
        confidences=[confidences[i] for i in new],
        already_labeled=len(sure) - len(new),
    )


def _row(result: Any, i: int, form: LabelFormat) -> list[float]:
    """Return what follows the class in the row of an object."""
    row = ROWS["segment" if form.outlined and form.task.name == "detect" else form.task.name](result, i, form)
    if 1 + len(row) == form.point_columns:
        row += row[-2:]  # the last point of the outline twice, so that none of it is taken for key points
    return row


def _box(result: Any, i: int, _: LabelFormat) -> list[float]:
    box: list[float] = result.boxes.xywhn[i].tolist()
    return box


def _polygon(result: Any, i: int, _: LabelFormat) -> list[float]:
    """Return the outline of a mask, or of the box if the mask has no outline."""
    outline = result.masks.xyn[i] if result.masks is not None else []
    if len(outline) < 3:
        outline = corners_of(result.boxes.xyxyn.numpy()[[i]])[0]
    points: list[float] = np.asarray(outline).clip(0, 1).ravel().tolist()
    return points


def _oriented_box(result: Any, i: int, _: LabelFormat) -> list[float]:
    """Return the corners of a box, clipped if Ultralytics would otherwise refuse the image with all its labels."""
    corners = result.obb.xyxyxyxyn[i].numpy()  # [4, 2]
    low, high = corners.min(axis=0), corners.max(axis=0)
    if (low + high).min() < 0 or (low + high).max() > 2 or (high - low).max() > 1:
        corners = corners.clip(0, 1)
    points: list[float] = corners.ravel().tolist()
    return points


def _pose(result: Any, i: int, form: LabelFormat) -> list[float]:
    points = result.keypoints.xyn[i].numpy().clip(0, 1)  # [K, 2]
    if form.point_values == 3:
        confidence = result.keypoints.conf
        seen = np.ones(len(points), bool) if confidence is None else confidence[i].numpy() >= SEEN
        points = np.column_stack([points * seen[:, None], 2.0 * seen])
    return [*_box(result, i, form), *points.ravel().tolist()]


ROWS: dict[str, Callable[[Any, int, LabelFormat], list[float]]] = {  # what follows the class in a line of a label file
    "detect": _box,
    "segment": _polygon,
    "obb": _oriented_box,
    "pose": _pose,
}


def _class_map(result: Any, form: LabelFormat) -> Label:
    semantic = result.semantic_mask
    values = np.asarray(getattr(semantic, "data", semantic)).squeeze()
    table = np.full(max(256, int(values.max()) + 1), IGNORED, np.uint8)
    for theirs, ours in form.classes.items():
        table[theirs] = ours
    class_ids = table[values.astype(int)]
    counts = Counter({int(k): int(n) for k, n in zip(*np.unique(class_ids, return_counts=True), strict=True)})
    del counts[IGNORED]
    ids = np.arange(256, dtype=np.uint8)
    for ours, raw in form.raw_ids.items():
        ids[ours] = raw
    return Label(cv2.imencode(".png", ids[class_ids])[1].tobytes(), counts)


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


def _is_among(box: Array, labeled: Sequence[Array]) -> bool:
    """Return whether a box shows a labeled object; a helmet in the box of its wearer is a different one."""
    return any(_shared(box, other) >= SAME * max(_area(box), _area(other)) for other in labeled)
