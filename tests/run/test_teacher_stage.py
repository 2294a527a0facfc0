"""A teacher that does not know the data is trained first, in the same run."""

import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import SHORT, TAUGHT, TEACHER, bare, short_trainings
from processes import Started, together
from staging import Train
from test_state import StopError, interrupt_after
from torch import nn
from ultralytics import YOLO
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.utils import DEFAULT_CFG_DICT

from yolo_cwd import ConfigError, CWDTrainer
from yolo_cwd.cli import main
from yolo_cwd.method.teacher import load_teacher
from yolo_cwd.run.request import read
from yolo_cwd.run.results import read_rows
from yolo_cwd.run.teacher_stage import TeacherTrainer, planned
from yolo_cwd.study import compare
from yolo_cwd.study.check import examine
from yolo_cwd.tasks import TASKS


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[TeacherTrainer]:
    """The trainers of teachers, in the order of their first epochs."""
    trainers: list[TeacherTrainer] = []
    begin = TeacherTrainer._setup_train

    def note(self: TeacherTrainer) -> None:
        begin(self)
        trainers.append(self)

    monkeypatch.setattr(TeacherTrainer, "_setup_train", note)
    return trainers


def weights(file: Path | str) -> dict[str, torch.Tensor]:
    content = torch.load(file, weights_only=False)
    return (content["ema"] or content["model"]).state_dict()  # type: ignore[no-any-return]


