# SPDX-License-Identifier: AGPL-3.0-or-later
"""What a distilled training would be and cost, and whether its teacher is worth it, before a day is spent on it.

The training is set up in full, in a folder that is removed again, and makes a few steps.
"""

from __future__ import annotations

import json
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from ultralytics import YOLO
from ultralytics.utils import LOGGER
from ultralytics.utils.torch_utils import autocast, get_flops, unwrap_model

from yolo_cwd import digits
from yolo_cwd.compare import score
from yolo_cwd.config import ConfigError
from yolo_cwd.teacher import wait_for
from yolo_cwd.trainer import CWDTrainer

BATCHES = 2
TURNS = 3  # steps on each batch, of which the first warms up
WORTHWHILE = 0.05  # lead of a teacher in mAP50-95: with 0.06 a gain has been measured, with 0.04 none


class Rehearsal(CWDTrainer):
    """A trainer that is set up and makes a few steps, and that no logger hears of."""

    def run_callbacks(self, event: str) -> None:
        """Run none: Ultralytics' loggers begin a run of theirs."""


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
    level = LOGGER.level
    LOGGER.setLevel("ERROR")  # Ultralytics tells of a training that is none
    try:
        with tempfile.TemporaryDirectory() as folder:
            found = examine(words, Path(folder))
    finally:
        LOGGER.setLevel(level)
    print(json.dumps(found, indent=1) if form == "json" else as_text(found))


