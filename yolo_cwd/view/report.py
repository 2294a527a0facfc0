# SPDX-License-Identifier: AGPL-3.0-or-later
"""What a run says about its distillation: a sentence at the start, one at the end, and the curves in results.csv."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from yolo_cwd.config import WEIGHT_COLUMN
from yolo_cwd.run.results import read_rows
from yolo_cwd.tasks import Score


class Curves(NamedTuple):
    """The course of a run, one value per epoch.

    Attributes:
        epochs: Epochs as `results.csv` counts them, from 1.
        task: The task's own loss in training, without our terms.
        weight: The overall weight.
        terms: For each level, the weighted term of the training loss.
        divergence: For each level, the divergence itself, in nats; nan while the weights are 0.
        shares: For each level, the norm of the divergence's gradient at the student's maps, divided by the task's own.
        score: The task's score on the validation images; 0 for an epoch that was not validated.
        teacher: The teacher's score on them; None if it has none.
        label: What the score is called.
    """

    epochs: list[int]
    task: list[float]
    weight: list[float]
    terms: dict[str, list[float]]
    divergence: dict[str, list[float]]
    shares: dict[str, list[float]]
    score: list[float]
    teacher: float | None = None
    label: str = "score"


def read_curves(table: Path, weights: Mapping[str, float], score: Score) -> Curves:
    """Read the curves from a `results.csv`, so that they are complete even after a resume.

    Args:
        table: The file.
        weights: The weight of every term by its name: the distilled levels (`P3`), finest first, and the class maps.
        score: The score that judges the task's models.
    """
    rows = read_rows(table)
    ours = {f"train/{name}_loss" for name in weights} | {"train/cwd_loss"}
    own = [n for n in rows[0] if n.startswith("train/") and n.endswith("_loss") and n not in ours]
    terms = {name: [row[f"train/{name}_loss"] for row in rows] for name in weights}
    weight = [row[WEIGHT_COLUMN] for row in rows]
    divergence = {name: [_divergence(row, name, weights[name]) for row in rows] for name in weights}
    shares = {name: [row.get(f"train/{name}_share", math.nan) for row in rows] for name in weights}
    return Curves(
        epochs=[int(row["epoch"]) for row in rows],
        task=[sum(row[name] for name in own) for row in rows],
        weight=weight,
        terms=terms,
        divergence=divergence,
        shares=shares,
        score=[row.get(score.column, 0.0) for row in rows],
        label=score.label,
    )


def _divergence(row: Mapping[str, float], name: str, weight: float) -> float:
    return row.get(f"train/{name}_nats", math.nan) if weight * row[WEIGHT_COLUMN] else math.nan


def beginning(student: str, trainer: Any) -> str:
    """Say what is distilled, and by which rule.

    Args:
        student: The student's name.
        trainer: The `CWDTrainer`, set up.
    """
    settings, teacher = trainer.settings, trainer.distillation.teacher
    if not settings.cwd:
        return f"cwd=0: nothing is distilled, {student} trains as it would without a teacher"
    student += ", in the shape of its pruned checkpoint," if trainer.reshaped else ""
    learns = ", ".join(level.name for level in trainer.distillation.levels)
    if number := len(trainer.distillation.classes):
        learns += f" and the maps of {number} {'classes' if number > 1 else 'class'}"
    details = [settings.describe_schedule(), f"tau {settings.tau:g}"]
    if set(settings.level_weights) != {1.0}:
        details.append("level weights " + " ".join(f"{w:g}" for w in settings.level_weights))
    if trainer.distillation.explained:
        details.append("adapters explain " + " ".join(f"{100 * x:.0f}" for x in trainer.distillation.explained) + " %")
    return (
        f"{student} learns {learns} from {teacher.label} "
        f"({teacher.parameter_count / 1e6:.1f}M parameters, {teacher.precision}), {', '.join(details)}"
    )


def without_labels(trainer: Any) -> str:
    """Say how many training images have no label file; nothing if all have one, or if Ultralytics leaves those out.

    Args:
        trainer: The `CWDTrainer`, set up.
    """
    files = [] if trainer.task.name in {"semantic", "depth"} else trainer.train_loader.dataset.label_files
    missing = sum(not Path(file).is_file() for file in files)
    if not missing:
        return ""
    return (
        f"{missing} of {len(files)} training images have no label file, and count as images without any object; in a "
        "folder of their own, named by unlabeled=, the teacher would label them"
    )


def outcome(curves: Curves, score: Score) -> str:
    """Say how a run went: its best score, and how far the divergence fell in training.

    Args:
        curves: The course of the run.
        score: Which score it is.
    """
    known = [(value, epoch) for value, epoch in zip(curves.score, curves.epochs, strict=True) if value]
    best, epoch = max(known, key=lambda x: score.sign * x[0], default=(0.0, 0))
    parts = [f"best {score.label} {best:.3f} in epoch {epoch}" if best else f"{score.label} 0"]
    distilled = [i for i, weight in enumerate(curves.weight) if weight > 0]  # nan where plain Ultralytics has trained
    if len(distilled) > 1:
        first, last = distilled[0], distilled[-1]
        both = [(n, d[first], d[last]) for n, d in curves.divergence.items() if d[first] > 0 and d[last] > 0]
        changes = [f"{n} {begin:.3g} to {end:.3g} ({100 * (end / begin - 1):+.0f} %)" for n, begin, end in both]
        epochs = f"epoch {curves.epochs[first]} to {curves.epochs[last]}"
        parts += [f"divergence from the teacher, {epochs}: {', '.join(changes)}"] if changes else []
    return "; ".join(parts)
