# SPDX-License-Identifier: AGPL-3.0-or-later
"""`yolo_cwd label`: what would the teacher's labels for unlabelled images look like?

This is the first step of a training with `unlabeled=` or `complete_labels=True`, on its own, so that the user can look
at the labels beforehand. The training then uses the same labels.
"""

from __future__ import annotations

import textwrap
from pathlib import Path
from statistics import fmean
from typing import Any

from ultralytics import YOLO
from ultralytics.cfg import get_cfg
from ultralytics.data.build import build_yolo_dataset
from ultralytics.data.utils import check_det_dataset
from ultralytics.utils import DEFAULT_CFG_DICT
from ultralytics.utils.plotting import plot_images

from yolo_cwd import digits
from yolo_cwd.config import ConfigError, Settings, check_names, listed, split_options
from yolo_cwd.method.teacher import load_teacher
from yolo_cwd.pool import complete, confidence, store
from yolo_cwd.pool.images import evenly, images_of_data, is_readable, list_images
from yolo_cwd.pool.labels import MAPS
from yolo_cwd.pool.plan import as_begun, whole_teacher
from yolo_cwd.study.advice import WIDTH

SHEET = 9  # images that are drawn with their labels
COMPARED = 64  # validation images to measure the teacher's usual confidence on
FAR_LOWER = 0.75  # as a share of the confidence on the validation images


def run(words: dict[str, Any]) -> store.Pool:
    """Label images and print what was found.

    Args:
        words: `teacher`, `source` (or `unlabeled`), optionally `data`, and any options and arguments that matter.
            Without `source`, but with `complete_labels`, the images are those of the data.

    Raises:
        ConfigError: If they cannot be labelled.
    """
    words = {**words}
    source = words.pop("source", None) or words.pop("unlabeled", None)
    options, arguments = split_options(words)
    if source is None and not options.get("complete_labels"):
        raise ConfigError("source: missing; give the images to label, such as source=path/to/images")
    check_names(arguments, DEFAULT_CFG_DICT)
    settings = Settings.parse({**options, "unlabeled": source})
    if source is not None and not settings.pool_weight:
        raise ConfigError("pool_weight=0: such images get no labels, so there is nothing to see; leave pool_weight out")
    load_teacher(settings.teacher, settings.trust_teacher)
    teacher = whole_teacher(settings, arguments.get("task"))
    data = digits.resolve(arguments.get("data"), teacher.task)
    args = as_begun(get_cfg(DEFAULT_CFG_DICT, {**arguments, "data": data, "task": teacher.task}))
    settings = confidence.chosen(settings, teacher.task, args)
    pool = complete.prepare(settings, teacher.task, args)
    names = check_det_dataset(str(pool.data))["names"] if settings.unlabeled else dict(enumerate(pool.found.objects))
    print(as_text(pool, settings, _draw(pool, args)))
    for warning in _warnings(pool.found, names, _usual_confidence(teacher, settings, args)):
        print(textwrap.fill(f"warning: {warning}", WIDTH))
    return pool


def as_text(pool: store.Pool, settings: Settings, sheet: Path) -> str:
    """Return the contents of a pool in words and a table."""
    found = pool.found
    lines = [f"{found.images:,} images {'labelled' if settings.unlabeled else 'completed'} by {settings.teacher}"]
    further = "" if settings.unlabeled else "further "
    if found.task not in MAPS:
        lines += [
            f"{found.empty:,} without any {further}object, {found.painted:,} with uncertain ones painted over",
            f"mean confidence {found.confidence:.2f}",
        ]
    width = max(map(len, found.objects), default=0)
    lines += ["", *(f"{name:{width}}  {number:>9,}" for name, number in found.objects.items()), ""]
    return "\n".join([*lines, f"labels    {pool.folder}", f"pictures  {sheet}", f"data      {pool.data}"])


def _draw(pool: store.Pool, args: Any) -> Path:
    """Draw some images with their labels, as a training reads them, and return the picture's path."""
    listed = pool.data.with_suffix(".txt")
    sample = listed.with_name(f"{listed.stem}-drawn.txt")
    sample.write_text("\n".join(map(str, evenly(list_images([str(listed)]), SHEET))), encoding="utf-8")
    data = check_det_dataset(str(pool.data))
    args.rect = args.cache = False
    dataset = build_yolo_dataset(args, str(sample), SHEET, data, mode="val")
    batch = dataset.collate_fn([dataset[i] for i in range(len(dataset))])
    sheet = sample.with_suffix(".jpg")
    plot_images(batch, paths=batch["im_file"], fname=sheet, names=data["names"], max_subplots=SHEET, threaded=False)
    return sheet


def _usual_confidence(teacher: YOLO, settings: Settings, args: Any) -> float:
    """Return the mean confidence of the objects a teacher finds in validation images; 0 if there are none."""
    if not args.data:
        return 0.0
    held_out = images_of_data(check_det_dataset(str(args.data))).held_out
    images = [image for image in evenly(held_out, COMPARED) if is_readable(image)]
    asked = {"conf": settings.pool_conf, "imgsz": args.imgsz, "device": args.device, "verbose": False, "save": False}
    found = [result.obb or result.boxes for image in images for result in teacher.predict(str(image), **asked)]
    confidences = [x for boxes in found if boxes is not None for x in boxes.conf.tolist()]
    return fmean(confidences) if confidences else 0.0


def _warnings(found: store.Found, names: dict[int, str], usual: float) -> list[str]:
    """Return warnings about a training on these labels."""
    warnings = []
    absent = [name for name in names.values() if not found.objects.get(name)]
    if found.task != "depth" and absent:
        warnings.append(f"no image has {listed(absent, 8)}")
    if found.confidence < FAR_LOWER * usual:
        warnings.append(
            f"the teacher is far less sure here than on the validation images (mean confidence {found.confidence:.2f}, "
            f"there {usual:.2f}): these images are of another kind"
        )
    return warnings
