# SPDX-License-Identifier: AGPL-3.0-or-later
"""`yolo_cwd label`: what would the teacher's labels for unlabeled images look like?

This is the first step of a training with `unlabeled=` or `complete_labels=True`, on its own, so that the user can look
at the labels beforehand. The training then uses the same labels.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ultralytics.cfg import get_cfg
from ultralytics.data.build import build_yolo_dataset
from ultralytics.data.utils import check_det_dataset
from ultralytics.utils import DEFAULT_CFG_DICT
from ultralytics.utils.plotting import plot_images

from yolo_cwd.config import IMAGES, ConfigError, Settings, check_names, listed, refuse_missing, split_options
from yolo_cwd.method.teacher import load_teacher
from yolo_cwd.pool.images import evenly, list_images
from yolo_cwd.pool.lists import PoolSummary
from yolo_cwd.pool.pool import Labeler, Pool
from yolo_cwd.study.advice import WIDTH
from yolo_cwd.tasks import TASKS

SHEET = 9  # images that are drawn with their labels
FAR_LOWER = 0.75  # as a share of the confidence on the validation images
OPTIONS_OF_LABELS = ("teacher", "trust_teacher", "pool_conf", "pool_ratio", "pool_classes", "complete_labels")
ARGUMENTS_OF_LABELS = ("data", "imgsz", "batch", "device", "fraction", "single_cls", "task")
INSTEAD = {"conf": "give pool_conf=", "model": "give teacher="}  # what a user of `yolo predict` is looking for


def run(words: dict[str, Any]) -> Pool:
    """Label images and print what was found.

    Args:
        words: `teacher`, `source` (or `unlabeled`), optionally `data`, and any options and arguments that matter.
            Without `source`, but with `complete_labels`, the images are those of the data.

    Raises:
        ConfigError: If they cannot be labeled.
    """
    settings, arguments, source = _read(words)
    load_teacher(settings.teacher, settings.trust_teacher)
    task = arguments.get("task")
    if task and task not in TASKS:
        raise ConfigError(f"task={task}: has no labels that a teacher gives; give one of {', '.join(TASKS)}")
    labeler = Labeler(settings, TASKS[task] if task else None, get_cfg(DEFAULT_CFG_DICT, arguments), source)
    pool = labeler.label()
    names = check_det_dataset(str(pool.data))["names"] if settings.unlabeled else dict(enumerate(pool.summary.objects))
    sheet = _draw(pool, get_cfg(DEFAULT_CFG_DICT, {**arguments, "task": labeler.task.name}))
    print(as_text(pool, settings, sheet))
    for warning in _warnings(pool.summary, names, labeler.usual_confidence()):
        print(textwrap.fill(f"warning: {warning}", WIDTH))
    return pool


def _read(words: Mapping[str, Any]) -> tuple[Settings, dict[str, Any], str]:
    """Return the checked options, the arguments, and the name under which the images are given.

    Raises:
        ConfigError: If an argument is missing, unknown, or changes nothing about labels.
    """
    given = [name for name in IMAGES if words.get(name) is not None]
    images, rest = [words[name] for name in given], {n: value for n, value in words.items() if n not in IMAGES}
    options, arguments = split_options(rest)
    check_names(arguments, DEFAULT_CFG_DICT)
    for name, value in rest.items():
        if name not in (*OPTIONS_OF_LABELS, *ARGUMENTS_OF_LABELS):
            raise ConfigError(f"{name}={value}: changes nothing about labels; {INSTEAD.get(name, 'leave it out')}")
    if len(given) > 1:
        raise ConfigError(f"unlabeled={images[1]}: source={images[0]} names the images already; give one of the two")
    completes = options.get("complete_labels")
    needed = {"data": arguments.get("data")} if completes else {"source": images[0] if given else None}
    refuse_missing({"teacher": options.get("teacher"), **needed})
    if not given and not completes:
        raise ConfigError("source: missing; give the images to label, such as source=path/to/images")
    settings = Settings.parse({**options, "unlabeled": images[0] if given else None})
    return settings, arguments, given[0] if given else IMAGES[0]


def as_text(pool: Pool, settings: Settings, sheet: Path) -> str:
    """Return the contents of a pool in words and a table."""
    summary = pool.summary
    lines = [f"{summary.images:,} images {'labeled' if settings.unlabeled else 'completed'} by {settings.teacher}"]
    further = "" if settings.unlabeled else "further "
    if not TASKS[summary.task].has_maps:
        lines.append(f"{summary.empty:,} without any {further}object")
    if summary.confidence:
        lines.append(f"mean confidence {summary.confidence:.2f}")
    width = max(map(len, summary.objects), default=0)
    lines += ["", *(f"{name:{width}}  {number:>9,}" for name, number in summary.objects.items()), ""]
    return "\n".join([*lines, f"labels    {pool.folder}", f"pictures  {sheet}", f"data      {pool.data}"])


def _draw(pool: Pool, args: Any) -> Path:
    """Draw some images with their labels, as a training reads them, and return the picture's path."""
    images = pool.data.with_suffix(".txt")
    sample = images.with_name(f"{images.stem}-drawn.txt")
    sample.write_text("\n".join(map(str, evenly(list_images([str(images)]), SHEET))), encoding="utf-8")
    data = check_det_dataset(str(pool.data))
    args.rect = args.cache = False
    dataset = build_yolo_dataset(args, str(sample), SHEET, data, mode="val")
    batch = dataset.collate_fn([dataset[i] for i in range(len(dataset))])
    sheet = sample.with_suffix(".jpg")
    plot_images(batch, paths=batch["im_file"], fname=sheet, names=data["names"], max_subplots=SHEET, threaded=False)
    return sheet


def _warnings(summary: PoolSummary, names: dict[int, str], usual: float) -> list[str]:
    """Return warnings about a training on these labels."""
    warnings = []
    absent = [name for name in names.values() if not summary.objects.get(name)]
    if summary.task != "depth" and absent:
        warnings.append(f"no image has {listed(absent, 8)}")
    if summary.confidence and summary.confidence < FAR_LOWER * usual:
        warnings.append(
            f"the teacher is far less sure here than on the validation images (mean confidence "
            f"{summary.confidence:.2f}, there {usual:.2f}): these images are of another kind"
        )
    return warnings
