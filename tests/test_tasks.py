"""Every dense task: one trainer, one loss, plain checkpoints."""

import csv
import json
import pickle
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import digits
import pytest
import torch
from conftest import SHORT, STUDENT, TAUGHT, bare, narrow, settled, short_trainings
from processes import Started
from test_divergence import reference
from test_state import StopError, interrupted, resume
from torch import nn
from ultralytics import YOLO

from yolo_cwd import CWDTrainer
from yolo_cwd.cli import main
from yolo_cwd.config import ConfigError
from yolo_cwd.method.fpn import HeadTap
from yolo_cwd.method.teacher import load_teacher
from yolo_cwd.run.files import content_of
from yolo_cwd.run.state import RunState, load_state
from yolo_cwd.tasks import TASKS, task_of_student

MODELS = {
    "segment": ("yolov8n-seg.yaml", "yolo11n-seg.yaml"),
    "pose": ("yolo11n-pose.yaml", "yolov8n-pose.yaml"),
    "obb": ("yolov8n-obb.yaml", "yolo26n-obb.yaml"),
    "semantic": ("yolo26n-sem.yaml", "yolo26n-sem.yaml"),
    "depth": ("yolo26n-depth.yaml", "yolo26n-depth.yaml"),
}
Train = Callable[..., CWDTrainer]
compile_ = torch.compile


@pytest.fixture
def students(sets: dict[str, str]) -> dict[str, str]:
    """Models by task, of little more than a head."""
    return {task: bare(student) for task, (student, _) in MODELS.items()}


def rows(trainer: CWDTrainer) -> list[dict[str, float]]:
    with trainer.csv.open() as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


class Taught(NamedTuple):
    """A training of two epochs that was interrupted between them.

    Attributes:
        half: The checkpoint that it went on from.
        saved: What lay beside that checkpoint.
        restored: The same as it was when the second epoch began.
        trainer: The trainer of the second epoch, at the end.
    """

    half: Path
    saved: dict[str, Any]
    restored: dict[str, Any]
    trainer: CWDTrainer


@pytest.fixture(scope="module")
def taught(sets: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Taught]:
    """Let a student of a task learn from a teacher of its own, once."""

    @cache
    def learn(task: str) -> Taught:
        folder = tmp_path_factory.mktemp(task)
        student, teacher = narrow(MODELS[task][0]), YOLO(narrow(MODELS[task][1], 0.5))
        torch.manual_seed(4)
        settled(teacher.model, sets[task])
        teacher.save(folder / "teacher.pt")
        options = {"teacher": str(folder / "teacher.pt"), "cwd": "balanced", "adapter": "fitted", "epochs": 2}
        last = interrupted(short_trainings(sets[task], folder), folder, 1, model=student, **options)
        half = folder / "half.pt"
        half.write_bytes(last.read_bytes())
        saved, restored = load_state(last), RunState({})

        def look(trainer: CWDTrainer) -> None:
            restored.remember(
                trainer.start_epoch - 1,
                trainer.distillation.terms,
                trainer.optimizer,
                trainer.distillation.measured(),
                "",
            )

        return Taught(half, saved.epochs, restored.epochs, resume(last, {"on_train_start": look}))

    return learn


@pytest.mark.parametrize("task", MODELS)
def test_a_student_of_every_task_learns_from_a_teacher_of_its_own(taught: Callable[[str], Taught], task: str) -> None:
    trainer = taught(task).trainer
    assert isinstance(trainer, TASKS[task].trainer)
    assert trainer.args.task == task
    assert trainer.save_dir.parent.name == "runs"
    row = rows(trainer)[-1]
    levels = ("P3", "P4") if task == "semantic" else ("P3", "P4", "P5")
    assert all(row[f"train/{level}_loss"] > 0 and row[f"train/{level}_share"] > 0 for level in levels)
    assert TASKS[task].score.column in row


