# SPDX-License-Identifier: AGPL-3.0-or-later
"""What several models find in the same images, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from ultralytics import YOLO

from yolo_cwd.view.plots import drawn

SHOWN_SIZE = 480  # pixels of the longer side of an image: room for the names of classes


@drawn
def draw_side_by_side(
    file: Path,
    images: Sequence[Path],
    models: Mapping[str, Path | str],
    size: int,
    confidence: float = 0.25,
    labels: bool = True,
) -> None:
    """Draw a row for each image and a column for each model, with what the model finds in it.

    Args:
        file: The file to write.
        images: The images.
        models: Checkpoints by the title of their column.
        size: Size in pixels at which the models see the images.
        confidence: Lowest confidence of an object to draw, 0 to 1.
        labels: Whether to draw class names; each class has its own color anyway.
    """
    from matplotlib import pyplot as plt

    enlarged = [_enlarge(cv2.imread(str(image))) for image in images]
    rows, columns = len(images), len(models)
    height = sum(image.shape[0] / image.shape[1] for image in enlarged)
    figsize = (3 * columns, 3 * height + 0.6)
    figure, grid = plt.subplots(rows, columns, figsize=figsize, layout="constrained", squeeze=False)
    for column, (title, weights) in zip(grid.T, models.items(), strict=True):
        found = YOLO(weights).predict(enlarged, imgsz=size, conf=confidence, verbose=False)
        column[0].set_title(title)
        for axes, result in zip(column, found, strict=True):
            axes.imshow(result.plot(conf=False, labels=labels, line_width=2, font_size=10)[..., ::-1])
            axes.set_axis_off()
    figure.savefig(file, dpi=80)
    plt.close(figure)


def _enlarge(image: Any) -> np.ndarray[Any, Any]:
    scale = SHOWN_SIZE / max(image.shape[:2])
    return np.asarray(cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC))
