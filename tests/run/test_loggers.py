"""The loggers that Ultralytics supports get our columns too, with the values of results.csv.

Under a test Ultralytics logs nothing. So the training has a process of its own, which knows of no test.
"""

import csv
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SHORT, TAUGHT

pytestmark = pytest.mark.slow
EPOCHS = 2
OURS = {f"train/P{level}_{kind}" for level in (3, 4, 5) for kind in ("loss", "share", "nats")}
OURS |= {"train/cwd_loss", "train/cwd_weight"}
Curves = dict[str, dict[int, float]]  # by name and step


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory, data: str) -> Path:
    """Folder of a short distilled run, logged to what is installed of the two; MLflow's file store is mlruns/."""
    folder = tmp_path_factory.mktemp("logged")
    settings = {"mlflow": True, "tensorboard": True, "runs_dir": str(folder)}
    (folder / "Ultralytics").mkdir()
    (folder / "Ultralytics" / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
    env = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
    env |= {"YOLO_CONFIG_DIR": str(folder), "MLFLOW_EXPERIMENT_NAME": "small"}
    env |= {"MLFLOW_TRACKING_URI": (folder / "mlruns").as_uri(), "MLFLOW_ALLOW_FILE_STORE": "true"}
    words = {**SHORT, **TAUGHT, "data": data, "epochs": EPOCHS, "project": folder, "name": "run"}
    command = [sys.executable, "-m", "yolo_cwd", "train", *(f"{name}={value}" for name, value in words.items())]
    subprocess.run(command, check=True, env=env, cwd=folder)
    return folder


def expected(folder: Path) -> Curves:
    with (folder / "run" / "results.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == EPOCHS
    return {name: {int(row["epoch"]): float(row[name]) for row in rows} for name in OURS}


@pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="mlflow-skinny is not installed")
def test_mlflow_gets_our_columns(logged: Path) -> None:
    (metrics,) = logged.glob("mlruns/*/*/metrics")
    curves: Curves = {}
    for name in OURS:
        lines = (metrics / name).read_text(encoding="utf-8").splitlines()  # time, value, step
        curves[name] = {int(line.split()[2]) + 1: float(line.split()[1]) for line in lines}
    for name, values in expected(logged).items():
        assert curves[name] == pytest.approx(values, rel=1e-4), name


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_gets_our_columns(logged: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(logged / "run"))
    events.Reload()
    for name, values in expected(logged).items():
        curve = {event.step: event.value for event in events.Scalars(name)}
        assert curve == pytest.approx(values, rel=1e-4), name
