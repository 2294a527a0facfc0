# SPDX-License-Identifier: AGPL-3.0-or-later
"""Models read from files: only classes of Ultralytics and torch are admitted."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from ultralytics import RTDETR, YOLO
from ultralytics.nn.tasks import load_checkpoint, torch_safe_load, yaml_model_load
from ultralytics.utils.checks import check_model_file_from_stem

from yolo_cwd.config import ConfigError, first_line, refused_as, unusable_model
from yolo_cwd.run.refusal import is_obtainable

ANOTHER = "give an existing .pt checkpoint of a YOLO model"
TRUST = "or if you trust the origin of this one, trust_teacher=True"


def load_model(path: str, argument: str, trust: bool) -> nn.Module:
    """Return the model in a file.

    Args:
        path: Path or known name of a .pt checkpoint, or path of a .yaml model, whose weights are then random.
        argument: The argument as the user gave it, for messages.
        trust: Whether the checkpoint may hold classes other than those of Ultralytics and torch; their code then runs.

    Raises:
        ConfigError: If the file cannot be read, or holds no model.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in {".pt", ".yaml", ".yml"}:
        raise ConfigError(f"{argument}: the suffix {suffix} is none of .pt, .yaml; give a checkpoint or a model file")
    with refused_as(lambda error: _refusal(argument, error, trust)):
        return _checkpoint(path, argument, trust) if suffix == ".pt" else _untrained(path)


def _checkpoint(path: str, argument: str, trust: bool) -> nn.Module:
    if not is_obtainable(path):
        raise FileNotFoundError(path)
    file = check_model_file_from_stem(path)
    content, _ = torch_safe_load(file, safe_only=not trust)  # here only: a switch would affect all threads
    held = [content.get(name) for name in ("ema", "model")] if isinstance(content, dict) else []
    if any(isinstance(model, nn.Sequential) for model in held):
        raise ConfigError(f"{argument}: holds the layers of a model without the model; give what its save() writes")
    if not any(isinstance(model, nn.Module) for model in held):
        raise ConfigError(
            f"{argument}: holds weights only, no model; load them into the model they belong to, and give what its "
            "save() writes"
        )
    model: nn.Module = load_checkpoint(file)[0]
    return model


def _untrained(path: str) -> nn.Module:
    head = yaml_model_load(path)["head"][-1][2]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        built: Any = RTDETR(path) if head == "RTDETRDecoder" else YOLO(path)
    model: nn.Module = built.model
    return model


def _refusal(argument: str, error: BaseException, trust: bool) -> ConfigError:
    """Return the line for a file that cannot be loaded; the restricted loader is ours, so what it refuses is named."""
    texts = " ".join(map(str, (error, error.__cause__, error.__context__)))
    if not trust and (unknown := re.search(r"GLOBAL (\S+) was not an allowed", texts)):
        reason = f"holds {unknown[1]}, which the restricted loader does not admit"
        return ConfigError(f"{argument}: {reason}; {ANOTHER}, {TRUST}")
    if isinstance(error, TypeError):  # Ultralytics': the reason, and its own advice behind it
        reason = first_line(error).partition(". ")[0].removeprefix("ERROR ").partition(" ")[2]
        return ConfigError(f"{argument}: {reason}; {ANOTHER}")
    return unusable_model(argument, error, ANOTHER)
