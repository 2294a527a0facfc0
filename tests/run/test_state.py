"""Going on after an interruption: nothing is lost, nothing is torn, nothing is trained twice."""

import csv
import math
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from conftest import SHORT, STUDENT, TAUGHT, TEACHER, Payload
from processes import Started
from test_trainer import TERMS, rows
from torch import nn
from ultralytics import YOLO
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn.tasks import DetectionModel

from yolo_cwd import ConfigError, CWDTrainer
from yolo_cwd.run.files import atomic_checkpoints, write_atomic
from yolo_cwd.run.results import drop_rows_after
from yolo_cwd.run.state import FILE, RunState, load_state

Train = Callable[..., CWDTrainer]


class StopError(Exception):
    """Stands for a kill, at a moment between two epochs."""


def interrupt_after(epoch: int) -> Callable[[CWDTrainer], None]:
    def stop(trainer: CWDTrainer) -> None:
        if trainer.epoch + 1 == epoch:
            raise StopError

    return stop


def interrupted(train: Train, tmp_path: Path, epoch: int, **arguments: Any) -> Path:
    """Run a training that is interrupted after an epoch, and return its last.pt."""
    with pytest.raises(StopError):
        train(name="run", callbacks={"on_fit_epoch_end": interrupt_after(epoch)}, **arguments)
    return tmp_path / "runs" / "run" / "weights" / "last.pt"


def resume(last: Path, callbacks: dict[str, Any] | None = None, **overrides: Any) -> CWDTrainer:
    trainer = CWDTrainer(overrides={"resume": str(last), **overrides})
    for event, callback in (callbacks or {}).items():
        trainer.add_callback(event, callback)
    trainer.train()
    return trainer


def test_a_run_that_has_moved_goes_on_where_it_is(train: Train, tmp_path: Path) -> None:
    last = interrupted(train, tmp_path, 1, epochs=3)
    moved = last.parents[1].rename(tmp_path / "runs" / "moved")
    trainer = train(name="moved", epochs=3, resume=True)
    assert trainer.start_epoch == 1
    assert trainer.save_dir == moved
    assert [row["epoch"] for row in rows(trainer)] == [1, 2, 3]
    assert [run.name for run in moved.parent.iterdir()] == ["moved"]


def test_a_resumed_run_keeps_its_device(train: Train, tmp_path: Path) -> None:
    last = interrupted(train, tmp_path, 1, epochs=2)
    assert CWDTrainer(overrides={"resume": str(last)}).args.device == "cpu", "not the default, which is empty"
    with pytest.raises(ValueError, match="device=5"):
        CWDTrainer(overrides={"resume": str(last), "device": "5"})


def test_one_command_begins_a_named_run_and_goes_on_with_it(train: Train, tmp_path: Path) -> None:
    last = interrupted(train, tmp_path, 2, epochs=3, resume=True)
    trainer = train(final=True, name="run", epochs=3, resume=True)
    assert trainer.last == last
    assert trainer.start_epoch == 2
    assert [row["epoch"] for row in rows(trainer)] == [1, 2, 3]
    with pytest.raises(ConfigError, match="the training is finished"):
        train(name="run", epochs=3, resume=True)
    assert [run.name for run in last.parents[2].iterdir()] == ["run"]


def test_a_command_that_names_a_checkpoint_goes_on_with_that(train: Train, tmp_path: Path) -> None:
    """Whatever else stands in the command that began the run."""
    last = interrupted(train, tmp_path, 1, epochs=2)
    trainer = train(model=str(last), resume=True, student=STUDENT, name="another", epochs=2)
    assert (trainer.start_epoch, trainer.last) == (1, last)
    assert [run.name for run in last.parents[2].iterdir()] == ["run"]


