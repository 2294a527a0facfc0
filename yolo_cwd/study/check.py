# SPDX-License-Identifier: AGPL-3.0-or-later
"""`yolo_cwd check`: what a distilled training would do and cost, and whether its teacher is worth it.

The training is set up in full, in a folder that is removed again, and runs a few steps. advice.py puts the findings
into words.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from math import isfinite
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from ultralytics import YOLO
from ultralytics.utils.torch_utils import get_flops, parse_device, unwrap_model

from yolo_cwd.config import ConfigError
from yolo_cwd.method.teacher import wait_for
from yolo_cwd.method.terms import LevelTerm
from yolo_cwd.pool.pool import Labeler
from yolo_cwd.run.score import knows, score
from yolo_cwd.study import made_up
from yolo_cwd.study.advice import as_text, compare_classes, verdict
from yolo_cwd.study.dry_run import NoCallbacks, scratch_folder, set_up
from yolo_cwd.trainer import CWDTrainer

MADE_UP = "made-up images"
FIXED = 100.0  # a fixed weight to compare with
BATCHES = 2
TURNS = 3  # steps on each batch; the first is for warming up


class Trial(NoCallbacks, CWDTrainer):
    """A trainer that is set up and runs a few steps, on made-up images if no data are given."""

    labels: dict[str, str]

    def make_labeler(self, args: Any) -> Labeler:
        """Return what labels images; made-up ones need no labels."""
        args.data = None if args.data == MADE_UP else args.data
        return super().make_labeler(args)

    def label_images(self) -> None:
        """Say what the teacher would label, without labeling it."""
        self.labels = self.labeler.survey() if self.labeler else {}
        if self.labeler:
            self.labeler.release()

    def plan_teacher(self, teacher: Any, args: Any, goes_on: bool) -> Any:
        """Plan the teacher's training, unless there are no data to train it on."""
        return (None, self.settings) if args.data == MADE_UP else super().plan_teacher(teacher, args, goes_on)

    def get_dataset(self) -> Any:
        """Resolve `data`, or make up two full batches that suit the student's classes."""
        if self.args.batch < 1:
            raise ConfigError(f"batch={self.args.batch}: a check measures a given one, such as batch=16")
        if self.args.data == MADE_UP:
            names = {0: "object"}
            with suppress(Exception):  # the building of the student reports any fault
                names = YOLO(self.args.model).names
            images = {"train": BATCHES * self.args.batch, "val": 4}
            channels = self.distillation.teacher.image_channels
            file = made_up.build(self.save_dir / "made-up", images, self.task.name, names, channels)
            self.args.data, self.args.fraction = str(file), 1.0
        return super().get_dataset()


def run(words: dict[str, Any]) -> None:
    """Examine a training and print what was found.

    Args:
        words: Arguments and options of a training, and `format`: `table`, or `json` for a machine.

    Raises:
        ConfigError: If the training could not begin.
    """
    words = {**words}
    form = words.pop("format", "table")
    if form not in {"table", "json"}:
        raise ConfigError(f"format={form}: must be one of table, json")
    if words.get("resume"):
        raise ConfigError(f"resume={words['resume']}: a run that has begun needs no check; leave it out")
    with scratch_folder() as folder:
        found = examine(words, folder)
    print(json.dumps(found, indent=1) if form == "json" else as_text(found))


