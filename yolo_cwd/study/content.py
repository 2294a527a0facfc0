# SPDX-License-Identifier: AGPL-3.0-or-later
"""What the numbers of a comparison depend on beside its arguments: the content of files, and versions.

A path says nothing: a teacher is trained again under its old name, and labels are corrected. Contents are compared as
hashes. Models and text labels are read in full; of images and maps, only names and sizes. Folders do not matter, so
that a comparison goes on where its data have moved.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import ultralytics
from ultralytics.cfg import DEFAULT_CFG_DICT, get_cfg

from yolo_cwd import __version__
from yolo_cwd.config import Settings, model_path, split_options
from yolo_cwd.pool.images import list_images
from yolo_cwd.run.files import content_of
from yolo_cwd.run.refusal import is_obtainable
from yolo_cwd.run.request import data_of
from yolo_cwd.run.teacher_record import content_of_model, images_of, labels_of
from yolo_cwd.study.comparison import Comparison

MODELS = {"teacher": "teacher", "model": "student", "pretrained": "pretrained"}  # arguments, and how they are called
PLACES = {"path", "train", "val", "test", "minival", "yaml_file", "download"}  # of a data set: they may change


def versions() -> dict[str, str]:
    """Return the versions that decide what is trained."""
    return {"yolo_cwd": __version__, "ultralytics": ultralytics.__version__}


def contents(comparison: Comparison) -> dict[str, str]:
    """Return a hash for each thing that the runs read, by what a user calls it.

    What cannot be read has none: setting up the runs refuses it, if there are runs left.
    """
    shared = {**comparison.arguments, "teacher": comparison.teacher}
    found = dict(_contents(shared, shared, comparison.split))
    for arm in comparison.arms:
        own = dict(_contents(arm.arguments, {**shared, **arm.arguments}, comparison.split))
        found |= {f"{what} of arm {arm.name}": value for what, value in own.items()}
    return found


def _contents(named: Mapping[str, Any], words: dict[str, Any], split: str) -> Iterator[tuple[str, str]]:
    """Yield what some arguments name, with its hash.

    Args:
        named: The arguments whose files are read.
        words: All arguments and options of the training.
        split: The split that models are scored on.
    """
    for argument, name in MODELS.items():
        with suppress(Exception):
            if (model := named.get(argument)) and not isinstance(model, bool):
                yield name, _of_model(argument, model)
    with suppress(Exception):
        if "data" in named:
            yield from _of_data(data_of(get_cfg(DEFAULT_CFG_DICT, split_options(words)[1])), split)
    with suppress(Exception):
        if named.get("unlabeled"):
            images = list_images(Settings.parse(split_options(words)[0]).unlabeled)
            yield "unlabeled images", _hash(_sizes(images))


def _of_model(argument: str, model: Any) -> str:
    path = model_path(argument, model)
    if path.endswith(".pt") and not is_obtainable(path):
        raise FileNotFoundError(path)
    return content_of_model(path)


def _of_data(data: Mapping[str, Any], split: str) -> Iterator[tuple[str, str]]:
    splits = {name: sorted(images_of(data, name)) for name in dict.fromkeys(("train", "val", split))}
    yield "data", _hash(sorted((name, value) for name, value in data.items() if name not in PLACES))
    yield "images of data", _hash([(name, _sizes(images)) for name, images in splits.items()])
    yield "labels of data", _hash([(name, _labels(data, images)) for name, images in splits.items()])


def _sizes(files: Sequence[str | Path]) -> list[tuple[str, int]]:
    return sorted((file.name, file.stat().st_size if file.exists() else -1) for file in map(Path, files))


def _labels(data: Mapping[str, Any], images: list[str]) -> list[Any]:
    """Return the text labels of images as they are, and the sizes of maps; images without labels have none."""
    files = labels_of(data, images)
    texts, maps = ([file for file in files if (Path(file).suffix == ".txt") == text] for text in (True, False))
    with ThreadPoolExecutor() as threads:  # of a network's disk, many at once
        return [sorted(threads.map(_text, texts)), _sizes(maps)]


def _text(file: str) -> tuple[str, str]:
    with suppress(FileNotFoundError):
        return Path(file).name, content_of(Path(file))
    return Path(file).name, ""


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()[:16]
