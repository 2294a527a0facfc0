# SPDX-License-Identifier: AGPL-3.0-or-later
"""What a teacher and two students find in the same images; what only one student finds is marked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
import torch
from ultralytics import YOLO
from ultralytics.data.utils import img2label_paths
from ultralytics.utils.metrics import box_iou
from ultralytics.utils.ops import xywh2xyxy

from yolo_cwd.view.plots import COLORS, drawn

LEAST_CONFIDENCE = 0.01  # of a box that may be drawn, 0 to 1
OVERLAP = 0.5  # least IoU of a box with the object that it finds; two boxes of a class that overlap more are one
LEAST_OBJECTS = 8  # in an image that is drawn: where fewer are labeled, many are not labeled
SHOWN_SIZE = 480  # pixels of the longer side of an image
THIN, THICK = 1.0, 3.2
ALONE, MISSED = COLORS[3], COLORS[2]  # green and vermilion
CLASS_COLORS = (COLORS[5], COLORS[0], COLORS[1])  # orange, black and blue, seen on red and white cells

Array = npt.NDArray[Any]


class Boxes(NamedTuple):
    """Boxes in one image.

    Attributes:
        corners: Left, top, right and bottom, as fractions of the image, [N, 4].
        classes: The class of each, [N].
    """

    corners: Array
    classes: Array


class Found(NamedTuple):
    """What a model finds in one image.

    Attributes:
        boxes: All its boxes, the most confident first.
        objects: Whether each of the labeled objects is found, [M].
    """

    boxes: Boxes
    objects: Array


class Row(NamedTuple):
    """One image, its labels, and what teacher, first and second student find in it."""

    image: Path
    labels: Boxes
    found: Sequence[Found]


def draw_comparison(
    file: Path,
    images: Sequence[Path],
    models: Mapping[str, Path | str],
    size: int,
    rows: int = 3,
) -> None:
    """Draw the images in which two students differ most: a column for the labels, the teacher, and each student.

    Classes count equally, as in the score. Models differ in how confident they are, so each makes as many boxes of a
    class, in all the images, as are labeled there.

    Args:
        file: The file to write.
        images: Images of a data set in YOLO's layout, with boxes as labels.
        models: Checkpoints by the title of their column: the teacher, then the two students, of the same classes.
        size: Size in pixels at which the models see the images.
        rows: The number of images to draw.
    """
    labels = [read_labels(image) for image in images]
    found = [find(weights, images, labels, size) for weights in models.values()]
    counts = np.bincount(np.concatenate([objects.classes for objects in labels]))
    differences = [
        (1 / counts[objects.classes])[one.objects != other.objects].sum() * (objects.classes.size >= LEAST_OBJECTS)
        for objects, one, other in zip(labels, *found[1:], strict=True)
    ]
    chosen = sorted(sorted(range(len(images)), key=lambda i: -differences[i])[:rows])
    names = YOLO(next(iter(models.values()))).names
    in_all = ", ".join(f"{names[number]} {count}" for number, count in enumerate(counts))
    titles = [f"labels\n{in_all}"]
    for title, of_model in zip(models, found, strict=True):
        found_classes = np.concatenate(
            [objects.classes[f.objects] for objects, f in zip(labels, of_model, strict=True)]
        )
        finds = np.bincount(found_classes, minlength=len(counts))
        shares = ", ".join(f"{names[number]} {100 * n / max(counts[number], 1):.0f}%" for number, n in enumerate(finds))
        titles.append(f"{title}\n{shares}")
    _draw(file, [Row(images[i], labels[i], [f[i] for f in found]) for i in chosen], titles, names)


def read_labels(image: Path) -> Boxes:
    """Return the labeled boxes of an image in YOLO's layout."""
    (labels,) = map(Path, img2label_paths([str(image)]))
    values = np.array([line.split() for line in labels.read_text(encoding="utf-8").splitlines()], float).reshape(-1, 5)
    return Boxes(xywh2xyxy(values[:, 1:]), values[:, 0].astype(int))