def same(one: Path | str, other: Path | str) -> bool:
    ours, theirs = weights(one), weights(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def interrupt_teacher(monkeypatch: pytest.MonkeyPatch, epoch: int) -> None:
    """Stop the training of a teacher after an epoch, once."""
    finish = TeacherTrainer.save_model

    def stop(self: TeacherTrainer) -> Any:
        saved = finish(self)
        if self.epoch + 1 == epoch:
            monkeypatch.setattr(TeacherTrainer, "save_model", finish)
            raise StopError
        return saved

    monkeypatch.setattr(TeacherTrainer, "save_model", stop)


def test_one_command_gives_the_student_of_two_by_hand(
    staged: Train, models: dict[str, str], data: str, tmp_path: Path
) -> None:
    deterministic: list[bool] = []

    def note(_: CWDTrainer) -> None:
        deterministic.append(torch.are_deterministic_algorithms_enabled())

    words = {"epochs": 2, "val": True, "mosaic": 1.0, "cwd": "balanced", "adapter": "fitted", "seed": 3}
    one = staged(final=True, **words, teacher_epochs=3, callbacks={"on_train_start": note})
    by_ultralytics = {k: v for k, v in {**SHORT, **words}.items() if k not in {"cwd", "adapter"}}
    hand = DetectionTrainer(
        overrides={
            **by_ultralytics,
            "model": models["teacher"],
            "data": data,
            "project": str(tmp_path / "hand"),
            "epochs": 3,
        }
    )
    hand.train()
    two = staged(final=True, **words, teacher=str(hand.best), callbacks={"on_train_start": note})
    assert same(one.save_dir / "teacher" / "weights" / "best.pt", hand.best)
    assert same(one.last, two.last)
    assert not same(one.last, models["model"])
    assert one.distillation.teacher.names == one.data["names"], "the trained teacher took its place"
    assert two.stage is None
    assert deterministic == [True, True]


def test_the_first_lines_say_what_will_happen(staged: Train, said: Callable[[], str]) -> None:
    trainer = staged(teacher_epochs=2, verbose=True)
    ours = [line for line in said().splitlines() if "CWD:" in line or "Starting training" in line]
    assert "does not know 0, 1, 2, 3 and 6 more, so it is trained on the data first: 2 epochs" in ours[0]
    assert "then 1 for the student" in ours[0]
    assert str(trainer.save_dir / "teacher") in ours[0]
    assert ours[1].startswith("Starting training for 2 epochs")


def test_the_teacher_has_the_arguments_of_the_run(staged: Train, trained: list[TeacherTrainer]) -> None:
    given = {"imgsz": 96, "lr0": 0.002, "fliplr": 0.1, "seed": 7, "fraction": 0.5, "freeze": 2, "save": False}
    student = staged(**given)
    (teacher,) = trained
    assert {k: getattr(teacher.args, k) for k in given} == {**given, "freeze": None, "save": True}
    assert len(teacher.train_loader.dataset) == 4
    assert type(teacher).__mro__[2] is DetectionTrainer
    assert teacher.args.model == student.settings.teacher or teacher.args.epochs == 1
    assert student.settings.teacher == str(student.save_dir / "teacher" / "weights" / "best.pt")
    record = yaml.safe_load((student.save_dir / "teacher" / "cwd.yaml").read_text())
    assert record["complete"] is True
    assert record["arguments"]["imgsz"] == 96


def test_a_teacher_that_knows_the_data_is_taken_as_it_is(
    staged: Train, data: str, tmp_path: Path, said: Callable[[], str]
) -> None:
    model = YOLO(TEACHER)
    model.model.names = {**{i + 1: str(9 - i) for i in range(10)}, 0: "more"}
    model.save(tmp_path / "knows.pt")
    assert staged(teacher=str(tmp_path / "knows.pt")).stage is None
    assert "no effect" not in said()
    staged(teacher=str(tmp_path / "knows.pt"), teacher_epochs=4)
    assert said().count("teacher_epochs=4 has no effect") == 1


@pytest.mark.parametrize(
    ("names", "arguments", "first"),
    [
        ({0: "0", 1: "1"}, {"classes": [0, 1]}, False),
        ({0: "0", 1: "1"}, {"classes": [1, 2]}, True),
        ({0: "item"}, {"single_cls": True}, False),
        ({0: "item"}, {}, True),
        ({i: str(i) for i in range(10)}, {"single_cls": True}, False),
        ({i: str(i) for i in range(9)}, {"single_cls": True}, True),
        ({0: "0"}, {"cwd": 0, "adapter": "conv"}, False),
    ],
)
def test_which_teacher_knows_the_data(
    names: dict[int, str], arguments: dict[str, Any], first: bool, data: str, tmp_path: Path
) -> None:
    model = YOLO(TEACHER)
    model.model.names = names
    options = {**TAUGHT, **SHORT, "teacher_epochs": "auto", "teacher": model, "data": data, "project": str(tmp_path)}
    assert (CWDTrainer(overrides={**options, **arguments}).stage is not None) == first


def test_0_takes_it_as_it_is_with_one_warning(staged: Train, said: Callable[[], str], tmp_path: Path) -> None:
    trainer = staged(teacher_epochs=0)
    assert said().count("teaches as it is") == 1
    assert trainer.stage is None
    assert not (trainer.save_dir / "teacher").exists()


@pytest.mark.parametrize(
    ("options", "shares"),
    [
        pytest.param({"teacher_epochs": 0}, (0.03, 0.03), id="as it is"),
        pytest.param({"teacher_epochs": 0, "share": 0.5}, (0.5, 0.5), id="a share that is given stays"),
        pytest.param({"teacher_epochs": 0, "class_share": 2.0}, (0.03, 2.0), id="and one of the class maps"),
        pytest.param({"teacher_epochs": 1}, (1.0, 1.0), id="trained first"),
        pytest.param({"teacher_epochs": 0, "complete_labels": True}, (1.0, 1.0), id="it knows what labels leave out"),
    ],
)
def test_the_share_of_a_teacher_that_does_not_know_the_data_is_small(
    options: dict[str, Any], shares: tuple[float, float], models: dict[str, str], data: str
) -> None:
    """What counts is what the run trains with and a resumed run continues with."""
    words = {"teacher": models["teacher"], "data": data, "model": models["model"]}
    request = read(DEFAULT_CFG_DICT, {**words, **options})
    teacher, args = load_teacher(models["teacher"]), request.args
    stage, settings = planned(teacher, request.settings, request.options, args, TASKS["detect"])
    assert (settings.share, settings.class_share) == shares
    assert (stage is not None) == (options["teacher_epochs"] == 1)


def test_a_run_under_an_unknowing_teacher_keeps_its_small_share(staged: Train, tmp_path: Path) -> None:
    trainer = staged(teacher_epochs=0, cwd="balanced", share="auto", epochs=2, schedule="constant", nbs=4)
    rows = read_rows(trainer.csv)
    assert 0 < rows[0]["train/P3_share"] < 0.2
    assert trainer.state.options["share"] == 0.03


def test_networks_that_cannot_be_trained_teach_as_they_are(staged: Train, said: Callable[[], str]) -> None:
    class Pyramid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Conv2d(3 if i == 0 else 8, 8, 3, 2, 1) for i in range(5))

        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            maps = []
            for layer in self.layers:
                maps.append(x := layer(x))
            return maps[2:]

    assert staged(teacher=Pyramid()).stage is None
    assert said().count("is a network of its own kind and does not know") == 1