@pytest.mark.parametrize("task", MODELS)
def test_a_run_of_every_task_resumes_where_it_stopped(taught: Callable[[str], Taught], task: str) -> None:
    """Adapters, their moments, and the measured gradients are those of the moment; each epoch is trained once."""
    run = taught(task)
    assert isinstance(run.trainer, TASKS[task].trainer)
    assert list(run.saved) == [0]
    assert all(moments["step"] > 0 for moments in run.saved[0]["optimizer"])
    assert run.saved[0]["measured"]
    (saved,), (restored,) = ([*epochs.values()] for epochs in (run.saved, run.restored))
    assert saved["checkpoint"] == content_of(run.half)
    kept = {name: value for name, value in saved.items() if name != "checkpoint"}
    torch.testing.assert_close({name: restored[name] for name in kept}, kept, rtol=0, atol=0)
    assert [row["epoch"] for row in rows(run.trainer)] == [1, 2]


def test_checkpoints_of_every_task_are_plain(taught: Callable[[str], Taught], tmp_path: Path) -> None:
    """Those in the middle of a training and those at its end."""
    files = [str(file) for run in map(taught, MODELS) for file in (run.half, run.trainer.best)]
    ended = Started("processes:predict_without_us", *files, cwd=tmp_path).wait()
    assert ended.code == 0, ended.stderr
    assert ended.stdout.split() == [task for task in MODELS for _ in range(2)]


@pytest.mark.parametrize("task", ["semantic", "segment"])
def test_class_maps_are_compared_where_both_know_a_class(
    train: Train, sets: dict[str, str], students: dict[str, str], task: str
) -> None:
    teacher = YOLO(bare(MODELS[task][1], 0.5))
    names = {**digits.CLASSES, 10: "background"} if task == "semantic" else digits.CLASSES
    head = settled(teacher.model, sets[task]).model[-1]
    teacher.model.names = {i: names.get(i, f"other {i}") for i in range(head.nc)}
    trainer = train(model=students[task], teacher=teacher, data=sets[task], cwd="balanced", epochs=2)
    assert len(trainer.distillation.classes) == len(names)
    assert rows(trainer)[-1]["train/classmap_loss"] > 0


@pytest.mark.parametrize("task", MODELS)
def test_without_weight_a_task_trains_as_in_plain_ultralytics(
    train: Train, sets: dict[str, str], students: dict[str, str], tmp_path: Path, task: str
) -> None:
    ours = train(model=students[task], data=sets[task], cwd=0)
    project = str(tmp_path / "plain")
    plain = TASKS[task].trainer(overrides={**SHORT, "model": students[task], "data": sets[task], "project": project})
    plain.final_eval = lambda: None
    plain.train()
    (expected,), (got,) = rows(plain), rows(ours)
    assert {name: got[name] for name in expected if name != "time"} == {
        n: v for n, v in expected.items() if n != "time"
    }
    for mine, theirs in ((ours.model, plain.model), (ours.ema.ema, plain.ema.ema)):
        expected, got = theirs.state_dict(), mine.state_dict()
        assert expected.keys() == got.keys()
        assert all(torch.equal(value, expected[name]) for name, value in got.items())


@pytest.mark.parametrize("task", TASKS)
def test_the_loss_is_the_tasks_own_and_the_divergences(
    train: Train, sets: dict[str, str], students: dict[str, str], task: str
) -> None:
    """One batch through the parts by hand: a criterion of Ultralytics, and the definition of the divergence."""
    seen: list[tuple[float, float]] = []

    def look(trainer: CWDTrainer) -> None:
        criterion, student = trainer.distillation.criterion, trainer.model.train()
        batch = trainer.preprocess_batch(next(iter(trainer.train_loader)))
        received: list[torch.Tensor] = []
        hook = student.model[-1].register_forward_pre_hook(lambda _, inputs: received.extend(inputs[0]))
        with torch.no_grad():
            own, _ = student.init_criterion()(student(batch["img"]), batch)
            hook.remove()
            maps = zip(trainer.distillation.terms, received, trainer.distillation.teacher(batch["img"]), strict=False)
            divergences = sum(reference(term.adapter(ours), theirs, 1.0) for term, ours, theirs in maps)
            criterion.weight = 100.0
            whole, _ = criterion(
                student(batch["img"]), {**batch, "teacher": trainer.distillation.teacher.maps(batch["img"])}
            )
        seen.append((float(whole.sum()), float(own.sum()) + 100 * divergences * len(batch["img"])))
        raise StopError

    with pytest.raises(StopError):
        train(model=students.get(task, STUDENT), data=sets[task], callbacks={"on_train_start": look})
    ((whole, expected),) = seen
    assert whole == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("task", ["semantic"])
