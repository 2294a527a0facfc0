# SPDX-License-Identifier: AGPL-3.0-or-later
"""Models read from files: only classes of Ultralytics and torch are admitted, and a refusal gives the true reason."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from ultralytics import RTDETR, YOLO
from ultralytics.nn.tasks import load_checkpoint, torch_safe_load, yaml_model_load
from ultralytics.utils.checks import check_model_file_from_stem

from yolo_cwd.config import ConfigError, unusable_model

ANOTHER = "give an existing .pt checkpoint of a YOLO model"
TRUST = "or if you trust the origin of this one, trust_teacher=True"
BEGINNINGS = {  # of files that are named .pt but are not checkpoints
    b"<": ("is a web page, no checkpoint", "download the file itself"),
    b"version https://git-lfs": ("is a pointer of Git LFS, no checkpoint", "fetch the file with 'git lfs pull'"),
}


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
    try:
        return _checkpoint(path, argument, trust) if suffix == ".pt" else _untrained(path)
    except ConfigError:
        raise
    except Exception as error:
        reason, remedy = _fault(Path(path), error, trust)
        if reason:
            raise ConfigError(f"{argument}: {reason}; {remedy}") from error
        raise unusable_model(argument, error, remedy) from error


def _checkpoint(path: str, argument: str, trust: bool) -> nn.Module:
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


def _fault(file: Path, error: BaseException, trust: bool) -> tuple[str, str]:
    """Return what is wrong with a file (empty if the error says it best) and what to do."""
    if not file.is_file() or file.suffix != ".pt":
        return "", ANOTHER
    start = file.read_bytes()[:64].lstrip()
    for beginning, fault in BEGINNINGS.items():
        if start.startswith(beginning):
            return fault
    texts = " ".join(str(cause) for cause in _causes(error))
    if "TorchScript" in texts:
        return "is a TorchScript archive", "give the .pt checkpoint that it was exported from"
    if not trust and (unknown := re.search(r"GLOBAL (\S+) was not an allowed", texts)):
        return f"holds {unknown[1]}, which the restricted loader does not admit", f"{ANOTHER}, {TRUST}"
    if plain := _plain_content(file):
        return plain, "load the weights into the model they belong to, and give what its save() writes"
    if isinstance(error, TypeError):
        return "is no checkpoint: empty, truncated or of another format", ANOTHER
    return "", ANOTHER


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _plain_content(file: Path) -> str:
    """Say that a file holds only weights if torch's restricted loader, which admits no model, can read it."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception:
        return ""
    return "" if isinstance(content, nn.Module) else "holds weights only, no model"
