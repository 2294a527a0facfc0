# SPDX-License-Identifier: AGPL-3.0-or-later
"""The checkpoint that an interrupted training resumes from: whether it is whole, finished, and fits the data."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn
from ultralytics.nn.tasks import load_checkpoint

from yolo_cwd.config import ConfigError, listed
from yolo_cwd.log import warn
from yolo_cwd.tasks import count_classes


def read_checkpoint(checkpoint: Path) -> dict[str, Any]:
    """Return what is in a checkpoint of a training under a teacher.

    Raises:
        ConfigError: If it cannot be read; the remedy is another checkpoint of the training.
    """
    try:
        return _content(checkpoint)
    except Exception as error:
        remedy = "begin the training again"
        if (other := newest_usable(_beside(checkpoint))) is not None:
            epoch = _content(other)["epoch"] + 1
            remedy = f"resume from {other.name} beside it, which goes on after epoch {epoch} with the teacher"
        raise ConfigError(f"resume={checkpoint}: cannot be read, it is torn or no checkpoint; {remedy}") from error


def is_finished(content: Mapping[str, Any]) -> bool:
    """Return whether nothing is left to train after a checkpoint: Ultralytics strips the last one."""
    if content.get("optimizer") is None:
        return True
    return bool(content["epoch"] + 1 >= content["train_args"]["epochs"])


def newest_usable(checkpoints: Iterable[Path]) -> Path | None:
    """Return the checkpoint of the latest epoch among those that can be read and that a training can resume from."""
    epochs: dict[Path, int] = {}
    for file in checkpoints:
        try:
            content = _content(file)
            if not is_finished(content):
                epochs[file] = content["epoch"]
        except Exception:
            continue
    return max(epochs, key=lambda file: (epochs[file], file.name == "last.pt"), default=None)


def require_fit(model: nn.Module, content: Mapping[str, Any], names: Mapping[int, str], data: Any, file: Path) -> None:
    """Refuse to resume a training whose data have changed so that they need another model; warn of other names.

    Args:
        model: The model that Ultralytics has built for the data, neither compiled nor parallel.
        content: What is in the checkpoint.
        names: The classes of the data.
        data: The argument `data`.
        file: The checkpoint.

    Raises:
        ConfigError: If they have.
    """
    begun: Any = content.get("ema")
    if begun is None:
        return
    shapes = {name: tuple(value.shape) for name, value in begun.state_dict().items()}
    other = [n for n, value in model.state_dict().items() if shapes.get(n, tuple(value.shape)) != tuple(value.shape)]
    if other:
        here, there = count_classes(model), count_classes(begun)
        change = f"has {here} classes, the training began with {there}"
        if here == there:
            change = f"needs another model than the training began with, such as {other[0]} of another shape"
        raise ConfigError(
            f"data={data}: {change}; resume with the data as they were, or begin a new run from {file.name}"
        )
    changed = [f"{begun.names[i]} is {name}" for i, name in names.items() if begun.names.get(i, name) != name]
    if changed:
        warn(f"data={data}: has other names than the training began with: {listed(changed)}")


def _content(checkpoint: Path) -> dict[str, Any]:
    content: dict[str, Any] = load_checkpoint(checkpoint)[1]
    return content


def _beside(checkpoint: Path) -> list[Path]:
    """Return the other checkpoints of a training."""
    files = checkpoint.parent.glob("*.pt")
    return [f for f in files if f != checkpoint and re.fullmatch(r"(best|last|epoch\d+)\.pt", f.name)]
