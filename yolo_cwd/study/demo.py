# SPDX-License-Identifier: AGPL-3.0-or-later
"""The demonstration: teacher, plain student and distilled student on the embedded data set, in minutes on a CPU.

A miniature of the usual case, in which a public checkpoint has seen far more than the user's own data: the teacher
trains on all images, the two students on a quarter of them, with the same seed and the same schedule.
"""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from ultralytics.cfg import get_save_dir
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn.tasks import yaml_model_load
from ultralytics.utils import LOGGER, YAML, colorstr
from ultralytics.utils.torch_utils import get_flops, get_num_params

from yolo_cwd import digits
from yolo_cwd.trainer import CWDTrainer

TEACHER_MODEL = "yolov8n.yaml"
STUDENT_WIDTH = 0.125  # of YOLOv8's channels; YOLOv8n has 0.25
IMAGE_SIZE = 96
SCHEDULE: dict[str, Any] = {
    "imgsz": IMAGE_SIZE,
    "batch": 16,
    "nbs": 16,
    "optimizer": "AdamW",
    "lr0": 2e-3,
    "warmup_epochs": 1,
    "amp": False,
}
# Digits do not come mirrored or in mosaics; only the last epoch is validated, to spend the time on training.
SCHEDULE |= {"mosaic": 0.0, "fliplr": 0.0, "val": False, "plots": False}
TEACHER_SHARE: dict[str, Any] = {"epochs": 8}
STUDENT_SHARE: dict[str, Any] = {"epochs": 20, "fraction": 0.25}


class Result(NamedTuple):
    """One line of the demonstration's table."""

    name: str
    map50_95: float
    map50: float
    parameters: float
    gflops: float
    seconds: float
    weights: Path


def run() -> list[Result]:
    """Train the three models, print the table, and return its lines."""
    folder = get_save_dir(SimpleNamespace(project="", task="detect", name="demo", mode="train", exist_ok=False))
    folder.mkdir(parents=True)
    student = _student_file(folder)
    teacher = _train("teacher", DetectionTrainer, folder, model=TEACHER_MODEL, **TEACHER_SHARE)
    plain = _train("student", DetectionTrainer, folder, model=student, **STUDENT_SHARE)
    distilled = _train("distilled", CWDTrainer, folder, model=student, teacher=str(teacher.weights), **STUDENT_SHARE)
    results = [teacher, plain, distilled]
    print(table(results))
    return results


def _student_file(folder: Path) -> str:
    model = yaml_model_load(TEACHER_MODEL)
    depth, _, most_channels = model["scales"]["n"]
    path = folder / "student.yaml"
    YAML.save(path, {**model, "scales": {"n": [depth, STUDENT_WIDTH, most_channels]}})
    return str(path)


def _train(name: str, trainer_class: type, folder: Path, **arguments: Any) -> Result:
    LOGGER.info(f"\n{colorstr('demo:')} training the {name}")
    arguments = {**SCHEDULE, "data": str(digits.build()), **arguments, "project": str(folder), "name": name}
    trainer = trainer_class(overrides=arguments)
    begin = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - begin
    scores = trainer.metrics
    model = trainer.ema.ema
    return Result(
        name,
        scores["metrics/mAP50-95(B)"],
        scores["metrics/mAP50(B)"],
        get_num_params(model) / 1e6,
        get_flops(model, IMAGE_SIZE),
        seconds,
        trainer.best,
    )


def table(results: list[Result]) -> str:
    """Return the results as text, with the gain of the distilled student in the last lines."""
    header = f"{'':10} {'mAP50-95':>9} {'mAP50':>7} {'params (M)':>11} {'GFLOPs':>7} {'time (s)':>9}"
    lines = [
        f"{r.name:10} {r.map50_95:9.3f} {r.map50:7.3f} {r.parameters:11.2f} {r.gflops:7.3f} {r.seconds:9.0f}"
        for r in results
    ]
    _, plain, distilled = results
    gain = 100 * (distilled.map50_95 - plain.map50_95)
    return "\n".join(
        [
            "",
            header,
            *lines,
            "",
            f"Distillation changed the student by {gain:+.1f} points of mAP50-95 (one seed; no cost at inference).",
            f"The distilled student's weights: {distilled.weights}",
        ]
    )
