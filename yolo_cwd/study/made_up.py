# SPDX-License-Identifier: AGPL-3.0-or-later
"""Images with labels for any task, for steps of which only the cost counts: the embedded ones and their boxes."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import yaml

from yolo_cwd import bccd

SHAPE = 240, 320  # pixels of an embedded image, and so of its class or depth map
FAR, NEAR = 20.0, 5.0  # meters to what is outside and inside boxes
POSE = {"kpt_shape": [4, 2], "flip_idx": [1, 0, 3, 2]}  # the corners of a box

Array = npt.NDArray[Any]


def build(folder: Path, images: Mapping[str, int], task: str, names: Mapping[int, str], channels: int = 3) -> Path:
    """Write a data set, and return the path of its YAML file. Every object is of the first class.

    Args:
        folder: The folder to write it into.
        images: The number of images by split; those of the embedded set repeat.
        task: What the labels are for, one of `yolo_cwd.tasks.TASKS`.
        names: The classes.
        channels: The channels of the images, as the YAML file says.
    """
    kind = {"semantic": "masks", "depth": "depth"}.get(task, "labels")
    with zipfile.ZipFile(bccd.ARCHIVE) as packed:
        embedded = cycle(name for name in packed.namelist() if name.endswith(".jpg"))
        for split, count in images.items():
            for sub in ("images", kind):
                (folder / sub / split).mkdir(parents=True, exist_ok=True)
            for number, name in enumerate(islice(embedded, count)):
                (folder / "images" / split / f"{number:05d}.jpg").write_bytes(packed.read(name))
                rows = packed.read(name.replace("images/", "labels/").replace(".jpg", ".txt"))
                boxes = np.array([line.split()[1:] for line in rows.decode().splitlines()], float).reshape(-1, 4)
                _write_labels(folder / kind / split / f"{number:05d}", boxes, task, len(names))
    own = POSE if task == "pose" else {"masks_dir": kind} if task == "semantic" else {}
    description = {"path": str(folder.resolve()), **{split: f"images/{split}" for split in images}, **own}
    file = folder / "made-up.yaml"
    file.write_text(yaml.safe_dump({**description, "names": dict(names), "channels": channels}), encoding="utf-8")
    return file


def _write_labels(stem: Path, boxes: Array, task: str, classes: int) -> None:
    """Write the labels of one image: a map, or one line per box.

    Args:
        stem: The file without its suffix.
        boxes: Center and size of each box as fractions of the image, [N, 4].
        task: What the labels are for.
        classes: The number of classes; the last one is outside the boxes of a class map.
    """
    if task == "semantic":
        cv2.imwrite(f"{stem}.png", _map(boxes, np.uint8, classes - 1, 0))
    elif task == "depth":
        np.save(f"{stem}.npy", _map(boxes, np.float16, FAR, NEAR))
    else:
        values = {"detect": boxes, "pose": np.hstack([boxes, _corners(boxes)])}.get(task, _corners(boxes))
        lines = ["0 " + " ".join(f"{x:.6f}" for x in row) for row in values]
        Path(f"{stem}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _corners(boxes: Array) -> Array:
    """Return the corners of boxes, clockwise from the top left one, [N, 8]."""
    turn = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) / 2
    corners: Array = boxes[:, None, :2] + turn * boxes[:, None, 2:]  # [N, 4, 2]
    return corners.clip(0, 1).reshape(-1, 8)


def _map(boxes: Array, dtype: type, outside: float, inside: float) -> Array:
    canvas: Array = np.full(SHAPE, outside, dtype)
    for left, top, right, bottom in (_corners(boxes)[:, [0, 1, 4, 5]] * np.tile(SHAPE[::-1], 2)).round().astype(int):
        canvas[top:bottom, left:right] = inside
    return canvas
