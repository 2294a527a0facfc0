"""Training by several processes: torchrun with gloo on this machine, and the launch that Ultralytics makes."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars
import pytest
import torch
from conftest import SHORT
from torch import nn
from ultralytics import YOLO

RECORDER = Path(__file__).with_name("step_recorder.py")
WORDS = {
    **{k: v for k, v in SHORT.items() if k != "val"},
    "batch": 8,
    "nbs": 8,
    "teacher_dtype": "fp32",
    "schedule": "constant",
}
PLAIN = dict.fromkeys(("mosaic", "fliplr", "hsv_h", "hsv_s", "hsv_v", "translate", "scale"), 0)  # no augmentation


def torchrun(processes: int, *program: str, cwd: Path, env: dict[str, str] | None = None, **options: str) -> Any:
    """Run `program` by so many processes; keywords are options of torchrun."""
    launch = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
    launch += [f"--{name}={value}" for name, value in options.items()]
    command = [sys.executable, *(launch if processes > 1 else []), *program]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(RECORDER.parents[1]), **(env or {})}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False)


def as_words(**arguments: Any) -> list[str]:
    return [f"{name}={value}" for name, value in arguments.items()]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints of a student and a teacher: models from a .yaml would differ from process to process.

    With normalization turned up, since the maps of untrained models hardly vary.
    """
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    for name, model in {"model": "yolov8n", "teacher": "yolov8s"}.items():
        yolo = YOLO(f"{model}.yaml")
        for module in yolo.model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.constant_(module.weight, 2.75)
        yolo.save(folder / f"{name}.pt")
    return {name: folder / f"{name}.pt" for name in ("model", "teacher")}


@pytest.fixture
def record(models: dict[str, Path], data: str, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Train by so many processes, and return what the recorder wrote down."""

    def run(processes: int, shards: int = 0, **arguments: Any) -> dict[str, Any]:
        file = tmp_path / f"{processes}-{shards}.pt"
        seed = 1 if processes == 1 else 0  # Ultralytics adds the rank plus 1, and a single process has rank -1
        words = as_words(**{**WORDS, **PLAIN, **models, "data": data, "seed": seed, "project": tmp_path, **arguments})
        result = torchrun(processes, str(RECORDER), str(file), *words, cwd=tmp_path, env={"SHARDS": str(shards)})
        assert file.exists(), result.stderr
        recorded: dict[str, Any] = torch.load(file)
        return recorded

    return run


def error(ours: dict[str, torch.Tensor], reference: dict[str, torch.Tensor], prefix: str) -> float:
    """Relative error of all gradients whose names begin so."""
    names = [name for name in reference if name.startswith(prefix)]
    assert names
    assert ours.keys() == reference.keys()
    difference = torch.cat([(ours[n] - reference[n]).flatten() for n in names]).norm()
    return float(difference / torch.cat([reference[n].flatten() for n in names]).norm())


def test_distillation_is_that_of_one_process_on_the_same_global_batch(record: Callable[..., dict[str, Any]]) -> None:
    alone = {"box": 0, "cls": 0, "dfl": 0}
    one, *several = (record(processes, **alone) for processes in (1, 2, 4))
    assert one["first_loss"] > 0.1
    for run in several:
        assert run["first_loss"] == pytest.approx(one["first_loss"], rel=1e-5)
        assert error(run["gradients"], one["gradients"], "adapters") < 1e-5
        assert error(run["gradients"], one["gradients"], "model") < 1e-5


def test_whole_loss_is_that_of_one_process_that_adds_up_the_shares(record: Callable[..., dict[str, Any]]) -> None:
    """Ultralytics' detection loss divides by the targets of each process, so the reference takes share by share."""
    one, four = record(1, shards=4, batch=2), record(4)
    assert len(one["losses"]) == 4
    assert four["first_loss"] == pytest.approx(sum(one["losses"]), rel=1e-5)
    assert error(four["gradients"], one["gradients"], "adapters") < 1e-5
    assert error(four["gradients"], one["gradients"], "model") < 1e-5


def test_all_processes_hold_the_same_models_after_20_steps(record: Callable[..., dict[str, Any]]) -> None:
    run = record(2, epochs=20)
    assert len(run["losses"]) == 20
    assert run["differing"] == []


def test_torchrun_trains_as_one_run(models: dict[str, Path], data: str, tmp_path: Path) -> None:
    words = as_words(**{**WORDS, **models, "data": data, "epochs": 2, "plots": True, "verbose": True})
    result = torchrun(2, "-m", "yolo_cwd", "train", *words, f"project={tmp_path / 'runs'}", "name=two", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "runs" / "two"
    assert [f.name for f in folder.parent.iterdir()] == ["two"]
    assert polars.read_csv(folder / "results.csv")["epoch"].to_list() == [1, 2]
    assert {"best.pt", "last.pt"} == {f.name for f in (folder / "weights").iterdir()}
    assert (folder / "cwd_levels.png").exists()
    assert result.stdout.count("learns P3, P4, P5 from") == 1
    ckpt = torch.load(folder / "weights" / "best.pt", weights_only=False)
    assert len(ckpt["train_results"]["epoch"]) == 2
    assert YOLO(folder / "weights" / "best.pt").val(data=data, imgsz=64, plots=False).box.map >= 0


@pytest.mark.parametrize(
    ("word", "complaint"),
    [
        ("teacher=absent.pt", "teacher=absent.pt: "),
        ("data=absent.yaml", "data=absent.yaml: "),
        ("batch=3", "batch=3: does not divide over 2 processes"),
    ],
)
def test_bad_input_is_one_line_of_all_processes(word: str, complaint: str, data: str, tmp_path: Path) -> None:
    given = {**WORDS, "teacher": "yolov8s.yaml", "student": "yolov8n.yaml", "data": data}
    given.pop("model")
    result = torchrun(2, "-m", "yolo_cwd", "train", *as_words(**given), word, "project=runs", cwd=tmp_path)
    lines = [line for line in result.stderr.splitlines() if line.startswith("yolo_cwd: ")]
    assert len(lines) == 1
    assert complaint in lines[0]
    assert "exitcode  : 2" in result.stderr
    assert not list(tmp_path.iterdir())
