"""What lies in the folder of an interrupted run may not be what the run has left: each case is told in one line."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import SHORT, TAUGHT
from staging import Train
from test_state import interrupt_after, interrupted, resume
from test_trainer import rows
from torch import nn
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.models.yolo.detect import DetectionTrainer

from yolo_cwd import ConfigError, CWDTrainer
from yolo_cwd.cli import main
from yolo_cwd.run.interrupted import newest_usable, require_fit
from yolo_cwd.run.results import drop_rows_after, read_rows
from yolo_cwd.run.state import FILE
from yolo_cwd.run.teacher_stage import TeacherTrainer
from yolo_cwd.tasks import TASKS
from yolo_cwd.view.report import outcome, read_curves

FITTED = {"adapter": "fitted", "cwd": "balanced", "class_share": 0.0}


def plain(epoch: int, **overrides: Any) -> None:
    """Train with Ultralytics alone, and stop after an epoch."""
    trainer = DetectionTrainer(overrides=overrides)
    trainer.add_callback("on_fit_epoch_end", interrupt_after(epoch))
    with pytest.raises(Exception, match=r"^$"):
        trainer.train()


def start_over_plainly(last: Path, data: str, epoch: int) -> None:
    """Train anew with Ultralytics alone in the folder of another run."""
    folder = last.parents[1]
    where = {"project": str(folder.parent), "name": folder.name, "exist_ok": True}
    plain(epoch, **{**SHORT, "data": data, "epochs": 4, **where})


def test_a_plain_run_of_the_same_name_is_not_taken_for_the_distilled_one(
    train: Train, data: str, tmp_path: Path
) -> None:
    last = interrupted(train, tmp_path, 2, epochs=4)
    start_over_plainly(last, data, epoch=2)
    before = last.read_bytes()
    with pytest.raises(ConfigError) as error:
        resume(last)
    line = str(error.value)
    assert line.startswith(f"resume={last}: is of another run than cwd.pt beside it")
    assert line.endswith("; 'yolo train resume' continues it as it began, without a teacher")
    assert last.read_bytes() == before
    DetectionTrainer(overrides={"resume": str(last), "model": str(last)}).train()  # the remedy


def test_a_run_that_went_on_plainly_comes_back_to_its_teacher(
    train: Train, tmp_path: Path, said: Callable[[], str]
) -> None:
    last = interrupted(train, tmp_path, 2, epochs=5, tau=2.0, **FITTED)
    plain(3, resume=str(last), model=str(last))
    said()
    explained: list[float] = []
    trainer = resume(last, {"on_train_start": lambda t: explained.extend(t.distillation.explained)})
    assert (trainer.start_epoch, trainer.settings.tau) == (3, 2.0)
    assert len(explained) == 3, "the adapters are fitted to some batches, as those of a new run"
    assert f"cwd.pt has no adapters for {last}" in said()
    table = rows(trainer)
    assert [row["epoch"] for row in table] == [1, 2, 3, 4, 5]
    assert [row["train/cwd_loss"] > 0 for row in table] == [True, True, False, True, True]
    assert table[2]["train/box_loss"] > 0, "the row of the plain epoch is kept"
    assert sorted(file.name for file in last.parent.iterdir()) == ["best.pt", "last.pt"]


def test_an_older_checkpoint_of_the_run_goes_on_with_adapters_that_begin_anew(
    train: Train, tmp_path: Path, said: Callable[[], str]
) -> None:
    last = interrupted(train, tmp_path, 3, epochs=4, save_period=1, **FITTED)
    said()
    trainer = resume(last.with_name("epoch0.pt"))
    assert (trainer.start_epoch, len(trainer.distillation.explained)) == (1, 3)
    assert "the adapters begin anew" in said()
    assert [row["epoch"] for row in rows(trainer)] == [1, 2, 3, 4]


def test_a_run_that_goes_on_as_it_was_says_nothing(train: Train, tmp_path: Path, said: Callable[[], str]) -> None:
    last = interrupted(train, tmp_path, 2, epochs=3, **FITTED)
    said()
    trainer = resume(last)
    assert not trainer.distillation.explained, "nothing is fitted"
    assert "begin anew" not in said()


def test_adapters_that_broke_are_fitted_again_when_ultralytics_recovers(train: Train) -> None:
    """A loss that is not finite sends it back to last.pt, whose adapters are of no use."""

    def poison(trainer: CWDTrainer) -> None:
        if trainer.epoch == 0:
            next(trainer.distillation.terms.parameters()).data.fill_(torch.nan)
        elif trainer.epoch == 1 and not trainer.nan_recovery_attempts:
            trainer.loss = torch.tensor(torch.nan)

    trainer = train(epochs=3, callbacks={"on_train_epoch_end": poison}, **FITTED)
    assert rows(trainer)[-1]["train/P3_nats"] > 0
    assert all(p.isfinite().all() for p in trainer.distillation.terms.parameters())


# Data that have changed


def changed_classes(data: str, folder: Path, names: list[str]) -> Path:
    """Write a data set with the same images under other classes."""
    content = yaml.safe_load(Path(data).read_text())
    file = folder / "data.yaml"
    file.write_text(yaml.safe_dump({**content, "path": str(Path(data).parent), "names": dict(enumerate(names))}))
    return file


@pytest.mark.parametrize("names", [[*"0123456789", "new"], [*"012345678"]], ids=["added", "removed"])
def test_resuming_after_the_classes_have_changed(
    train: Train, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], names: list[str]
) -> None:
    file = changed_classes(data, tmp_path, [*"0123456789"])
    last = interrupted(train, tmp_path, 1, epochs=2, data=str(file))
    changed_classes(data, tmp_path, names)
    assert main(["train", "resume", f"model={last}"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("yolo_cwd: ")]
    assert line == (
        f"yolo_cwd: data={file}: has {len(names)} classes, the training began with 10; resume with the data as they "
        "were, or begin a new run from last.pt"
    )
    changed_classes(data, tmp_path, [*"0123456789"])
    assert main(["train", "resume", f"model={last}"]) == 0


def test_a_class_that_became_another_one_is_warned_of(
    train: Train, data: str, tmp_path: Path, said: Callable[[], str]
) -> None:
    file = changed_classes(data, tmp_path, [*"0123456789"])
    last = interrupted(train, tmp_path, 1, epochs=2, data=str(file))
    changed_classes(data, tmp_path, [*"0132456789"])
    resume(last)
    assert f"data={file}: has other names than the training began with: 2 is 3, 3 is 2" in said()


def test_a_shape_that_is_not_about_classes_is_named() -> None:
    begun, needed = nn.Module(), nn.Module()
    begun.model, needed.model = (nn.Sequential(nn.Conv2d(2, width, 1)) for width in (3, 4))
    with pytest.raises(ConfigError, match=r"^data=a.yaml: needs another model .*model.0.weight of another shape; "):
        require_fit(needed, {"ema": begun}, {}, "a.yaml", Path("last.pt"))


def test_a_teachers_training_whose_classes_have_changed(staged: Train, data: str, tmp_path: Path) -> None:
    file = changed_classes(data, tmp_path, [*"0123456789"])
    with teacher_interrupted("save_model", after=True):
        staged(name="run", teacher_epochs=2, data=str(file))
    changed_classes(data, tmp_path, [*"0123456789", "new"])
    with pytest.raises(ConfigError, match="has 11 classes, the training began with 10"):
        resume(tmp_path / "runs" / "run" / "teacher" / "weights" / "last.pt")


@contextmanager
def teacher_interrupted(method: str, after: bool) -> Iterator[None]:
    """Interrupt the training of a teacher in a method, or after it."""
    whole = getattr(TeacherTrainer, method)

    def stop(self: TeacherTrainer) -> None:
        if after:
            whole(self)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, suppress(KeyboardInterrupt):
        patch.setattr(TeacherTrainer, method, stop)
        yield
        pytest.fail("was not interrupted")


# An interrupt in the last validation


@pytest.mark.parametrize("teacher_first", [False, True])
def test_an_interrupt_in_the_last_validation_says_what_is_left(
    models: dict[str, str],
    data: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    teacher_first: bool,
) -> None:
    whole = BaseTrainer.final_eval

    def stop(self: BaseTrainer) -> None:
        if isinstance(self, CWDTrainer):
            assert not (self.wdir / FILE).exists(), "nor is it left by a kill"
            raise KeyboardInterrupt
        whole(self)

    monkeypatch.setattr(BaseTrainer, "final_eval", stop)
    models = {"teacher": models["teacher"], "model": models["model"]}
    words = {**SHORT, **TAUGHT, **models, "teacher_epochs": int(teacher_first), "data": data}
    words |= {"project": str(tmp_path), "name": "run"}
    assert main(["train", *(f"{name}={value}" for name, value in words.items())]) == 130
    best = tmp_path / "run" / "weights" / "best.pt"
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("yolo_cwd: interrupted; all epochs are trained, ")
    assert f"'yolo val model={best} data={data}'" in line
    assert "resume" not in line
    assert sorted(file.name for file in best.parent.iterdir()) == ["best.pt", "last.pt"]


def test_a_finished_training_whose_state_a_kill_has_left(train: Train, tmp_path: Path) -> None:
    last = interrupted(train, tmp_path, 1, epochs=1)
    assert (last.parent / FILE).is_file()
    with pytest.raises(ConfigError, match=r"last.pt: the training is finished; for more epochs, begin a new run from"):
        resume(last)
    assert not (last.parent / FILE).exists()


def test_a_teacher_that_was_interrupted_in_its_last_validation_teaches(staged: Train, tmp_path: Path) -> None:
    with teacher_interrupted("final_eval", after=False):
        staged(name="run", teacher_epochs=1)
    weights = tmp_path / "runs" / "run" / "teacher" / "weights"
    trained = weights.joinpath("best.pt").read_bytes()
    trainer = resume(weights / "last.pt")
    assert trainer.last == tmp_path / "runs" / "run" / "weights" / "last.pt"
    assert trainer.settings.teacher == str(weights / "best.pt")
    assert weights.joinpath("best.pt").read_bytes() == trained


# Torn checkpoints


def tear(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def test_a_torn_checkpoint_is_named_and_the_remedy_keeps_the_teacher(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = interrupted(train, tmp_path, 2, epochs=3, save_period=1)
    tear(last)
    shutil.copyfile(last.with_name("epoch0.pt"), last.with_name("best.pt"))
    assert main(["train", "resume", f"model={last}"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("yolo_cwd: ")]
    other = last.with_name("epoch1.pt")
    assert line.startswith(f"yolo_cwd: resume={last}: cannot be read, it is torn or no checkpoint; ")
    assert line.endswith("; resume from epoch1.pt beside it, which goes on after epoch 2 with the teacher")
    assert main(["train", "resume", f"model={other}"]) == 0
    table = read_rows(last.parents[1] / "results.csv")
    assert [row["epoch"] for row in table] == [1, 2, 3]
    assert all(row["train/cwd_loss"] > 0 for row in table)


def test_where_every_checkpoint_is_torn_the_run_begins_again(train: Train, tmp_path: Path) -> None:
    last = interrupted(train, tmp_path, 1, epochs=2)
    for name in ("last.pt", "best.pt"):
        tear(last.with_name(name))
    with pytest.raises(ConfigError, match=r"last.pt: cannot be read, .*; begin the training again"):
        resume(last)
    assert newest_usable(last.parent.glob("*.pt")) is None


def test_of_two_checkpoints_of_an_epoch_the_last_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = {"epoch": 3, "optimizer": {}, "train_args": {"epochs": 9}}
    monkeypatch.setattr("yolo_cwd.run.interrupted._content", lambda file: content)
    files = [tmp_path / "best.pt", tmp_path / "last.pt"]
    assert newest_usable(files) == newest_usable(reversed(files)) == tmp_path / "last.pt"


def test_a_teachers_torn_checkpoint_is_replaced_by_another(
    staged: Train, tmp_path: Path, said: Callable[[], str]
) -> None:
    with teacher_interrupted("save_model", after=True):
        staged(name="run", teacher_epochs=2)
    last = tmp_path / "runs" / "run" / "teacher" / "weights" / "last.pt"
    tear(last)
    trainer = resume(last)
    assert f"{last} cannot be read; the teacher's training goes on from {last.with_name('best.pt')}" in said()
    assert [row["epoch"] for row in read_rows(last.parents[1] / "results.csv")] == [1, 2]
    assert trainer.last.is_file()


# The table


def test_rows_of_plain_epochs_are_kept_and_filled_up(tmp_path: Path) -> None:
    table = tmp_path / "results.csv"
    table.write_text("epoch,time,loss,ours\n1,5,0.5,2\n2,9,0.4\n3,14,0.3\n4,18,0.2,1,7\n5,1")
    drop_rows_after(table, 4)
    assert table.read_text() == "epoch,time,loss,ours\n1,5,0.5,2\n2,9,0.4,nan\n3,14,0.3,nan\n"


def test_the_last_line_leaves_plain_epochs_out(tmp_path: Path) -> None:
    table, score = tmp_path / "results.csv", TASKS["detect"].score
    columns = f"epoch,time,train/box_loss,{score.column},train/P3_loss,train/cwd_loss,train/cwd_weight,train/P3_nats"
    begin, taught = f"{columns}\n1,5,1,0.1", "3,5,1,0.2,1,1,1,0.5"
    table.write_text(f"{begin}\n2,5,1,0.1\n{taught}\n")
    said = outcome(read_curves(table, {"P3": 1.0}, score), score)
    assert said == f"best {score.label} 0.200 in epoch 3", "nothing to compare, so no colon that nothing follows"
    table.write_text(f"{begin},1,1,1,1\n2,5,1,0.1\n{taught}\n")
    said = outcome(read_curves(table, {"P3": 1.0}, score), score)
    assert said.endswith("; divergence from the teacher, epoch 1 to 3: P3 1 to 0.5 (-50 %)")
