"""Fixtures of runs whose teacher is trained first."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import STUDENT, TEACHER, bare, short_trainings
from ultralytics import YOLO

from yolo_cwd import CWDTrainer

ANSI = re.compile(r"\x1b\[[0-9;]*[a-zA-Z]")
Train = Callable[..., CWDTrainer]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Checkpoints of a student and of teachers with classes of COCO, none of them trained."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    described = {"teacher": TEACHER, "model": STUDENT, "segment": bare("yolov8n-seg.yaml"), "other": TEACHER}
    for name, model in described.items():
        yolo = YOLO(model)
        yolo.model.names = {i: f"coco{i}" for i in range(80)}
        yolo.save(folder / f"{name}.pt")
    return {name: str(folder / f"{name}.pt") for name in described}


@pytest.fixture
def staged(models: dict[str, str], data: str, tmp_path: Path) -> Train:
    """Run a short training of both stages; keywords override its arguments."""
    options = {**{k: models[k] for k in ("teacher", "model")}, "teacher_epochs": "auto"}
    return lambda **given: short_trainings(data, tmp_path)(**{**options, **given})


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Callable[[], str]:
    """What has been logged since the last call."""
    monkeypatch.setattr("ultralytics.utils.LOGGER.propagate", True)

    def text() -> str:
        messages = "\n".join(dict.fromkeys(ANSI.sub("", record.getMessage()) for record in caplog.records))
        caplog.clear()
        return messages

    return text