def examine(words: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return all that is found out about a training, as plain values.

    Args:
        words: Its arguments and options. Without `data`, the steps are taken on the embedded digits.
        folder: A folder for passing files.
    """
    place = {"project": str(folder), "name": "run", "plots": False, "verbose": False, "save_period": -1}
    embedded = {} if words.get("data") else {"data": str(digits.build(folder, {"train": 64, "val": 4}))}
    trainer = Rehearsal(overrides={**words, **embedded, **place})
    trainer._setup_train()
    teacher, student = trainer.teacher, unwrap_model(trainer.model)
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
        "levels": _levels(trainer),
        "data": None if embedded else str(trainer.args.data),
        "device": str(trainer.device),
        "batch": trainer.batch_size,
        "imgsz": size,
        **_cost(trainer),
    }
    if embedded:
        return {**found, "verdict": "give data= as well, to see the mAP of both and whether this teacher is worth it"}
    same = teacher.names == trainer.data["names"]
    arguments = {**vars(trainer.args), "device": str(trainer.device)}
    scores = {
        "teacher": _score(teacher.label, arguments, folder) if same else None,
        "student": _score(str(trainer.args.model), arguments, folder) if _can_score_student(trainer) else None,
    }
    return {**found, "same_classes": same, "map50_95": scores, "verdict": verdict(same, **scores)}


def _can_score_student(trainer: CWDTrainer) -> bool:
    """Return whether the student has been trained on the classes of the data before."""
    model = str(trainer.args.model)
    return model.endswith(".pt") and bool(YOLO(model).names == trainer.data["names"])


def _score(model: str, arguments: dict[str, Any], folder: Path) -> float | None:
    return score(model, arguments, arguments["split"], folder)["map50_95"] if model.endswith(".pt") else None


def _levels(trainer: CWDTrainer) -> list[dict[str, Any]]:
    rows = []
    for level, adapter, weight in zip(trainer.levels, trainer.adapters, trainer.level_weights, strict=True):
        row = {"name": level.name, "stride": level.stride, "map": trainer.args.imgsz // level.stride}
        row |= {"student_channels": level.student_channels, "teacher_channels": level.teacher_channels}
        rows.append({**row, "adapter_parameters": sum(p.numel() for p in adapter.parameters()), "weight": weight})
    return rows


def _cost(trainer: CWDTrainer) -> dict[str, Any]:
    """Return the time of a step and the memory it needs, plain and distilled, on the same batches."""
    assert trainer.criterion is not None
    trainer._model_train()
    batches = [batch for batch, _ in zip(trainer.train_loader, range(BATCHES), strict=False)]
    weights = {"plain": 0.0, "distilled": trainer.cwd.cwd}
    memory: dict[str, float] = {}
    times: dict[str, list[float]] = {arm: [] for arm in weights}
    for turn in range(TURNS):
        for arm, weight in weights.items():  # the plain step first: memory once taken is not always given back
            trainer.criterion.weight = weight
            with _peak(trainer.device) as peak:
                for batch in batches:
                    duration = _step(trainer, batch)
                    if turn:
                        times[arm].append(duration)
            memory.setdefault(arm, peak[0])
    seconds = {arm: median(values) for arm, values in times.items()}
    return {
        "step_seconds": seconds,
        "step_ratio": round(seconds["distilled"] / seconds["plain"], 2),
        "peak_mib": {arm: round(peak / 2**20) for arm, peak in memory.items()},
    }


def _step(trainer: CWDTrainer, raw: dict[str, Any]) -> float:
    """Make a step of the training on a batch of its loader, and return its seconds."""
    wait_for(trainer.device)
    begin = time.perf_counter()
    trainer._batches = 0  # distil this one, whatever cwd_every
    with autocast(trainer.amp, device=trainer.device.type):
        loss, _ = trainer.model(trainer.preprocess_batch(dict(raw)))
    trainer.scaler.scale(loss.sum()).backward()
    trainer.optimizer_step()
    wait_for(trainer.device)
    return time.perf_counter() - begin


@contextmanager
def _peak(device: torch.device) -> Iterator[list[int]]:
    """Put into a list the peak of memory in bytes: what PyTorch holds on a GPU, or what the process does elsewhere."""
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


def verdict(same_classes: bool, teacher: float | None, student: float | None) -> str:
    """Return in a sentence whether a teacher is worth it.

    Args:
        same_classes: Whether its classes are those of the data.
        teacher: Its mAP50-95 on the validation images, in 0 to 1; None if it has none.
        student: The student's before this training; None if it has not been trained on such data.
    """
    if not same_classes:
        return "doubtful: the teacher does not know the classes of the data; one trained on such data teaches more"
    if teacher is None:
        return "no: the teacher has not been trained"
    if student is None:
        return (
            f"the teacher reaches {100 * teacher:.1f} points; it is worth it if the student alone ends well below, "
            "which 'yolo_cwd compare' tells"
        )
    lead = teacher - student
    if lead <= 0:
        return f"no: the teacher is {-100 * lead:.1f} points behind the student, and has nothing to teach it here"
    if lead < WORTHWHILE:
        return (
            f"hardly: the teacher leads the student by {100 * lead:.1f} points only; no gain has been measured under "
            "such a lead"
        )
    return f"yes: the teacher leads the student by {100 * lead:.1f} points; 'yolo_cwd compare' tells the gain"


def as_text(found: dict[str, Any]) -> str:
    """Return the findings in words and tables of less than 100 columns."""
    lines = []
    for who, part in (("teacher", "without its head"), ("student", "whole")):
        model = found[who]
        name = model["model"] if len(model["model"]) <= 44 else "..." + model["model"][-41:]
        size = f"{model['parameters'] / 1e6:6.2f}M parameters, {model['gflops']:6.1f} GFLOPs {part}"
        lines.append(f"{who}  {name:44}  {size}")
    lines += ["", f"level  stride      map  {'student':>9}  {'teacher':>9}  {'adapter':>9}  weight"]
    for x in found["levels"]:
        channels = f"{x['student_channels']:9,}  {x['teacher_channels']:9,}  {x['adapter_parameters']:9,}"
        lines.append(f"{x['name']:5}  {x['stride']:6}  {x['map']:3}x{x['map']:<3}  {channels}  {x['weight']:6g}")
    where = f"batch {found['batch']}, {found['imgsz']} px, {found['device']}"
    on = "the embedded digits" if found["data"] is None else "the data"
    holds = "held by PyTorch on the GPU" if "cuda" in found["device"] else "of the whole process"
    peaks = found["peak_mib"]
    lines += [
        "",
        f"step      {found['step_ratio']:.2f}x a plain one, measured on {BATCHES} batches of {on} ({where})",
        f"memory    {peaks['distilled']} MiB at its peak, {peaks['plain']} MiB for a plain step ({holds})",
        f"teacher   calculates in {found['teacher']['precision']}",
    ]
    if "map50_95" in found:
        known = {who: value for who, value in found["map50_95"].items() if value is not None}
        shown = ", ".join(f"{who} {100 * value:.1f}" for who, value in known.items())
        lines.append(f"mAP50-95  {shown or 'not known'}")
        lines.append(f"classes   the teacher's are {'' if found['same_classes'] else 'not '}those of the data")
    return "\n".join([*lines, "", f"verdict   {found['verdict']}"])
