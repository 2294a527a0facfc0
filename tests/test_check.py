"""`yolo_cwd check`: what is distilled, what it costs, and whether the teacher is worth it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import SHORT
from torch import nn
from ultralytics import YOLO

from yolo_cwd.check import as_text, examine, verdict
from yolo_cwd.cli import main

WORDS = {**{k: v for k, v in SHORT.items() if k != "val"}, "model": "yolov8n.yaml", "teacher_dtype": "fp32"}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, data: str) -> dict[str, str]:
    """Checkpoints of teacher and student, untrained, with the classes of the data."""
    folder = tmp_path_factory.mktemp("pair")
    names = yaml.safe_load(Path(data).read_text())["names"]
    torch.manual_seed(0)
    for who, model in {"teacher": "yolov8s", "model": "yolo11n"}.items():
        yolo = YOLO(f"{model}.yaml")
        yolo.model.names = names
        yolo.save(folder / f"{who}.pt")
    return {who: str(folder / f"{who}.pt") for who in ("teacher", "model")}


def test_levels_adapters_and_models(tmp_path: Path, pair: dict[str, str]) -> None:
    words = {**WORDS, "teacher": pair["teacher"], "imgsz": 96, "levels": "P4,P5", "level_weights": (1, 0.5)}
    found = examine(words, tmp_path)
    p4, p5 = found["levels"]
    assert p4 == {
        "name": "P4",
        "stride": 16,
        "map": 6,
        "student_channels": 128,
        "teacher_channels": 256,
        "adapter_parameters": 128 * 256,
        "weight": 1,
    }
    assert (p5["map"], p5["adapter_parameters"], p5["weight"]) == (3, 256 * 512, 0.5)
    assert found["teacher"]["parameters"] == sum(p.numel() for p in YOLO("yolov8s.yaml").model.parameters())
    # 28.8 and 8.7 at 640 px by Ultralytics' own summary, with 80 classes; the teacher's head is not counted
    whole = 28.8 * (96 / 640) ** 2
    assert 0.5 * whole < found["teacher"]["gflops"] < whole
    assert found["student"]["gflops"] == pytest.approx(8.2 * (96 / 640) ** 2, abs=0.06)
    assert found["data"] is None
    assert "give data=" in found["verdict"]


def test_step_is_measured_against_a_plain_one(tmp_path: Path, pair: dict[str, str], monkeypatch) -> None:
    calls = []
    forward = nn.Module.__call__

    def count(module: nn.Module, *args: object, **kwargs: object) -> object:
        if type(module).__name__ == "Teacher":
            calls.append(module)
        return forward(module, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "__call__", count)
    found = examine({**WORDS, "teacher": pair["teacher"]}, tmp_path)
    assert len(calls) == 6  # three turns of two batches, the plain steps without
    seconds = found["step_seconds"]
    assert seconds["distilled"] > seconds["plain"] > 0
    assert found["step_ratio"] == pytest.approx(seconds["distilled"] / seconds["plain"], abs=0.006)
    assert found["peak_mib"]["distilled"] > 100


def test_scores_of_both(tmp_path: Path, pair: dict[str, str], data: str) -> None:
    found = examine({**WORDS, **pair, "data": data}, tmp_path)
    assert found["same_classes"]
    expected = YOLO(pair["teacher"]).val(data=data, imgsz=64, batch=4, project=str(tmp_path), plots=False).box.map
    assert found["map50_95"]["teacher"] == pytest.approx(expected, abs=1e-6)
    assert found["map50_95"]["student"] == 0
    assert found["verdict"].startswith("no: ")


def test_other_classes_are_no_score(tmp_path: Path, pair: dict[str, str], data: str) -> None:
    found = examine({**WORDS, "teacher": "yolov8n.yaml", "data": data}, tmp_path)
    assert not found["same_classes"]
    assert found["map50_95"] == {"teacher": None, "student": None}
    assert "does not know the classes" in found["verdict"]
    assert "the teacher's are not those of the data" in as_text(found)
    assert max(map(len, as_text(found).splitlines())) <= 110


@pytest.mark.parametrize(
    ("scores", "beginning"),
    [
        ((True, 0.5, 0.3), "yes: the teacher leads the student by 20.0 points"),
        ((True, 0.5, 0.46), "hardly: the teacher leads the student by 4.0 points only"),
        ((True, 0.4, 0.45), "no: the teacher is 5.0 points behind"),
        ((True, None, 0.3), "no: the teacher has not been trained"),
        ((True, 0.5, None), "the teacher reaches 50.0 points"),
        ((False, None, None), "doubtful: "),
    ],
)
def test_verdicts(scores: tuple[bool, float | None, float | None], beginning: str) -> None:
    assert verdict(*scores).startswith(beginning)


def test_json_stands_alone_and_nothing_is_left(tmp_path: Path, pair: dict[str, str], data: str) -> None:
    words = [f"{k}={v}" for k, v in {**WORDS, **pair, "data": data, "format": "json"}.items()]
    command = [sys.executable, "-m", "yolo_cwd", "check", *words]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert len(json.loads(result.stdout)["levels"]) == 3
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("format=xml", "format=xml: must be one of table, json"),
        ("resume=True", "resume=True: a run that has begun"),
        ("teacher=absent.pt", "teacher=absent.pt: "),
        ("tau=0", "tau=0: must be a number above 0"),
        ("data=absent.yaml", "data=absent.yaml: "),
    ],
)
def test_bad_input(word: str, message: str, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = {**WORDS, "teacher": "yolov8n.yaml"} | dict([word.split("=")])
    assert main(["check", *(f"{k}={v}" for k, v in given.items())]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("yolo_cwd: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert not list(tmp_path.iterdir())