def test_a_teacher_of_another_task_teaches(
    train: Train, sets: dict[str, str], students: dict[str, str], checkpoints: Path, task: str
) -> None:
    trainer = train(model=students[task], data=sets[task], teacher=str(checkpoints / "segment.pt"))
    assert all(rows(trainer)[0][f"train/{level}_loss"] > 0 for level in ("P3", "P4"))
    assert not trainer.distillation.classes


def test_a_tap_is_pickled_as_a_hook_that_does_nothing() -> None:
    tap, head = HeadTap(), nn.Identity()
    received = ([torch.ones(1, 2, 3, 3)],)
    assert tap(head, received) is None
    assert tap.take(None) == received[0]
    head.register_forward_pre_hook(tap)
    copied = pickle.loads(pickle.dumps(head))
    assert b"yolo_cwd" not in pickle.dumps(head)
    assert torch.equal(copied(received[0][0]), received[0][0])


def test_maps_of_a_step_that_failed_are_forgotten(train: Train, students: dict[str, str], sets: dict[str, str]) -> None:
    """After running out of memory Ultralytics begins the epoch again."""
    left: list[Any] = []

    def fail(trainer: CWDTrainer) -> None:
        trainer.distillation.criterion.features.__self__._maps = ["a graph"]

    callbacks = {
        "on_train_epoch_start": fail,
        "on_train_batch_start": lambda trainer: left.append(trainer.distillation.criterion.features.__self__._maps),
    }
    train(model=students["semantic"], data=sets["semantic"], teacher=students["semantic"], callbacks=callbacks)
    assert left[0] is None


@pytest.mark.slow
@pytest.mark.parametrize("task", ["semantic"])
def test_a_task_is_compiled(
    train: Train, sets: dict[str, str], students: dict[str, str], monkeypatch: pytest.MonkeyPatch, task: str
) -> None:
    monkeypatch.setattr(torch, "compile", lambda model, **_: compile_(model, backend="aot_eager"))
    eager, compiled = (rows(train(model=students[task], data=sets[task], compile=on, lr0=1e-7)) for on in (False, True))
    for level in ("P3", "P4"):
        assert compiled[0][f"train/{level}_nats"] == pytest.approx(eager[0][f"train/{level}_nats"], rel=1e-3)


def test_yolo_train_finds_the_trainer_of_its_task(
    sets: dict[str, str], students: dict[str, str], tmp_path: Path
) -> None:
    model = YOLO(students["segment"])
    arguments = {k: v for k, v in SHORT.items() if k != "model"}
    model.train(trainer=CWDTrainer, data=sets["segment"], project=str(tmp_path), **TAUGHT, **arguments)
    assert isinstance(model.trainer, TASKS["segment"].trainer)
    assert type(model.trainer).__name__ == "CWDTrainer"
    assert type(model.trainer).__module__ == "yolo_cwd.trainer", "processes that Ultralytics starts import it by name"


class Mine(CWDTrainer):
    """A trainer of somebody's own."""


def test_a_trainer_of_ones_own_is_joined_too(sets: dict[str, str], students: dict[str, str], tmp_path: Path) -> None:
    overrides = {**TAUGHT, **SHORT, "model": students["pose"], "data": sets["pose"], "project": str(tmp_path)}
    trainer = Mine(overrides=overrides)
    assert isinstance(trainer, Mine)
    assert isinstance(trainer, TASKS["pose"].trainer)
    assert type(trainer).__name__ == "Mine"


