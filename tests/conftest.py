"""Fixtures: a tiny data set, and short trainings in a folder of their own."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["YOLO_CONFIG_DIR"] = tempfile.mkdtemp(prefix="yolo_cwd-tests-")  # keep the user's settings out of it

import pytest
import torch
from ultralytics.models.yolo.detect import DetectionTrainer

from yolo_cwd import digits
from yolo_cwd.trainer import CWDTrainer

SHORT = {
    "model": "yolov8n.yaml",
    "imgsz": 64,
    "batch": 4,
    "nbs": 4,
    "epochs": 1,
    "warmup_epochs": 0,
    "optimizer": "AdamW",
    "lr0": 1e-3,
    "amp": False,
    "plots": False,
    "val": False,
    "device": "cpu",
    "verbose": False,
}
TAUGHT = {"teacher": "yolov8s.yaml", "teacher_dtype": "fp32", "schedule": "constant"}


class Payload:
    """Makes a file when it is unpickled without restriction."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """YAML path of a data set with 8 training and 4 validation images: two steps at batch 4."""
    return str(digits.build(tmp_path_factory.mktemp("data"), {"train": 8, "val": 4}))


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with small.pt (a YOLOv8n detector), segment.pt and classify.pt, none of them trained."""
    from ultralytics import YOLO

    folder = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    for name, model in {"small": "yolov8n", "segment": "yolov8n-seg", "classify": "yolov8n-cls"}.items():
        YOLO(f"{model}.yaml").save(folder / f"{name}.pt")
    return folder


@pytest.fixture
def train(data: str, tmp_path: Path) -> Callable[..., CWDTrainer]:
    """Run a short distilled training; keywords override its arguments."""

    def run(**overrides: Any) -> CWDTrainer:
        callbacks = overrides.pop("callbacks", {})
        project = str(tmp_path / "runs")
        trainer = CWDTrainer(overrides={**TAUGHT, **SHORT, "data": data, "project": project, **overrides})
        for event, callback in callbacks.items():
            trainer.add_callback(event, callback)
        trainer.train()
        return trainer

    return run


@pytest.fixture
def train_plain(data: str, tmp_path: Path) -> Callable[..., DetectionTrainer]:
    """Run the same short training with Ultralytics alone."""

    def run(**overrides: Any) -> DetectionTrainer:
        project = str(tmp_path / "runs")
        trainer = DetectionTrainer(overrides={**SHORT, "data": data, "project": project, **overrides})
        trainer.train()
        return trainer

    return run
