# SPDX-License-Identifier: AGPL-3.0-or-later
"""Where features are taken: the pyramid levels of a detector, the frozen teacher, and the adapters between the two.

The inputs of a YOLO detection head are the outputs of its neck, the feature pyramid (FPN), one map for each stride.
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from ultralytics.nn.modules.head import Detect, v10Detect
from ultralytics.nn.tasks import DetectionModel, load_checkpoint
from ultralytics.utils.checks import check_model_file_from_stem

from yolo_cwd.config import ConfigError, first_line, level_name

LETTERBOX_GRAY = 114 / 255  # the value Ultralytics pads its images with


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


class Teacher(nn.Module):
    """A frozen detector without its head: images in, feature pyramid out.

    Attributes:
        taps: Inputs of the removed head by stride.
        image_channels: Channels of the images it takes.
        parameter_count: Parameters of the whole model, head included.
    """

    def __init__(self, model: nn.Module, argument: str = "teacher") -> None:
        """Take a private copy of a detector, freeze it and cut its head off.

        Args:
            model: The detector; it stays as it is.
            argument: What the user named it by, for messages.

        Raises:
            ConfigError: If the model is no detector.
        """
        super().__init__()
        self.argument = argument
        self.taps = pyramid_taps(model, argument)
        self.parameter_count = sum(p.numel() for p in model.parameters())
        self.image_channels = next(model.parameters()).shape[1]
        self.body = _without_head(model).float().eval().requires_grad_(False)
        self._grid = max(self.taps)

    def train(self, mode: bool = True) -> Teacher:
        """Stay in evaluation mode, whatever the mode of the training around it."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the maps [N, C, H/stride, W/stride] of images [N, C, H, W], finest level first.

        Images whose size is no multiple of the coarsest stride are padded as Ultralytics pads them, and the maps cut
        back: a student without a P6 may train at sizes that a teacher with one does not take.
        """
        height, width = images.shape[-2:]
        padding = (0, -width % self._grid, 0, -height % self._grid)
        maps: list[Tensor] = self.body(F.pad(images, padding, value=LETTERBOX_GRAY) if any(padding) else images)
        if any(padding):
            maps = [m[..., : height // s, : width // s] for m, s in zip(maps, self.taps, strict=True)]
        return maps


class _HeadInputs(nn.Module):
    """Stands in the place of a detection head and returns what the head would have received."""

    def __init__(self, head: Any) -> None:
        super().__init__()
        self.__dict__.update(f=head.f, i=head.i, type=head.type)  # how a YOLO model routes its layers

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        return list(maps)


def _without_head(model: nn.Module) -> nn.Module:
    layers: Any = model.model
    head = layers[-1]
    layers[-1] = _HeadInputs(head)
    try:
        body = deepcopy(model)
    finally:
        layers[-1] = head
    body.__dict__.pop("criterion", None)
    return body


def load_teacher(source: Any) -> Teacher:
    """Return the frozen teacher named by the option `teacher`.

    Args:
        source: Path or known name of a .pt checkpoint (downloaded by Ultralytics where it knows it), path of a .yaml
            model (untrained: for tests), a `YOLO`, or a `DetectionModel`.

    Raises:
        ConfigError: If there is no such file, if it cannot be read, or if it holds no detector.
    """
    if isinstance(source, str | Path):
        argument = f"teacher={source}"
        return Teacher(_load(str(source), argument), argument)
    argument = f"teacher={type(source).__name__}"
    model = source if isinstance(source, DetectionModel) else getattr(source, "model", None)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{argument}: not a model; give a name, a .pt or .yaml path, or a YOLO model")
    return Teacher(model, argument)


def _load(path: str, argument: str) -> nn.Module:
    suffix = Path(path).suffix.lower()
    try:
        if suffix in {".yaml", ".yml"}:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model: nn.Module = DetectionModel(path, verbose=False)
                return model
        if suffix == ".pt":
            model, _ = load_checkpoint(check_model_file_from_stem(path))
            return model
    except Exception as error:
        raise ConfigError(f"{argument}: {first_line(error)}; give an existing .pt checkpoint of a detector") from error
    raise ConfigError(f"{argument}: the suffix {suffix} is none of .pt, .yaml; give a checkpoint or a model file")


def build_adapters(levels: list[Level], kind: str) -> nn.ModuleList:
    """Return one adapter a level from student to teacher channels.

    A 1x1 convolution needs no bias: the softmax over positions does not see a constant per channel.

    Args:
        levels: The distilled levels.
        kind: `conv` or `identity`.

    Raises:
        ConfigError: If `identity` is asked for where channels differ.
    """
    if kind == "conv":
        with torch.random.fork_rng(devices=[]):  # the student's own random numbers stay as they are without us
            return nn.ModuleList(nn.Conv2d(x.student_channels, x.teacher_channels, 1, bias=False) for x in levels)
    for x in levels:
        if x.student_channels != x.teacher_channels:
            raise ConfigError(
                f"adapter=identity: {x.name} has {x.student_channels} channels in the student and "
                f"{x.teacher_channels} in the teacher; use adapter=conv"
            )
    return nn.ModuleList(nn.Identity() for _ in levels)
