# SPDX-License-Identifier: AGPL-3.0-or-later
"""Scores a model as Ultralytics' own `val` does, with the arguments of the training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ultralytics import YOLO
from ultralytics.cfg import DEFAULT_CFG_DICT, get_cfg
from ultralytics.data.utils import add_polygon_background

from yolo_cwd.config import ConfigError, split_options
from yolo_cwd.run.request import data_of
from yolo_cwd.tasks import TASKS, Task

# Arguments that mean nothing, or something else, in `val`.
OF_TRAINING = {"model", "mode", "rect", "compile", "resume", "save_dir"}
SILENT = {"exist_ok": True, "plots": False, "verbose": False, "save_json": False, "save_txt": False, "cache": False}


def score(weights: Path | str | YOLO, arguments: dict[str, Any], split: str, folder: Path) -> dict[str, Any]:
    """Return the two scores of a model for its task, and the first score by class, as Ultralytics' `val` does.

    Args:
        weights: The checkpoint, or the model itself, which Ultralytics then fuses.
        arguments: All arguments of its training; those that affect a score apply here too.
        split: The split to score it on.
        folder: For Ultralytics' own use.
    """
    _, arguments = split_options(arguments)
    arguments = {name: value for name, value in arguments.items() if name not in OF_TRAINING}
    model = weights if isinstance(weights, YOLO) else YOLO(weights)
    task = TASKS[model.task]
    metrics = model.val(**{**arguments, **SILENT, "project": str(folder), "name": "score", "split": split})
    values = metrics.results_dict
    return {
        "score": float(values[task.score.column]),
        "second": float(values[task.second.column]),
        "classes": _by_class(metrics, task),
    }


def _by_class(metrics: Any, task: Task) -> dict[str, float]:
    """Return the task's score for each class that occurs."""
    if task.name == "depth":
        return {}
    if task.name == "semantic":
        return {metrics.names[c]: float(metrics.class_result(i)[0]) for i, c in enumerate(metrics.ap_class_index)}
    part = {"segment": "seg", "pose": "pose"}.get(task.name, "box")
    found = getattr(metrics, part)
    return {metrics.names[c]: float(found.maps[c]) for c in found.ap_class_index}


def classes_of_data(arguments: dict[str, Any], split: str, task: Task) -> dict[int, str]:
    """Return the classes of the data as a training with these arguments sees them, resolved as Ultralytics does.

    Raises:
        ConfigError: If the data cannot be used, or have no such split.
    """
    args = get_cfg(DEFAULT_CFG_DICT, {**split_options(arguments)[1], "split": split})
    data = data_of(args)
    if task.name == "semantic":
        data = add_polygon_background(data)
    if not data.get(split):
        raise ConfigError(f"split={split}: data={args.data} names no images for it; give split=val")
    names: dict[int, str] = data["names"]
    return names


def knows(model: str, task: Task, classes: dict[int, str]) -> bool:
    """Return whether a checkpoint has the given task and classes, and so a score."""
    trained = YOLO(model)
    return bool(trained.task == task.name and (task.name == "depth" or trained.names == classes))
