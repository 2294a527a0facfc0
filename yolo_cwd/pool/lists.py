# SPDX-License-Identifier: AGPL-3.0-or-later
"""Lists of labeled images: what a training uses, kept beside the labels.

In <folder>/lists/ (store.py), <key>.txt has the images for one training; <key>.yaml is a data set with them, and
<key>.json, which is written last, says what is in it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from yolo_cwd.config import exists, listed
from yolo_cwd.pool.labels import LabelFormat
from yolo_cwd.pool.store import Plan
from yolo_cwd.run.files import write_atomic
from yolo_cwd.tasks import TASKS


class PoolSummary(NamedTuple):
    """What is in a pool, as plain values.

    Attributes:
        task: The task that its images are labeled for.
        images: Number of images to train on.
        objects: Number of the teacher's objects by class; of pixels, in tasks where every pixel has a class.
        empty: Number of images without any such object.
        confidence: Mean confidence of the objects; 0 if there are none.
        left_out: What was left out, in words.
        scored_on: Number of images that were left out because models are scored on them.
        warnings: What else the user should know.
    """

    task: str
    images: int
    objects: dict[str, int]
    empty: int
    confidence: float
    left_out: str
    scored_on: int
    warnings: Sequence[str] = ()

    def describe(self) -> str:
        """Return in words what was labeled."""
        said = f"{self.images:,} images without labels are labeled by the teacher"
        if TASKS[self.task].has_maps:
            return said
        return f"{said}: {sum(self.objects.values()):,} objects, {self.empty:,} images without any"

    def describe_completed(self) -> str:
        """Return in words what was added to labels."""
        objects = listed([f"{name} {number:,}" for name, number in self.objects.items()], 8)
        left_out = self.left_out and f", without {self.left_out}"
        return f"the labels of {self.images:,} images are completed by the teacher: {objects}{left_out}"


class Pool(NamedTuple):
    """Labeled images to train on.

    Attributes:
        folder: Where the images and labels are.
        train: What to train on: lists of images, and what else the data set has.
        data: The YAML file of a data set with all of it; plain Ultralytics can use it too.
        summary: What is in it.
    """

    folder: Path
    train: list[str]
    data: Path
    summary: PoolSummary


def read_pool(folder: Path, file: Path) -> Pool:
    """Return the pool that a file says what is in."""
    data = file.with_suffix(".yaml")
    train = yaml.safe_load(data.read_text(encoding="utf-8"))["train"]
    return Pool(folder, train, data, PoolSummary(**json.loads(file.read_text(encoding="utf-8"))))


def is_complete(file: Path, form: LabelFormat) -> bool:
    """Return whether a pool is there with all its lists, images and labels: the user may delete any of them.

    Args:
        file: The file that says what is in it.
        form: What its labels look like.
    """
    if not all(file.with_suffix(suffix).exists() for suffix in (".json", ".yaml", ".txt")):
        return False
    train = yaml.safe_load(file.with_suffix(".yaml").read_text(encoding="utf-8"))["train"]
    images = map(Path, file.with_suffix(".txt").read_text(encoding="utf-8").splitlines())
    labels = file.parents[1] / form.folder
    return all(map(exists, train)) and all(
        image.exists() and (labels / f"{image.stem}{form.task.label_suffix}").exists() for image in images
    )


def write_pool(
    file: Path,
    plan: Plan,
    others: Sequence[str],
    records: Sequence[Mapping[str, Any]],
    description: Mapping[str, Any],
    summary: PoolSummary,
) -> None:
    """Write a list of labeled images, a data set with it, and the file that says what is in it.

    Args:
        file: The file that says what is in it; it is written last.
        plan: Where the images are.
        others: What else to train on.
        records: The records of the images.
        description: The data set without these images.
        summary: What is in the list.
    """
    images = write_list(file.with_suffix(".txt"), [plan.folder / record["image"] for record in records])
    train = [*others, images]
    content = {**description, "train": train, "val": description.get("val") or train}
    write_atomic(file.with_suffix(".yaml"), yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
    write_atomic(file, json.dumps(summary._asdict()))


def write_list(file: Path, images: Sequence[Path]) -> str:
    """Write a list of images, and return its path."""
    file.parent.mkdir(exist_ok=True)
    write_atomic(file, "".join(f"{image}\n" for image in images))
    return str(file)


def summary_of(
    records: Sequence[Mapping[str, Any]], form: LabelFormat, names: Mapping[int, str], left_out: str, scored_on: int = 0
) -> PoolSummary:
    """Return what the records of labeled images say is in them."""
    objects: Counter[str] = Counter()
    for record in records:
        objects.update({names.get(int(i), f"class {i}"): number for i, number in record["classes"].items()})
    sure = [confidence for record in records for confidence in record["confidences"]]
    return PoolSummary(
        task=form.task.name,
        images=len(records),
        objects=dict(objects.most_common()),
        empty=sum(not record["classes"] for record in records),
        confidence=sum(sure) / len(sure) if sure else 0.0,
        left_out=left_out,
        scored_on=scored_on,
    )


def plain_data(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the plain values of a data set that Ultralytics has resolved."""
    return {name: str(x) if isinstance(x, Path) else x for name, x in data.items() if name != "yaml_file"}


def share(images: list[Path], fraction: Any, data: Mapping[str, Any]) -> list[Path]:
    """Return the images of a data set that Ultralytics would use under its argument `fraction`."""
    part = fraction[0] if isinstance(fraction, list) else fraction
    if part == 1 or data.get("complete"):  # downloaded in part already
        return images
    return images[: part if isinstance(part, int) else max(1, round(len(images) * part))]