def examine(words: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return all findings about a training, as plain values.

    Args:
        words: Its arguments and options. Without `data`, the steps run on the embedded images.
        folder: A folder for temporary files.

    Raises:
        ConfigError: If the training could not begin, or a step does not fit into the GPU.
    """
    embedded = words.get("data") is None
    _say("building the models")
    trainer = _set_up({**words, "data": MADE_UP if embedded else words["data"]}, folder)
    teacher, student = trainer.distillation.teacher, unwrap_model(trainer.model)
    size = trainer.args.imgsz
    found = {
        "teacher": {
            "model": teacher.label,
            "parameters": teacher.parameter_count,
            "gflops": round(get_flops(teacher.body, size), 1),
            "precision": str(teacher.precision),
        },
        "student": {
            "model": trainer.state.options["student"],
            "parameters": sum(p.numel() for p in student.parameters()),
            "gflops": round(get_flops(student, size), 1),
        },
        "balanced": trainer.settings.balanced,
        "data": None if embedded else str(trainer.args.data),
        "device": str(trainer.device),
        "batch": trainer.batch_size,
        "imgsz": size,
        **_cost(trainer),
        "levels": _levels(trainer),
        "unlabeled": trainer.labels.get("unlabeled"),
        "completed": trainer.labels.get("complete_labels"),
        "classes": _classes(trainer, embedded),
    }
    if embedded:
        return {
            **found,
            "verdict": "give data= as well, to see the scores of both and whether this teacher is worth it",
        }
    same, model = trainer.stage is None and _knows_the_data(trainer, teacher.label), str(trainer.args.model)
    arguments = {**vars(trainer.args), "device": str(trainer.device)}
    scores = {
        "teacher": _score(teacher.label, arguments, folder) if same else None,
        "student": _score(model, arguments, folder) if _knows_the_data(trainer, model) else None,
    }
    said = verdict(same, **scores, sign=trainer.task.score.sign, trained_first=trainer.stage is not None)
    found["stages"] = _stages(trainer, found)
    return {**found, "same_classes": same, "score": trainer.task.score.label, "scores": scores, "verdict": said}


def _stages(trainer: CWDTrainer, found: dict[str, Any]) -> str | None:
    """Say that the teacher will be trained first, and what that costs beside the student's training."""
    if (stage := trainer.stage) is None:
        return None
    ratio = found["teacher"]["gflops"] / max(found["student"]["gflops"], 0.1)
    ours = found["step_ratio"] * trainer.epochs
    return (
        f"{stage.reason()}, so it is trained on the data first: {stage.epochs} epochs for the teacher, then "
        f"{trainer.epochs} for the student; by GFLOPs an epoch of the teacher costs about {ratio:.2g} of a plain one "
        f"of the student, so both stages together about {ratio * stage.epochs + ours:.0f} of those"
    )


def _set_up(words: dict[str, Any], folder: Path) -> Trial:
    if "," in (device := parse_device(words.get("device"))):
        raise ConfigError(f"device={device}: one device is enough to check; give one, and the batch of one")
    trainer: Trial = set_up(Trial, words, folder)
    return trainer


def _say(doing: str) -> None:
    print(f"yolo_cwd check: {doing} ...", file=sys.stderr, flush=True)


def _classes(trainer: CWDTrainer, embedded: bool) -> str:
    names = trainer.data["names"] if not embedded or str(trainer.args.model).endswith(".pt") else {}
    return compare_classes(trainer.distillation.teacher.names, names, "student" if embedded else "data")


def _knows_the_data(trainer: CWDTrainer, model: str) -> bool:
    """Return whether a checkpoint has been trained for this task, on the classes of the data."""
    if model.endswith(".pt"):
        return knows(model, trainer.task, trainer.data["names"])
    return bool(trainer.distillation.teacher.names == trainer.data["names"])  # an untrained model has no score


def _score(model: str, arguments: dict[str, Any], folder: Path) -> float | None:
    if not model.endswith(".pt"):
        return None
    _say(f"scoring {model}")
    return float(score(model, arguments, arguments["split"], folder)["score"])


def _levels(trainer: CWDTrainer) -> list[dict[str, Any]]:
    assert trainer.distillation.criterion is not None
    rows, meter = [], trainer.distillation.criterion.meter
    fixed = (FIXED / meter.ratios).tolist()
    for i, term in enumerate(term for term in trainer.distillation.terms if isinstance(term, LevelTerm)):
        level = term.level
        row = {"name": level.name, "stride": level.stride, "map": trainer.args.imgsz // level.stride}
        row |= {"student_channels": level.student_channels, "teacher_channels": level.teacher_channels}
        row |= {"adapter_parameters": sum(p.numel() for p in term.parameters()), "weight": term.share}
        rows.append({**row, "share": meter.shares[level.name], "fixed_share": fixed[i] if isfinite(fixed[i]) else None})
    return rows


def _cost(trainer: CWDTrainer) -> dict[str, Any]:
    """Return the time and memory of a step, plain and distilled, on the same batches.

    The memory of a plain step excludes teacher and adapters, which are already loaded.
    """
    assert trainer.distillation.criterion is not None
    _say("timing steps")
    trainer._model_train()
    batches = [batch for batch, _ in zip(trainer.train_loader, range(BATCHES), strict=False)]
    weights = {"plain": 0.0, "distilled": trainer.settings.strength}
    memory: dict[str, float] = {}
    times: dict[str, list[float]] = {arm: [] for arm in weights}
    try:
        for turn in range(TURNS):
            for arm, weight in weights.items():  # the plain step first: memory, once taken, is not always released
                trainer.distillation.criterion.weight = weight
                with _peak(trainer.device) as peak:
                    for batch in batches:
                        duration = _step(trainer, batch)
                        if turn:
                            times[arm].append(duration)
                memory.setdefault(arm, peak[0])
    except torch.cuda.OutOfMemoryError as error:
        reason = f"batch={trainer.batch_size}: a step does not fit into the memory of {trainer.device}"
        raise ConfigError(f"{reason}; give a smaller batch or imgsz, or a smaller teacher") from error
    seconds = {arm: median(values) for arm, values in times.items()}
    if trainer.settings.cwd:  # with cwd=0 the teacher stays where it was loaded
        ours = [p for module in (trainer.distillation.teacher, trainer.distillation.terms) for p in module.parameters()]
        memory["plain"] -= sum(p.numel() * p.element_size() for p in ours)
    return {
        "step_seconds": seconds,
        "step_ratio": round(seconds["distilled"] / seconds["plain"], 2),
        "peak_mib": {arm: round(peak / 2**20) for arm, peak in memory.items()},
    }


def _step(trainer: CWDTrainer, raw: dict[str, Any]) -> float:
    """Run one training step on a batch of its loader, and return the seconds it takes."""
    wait_for(trainer.device)
    begin = time.perf_counter()
    trainer.distillation.past_first_batch()
    with trainer.autocast():
        batch = trainer.preprocess_batch(dict(raw))
        if trainer.args.compile:  # as in Ultralytics' loop: the criterion stays outside of what is compiled
            loss, _ = unwrap_model(trainer.model).loss(batch, trainer.model(batch["img"]))
        else:
            loss, _ = trainer.model(batch)
    trainer.scaler.scale(loss.sum()).backward()
    trainer.optimizer_step()
    wait_for(trainer.device)
    return time.perf_counter() - begin


@contextmanager
def _peak(device: torch.device) -> Iterator[list[int]]:
    """Yield a list that receives the peak memory in bytes: PyTorch's on a GPU, the process's elsewhere."""
    found = [0]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield found
        found[0] = torch.cuda.max_memory_allocated(device)
        return
    process, ended = psutil.Process(), threading.Event()

    def watch() -> None:
        while not ended.wait(0.005):
            found[0] = max(found[0], process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        ended.set()
        watcher.join()