def test_an_object_is_trained_from_what_it_is(staged: Train, models: dict[str, str], tmp_path: Path) -> None:
    model = YOLO(models["teacher"])
    model.model.criterion = lambda: "of its own training, which no checkpoint can hold"
    before = {k: v.clone() for k, v in model.model.state_dict().items()}
    by_object = staged(teacher=model, name="object")
    by_path = staged(name="path")
    assert all(torch.equal(before[k], v) for k, v in model.model.state_dict().items()), "the object is the user's"
    assert same(by_object.last, by_path.last)


def test_a_yolo_object_as_student(staged: Train, models: dict[str, str], data: str, tmp_path: Path) -> None:
    model = YOLO(models["model"])
    arguments = {k: v for k, v in SHORT.items() if k != "model"}
    options = {**TAUGHT, "teacher": models["teacher"], "teacher_epochs": 1}
    model.train(trainer=CWDTrainer, data=data, project=str(tmp_path), **arguments, **options)
    assert same(staged(final=True).last, model.trainer.last)


def test_a_detector_is_trained_on_outlines(
    sets: dict[str, str], models: dict[str, str], trained: list[TeacherTrainer], tmp_path: Path
) -> None:
    options = {"model": bare("yolov8n-seg.yaml"), "teacher": models["teacher"], "teacher_epochs": 1}
    trainer = short_trainings(sets["segment"], tmp_path)(**options)
    assert trainer.task.name == "segment"
    assert trained[0].args.task == "detect"
    assert not isinstance(trained[0], TASKS["segment"].trainer)


