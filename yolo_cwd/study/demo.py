# SPDX-License-Identifier: AGPL-3.0-or-later
"""The demonstration: teacher, plain student and distilled student on the embedded data set, in minutes on a CPU.

It is a small version of the usual case, in which a public checkpoint has seen far more than the user's own data. The
teacher trains on all images, and the two students on a quarter of them, with the same seed and schedule. They learn
where a digit is, not which one. The plain student needs no teacher, and trains beside it in a process of its own: on a
CPU, Ultralytics leaves one core idle.
"""

from __future__ import annotations

import logging
import multiprocessing
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, NamedTuple

from ultralytics.cfg import get_save_dir
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn.tasks import yaml_model_load
from ultralytics.utils import LOGGER, YAML, colorstr
from ultralytics.utils.torch_utils import get_flops, get_num_params

from yolo_cwd import digits
from yolo_cwd.run.results import read_rows
from yolo_cwd.tasks import TASKS
from yolo_cwd.trainer import CWDTrainer
from yolo_cwd.view.gallery import draw_side_by_side
from yolo_cwd.view.plots import COLORS, drawn, spread

TEACHER_MODEL = "yolov8n.yaml"
STUDENT_WIDTH = 0.125  # share of YOLOv8's channels; YOLOv8n has 0.25
IMAGE_SIZE = 96
IMAGES = {"train": 1600, "val": 100}
SCHEDULE: dict[str, Any] = {
    "imgsz": IMAGE_SIZE,
    "single_cls": True,
    "batch": 16,
    "nbs": 16,
    "optimizer": "AdamW",
    "lr0": 2e-3,
    "warmup_epochs": 1,
    "amp": False,
    "plots": False,
    "verbose": False,
}
SCHEDULE |= {"mosaic": 0.0, "fliplr": 0.0}  # digits are never mirrored or in mosaics
TEACHER_SHARE: dict[str, Any] = {"epochs": 3}
STUDENT_SHARE: dict[str, Any] = {"epochs": 15, "fraction": 0.25}
SHOWN_IMAGES = 4
PARTS = {"teacher": 0.47, "distilled": 0.53}  # shares of the whole time; the plain student trains beside them
TITLES = {"teacher": "teacher", "student": "plain student", "distilled": "distilled student"}


class Result(NamedTuple):
    """One line of the demonstration's table.

    Attributes:
        name: Which of the three models it is.
        map50_95: Its mAP50-95 on the validation images, 0 to 1.
        map50: Its mAP50.
        parameters: Its parameters, in millions.
        gflops: Its GFLOPs per image.
        seconds: How long it trained.
        weights: Its checkpoint.
        curve: Its mAP50 after each epoch.
    """

    name: str
    map50_95: float
    map50: float
    parameters: float
    gflops: float
    seconds: float
    weights: Path
    curve: list[float]


class Progress:
    """Estimates the time left from the share of the work that is done."""

    def __init__(self) -> None:
        """Start the clock."""
        self.begin, self.done, self.part = time.perf_counter(), 0.0, 0.0

    def start(self, name: str) -> None:
        """Say which model is trained next."""
        self.part = PARTS[name]
        left = f", {self._left(self.done)}" if self.done else f", and beside it the {TITLES['student']}"
        LOGGER.info(f"{colorstr('demo:')} training the {TITLES[name]}{left}")

    def epoch(self, trainer: Any) -> None:
        """Say how far the training has got."""
        done = self.done + self.part * (trainer.epoch + 1) / trainer.epochs
        LOGGER.info(f"{colorstr('demo:')} epoch {trainer.epoch + 1} of {trainer.epochs}, {self._left(done)}")

    def end(self) -> None:
        """Count the current part as done."""
        self.done += self.part

    def _left(self, done: float) -> str:
        left = (time.perf_counter() - self.begin) * (1 - done) / done
        return f"about {left:.0f} s left" if left < 90 else f"about {left / 60:.0f} min left"