def find(weights: Path | str, images: Sequence[Path], labels: Sequence[Boxes], size: int) -> list[Found]:
    """Return what a model finds in each image, with as many boxes of a class in all of them as there are labels."""
    words = {"imgsz": size, "conf": LEAST_CONFIDENCE, "iou": OVERLAP, "verbose": False}
    all_boxes = [result.boxes.cpu().numpy() for result in YOLO(weights).predict(list(map(str, images)), **words)]
    classes, confidences = (np.concatenate([getattr(b, name) for b in all_boxes]) for name in ("cls", "conf"))
    labeled = np.concatenate([objects.classes for objects in labels])
    least = {
        number: np.sort(confidences[classes == number])[::-1][: (labeled == number).sum()].min(initial=1.0)
        for number in np.unique(classes)
    }
    found = []
    for boxes, objects in zip(all_boxes, labels, strict=True):
        order = [i for i in np.argsort(-boxes.conf) if boxes.conf[i] >= least[boxes.cls[i]]]
        ours = Boxes(boxes.xyxyn[order], boxes.cls[order].astype(int))
        found.append(Found(ours, match(ours, objects)))
    return found


def match(boxes: Boxes, objects: Boxes) -> Array:
    """Return which objects are found, [M]: each box finds one at most, the free one of its class it overlaps most."""
    overlaps = box_iou(torch.tensor(boxes.corners).double(), torch.tensor(objects.corners).double()).numpy()
    overlaps = np.where(boxes.classes[:, None] == objects.classes[None], overlaps, 0.0)  # [N, M]
    found = np.zeros(len(objects.classes), bool)
    for row in overlaps:
        free = np.where(found, 0.0, row)
        if free.size and free.max() >= OVERLAP:
            found[free.argmax()] = True
    return found


@drawn
def _draw(file: Path, rows: Sequence[Row], titles: Sequence[str], names: Mapping[int, str]) -> None:
    from matplotlib import pyplot as plt

    pictures = [_enlarged(row.image) for row in rows]
    height = sum(picture.shape[0] / picture.shape[1] + 0.07 for picture in pictures)
    size = (3.6 * len(titles), 3.6 * height + 1.3)
    figure, grid = plt.subplots(len(rows), len(titles), figsize=size, layout="constrained", squeeze=False)
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title)
    for line, picture, (_, objects, models) in zip(grid, pictures, rows, strict=True):
        for axes in line:
            axes.imshow(picture)
            axes.set(xticks=[], yticks=[])
        _boxes(line[0], picture, objects)
        line[0].set_xlabel(f"{len(objects.classes)} labeled")
        for axes, model in zip(line[1:], models, strict=True):
            _boxes(axes, picture, model.boxes)
            axes.set_xlabel(f"{model.objects.sum()} of {model.objects.size} found")
        for axes, ours, theirs in zip(line[2:], models[1:], models[:0:-1], strict=True):
            _mark(axes, picture, objects, ours, theirs)
    figure.suptitle("Where the students differ most. Each model draws as many boxes of a class as are labeled.")
    figure.legend(handles=_legend(names), loc="outside lower center", ncols=3 + len(names), frameon=False)
    figure.savefig(file, dpi=100)
    plt.close(figure)


def _enlarged(image: Path) -> Array:
    pixels = np.asarray(cv2.imread(str(image)))[..., ::-1]  # RGB
    scale = SHOWN_SIZE / max(pixels.shape[:2])
    return np.asarray(cv2.resize(pixels, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC))


def _boxes(axes: Any, picture: Array, boxes: Boxes) -> None:
    """Draw boxes in the colors of their classes."""
    for corners, number in zip(boxes.corners, boxes.classes, strict=True):
        _box(axes, picture, corners, CLASS_COLORS[number % len(CLASS_COLORS)], THIN)


def _mark(axes: Any, picture: Array, objects: Boxes, ours: Found, theirs: Found) -> None:
    """Mark the labeled objects that only one of two students finds."""
    for corners in objects.corners[theirs.objects & ~ours.objects]:
        _box(axes, picture, corners, MISSED, THICK, ":")
    for corners in objects.corners[ours.objects & ~theirs.objects]:
        _box(axes, picture, corners, ALONE, THICK)


def _box(axes: Any, picture: Array, corners: Array, color: str, width: float, style: str = "-") -> None:
    from matplotlib.patches import Rectangle

    (left, top), (right, bottom) = corners.reshape(2, 2) * picture.shape[1::-1]
    axes.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=color, lw=width, ls=style))


def _legend(names: Mapping[int, str]) -> list[Any]:
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], color=color, lw=2, label=names[n]) for n, color in zip(names, CLASS_COLORS, strict=False)]
    marks = {
        "found by this student alone": (ALONE, "-"),
        "found by the other student alone": (MISSED, ":"),
    }
    return lines + [Line2D([], [], color=c, ls=style, lw=THICK, label=text) for text, (c, style) in marks.items()]