@pytest.mark.parametrize(
    ("task", "student", "teacher", "needs"),
    [
        ("detect", "yolov8n.yaml", "segment", "outlines"),
        ("pose", "yolo11n-pose.yaml", "segment", "outlines"),
        ("pose", "yolo11n-pose.yaml", "teacher", "boxes or outlines alone"),
    ],
)
def test_a_teacher_whose_labels_are_not_there_is_refused(
    task: str,
    student: str,
    teacher: str,
    needs: str,
    sets: dict[str, str],
    models: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(Path(models[teacher]).parent)  # long paths would be shortened together with the reason
    options = {"model": bare(student), "teacher": f"{teacher}.pt", "teacher_epochs": "auto"}
    with pytest.raises(ConfigError, match=f"needs {needs}, which.*teacher for task={task}, or teacher_epochs=0"):
        short_trainings(os.path.relpath(sets[task]), tmp_path)(**options)
    assert not (tmp_path / "runs").exists()


def test_what_cannot_be_distilled_is_refused_before_the_teacher_is_trained(
    staged: Train, trained: list[TeacherTrainer], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="levels"):
        staged(levels="P2")
    assert not trained
    assert not (tmp_path / "runs").exists()


def test_the_time_is_for_both(staged: Train, trained: list[TeacherTrainer]) -> None:
    student = staged(time=0.0008, epochs=2, teacher_epochs=6)
    assert trained[0].args.time == pytest.approx(0.0006)
    assert 0 < student.args.time < 0.0008


def test_loggers_log_one_run_at_a_time(staged: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[tuple[str, str]] = []

    def begin(trainer: Any) -> None:
        order.append(("begins", trainer.save_dir.name))

    def end(trainer: Any) -> None:
        order.append(("ends", trainer.save_dir.name))

    begin.__module__ = "ultralytics.utils.callbacks.tensorboard"

    def add(instance: Any) -> None:
        if isinstance(instance, BaseTrainer):
            instance.callbacks["on_pretrain_routine_start"].append(begin)
            instance.callbacks["on_train_end"].append(end)

    monkeypatch.setattr("ultralytics.utils.callbacks.add_integration_callbacks", add)
    staged(name="run")
    assert order == [("begins", "teacher"), ("ends", "teacher"), ("begins", "run"), ("ends", "run")]


def test_a_trained_teacher_is_not_trained_again(
    staged: Train, trained: list[TeacherTrainer], said: Callable[[], str]
) -> None:
    first = staged(name="first")
    again = staged(name="first", exist_ok=True, device="cpu", plots=False)
    assert "is used; delete that folder" in said()
    other = staged(name="second")
    assert str(first.save_dir / "teacher") in said()
    assert len(trained) == 1
    assert same(again.last, other.last)
    assert same(again.save_dir / "teacher" / "weights" / "best.pt", other.save_dir / "teacher" / "weights" / "best.pt")
    staged(name="third", lr0=0.002)
    assert len(trained) == 2, "another learning rate makes another teacher"


def test_a_teacher_is_trained_again_on_new_labels(
    staged: Train, data: str, trained: list[TeacherTrainer], tmp_path: Path
) -> None:
    description = yaml.safe_load(Path(data).read_text())
    root = shutil.copytree(description["path"], tmp_path / "own")
    own = tmp_path / "own.yaml"
    own.write_text(yaml.safe_dump({**description, "path": str(root)}))
    staged(name="first", data=str(own))
    label = next((root / "labels" / "train").glob("*.txt"))
    label.write_text(label.read_text() + "1 0.5 0.5 0.2 0.2\n")
    staged(name="second", data=str(own))
    assert len(trained) == 2


def test_a_run_resumes_while_its_teacher_is_trained(
    staged: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: list[TeacherTrainer]
) -> None:
    interrupt_teacher(monkeypatch, 2)
    with pytest.raises(StopError):
        staged(name="run", epochs=2, teacher_epochs=3, tau=2.0)
    moved = (tmp_path / "runs" / "run").rename(tmp_path / "runs" / "moved")
    checkpoint = moved / "teacher" / "weights" / "last.pt"
    warned: list[str] = []
    monkeypatch.setattr("ultralytics.utils.LOGGER.warning", warned.append)
    trainer = CWDTrainer(overrides={"resume": True, "model": str(checkpoint), "task": "detect", "lr0": 0.5})
    trainer.train()
    assert [line.partition("ignored: ")[2] for line in warned if "keeps its" in line] == ["lr0"]
    assert [t.start_epoch for t in trained] == [0, 2]
    assert (trainer.save_dir, trainer.epochs, trainer.settings.tau) == (moved, 2, 2.0)
    assert len((moved / "results.csv").read_text().splitlines()) == 3
    assert [row.split(",")[0] for row in (moved / "teacher" / "results.csv").read_text().splitlines()[1:]] == [*"123"]
    assert [folder.name for folder in moved.parent.iterdir()] == ["moved"]


def test_a_run_resumes_between_its_stages(staged: Train, tmp_path: Path, trained: list[TeacherTrainer]) -> None:
    """A trained teacher is kept even where its student's training cannot be set up."""

    def stop(trainer: CWDTrainer) -> None:
        raise StopError

    with pytest.raises(StopError):
        staged(name="run", callbacks={"on_pretrain_routine_end": stop})
    checkpoint = tmp_path / "runs" / "run" / "teacher" / "weights" / "last.pt"
    trainer = CWDTrainer(overrides={"resume": str(checkpoint)})
    trainer.train()
    assert len(trained) == 1
    assert trainer.last.is_file()


def test_a_run_resumes_under_its_own_teacher_where_it_is_now(
    staged: Train, tmp_path: Path, trained: list[TeacherTrainer]
) -> None:
    with pytest.raises(StopError):
        staged(name="run", epochs=2, teacher_epochs=1, callbacks={"on_fit_epoch_end": interrupt_after(1)})
    moved = (tmp_path / "runs" / "run").rename(tmp_path / "runs" / "moved")
    for checkpoint in (moved / "weights" / "last.pt", moved / "teacher" / "weights" / "last.pt"):
        trainer = CWDTrainer(overrides={"resume": str(checkpoint)})
        assert trainer.args.resume == str(moved / "weights" / "last.pt")
        assert trainer.settings.teacher == str(moved / "teacher" / "weights" / "best.pt")
    trainer.train()
    assert (trainer.start_epoch, len(trained)) == (1, 1)


def test_a_named_run_goes_on_in_its_first_stage(
    staged: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: list[TeacherTrainer]
) -> None:
    interrupt_teacher(monkeypatch, 1)
    with pytest.raises(StopError):
        staged(name="run", resume=True, teacher_epochs=2)
    trainer = staged(name="run", resume=True, teacher_epochs=2)
    assert [t.start_epoch for t in trained] == [0, 1]
    assert trainer.save_dir == tmp_path / "runs" / "run"


def test_an_interrupt_says_how_to_go_on(
    staged: Train, models: dict[str, str], data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    words = {**SHORT, **models, **TAUGHT, "teacher": models["teacher"], "teacher_epochs": 3, "data": data}
    for name in ("segment", "other"):
        words.pop(name)
    words |= {"model": models["model"], "project": str(tmp_path / "runs"), "name": "run"}
    line = [f"{name}={value}" for name, value in words.items()]
    finish = TeacherTrainer.save_model

    def stop(self: TeacherTrainer) -> Any:
        finish(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(TeacherTrainer, "save_model", stop)
    assert main(["train", *line]) == 130
    last = tmp_path / "runs" / "run" / "teacher" / "weights" / "last.pt"
    assert f"'yolo_cwd train resume model={last}' continues it" in capsys.readouterr().err
    monkeypatch.setattr(TeacherTrainer, "save_model", finish)
    assert main(["train", "resume", f"model={last}"]) == 0
    assert (tmp_path / "runs" / "run" / "weights" / "best.pt").is_file()

    def at_once(self: TeacherTrainer) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(TeacherTrainer, "_setup_train", at_once)
    assert main(["train", *line[:-1], "name=none", "lr0=0.5"]) == 130
    assert not (tmp_path / "runs" / "none").exists()


def test_two_processes_train_both_stages(models: dict[str, str], data: str, tmp_path: Path) -> None:
    words = {**SHORT, **TAUGHT, "teacher": models["teacher"], "model": models["model"], "teacher_epochs": 2}
    words |= {"data": data, "project": str(tmp_path), "name": "run", "val": True}
    ended = together(2, "processes:main", "train", *(f"{k}={v}" for k, v in words.items()), cwd=tmp_path)
    assert [one.code for one in ended] == [0, 0], ended[0].stderr + ended[1].stderr
    run = tmp_path / "run"
    assert (run / "weights" / "best.pt").is_file()
    assert len((run / "teacher" / "results.csv").read_text().splitlines()) == 3
    assert [folder.name for folder in tmp_path.iterdir()] == ["run"]


def test_a_trained_teacher_comes_to_machines_that_do_not_see_its_folder(tmp_path: Path) -> None:
    trained = tmp_path / "0" / "weights" / "best.pt"
    trained.parent.mkdir(parents=True)
    trained.write_bytes(b"weights")
    ended = together(2, "processes:receive", "best.pt", cwd=tmp_path)
    assert [one.code for one in ended] == [0, 0], ended[0].stderr + ended[1].stderr
    assert (tmp_path / "1" / "weights" / "best.pt").read_bytes() == b"weights"


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
@pytest.mark.parametrize("stage", ["teacher/weights/last.pt", "weights/last.pt"])
def test_a_kill_in_either_stage_loses_nothing(stage: str, models: dict[str, str], data: str, tmp_path: Path) -> None:
    words = {**SHORT, **TAUGHT, "teacher": models["teacher"], "model": models["model"], "teacher_epochs": 20}
    words |= {"data": data, "project": str(tmp_path), "name": "run", "epochs": 20}
    started = Started("processes:main", "train", *(f"{k}={v}" for k, v in words.items()), cwd=tmp_path)
    checkpoint = tmp_path / "run" / stage
    while not checkpoint.exists() and started.process.is_alive():
        started.process.join(0.02)
    started.send_signal(signal.SIGKILL)
    started.wait()
    assert main(["train", "resume", f"model={checkpoint}"]) == 0
    for table in ("results.csv", "teacher/results.csv"):
        rows = (tmp_path / "run" / table).read_text().splitlines()[1:]
        assert [int(row.split(",")[0]) for row in rows] == list(range(1, 21))


def test_check_counts_both_stages(models: dict[str, str], data: str, tmp_path: Path) -> None:
    words = {k: v for k, v in SHORT.items() if k != "val"}
    words |= {"teacher": models["teacher"], "model": models["model"], "data": data, "teacher_epochs": 5, "epochs": 3}
    found = examine(words, tmp_path)
    assert "5 epochs for the teacher, then 3 for the student" in found["stages"]
    assert "will know the data" in found["verdict"]
    assert "no obstacle" not in found["classes"]
    assert found["scores"]["teacher"] is None
    assert not list(tmp_path.rglob("teacher"))


def test_a_comparison_trains_the_teacher_once(
    models: dict[str, str],
    data: str,
    tmp_path: Path,
    trained: list[TeacherTrainer],
    capsys: Any,
    said: Callable[[], str],
) -> None:
    words = {k: v for k, v in SHORT.items() if k not in {"model", "val"}}
    words |= {"teacher": models["teacher"], "student": models["model"], "data": data, "seeds": 1, "teacher_epochs": 2}
    words |= {"folder": str(tmp_path / "c"), "arms": "plain,cwd,cwd:teacher_epochs=0,builtin"}
    summary = compare.run(words)
    assert len(trained) == 1
    best = tmp_path / "c" / "teacher" / "weights" / "best.pt"
    assert yaml.safe_load((tmp_path / "c/runs/builtin-0/args.yaml").read_text())["distill_model"] == str(best)
    assert yaml.safe_load((tmp_path / "c/runs/cwd-0/cwd.yaml").read_text())["teacher"] == str(best)
    as_it_is = yaml.safe_load((tmp_path / "c/runs/cwd_teacher_epochs=0-0/cwd.yaml").read_text())
    assert as_it_is["teacher"] == models["teacher"]
    assert summary["teacher_time"] > 0
    assert re.search(r"^teacher .*x$", capsys.readouterr().out, re.MULTILINE)
    assert "has no effect" not in said()
    compare.run({**words, "seeds": 2, "arms": "cwd"})
    assert len(trained) == 1
    with pytest.raises(ConfigError, match="teacher of a comparison"):
        CWDTrainer(overrides={"resume": str(best.with_name("last.pt"))})
