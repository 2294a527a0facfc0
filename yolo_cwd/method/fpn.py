# SPDX-License-Identifier: AGPL-3.0-or-later
"""Where features are taken: the pyramid that a head receives, and its class maps.

Whatever the task, a YOLO head receives the outputs of the neck: the feature pyramid (FPN), one map for each stride. A
dry pass with a hook on the head finds them. This works for every network of Ultralytics that ends in a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from ultralytics.nn.modules.head import Detect, SemanticSegment, WorldDetect, YOLOEDetect
from ultralytics.nn.tasks import BaseModel

from yolo_cwd.config import ConfigError, first_line, level_name

PROBE = 256  # pixels of the image for the dry pass: enough to find every stride up to 256


class Tap(NamedTuple):
    """One map of a pyramid."""

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


class _HeadReachedError(Exception):
    """Carries what a head was about to receive."""


def head_inputs(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Return the maps [N, C, H, W] that the head of a YOLO model receives, without running the head.

    Args:
        model: A model of Ultralytics.
        images: Images [N, C, H, W] in 0 to 1.
    """
    head: Any = model.model[-1]  # type: ignore[index]

    def stop(_: nn.Module, received: tuple[Any, ...]) -> None:
        raise _HeadReachedError(received[0])

    handle = head.register_forward_pre_hook(stop)
    try:
        model(images)
    except _HeadReachedError as found:
        return _maps([m for m in found.args[0] if m.ndim == 4])  # YOLOE adds the embeddings of its prompts
    finally:
        handle.remove()
    raise RuntimeError("its head was never reached")


def _maps(found: Any) -> list[Tensor]:
    maps = list(found.values()) if isinstance(found, dict) else found
    if not isinstance(maps, list | tuple) or not all(isinstance(m, Tensor) and m.ndim == 4 for m in maps) or not maps:
        raise ValueError("it has no pyramid, a list of maps [N, C, H, W]")
    return list(maps)


def image_channels(model: nn.Module) -> int:
    """Return how many channels the images of a network have."""
    return next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), 3)


@torch.no_grad()
def pyramid_taps(model: nn.Module, argument: str) -> dict[int, Tap]:
    """Return the maps of a network's pyramid by stride, found by one pass over an empty image.

    Args:
        model: A model of Ultralytics, or any module that takes images [N, C, H, W] and returns a list of maps.
        argument: The argument as the user gave it (`teacher=yolov8l.pt`), for the message.

    Raises:
        ConfigError: If it has no usable pyramid.
    """
    some = next(model.parameters(), torch.zeros(()))
    image = torch.zeros(1, image_channels(model), PROBE, PROBE, device=some.device, dtype=some.dtype)
    try:
        with modes_untouched(model):
            model.eval()
            maps = head_inputs(model, image) if isinstance(model, BaseModel) else _maps(model(image))
    except Exception as error:
        remedy = "give a YOLO model of a task other than classify, or a module that returns a list of maps"
        raise ConfigError(f"{argument}: {first_line(error)}; {remedy}") from error
    taps: dict[int, Tap] = {}
    for position, (channels, *size) in enumerate(m.shape[1:] for m in maps):
        stride, rest = divmod(PROBE, size[0])
        if rest or size[0] != size[1]:
            raise ConfigError(
                f"{argument}: makes a map of {size[0]}x{size[1]} of an image of {PROBE}x{PROBE}, which is no whole "
                "stride; let it resize its maps to one, such as 32x32"
            )
        if stride in taps:
            raise ConfigError(f"{argument}: has two maps of stride {stride}; give a model with one map a stride")
        taps[stride] = Tap(position, channels)
    return taps


@contextmanager
def modes_untouched(model: nn.Module) -> Iterator[None]:
    """Restore the mode (training or evaluation) of every part of a model."""
    modes = {m: m.training for m in model.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def match_levels(student: dict[int, Tap], teacher: dict[int, Tap], wanted: tuple[int, ...] | None) -> list[Level]:
    """Return the levels to distill, finest first.

    Args:
        student: The student's taps by stride.
        teacher: The teacher's taps by stride.
        wanted: Strides to distill, or None for all that both have.

    Raises:
        ConfigError: If they share no stride, or if one of them lacks a wanted stride.
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


def student_features(preds: Any) -> list[Tensor] | None:
    """Return the pyramid [N, C, H, W] that the student's head received, taken from what it returned in training mode.

    Return None for predictions in evaluation mode. Both branches of an end-to-end head see the same maps, but only
    those of `one2many` still carry the graph.
    """
    if not isinstance(preds, dict):
        return None
    features: list[Tensor] = preds.get("one2many", preds)["feats"]
    return features


class HeadTap:
    """A forward pre-hook that keeps what a head receives in training mode, for heads that do not return it."""

    def __init__(self) -> None:
        """Start with nothing."""
        self._maps: list[Tensor] | None = None

    def __call__(self, head: nn.Module, received: tuple[Any, ...]) -> None:
        """Keep the maps of a forward pass."""
        if head.training:
            self._maps = list(received[0])

    def take(self, preds: Any) -> list[Tensor] | None:
        """Return the maps [N, C, H, W] of the last forward pass, once; None after one in evaluation mode."""
        maps, self._maps = self._maps, None
        return maps

    def __reduce__(self) -> Any:
        """Pickle as a hook that does nothing, so that a saved model loads without yolo_cwd."""
        return partial, (dict.get, {})


@contextmanager
def hooks_set_aside(head: nn.Module) -> Iterator[None]:
    """Leave a head without forward pre-hooks for a while, for a copy of it to have none."""
    hooks = head._forward_pre_hooks
    kept = dict(hooks)
    hooks.clear()
    try:
        yield
    finally:
        hooks.update(kept)


def class_branches(head: nn.Module) -> list[nn.Module]:
    """Return the branches of a head that make its class maps, one for each of its first inputs; none if not logits."""
    if isinstance(head, SemanticSegment):
        return [head.classifier]
    if not isinstance(head, Detect) or isinstance(head, WorldDetect | YOLOEDetect):
        return []
    branches: Any = getattr(head, "cv3", None) or getattr(head, "one2one_cv3", None)
    return list(branches or [])


def class_maps_agree(student: nn.Module, teacher: nn.Module) -> bool:
    """Return whether the class maps of two heads mean the same: both the class of a pixel, or both that of an object.

    Args:
        student: The student's head.
        teacher: The teacher's.
    """
    both = [isinstance(head, SemanticSegment) for head in (student, teacher) if class_branches(head)]
    return len(both) == 2 and both[0] == both[1]


def student_scores(preds: Any) -> Tensor:
    """Return the class logits that the student's head returned in training mode.

    They are [N, classes, positions], with the levels one after the other. Those of a semantic head are
    [N, classes, H, W], for the finest level only.
    """
    if isinstance(preds, dict):
        scores: Tensor = preds.get("one2many", preds)["scores"]
        return scores
    logits: Tensor = preds[0] if isinstance(preds, tuple) else preds
    return logits
