"""Training by several processes: torchrun with gloo on this machine, and the launch that Ultralytics makes."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
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
from conftest import SHORT, STUDENT, TEACHER, bare
from processes import Started, together
from test_tasks import MODELS
from torch import nn
from ultralytics import YOLO
from ultralytics.utils.checks import check_version
from ultralytics.utils.dist import find_free_network_port

from yolo_cwd import CWDTrainer
from yolo_cwd.method.prepare import choose_precision
from yolo_cwd.method.teacher import DTYPES, load_teacher
from yolo_cwd.run.torchrun import JointEvaluation
from yolo_cwd.view.attach import attach

ROOT = Path(__file__).parents[2]
Record = Callable[[int, str], dict[str, Any]]
WORDS = {
    **{k: v for k, v in SHORT.items() if k != "val"},
    "batch": 8,
    "nbs": 8,
    "teacher_dtype": "fp32",
    "teacher_epochs": 0,
    "schedule": "constant",
}
PLAIN = dict.fromkeys(("mosaic", "fliplr", "hsv_h", "hsv_s", "hsv_v", "translate", "scale"), 0)  # no augmentation
FIXED = {"cwd": 100, "adapter": "conv"}  # weights that do not depend on the task's loss, which is that of a share
TAUGHT_ALONE = {"box": 0, "cls": 0, "dfl": 0}  # without the detection loss
TRAININGS: dict[int, dict[str, dict[str, Any]]] = {  # by the number of processes
    1: {
        "taught alone": TAUGHT_ALONE,
        "whole": {"shards": 4, "batch": 2},
        **{task: {"shards": 2, "batch": 4, "cwd": 1} for task in MODELS},
    },
    2: {
        "taught alone": TAUGHT_ALONE,
        "balanced": {"cwd": "balanced", "adapter": "fitted"},
        "20 steps": {"epochs": 5, "batch": 2, "nbs": 2},
        **{task: {"epochs": 2, "cwd": 1} for task in MODELS},
    },
    4: {"taught alone": TAUGHT_ALONE, "whole": {}},
}


def torchrun(processes: int, *program: str, cwd: Path, env: dict[str, str] | None = None, **options: str) -> Any:
    """Run `program` by so many processes; keywords are options of torchrun."""
    launch = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
    launch += [f"--{name}={value}" for name, value in options.items()]
    command = [sys.executable, *(launch if processes > 1 else []), *program]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False)


def as_words(**arguments: Any) -> list[str]:
    return [f"{name}={value}" for name, value in arguments.items()]


def saved(models: dict[str, str], folder: Path) -> dict[str, Path]:
    """Checkpoints of models, since those from a .yaml would differ from process to process.

    With normalization turned up, since the maps of untrained models hardly vary.
    """
    torch.manual_seed(0)
    for name, model in models.items():
        yolo = YOLO(model)
        for module in yolo.model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.constant_(module.weight, 2.75)
        yolo.save(folder / f"{name}.pt")
    return {name: folder / f"{name}.pt" for name in models}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints of a student and a teacher."""
    return saved({"model": STUDENT, "teacher": TEACHER}, tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def students(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints of students by task."""
    return saved({task: bare(name) for task, (name, _) in MODELS.items()}, tmp_path_factory.mktemp("students"))


@pytest.fixture(scope="module")
def record(
    models: dict[str, Path], students: dict[str, Path], sets: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Record:
    """Return what the recorder wrote down of a training by so many processes, which run all of theirs at once."""

    @cache
    def run(processes: int) -> tuple[Path, str]:
        folder = tmp_path_factory.mktemp("recorded")
        seed = 1 if processes == 1 else 0  # Ultralytics adds the rank plus 1, and a single process has rank -1
        trainings = []
        for name, given in TRAININGS[processes].items():
            of_task = {"model": students[name], "data": sets[name]} if name in students else {}
            places = {"file": folder / name, "project": folder / "runs", **models, "data": sets["detect"], **of_task}
            arguments = {**WORDS, **PLAIN, **FIXED, "val": False, "seed": seed, "shards": 1, **places, **given}
            trainings.append(json.dumps(arguments, default=str))
        call = ("step_recorder:main", *trainings)
        ended = together(processes, *call, cwd=folder) if processes > 1 else [Started(*call, cwd=folder).wait()]
        return folder, "".join(one.stderr for one in ended)

    def recorded(processes: int, training: str) -> dict[str, Any]:
        folder, errors = run(processes)
        assert (folder / training).exists(), errors
        written: dict[str, Any] = torch.load(folder / training)
        return written

    return recorded


def error(ours: dict[str, torch.Tensor], reference: dict[str, torch.Tensor], prefix: str) -> float:
    """Relative error of all gradients whose names begin so."""
    names = [name for name in reference if name.startswith(prefix)]
    assert names
    assert ours.keys() == reference.keys()
    difference = torch.cat([(ours[n] - reference[n]).flatten() for n in names]).norm()
    return float(difference / torch.cat([reference[n].flatten() for n in names]).norm())


def assert_same_step(ours: dict[str, Any], reference: dict[str, Any], loss: float) -> None:
    """The loss of the whole batch, and the gradients of student and adapters."""
    assert ours["first_loss"] == pytest.approx(loss, rel=1e-5)
    for part in ("adapters", "model"):
        assert error(ours["gradients"], reference["gradients"], part) < 1e-5


def test_the_balanced_rule_is_the_same_in_every_process(record: Record) -> None:
    """Each has measured gradients of other images, and their squares are added up."""
    two = record(2, "balanced")
    assert two["differing"] == 0
    assert all(square > 0 for pair in two["means"] for square in pair)
    assert all(0 < loss < float("inf") for loss in two["losses"])


def test_distillation_is_that_of_one_process_on_the_same_global_batch(record: Record) -> None:
    one, *several = (record(processes, "taught alone") for processes in (1, 2, 4))
    assert one["first_loss"] > 0.1
    for run in several:
        assert_same_step(run, one, one["first_loss"])


def test_whole_loss_is_that_of_one_process_that_adds_up_the_shares(record: Record) -> None:
    """Ultralytics' detection loss divides by the targets of each process, so the reference takes share by share."""
    one, four = record(1, "whole"), record(4, "whole")
    assert len(one["losses"]) == 4
    assert_same_step(four, one, sum(one["losses"]))
    ratios = [[task / ours for task, ours in run["means"]] for run in (one, four)]
    assert ratios[0] == pytest.approx(ratios[1], rel=1e-4)


@pytest.mark.parametrize("task", MODELS)
def test_two_processes_train_a_task_as_one(record: Record, task: str) -> None:
    one, two = record(1, task), record(2, task)
    assert len(one["losses"]) == 2
    assert_same_step(two, one, sum(one["losses"]))
    assert len(two["losses"]) == 2
    assert two["differing"] == 0


def test_all_processes_hold_the_same_models_after_20_steps(record: Record) -> None:
    run = record(2, "20 steps")
    assert len(run["losses"]) == 20
    assert run["differing"] == 0


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


def test_all_processes_recover_from_a_nan_loss_and_calibrate_a_depth_model(
    students: dict[str, Path], sets: dict[str, str], tmp_path: Path
) -> None:
    models = {"model": str(students["depth"]), "teacher": str(students["depth"])}
    arguments = {**WORDS, **models, "data": sets["depth"], "epochs": 3, "project": str(tmp_path), "name": "run"}
    for ended in together(2, "processes:recover", json.dumps(arguments), cwd=tmp_path):
        assert ended.code == 0, ended.stderr
        assert "recovered, up to epoch 3" in ended.stdout
    assert polars.read_csv(tmp_path / "run" / "results.csv")["epoch"].to_list() == [1, 2, 3]
    for name in ("best", "last"):
        file = tmp_path / "run" / "weights" / f"{name}.pt"
        assert "depth_calibration" in torch.load(file, weights_only=False)
        load_teacher(str(file))  # the restricted loader takes it: nothing of ours is in it


@pytest.mark.parametrize("left", [[], ["last.pt"]])
def test_processes_end_a_training_without_a_best_checkpoint(
    left: list[str], models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in left:
        shutil.copy(models["model"], tmp_path / name)
    monkeypatch.setattr("yolo_cwd.run.torchrun.RANK", 0)
    trainer: Any = SimpleNamespace(last=tmp_path / "last.pt", best=tmp_path / "best.pt")
    JointEvaluation.final_eval(trainer)
    assert [file.name for file in tmp_path.iterdir()] == left


def test_a_process_that_starts_others_shows_nothing_itself() -> None:
    """Ultralytics hands its callbacks on to all of them, and the first attaches its own."""
    attach(SimpleNamespace(ddp=True, args=None))


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
    line = "yolo_cwd: process 0 of 2 ends, since another one has ended or is silent; 'resume' continues"
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
    result = torchrun(2, *long, "time=0.0005", "epochs=1000", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert time.monotonic() - started < 120
    assert (tmp_path / "run" / "weights" / "best.pt").exists()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0 or not shutil.which("ip"), reason="needs root and ip")
def test_two_hosts_train_together(long: list[str], tmp_path: Path) -> None:
    script = ROOT / "scripts" / "two_hosts.sh"
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
    monkeypatch.setattr("yolo_cwd.run.distributed.broadcast_object", lambda value: agreed)
    teacher, settings = load_teacher("yolov8n.yaml"), SimpleNamespace(teacher_dtype="auto")
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    loader = SimpleNamespace(dataset=SimpleNamespace(load_image=lambda index: (pixels, None, None)))
    choose_precision(teacher, settings.teacher_dtype, loader.dataset, torch.device("cpu"))
    assert teacher.precision.name == agreed
    assert next(teacher.body.parameters()).dtype == DTYPES[agreed]
