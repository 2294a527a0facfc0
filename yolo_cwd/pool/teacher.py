# SPDX-License-Identifier: AGPL-3.0-or-later
"""The teacher with its head: the model that labels, and its predictions on images."""

from __future__ import annotations

import locale
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from PIL import Image
from ultralytics import YOLO
from ultralytics.data.utils import exif_size
from ultralytics.utils import DEFAULT_CFG, LOCAL_RANK
from ultralytics.utils.checks import check_model_file_from_stem
from ultralytics.utils.downloads import attempt_download_asset
from ultralytics.utils.torch_utils import parse_device

from yolo_cwd.config import ConfigError, Settings
from yolo_cwd.log import warn
from yolo_cwd.pool.images import READERS
from yolo_cwd.tasks import Task

MOST_OBJECTS = 1000  # in an image: more would need too much memory for their masks


def file_of(teacher: str) -> Path:
    """Return a teacher's file, downloaded if Ultralytics knows it."""
    return Path(attempt_download_asset(check_model_file_from_stem(teacher)))


def whole_teacher(settings: Settings, task: Task | None, asking: str) -> YOLO:
    """Return the teacher with its head.

    Args:
        settings: The checked options; the restricted loader has already admitted the teacher.
        task: The task to label for; None for the teacher's own.
        asking: The arguments that ask for labels.

    Raises:
        ConfigError: If it cannot label for the task.
    """
    teacher, why = settings.teacher, "cannot label images"
    if not isinstance(teacher, str):
        raise ConfigError(f"teacher={type(teacher).__name__}: {why} as an object; give the path of its checkpoint")
    if not teacher.lower().endswith(".pt"):
        raise ConfigError(f"teacher={teacher}: {why}, it is not trained; give a .pt checkpoint, or leave {asking} out")
    model = YOLO(str(file_of(teacher)))
    if task and model.task != task.name:
        raise ConfigError(
            f"teacher={teacher}: a model for task={model.task} {why} for task={task.name}; give a teacher for "
            f"{task.name}, or leave {asking} out"
        )
    return model


def predictions(
    teacher: YOLO, task: Task, images: Mapping[Path, Path], args: Any, conf: float, folder: Path
) -> Iterator[tuple[Path, Any]]:
    """Yield images and the teacher's predictions on them, in any order.

    A batch has images of one size only. Ultralytics would pad others together, and what the teacher sees in an image
    would depend on its neighbors.

    Args:
        teacher: The teacher with its head.
        task: The task that it labels for.
        images: Where each image lies, under a name that has nothing of a pattern and fits into one line.
        args: The arguments of the training.
        conf: Lowest confidence of an object.
        folder: A folder that may be written to.
    """
    batch = args.batch if args.batch >= 1 else DEFAULT_CFG.batch  # one below 1 is estimated later, for the training
    asked = {"conf": conf, "imgsz": args.imgsz, "batch": batch, "device": device_here(args.device)}
    asked |= {"max_det": MOST_OBJECTS, "stream": True, "verbose": False, "save": False}
    sources = {str(place.absolute()): source for source, place in images.items()}
    crowded = 0
    with tempfile.TemporaryDirectory(dir=folder) as passing:
        listing = Path(passing) / "images.txt"
        for of_one_size in _by_size(sources):
            listing.write_text("\n".join(of_one_size), encoding=locale.getpreferredencoding(False))  # as it is read
            for result in teacher.predict(str(listing), **asked):
                crowded += not task.has_maps and len(result) >= MOST_OBJECTS
                yield sources[result.path], result
    if crowded:
        warn(
            f"{crowded} images may have more than {MOST_OBJECTS:,} objects; the rest of them counts "
            "as background: cut such images into smaller ones"
        )


def _by_size(images: Iterable[str]) -> list[list[str]]:
    images, groups = list(images), defaultdict(list)
    with ThreadPoolExecutor(READERS) as threads:
        for image, size in zip(images, threads.map(_size_of, images), strict=True):
            groups[size].append(image)
    return list(groups.values())


def _size_of(image: str) -> tuple[int, int]:
    with Image.open(image) as opened:
        width, height = exif_size(opened)
    return width, height


def device_here(device: Any) -> torch.device | str | None:
    """Return the device for this process, out of those of the training."""
    devices = parse_device(device).split(",")
    mine = devices[max(LOCAL_RANK, 0) % len(devices)]
    return torch.device("cuda", int(mine)) if mine.isdecimal() else mine or None


def mean_confidence(teacher: YOLO, images: Sequence[Path], args: Any, conf: float) -> float:
    """Return the mean confidence of the objects that a teacher finds in images; 0 if there are none."""
    asked = {"conf": conf, "imgsz": args.imgsz, "device": device_here(args.device), "verbose": False, "save": False}
    results = [teacher.predict(str(image), **asked)[0] for image in images]
    found = [result.obb if result.obb is not None else result.boxes for result in results]
    confidences = [x for boxes in found if boxes is not None for x in boxes.conf.tolist()]
    return fmean(confidences) if confidences else 0.0