def run() -> list[Result]:
    """Train the three models, print the table, draw the pictures, and return the results."""
    folder = get_save_dir(SimpleNamespace(project="", task="detect", name="demo", mode="train", exist_ok=False))
    folder.mkdir(parents=True)
    student, data, progress = _student_file(folder), digits.build(images=IMAGES), Progress()
    shared = {**SCHEDULE, "data": str(data), "project": str(folder)}
    of_student = {**shared, "model": student, **STUDENT_SHARE}
    with (
        TemporaryDirectory() as copy,
        ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_be_quiet) as beside,
    ):
        plain = beside.submit(_train, "student", DetectionTrainer, {**of_student, "data": _copied(data, copy)})
        of_teacher = {**shared, "model": TEACHER_MODEL, **TEACHER_SHARE}
        teacher = _train("teacher", DetectionTrainer, of_teacher, progress)
        distilled = _train("distilled", CWDTrainer, {**of_student, "teacher": str(teacher.weights)}, progress)
        results = [teacher, plain.result(), distilled]
    images = spread(sorted((data.parent / "images" / "val").iterdir()), SHOWN_IMAGES)
    columns = {f"{TITLES[r.name]}\nmAP50 {r.map50:.2f}": r.weights for r in results}
    draw_side_by_side(folder / "found.png", images, columns, IMAGE_SIZE, labels=False)
    draw_curves(folder / "curves.png", results)
    print(table(results, folder))
    return results


def _student_file(folder: Path) -> str:
    model = yaml_model_load(TEACHER_MODEL)
    depth, _, most_channels = model["scales"]["n"]
    path = folder / "student.yaml"
    YAML.save(path, {**model, "scales": {"n": [depth, STUDENT_WIDTH, most_channels]}})
    return str(path)


def _copied(data: Path, folder: str) -> str:
    """Copy a data set for a process of its own: Ultralytics writes what it has scanned beside the labels."""
    shutil.copytree(data.parent, folder, dirs_exist_ok=True)
    copy = Path(folder) / data.name
    YAML.save(copy, {**YAML.load(data), "path": folder})
    return str(copy)


def _be_quiet() -> None:
    LOGGER.setLevel(logging.ERROR)


def _train(name: str, trainer_class: type, arguments: dict[str, Any], progress: Progress | None = None) -> Result:
    trainer = trainer_class(overrides={**arguments, "name": name})
    if progress:
        progress.start(name)
        trainer.add_callback("on_train_epoch_end", progress.epoch)
    begin = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - begin
    if progress:
        progress.end()
    task, model = TASKS["detect"], trainer.ema.ema
    return Result(
        name,
        trainer.metrics[task.score.column],
        trainer.metrics[task.second.column],
        get_num_params(model) / 1e6,
        get_flops(model, IMAGE_SIZE),
        seconds,
        trainer.best,
        [row[task.second.column] for row in read_rows(trainer.csv)],
    )


@drawn
def draw_curves(file: Path, results: Sequence[Result]) -> None:
    """Draw mAP50 over the epochs, one line per model."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    axis: Any = axes.xaxis.get_major_locator()
    axis.set_params(integer=True)
    for color, result in zip(COLORS, results, strict=False):
        axes.plot(range(1, len(result.curve) + 1), result.curve, ".-", color=color, label=TITLES[result.name])
    axes.set(xlabel="epoch", ylabel="mAP50 on the validation images", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=100)
    plt.close(figure)


def table(results: list[Result], folder: Path) -> str:
    """Return the results as text, ending with the gain of the distilled student and where to find the files."""
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
            f"Distillation changed the student by {gain:+.1f} points of mAP50-95, at no cost at inference.",
            f"The distilled student's weights: {distilled.weights}",
            f"What the three find in the same images: {folder / 'found.png'}; their curves: {folder / 'curves.png'}",
            "This is one seed on made-up images. For proof on your own: yolo_cwd compare teacher=best.pt "
            "student=yolov8n.pt data=my.yaml seeds=3",
        ]
    )
