"""Training by several processes: torchrun with gloo on this machine, and the launch that Ultralytics makes."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars
import psutil
import pytest
import torch
import ultralytics
import yaml
from conftest import SHORT, STUDENT, TEACHER
from processes import Started, together
from torch import nn
from ultralytics import YOLO
from ultralytics.utils.checks import check_version
from ultralytics.utils.dist import find_free_network_port

from yolo_cwd import CWDTrainer
from yolo_cwd.method.prepare import choose_precision
from yolo_cwd.method.teacher import DTYPES, load_teacher

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
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
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
    for name, model in {"model": STUDENT, "teacher": TEACHER}.items():
        yolo = YOLO(model)
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
        fixed = {"cwd": 100, "adapter": "conv"}  # weights that do not depend on the detection loss, which is left out
        given = {**WORDS, **PLAIN, **fixed, **models, "val": False, "data": data, "seed": seed, "project": tmp_path}
        words = as_words(**{**given, **arguments})
        call = ("step_recorder:main", str(file), *words)
        if processes == 1:
            ended = [Started(*call, cwd=tmp_path, env={"SHARDS": str(shards)}).wait()]
        else:
            ended = together(processes, *call, cwd=tmp_path)
        assert [one.code for one in ended] == [0] * processes, ended[0].stderr
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


def test_the_balanced_rule_is_the_same_in_every_process(record: Callable[..., dict[str, Any]]) -> None:
    two = record(2, cwd="balanced", adapter="fitted")
    assert two["differing"] == []
    assert all(0 < loss < float("inf") for loss in two["losses"])


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
    words = as_words(**{**WORDS, **models, "data": data, "epochs": 2, "verbose": True})
    result = torchrun(2, "-m", "yolo_cwd", "train", *words, f"project={tmp_path / 'runs'}", "name=two", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "runs" / "two"
    assert [f.name for f in folder.parent.iterdir()] == ["two"]
    assert polars.read_csv(folder / "results.csv")["epoch"].to_list() == [1, 2]
    assert {"best.pt", "last.pt"} == {f.name for f in (folder / "weights").iterdir()}
    assert result.stdout.count("learns P3, P4, P5 ") == 1
    ckpt = torch.load(folder / "weights" / "best.pt", weights_only=False)
    assert len(ckpt["train_results"]["epoch"]) == 2
    assert YOLO(folder / "weights" / "best.pt").val(data=data, imgsz=64, plots=False).box.map >= 0


def test_the_first_process_draws_the_pictures(models: dict[str, Path], data: str, tmp_path: Path) -> None:
    words = as_words(**{**WORDS, **models, "val": False, "data": data, "plots": True, "project": tmp_path})
    first, second = together(2, "processes:draw", "train", *words, cwd=tmp_path)
    assert (first.code, second.code) == (0, 0), first.stderr
    assert {f.name for f in tmp_path.rglob("cwd_*.png")} >= {"cwd_levels.png", "cwd_channels.png"}
    assert "no pictures" not in second.stdout + second.stderr


@pytest.mark.parametrize(
    ("word", "complaint"),
    [
        ("teacher=absent.pt", "teacher=absent.pt: "),
        ("data=absent.yaml", "data=absent.yaml: "),
        ("batch=3", "batch=3: does not divide over 2 processes"),
    ],
)
def test_bad_input_is_one_line_of_all_processes(word: str, complaint: str, data: str, tmp_path: Path) -> None:
    given = {**WORDS, "teacher": TEACHER, "student": STUDENT, "data": data}
    given.pop("model")
    words = ["train", *as_words(**given), word, "project=runs"]
    if word.startswith("teacher"):
        result = torchrun(2, "-m", "yolo_cwd", *words, cwd=tmp_path)
        assert "exitcode  : 2" in result.stderr
        errors = result.stderr
    else:
        ended = together(2, "processes:main", *words, cwd=tmp_path)
        assert 2 in {one.code for one in ended}
        errors = "".join(one.stderr for one in ended)
    lines = [line for line in errors.splitlines() if line.startswith("yolo_cwd: ")]
    assert len(lines) == 1
    assert complaint in lines[0]
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(
    not check_version(ultralytics.__version__, ">=8.4.140"),
    reason="older ones hand text to their processes",
)
def test_options_and_a_teacher_object_reach_the_processes_that_ultralytics_starts(
    models: dict[str, Path], data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yolo, arguments = YOLO(models["model"]), {k: v for k, v in WORDS.items() if k != "model"}
    options = {"tau": 2, "levels": "P4,P5", "level_weights": (1, 3), "cwd": 7}
    teacher = YOLO(models["teacher"])
    yolo.train(trainer=OnTwo, teacher=teacher, data=data, project=str(tmp_path), name="run", **arguments, **options)
    settings = yaml.safe_load((tmp_path / "run" / "cwd.yaml").read_text())
    assert settings["tau"] == 2
    assert settings["cwd"] == 7
    assert settings["level_weights"] == [1, 3]
    losses = polars.read_csv(tmp_path / "run" / "results.csv")
    assert losses["train/P5_loss"].item() > losses["train/P4_loss"].item() > 0
    assert "train/P3_loss" not in losses
    assert yolo.metrics["metrics/mAP50-95(B)"] >= 0


class OnTwo(CWDTrainer):
    """What `device=0,1` makes of the trainer, on a machine without GPUs."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if "RANK" not in os.environ:
            self.ddp, self.world_size = True, 2