def test_resume_goes_on_where_it_stopped(train: Train, tmp_path: Path) -> None:
    options = {"cwd": 20.0, "tau": 2.0, "levels": "P4,P5", "level_weights": [1.0, 0.5], "optimizer": "AdamW"}
    last = interrupted(train, tmp_path, 2, epochs=4, **options)
    (last.parent / ".unfinished").mkdir()
    (last.parent / ".cwd.pt.123").write_bytes(b"half")
    saved = load_state(last)
    assert list(saved.epochs) == [1], "the epoch of this very checkpoint"
    seen: list[Any] = []

    def look(trainer: CWDTrainer) -> None:
        assert trainer.start_epoch == 2
        ours = trainer.distillation.terms.state_dict()
        assert all(torch.equal(ours[k], v) for k, v in saved.epochs[1]["adapters"].items())
        for parameter, moments in zip(
            trainer.distillation.terms.parameters(), saved.epochs[1]["optimizer"], strict=True
        ):
            assert all(torch.equal(trainer.optimizer.state[parameter][k], v) for k, v in moments.items())
        seen.append(trainer.optimizer.param_groups[-1]["lr"] == trainer.optimizer.param_groups[0]["lr"])

    trainer = resume(last, {"on_train_start": look})
    assert seen
    assert [row["epoch"] for row in rows(trainer)] == [1, 2, 3, 4]
    assert (trainer.settings.cwd, trainer.settings.tau, trainer.settings.levels, [*trainer.settings.level_weights]) == (
        20,
        2,
        (16, 32),
        [1, 0.5],
    )
    assert yaml.safe_load((trainer.save_dir / "cwd.yaml").read_text())["teacher"] == TEACHER
    assert trainer.save_dir == last.parent.parent
    assert sorted(f.name for f in last.parent.iterdir()) == ["best.pt", "last.pt"]
    assert type(YOLO(last).model) is DetectionModel


