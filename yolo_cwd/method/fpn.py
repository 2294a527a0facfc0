# SPDX-License-Identifier: AGPL-3.0-or-later
"""Where features are taken: the pyramid levels of a detector, and the adapters from student to teacher.

The inputs of a YOLO detection head are the outputs of its neck, the feature pyramid (FPN), one map for each stride.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from ultralytics.nn.modules.head import Detect, v10Detect

from yolo_cwd.config import ConfigError, level_name


class Tap(NamedTuple):
    """One input of a detection head."""

    position: int
    channels: int


class Level(NamedTuple):
    """One pyramid level that teacher and student share, matched by stride."""

    name: str
    stride: int
    student_index: int
    teacher_index: int
    student_channels: int
    teacher_channels: int


def pyramid_taps(model: nn.Module, argument: str) -> dict[int, Tap]:
    """Return the inputs of a detector's head by stride.

    Args:
        model: A YOLO model.
        argument: What the user named it by (`teacher=yolov8l.pt`), for the message.

    Raises:
        ConfigError: If the model is no detector with a pyramid of features.
    """
    layers = getattr(model, "model", None)
    head: Any = layers[-1] if isinstance(layers, nn.Sequential) else None
    if type(head) not in {Detect, v10Detect}:
        kind = type(head if head is not None else model).__name__
        raise ConfigError(f"{argument}: not a YOLO detection model (its head is {kind}); give one such as yolov8l.pt")
    branches = head.cv2 if head.cv2 is not None else head.one2one_cv2  # a fused end-to-end head keeps one of them
    return {int(s): Tap(i, _input_channels(b)) for i, (s, b) in enumerate(zip(head.stride, branches, strict=True))}


def _input_channels(branch: nn.Module) -> int:
    return next(m.in_channels for m in branch.modules() if isinstance(m, nn.Conv2d))


def match_levels(student: dict[int, Tap], teacher: dict[int, Tap], wanted: tuple[int, ...] | None) -> list[Level]:
    """Return the levels to distil, finest first.

    Args:
        student: The student's taps by stride.
        teacher: The teacher's taps by stride.
        wanted: Strides to distil, or None for all that both have.

    Raises:
        ConfigError: If no stride is left, or if one of the wanted is missing on a side.
    """
    common = sorted(student.keys() & teacher.keys())
    missing = [s for s in wanted or () if s not in common]
    if missing or not common:
        names = ",".join(level_name(s) for s in wanted) if wanted else "all"
        raise ConfigError(
            f"levels={names}: the student has {_names(student)} and the teacher {_names(teacher)}; "
            + (f"choose among {_names(common)}" if common else "choose a teacher that shares a level with the student")
        )
    chosen = wanted or common
    return [
        Level(level_name(s), s, student[s].position, teacher[s].position, student[s].channels, teacher[s].channels)
        for s in chosen
    ]


def _names(strides: Any) -> str:
    return ", ".join(level_name(s) for s in sorted(strides)) or "none"


def student_features(preds: dict[str, Any]) -> list[Tensor]:
    """Return the pyramid [N, C, H, W] that the student's head received, from what it returned in training mode.

    Both branches of an end-to-end head see the same maps; those of `one2many` still carry the graph.
    """
    features: list[Tensor] = preds.get("one2many", preds)["feats"]
    return features


def student_scores(preds: dict[str, Any]) -> Tensor:
    """Return the logits [N, classes, positions of all levels] that the student's head returned in training mode."""
    scores: Tensor = preds.get("one2many", preds)["scores"]
    return scores


def build_adapters(levels: list[Level], kind: str) -> nn.ModuleList:
    """Return one adapter a level from student to teacher channels.

    A 1x1 convolution needs no bias: the softmax over positions does not see a constant per channel.

    Args:
        levels: The distilled levels.
        kind: `conv`, `fitted`, which is fitted later, or `identity`.

    Raises:
        ConfigError: If `identity` is asked for where channels differ.
    """
    if kind != "identity":
        with torch.random.fork_rng(devices=[]):  # the student's own random numbers stay as they are without us
            return nn.ModuleList(nn.Conv2d(x.student_channels, x.teacher_channels, 1, bias=False) for x in levels)
    for x in levels:
        if x.student_channels != x.teacher_channels:
            raise ConfigError(
                f"adapter=identity: {x.name} has {x.student_channels} channels in the student and "
                f"{x.teacher_channels} in the teacher; use adapter=conv"
            )
    return nn.ModuleList(nn.Identity() for _ in levels)