@pytest.fixture
def long(models: dict[str, Path], data: str, tmp_path: Path) -> list[str]:
    """Words of a training that does not end before something happens to it."""
    words = {**WORDS, **models, "data": data, "epochs": 12, "project": tmp_path, "name": "run"}
    return ["-m", "yolo_cwd", "train", *as_words(**words)]


def wait_for_epoch(table: Path, epoch: int) -> None:
    deadline = time.monotonic() + 120
    while not (table.exists() and len(table.read_text().splitlines()) > epoch):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_a_process_says_that_another_has_been_killed(long: list[str], tmp_path: Path) -> None:
    port = find_free_network_port()
    environment = {**os.environ, "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    environment |= {"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "2"}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in (0, 1)]
    command = [sys.executable, *long]
    first, second = (
        subprocess.Popen(command, env={**environment, **rank}, stderr=subprocess.PIPE, text=True) for rank in ranks
    )
    wait_for_epoch(tmp_path / "run" / "results.csv", 1)
    second.kill()
    _, errors = first.communicate(timeout=60)
    second.communicate()
    assert first.returncode == 1
    line = "yolo_cwd: process 0 of 2 ends, since another one has ended or is silent; 'resume' goes on"
    assert [text.startswith(line) for text in errors.splitlines() if text.startswith("yolo_cwd")] == [True]
    assert (tmp_path / "run" / "weights" / "last.pt").exists()


@pytest.mark.slow
def test_torchrun_restarts_from_the_last_epoch(long: list[str], tmp_path: Path) -> None:
    launch = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "--max-restarts=1"]
    command = [sys.executable, *launch, *long, "resume=True"]
    run = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True)
    table = tmp_path / "run" / "results.csv"
    wait_for_epoch(table, 3)
    workers = psutil.Process(run.pid).children()
    workers[-1].kill()
    output, _ = run.communicate(timeout=200)
    assert run.returncode == 0
    assert f"Resuming training {tmp_path / 'run'}" in output
    assert polars.read_csv(table)["epoch"].to_list() == list(range(1, 13))
    assert [f.name for f in tmp_path.iterdir()] == ["run"]


@pytest.mark.slow
def test_all_processes_end_a_training_limited_by_time(long: list[str], tmp_path: Path) -> None:
    started = time.monotonic()
    result = torchrun(2, *long, "time=0.002", "epochs=1000", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert time.monotonic() - started < 120
    assert (tmp_path / "run" / "weights" / "best.pt").exists()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0 or not shutil.which("ip"), reason="needs root and ip")
def test_two_hosts_train_together(long: list[str], tmp_path: Path) -> None:
    script = RECORDER.parents[1] / "scripts" / "two_hosts.sh"
    command = [str(script), *long[3:], "epochs=2", "verbose=True"]
    environment = {**os.environ, "PYTHON": sys.executable}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stdout
    assert polars.read_csv(tmp_path / "run" / "results.csv")["epoch"].to_list() == [1, 2]
    said = re.findall(r"^b: (?!\[rank1\])(.*)$", result.stdout.partition("learns P3")[2], re.MULTILINE)
    assert [line for line in said if not re.match(r"[WE]\d{4} ", line)] == []  # one writer, and torchrun's own log


@pytest.mark.parametrize("agreed", ["fp32", "bf16"])
def test_the_first_process_chooses_the_precision_of_all(agreed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = {"fp32": ["bf16"], "bf16": []}[agreed]  # what this process is fast in: it would have chosen the other one
    monkeypatch.setattr("yolo_cwd.method.teacher._fast_precisions", lambda device: alone)
    monkeypatch.setattr("yolo_cwd.method.prepare.RANK", 1)
    monkeypatch.setattr("yolo_cwd.run.distributed.agree", lambda value: agreed)
    teacher, settings = load_teacher("yolov8n.yaml"), SimpleNamespace(teacher_dtype="auto")
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    loader = SimpleNamespace(dataset=SimpleNamespace(load_image=lambda index: (pixels, None, None)))
    choose_precision(SimpleNamespace(teacher=teacher, cwd=settings, device=torch.device("cpu"), test_loader=loader))
    assert teacher.precision.name == agreed
    assert next(teacher.body.parameters()).dtype == DTYPES[agreed]