def test_an_epoch_whose_checkpoint_is_missing_is_in_the_table_once(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = BaseTrainer.save_model

    def killed(trainer: CWDTrainer) -> Any:
        if trainer.epoch == 1:  # its row has been written
            raise StopError
        return save(trainer)

    monkeypatch.setattr(BaseTrainer, "save_model", killed)
    with pytest.raises(StopError):
        train(name="run", epochs=3)
    monkeypatch.setattr(BaseTrainer, "save_model", save)
    folder = tmp_path / "runs" / "run"
    assert [line.split(",")[0].strip() for line in (folder / "results.csv").read_text().splitlines()[1:]] == ["1", "2"]
    trainer = resume(folder / "weights" / "last.pt")
    assert trainer.start_epoch == 1
    assert [row["epoch"] for row in rows(trainer)] == [1, 2, 3]


def test_resume_by_the_model_object(train: Train, tmp_path: Path) -> None:
    last = interrupted(train, tmp_path, 1, epochs=2)
    model = YOLO(last)
    model.train(resume=True, trainer=CWDTrainer)
    assert [row["epoch"] for row in rows(model.trainer)] == [1, 2]


def test_the_seam_does_not_show_but_would_without_the_adapters(train: Train, tmp_path: Path) -> None:
    """The divergence in the first epoch after the seam, against that of the last epoch before it."""
    still = {"mosaic": 0.0, "fliplr": 0.0, "scale": 0.0, "translate": 0.0, "hsv_v": 0.0}
    last = interrupted(train, tmp_path, 10, epochs=12, lr0=1e-2, **still)
    copy = tmp_path / "copy" / "weights" / "last.pt"
    copy.parent.mkdir(parents=True)
    state = load_state(last)
    for file in (last, last.parent.parent / "results.csv"):
        (copy.parent / file.name if file == last else copy.parent.parent / file.name).write_bytes(file.read_bytes())
    fresh = {n: nn.Conv2d(w.shape[1], w.shape[0], 1).weight for n, w in state.epochs[9]["adapters"].items()}
    state.epochs[9]["adapters"] = {name: weight.detach() for name, weight in fresh.items()}
    state.save(copy.parent)

    def first_epoch_after(checkpoint: Path) -> float:
        trainer = resume(checkpoint, save_dir=str(checkpoint.parent.parent))
        return next(row["train/cwd_loss"] for row in rows(trainer) if row["epoch"] == 11)

    before = float((last.parent.parent / "results.csv").read_text().splitlines()[10].split(",")[_column(last)])
    kept, lost = first_epoch_after(last), first_epoch_after(copy)
    assert kept == pytest.approx(before, rel=0.1)
    assert lost > 1.2 * before


def _column(last: Path) -> int:
    return (last.parent.parent / "results.csv").read_text().splitlines()[0].split(",").index("train/cwd_loss")


def test_a_teacher_can_be_replaced_but_must_fit(train: Train, tmp_path: Path, checkpoints: Path) -> None:
    last = interrupted(train, tmp_path, 1, epochs=2, teacher=str(checkpoints / "small.pt"))
    state = load_state(last)
    state.options["teacher"] = str(tmp_path / "moved.pt")
    state.save(last.parent)
    before = sorted(str(f) for f in tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match=r"teacher=.*moved.pt: "):
        resume(last)
    with pytest.raises(ConfigError, match=r"yolov8s.yaml: asks for adapters of \[\(32, 16, 1, 1\)"):
        resume(last, teacher=TEACHER)
    (tmp_path / "p2.yaml").write_text(_other_levels())
    with pytest.raises(ConfigError, match="levels=P3,P4,P5: "):
        resume(last, teacher=str(tmp_path / "p2.yaml"))
    assert sorted(str(f) for f in tmp_path.rglob("*") if f.name != "p2.yaml") == before
    assert resume(last, teacher=str(checkpoints / "small.pt"), tau=3.0).settings.tau == 1  # a run keeps its options


def _other_levels() -> str:
    model = {
        "nc": 3,
        "backbone": [[-1, 1, "Conv", [16, 3, 2]], [-1, 1, "Conv", [16, 3, 2]], [-1, 1, "Conv", [16, 3, 2]]],
        "head": [[-1, 1, "Conv", [16, 3, 2]], [[2, 3], 1, "Detect", ["nc"]]],
    }
    return yaml.safe_dump(model)


@pytest.mark.parametrize("kind", ["finished", "hostile", "torn"])
def test_states_that_cannot_be_used(train: Train, tmp_path: Path, kind: str) -> None:
    last = interrupted(train, tmp_path, 1, epochs=2)
    file, marker = last.parent / FILE, tmp_path / "ran"
    if kind == "finished":
        resume(last)
    elif kind == "hostile":
        torch.save({"options": Payload(marker), "epochs": {}}, file)
    else:
        file.write_bytes(file.read_bytes()[:1000])
    message = "the training is finished; for more epochs, begin" if kind == "finished" else "cwd.pt cannot be read"
    with pytest.raises(ConfigError, match=message) as error:
        resume(last)
    assert "\n" not in str(error.value)
    assert not marker.exists()


def test_checkpoints_are_moved_when_complete(tmp_path: Path) -> None:
    class Trainer:
        wdir, last, best = tmp_path, tmp_path / "last.pt", tmp_path / "best.pt"

    trainer = Trainer()
    write_atomic(tmp_path / "last.pt", b"old")
    with pytest.raises(AttributeError), atomic_checkpoints(trainer):
        trainer.no_such_file.write_bytes(trainer.last.write_bytes(b"ne"))
    assert (tmp_path / "last.pt").read_bytes() == b"old"
    with atomic_checkpoints(trainer):
        trainer.last.write_bytes(b"new")
        trainer.best.write_bytes(b"new")
        (trainer.wdir / "epoch3.pt").write_bytes(b"new")
        assert (tmp_path / "last.pt").read_bytes() == b"old"
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == dict.fromkeys(
        ("last.pt", "best.pt", "epoch3.pt"), b"new"
    )
    assert trainer.last == tmp_path / "last.pt"


def test_rows_of_lost_epochs_are_dropped(tmp_path: Path) -> None:
    table = tmp_path / "results.csv"
    table.write_text("epoch,time,loss\n1,5,0.5\n2,9,0.4\n3,14,0.3\n4,18")
    drop_rows_after(table, 2)
    assert table.read_text() == "epoch,time,loss\n1,5,0.5\n2,9,0.4\n"
    drop_rows_after(tmp_path / "absent.csv", 2)
    for torn in ("", "epoch,time,lo"):
        table.write_text(torn)
        drop_rows_after(table, 2)
        assert not table.exists()


def test_only_the_last_epochs_are_kept() -> None:
    adapters = nn.ModuleList([nn.Conv2d(2, 3, 1)])
    state = RunState({})
    for epoch in range(4):
        state.remember(epoch, adapters, torch.optim.SGD(adapters.parameters()), {"P3": [float(epoch), 1.0]}, "")
    assert list(state.epochs) == [2, 3]
    state.restore(3, adapters, torch.optim.SGD(adapters.parameters()))
    assert state.measured == {"P3": [3.0, 1.0]}
    state.restore(0, adapters, torch.optim.SGD(adapters.parameters()))
    assert state.measured == {}, "nothing to continue from"


def test_adapters_that_are_not_finite_are_not_restored() -> None:
    adapters = nn.ModuleList([nn.Conv2d(2, 3, 1)])
    optimizer, state = torch.optim.SGD(adapters.parameters()), RunState({})
    state.remember(0, adapters, optimizer, {"P3": [1.0, 1.0]}, "")
    state.epochs[0]["adapters"]["0.weight"][0] = torch.nan
    state.restore(0, adapters, optimizer)
    assert state.measured == {}
    assert all(p.isfinite().all() for p in adapters.parameters())


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_counter_is_restored_where_the_optimizer_keeps_it(fused: bool) -> None:
    """On the device if it is fused, as Ultralytics has it on GPUs; the device `meta` stands for one."""
    adapters = nn.ModuleList([nn.Conv2d(2, 3, 1, device="meta")])
    parameters = list(adapters.parameters())
    moments = {"step": torch.tensor(3.0), "exp_avg": torch.zeros(1, 1)}
    saved = {name: torch.zeros(value.shape) for name, value in adapters.state_dict().items()}
    state = RunState({}, {0: {"adapters": saved, "optimizer": [moments] * 2, "measured": {}}})
    optimizer: Any = SimpleNamespace(param_groups=[{"params": parameters, "fused": fused}], state={})
    state.restore(0, adapters, optimizer)
    for parameter in parameters:
        placed = {name: value.device.type for name, value in optimizer.state[parameter].items()}
        assert placed == {"step": "meta" if fused else "cpu", "exp_avg": "meta"}


def words_of(data: str, folder: Path, **more: Any) -> list[str]:
    """Words of a short training into a folder."""
    given = {**SHORT, "teacher": TEACHER, "teacher_dtype": "fp32", "data": data, "project": folder, **more}
    return [f"{name}={value}" for name, value in given.items()]


@pytest.mark.parametrize(
    ("number", "word", "code"), [(signal.SIGTERM, "terminated", 143), (signal.SIGINT, "interrupted", 130)]
)
def test_signals_end_a_training_with_one_line(data: str, tmp_path: Path, number: int, word: str, code: int) -> None:
    process = Started("processes:main", "train", *words_of(data, tmp_path, epochs=500, name="run"), cwd=tmp_path)
    last = tmp_path / "run" / "weights" / "last.pt"
    deadline = time.monotonic() + 120
    while not last.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(number)
    ended = process.wait(60)
    line = ended.stderr.strip().splitlines()[-1]
    assert ended.code == code
    assert line == f"yolo_cwd: {word}; 'yolo_cwd train resume model={last}' continues it"
    assert "Traceback" not in ended.stderr
    assert os.fspath(last) in line
    assert type(YOLO(last).model) is DetectionModel


def test_terms_after_resume_are_of_the_same_columns(train: Train, tmp_path: Path) -> None:
    """And of a teacher in the precision that it had chosen, though another machine might choose another one."""
    last = interrupted(train, tmp_path, 1, epochs=2, teacher_dtype="auto")
    chosen = load_state(last).options["teacher_dtype"]
    assert chosen != "auto"
    trainer = resume(last)
    assert trainer.distillation.teacher.precision.name == chosen
    assert all(row[f"train/{term}"] > 0 for row in rows(trainer) for term in TERMS)


def test_a_table_of_other_columns_goes_on_with_both(train: Train, tmp_path: Path) -> None:
    """As another release has written it."""
    last = interrupted(train, tmp_path, 1, epochs=2)
    table = last.parents[1] / "results.csv"
    table.write_text(table.read_text().replace("train/P3_nats", "train/of_old"))
    first, second = rows(resume(last))
    assert list(first) == list(second)
    assert math.isnan(first["train/P3_nats"])
    assert second["train/P3_nats"] > 0
    assert first["train/of_old"] > 0
    assert math.isnan(second["train/of_old"])
    assert first["train/P5_nats"] > 0
    assert second["train/cwd_loss"] > 0


def test_plain_ultralytics_takes_a_checkpoint_in_the_middle_of_a_run(train: Train, tmp_path: Path, data: str) -> None:
    last = interrupted(train, tmp_path, 1, epochs=2)
    model = YOLO(last)
    assert model.val(data=data, imgsz=64, plots=False, project=tmp_path, device="cpu").box.map >= 0
    assert len(model.predict(torch.rand(1, 3, 64, 64), verbose=False)) == 1
    assert Path(model.export(format="torchscript", imgsz=64)).exists()


def test_two_trainings_at_once(data: str, tmp_path: Path) -> None:
    """Of the same data and teacher, into the same project: each is what it is alone."""
    words = words_of(data, tmp_path, epochs=2, val=True)
    processes = [Started("processes:main", "train", *words, cwd=tmp_path) for _ in range(2)]
    assert [process.wait().code for process in processes] == [0, 0]
    tables = [(tmp_path / name / "results.csv").read_text().splitlines() for name in ("train", "train-2")]
    without_time = [[[*row.split(",")[:1], *row.split(",")[2:]] for row in table] for table in tables]
    assert without_time[0] == without_time[1]


def test_a_model_that_a_callback_saves_loads_where_we_are_not(train: Train, tmp_path: Path) -> None:
    file = tmp_path / "guest.pt"

    def save(trainer: CWDTrainer) -> None:
        assert trainer.distillation.criterion is trainer.model.criterion
        torch.save({"model": trainer.model}, file)

    train(epochs=2, callbacks={"on_train_batch_end": save, "on_train_epoch_end": save})
    ended = Started("processes:load_without_us", str(file), cwd=tmp_path).wait()
    assert ended.code == 0, ended.stderr
    assert ended.stdout.split() == ["ultralytics.utils.loss", "box_loss", "cls_loss", "dfl_loss"]


def test_a_group_that_a_subclass_adds_is_saved_and_resumed(data: str, tmp_path: Path) -> None:
    class Guest(CWDTrainer):
        def build_optimizer(self, model: nn.Module, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
            optimizer = super().build_optimizer(model, *args, **kwargs)
            self.extra = nn.Parameter(torch.ones(3, 5, 7))
            optimizer.add_param_group({"params": [self.extra], "lr": 0.125, "param_group": "guest"})
            return optimizer

        def optimizer_step(self) -> None:
            self.extra.grad = torch.ones_like(self.extra)
            super().optimizer_step()

    def stop(trainer: CWDTrainer) -> None:
        if trainer.epoch == 1:
            raise StopError

    words = {**TAUGHT, **SHORT, "data": data, "project": str(tmp_path), "name": "run", "epochs": 3}
    trainer = Guest(overrides=words)
    trainer.add_callback("on_fit_epoch_end", stop)
    with pytest.raises(StopError):
        trainer.train()
    last = tmp_path / "run" / "weights" / "last.pt"
    saved = torch.load(last, weights_only=False)["optimizer"]
    kinds = [group["param_group"] for group in trainer.optimizer.param_groups]
    ours = len(kinds) - 2  # before the guest's
    assert [group["param_group"] for group in saved["param_groups"]] == [k for i, k in enumerate(kinds) if i != ours]
    assert saved["state"][saved["param_groups"][-1]["params"][0]]["exp_avg"].shape == (3, 5, 7)
    assert saved["state"].keys() <= {i for group in saved["param_groups"] for i in group["params"]}
    moments: list[Any] = []

    def look(resumed: Guest) -> None:
        moments.extend(resumed.optimizer.state[p] for p in (resumed.extra, *resumed.distillation.terms.parameters()))

    resumed = Guest(overrides={"resume": str(last)})
    resumed.add_callback("on_train_start", look)
    resumed.train()
    assert [m["exp_avg"].shape for m in moments[:1]] == [(3, 5, 7)]
    assert all(m["step"] > 0 for m in moments)


def test_rows_of_a_plain_resume_stand_under_their_own_names(train: Train, tmp_path: Path) -> None:
    last = interrupted(train, tmp_path, 2, epochs=3)
    table = last.parents[1] / "results.csv"
    taught = table.read_text().splitlines()
    trainer = DetectionTrainer(overrides={"resume": str(last), "val": True})
    logged: dict[str, float] = {}

    def note(trainer: DetectionTrainer) -> None:
        logged.update(trainer.label_loss_items(trainer.tloss), **trainer.lr)

    trainer.add_callback("on_fit_epoch_end", note)
    trainer.train()
    assert table.read_text().splitlines()[:3] == taught
    with table.open() as file:
        row = [*csv.DictReader(file)][2]
    values = {name: float(value) for name, value in row.items() if value}
    assert {name: values[name] for name in logged} == pytest.approx(logged, rel=1e-4)
    assert values.keys() == {"epoch", "time", *logged, *(n for n in values if n.startswith(("metrics/", "val/")))}
