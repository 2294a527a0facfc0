# SPDX-License-Identifier: AGPL-3.0-or-later
"""The embedded data set, `data=bccd`: photographs of blood cells with boxes; a teacher of it; a student to begin with.

README.md beside this file says where they come from. The images are unpacked into the user's cache folder when they are
first needed, because Ultralytics writes what it has scanned beside the labels.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import yaml

from yolo_cwd.config import ConfigError
from yolo_cwd.run.files import build_once, cache_folder, content_of
from yolo_cwd.run.refusal import unwritable

NAME = "bccd"
TASK = "detect"
CLASSES = {0: "Platelets", 1: "RBC", 2: "WBC"}
FOLDER = Path(__file__).parent
ARCHIVE = FOLDER / "data.zip"
TEACHER = FOLDER / "teacher.pt"
STUDENT = FOLDER / "student.pt"


def build(root: Path | None = None) -> Path:
    """Unpack the data set unless that has been done, and return the path of its YAML file.

    Args:
        root: Folder to unpack it in; by default the user's cache folder.
    """
    content = content_of(ARCHIVE)[:8]  # another archive goes elsewhere
    folder = (root or cache_folder()) / f"{NAME}-{content}"
    build_once(folder, lambda unfinished: _unpack(unfinished, folder))
    return folder / f"{NAME}.yaml"


def resolve(data: Any, task: str = TASK) -> Any:
    """Return the argument `data` unchanged, or for `bccd` the path of its YAML file, unpacked if needed.

    Raises:
        ConfigError: If `bccd` has no labels for the task, or if it cannot be unpacked.
    """
    if data != NAME:
        return data
    if task != TASK:
        raise ConfigError(f"data={NAME}: has boxes alone, not the labels of task={task}; give other data")
    try:
        return str(build())
    except OSError as error:
        raise unwritable(error, "data", NAME, "set XDG_CACHE_HOME to a folder of yours") from error


def _unpack(folder: Path, final: Path) -> None:
    with zipfile.ZipFile(ARCHIVE) as packed:
        packed.extractall(folder)
    description = {"path": str(final.resolve()), "train": "images/train", "val": "images/val", "names": CLASSES}
    (folder / f"{NAME}.yaml").write_text(yaml.safe_dump(description), encoding="utf-8")