@pytest.mark.parametrize(
    ("student", "task"),
    [
        ("yolov8n.yaml", "detect"),
        ("yolo11n-seg", "segment"),
        ("yolo26n-sem.pt", "semantic"),
        ("yolo26n-depth.yaml", "depth"),
        ("yolov8n-pose-p6.yaml", "pose"),
        ("best.pt", "detect"),
    ],
)
def test_the_task_is_the_students(student: str, task: str) -> None:
    assert task_of_student(student).name == task


def test_what_a_checkpoint_holds_counts_more_than_its_name(tmp_path: Path) -> None:
    YOLO(bare("yolov8n-obb.yaml")).save(tmp_path / "best-seg.pt")
    assert task_of_student(tmp_path / "best-seg.pt", asked="segment").name == "obb"


@pytest.mark.parametrize(
    ("student", "message"),
    [
        ("yolov8n-cls.yaml", "task=classify: has no pyramid to distill; give a model for detect, segment, pose"),
        (
            "yolov8s-worldv2.yaml",
            "student=yolov8s-worldv2.yaml: YOLO-World has a trainer of its own; give it as teacher=",
        ),
        ("yoloe-11s-seg.yaml", "student=yoloe-11s-seg.yaml: YOLOE has a trainer of its own"),
        ("rtdetr-l.yaml", "student=rtdetr-l.yaml: RT-DETR has a trainer of its own"),
    ],
)
def test_students_that_have_another_trainer_are_refused(student: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        CWDTrainer(
            overrides={"model": student, "teacher": STUDENT, "data": "coco8.yaml", "project": str(tmp_path / "x")}
        )
    assert str(error.value).startswith(message)
    assert len(str(error.value)) < 300
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("task", ["semantic", "depth"])
def test_check_tells_the_score_of_the_task(
    sets: dict[str, str], students: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], task: str
) -> None:
    teacher = str(tmp_path / "teacher.pt")
    YOLO(students[task]).save(teacher)
    words = [f"teacher={teacher}", f"student={students[task]}", "imgsz=64", "batch=2", "device=cpu", "amp=False"]
    assert main(["check", *words, "format=json"]) == 0
    assert json.loads(capsys.readouterr().out)["data"] is None
    trained = TASKS[task].trainer(overrides={**SHORT, "model": students[task], "data": sets[task], "project": tmp_path})
    trained.train()
    words[0] = f"teacher={trained.last}"
    assert main(["check", *words, f"data={sets[task]}"]) == 0
    found = capsys.readouterr().out
    assert f"score     {TASKS[task].score.label}: teacher " in found


def test_a_comparison_of_another_task(
    sets: dict[str, str], students: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = str(tmp_path / "teacher.pt")
    YOLO(students["depth"]).save(teacher)
    options = {k: v for k, v in SHORT.items() if k not in {"model", "val"}}
    words = {
        "teacher": teacher,
        "student": students["depth"],
        "data": sets["depth"],
        "seeds": "1,2",
        "folder": tmp_path,
    }
    assert main(["compare", *(f"{k}={v}" for k, v in {**options, **words}.items())]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert list(summary["arms"]) == ["plain", "cwd"], "Ultralytics' own distillation has no depth"
    plain, ours = summary["arms"]["plain"], summary["arms"]["cwd"]
    assert ours["gain"] == pytest.approx(plain["score"] - ours["score"]), "less of an error is a gain"
    assert "relative error" in capsys.readouterr().out
    run = YOLO(summary["runs"][0]["weights"]).val(data=sets["depth"], imgsz=64, batch=4, device="cpu", plots=False)
    assert summary["runs"][0]["score"] == pytest.approx(run.results_dict["metrics/abs_rel"], rel=1e-3)


def test_a_dry_pass_leaves_no_trace(students: dict[str, str]) -> None:
    model = YOLO(students["segment"]).model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    teacher = load_teacher(model)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.model[-1]._forward_pre_hooks
    assert teacher.taps.keys() == {8, 16, 32}
