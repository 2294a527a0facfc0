# SPDX-License-Identifier: AGPL-3.0-or-later
"""Trains a teacher that does not know the data, by Ultralytics' own trainer, before its student.

It is the same training that `yolo <task> train model=<teacher>` with the arguments of the run is, in the folder
`teacher` of the run. The student's training does not notice it: random numbers, deterministic algorithms and loggers
are as they would be without.
"""

from __future__ import annotations

import gc
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from ultralytics.utils import DEFAULT_CFG_DICT, LOCAL_RANK, RANK
from ultralytics.utils.torch_utils import init_seeds

from yolo_cwd.config import ConfigError, Settings, listed
from yolo_cwd.log import say, warn
from yolo_cwd.run import teacher_record
from yolo_cwd.run.distributed import barrier, broadcast_object, failed_children
from yolo_cwd.run.files import atomic_checkpoints, atomic_path, remove_leftovers, write_atomic
from yolo_cwd.run.interrupted import is_finished, newest_usable, read_checkpoint
from yolo_cwd.run.known import data_with_classes, lacking, require_labels, trainable_task
from yolo_cwd.run.random_state import random_numbers_untouched
from yolo_cwd.run.teacher_record import FOLDER, OBJECT, ON_RESUME, Record, last_of, weights_of
from yolo_cwd.run.whole_run import WholeRun, for_task
from yolo_cwd.tasks import Task

AS_IT_IS = (
    "does not know {lacks}; it teaches as it is, with {share}. With a share of 1 such teachers have cost 4 to 5 points "
    "of mAP50-95 (measured on three data sets); one that is trained on the data teaches more"
)
USED = "the teacher in {folder} has been trained so, and is used; delete that folder to train it again"
WITHOUT_EFFECT = "teacher_epochs={epochs} has no effect: {argument} knows the data, and teaches as it is"
STUDENTS_OWN = {  # arguments of the run that are not for its teacher
    *("model", "pretrained", "freeze", "distill_model", "quantize", "resume", "name", "exist_ok", "epochs", "task"),
    *("save", "save_dir", "cfg"),
}
LEAST_TIME = 1 / 3600  # hours for the student, whatever its teacher has taken: 0 would be without limit
BEGINNING = "on_pretrain_routine_start"


class TeacherTrainer(WholeRun):
    """Ultralytics' trainer of a task, whose checkpoints are whole even after a kill."""

    def __new__(cls, cfg: Any, overrides: dict[str, Any], _callbacks: Any = None) -> TeacherTrainer:
        """Make a trainer for the argument `task`."""
        trainer: TeacherTrainer = super().__new__(for_task(cls, overrides["task"]))
        return trainer

    def train(self) -> None:
        """Train as Ultralytics does, and leave the process group to the student.

        Raises:
            ChildProcessError: If one of the processes that Ultralytics starts fails.
        """
        self.resume = self.resume or self.ddp  # a launch would first remove the folder, with the record in it
        with failed_children(self.args.device):
            super().train()

    def save_model(self) -> Any:
        """Write the checkpoints."""
        self.wdir.mkdir(parents=True, exist_ok=True)
        with atomic_checkpoints(self):
            return super().save_model()


@dataclass
class TeacherStage:
    """The training of a teacher before its student.

    Attributes:
        teacher: What it starts from: a path or known name, or the model itself.
        argument: The teacher as the user gave it, for messages.
        task: The task it is trained for.
        epochs: For how many epochs.
        lacks: The classes of the data that it does not know.
        data: The data set as Ultralytics resolves it.
        goes_on: Whether a training of it that was interrupted goes on, even if arguments have changed.
        folder: The folder of its training, once that is known.
        begun: Whether its first epoch has begun.
        done: Whether the trained teacher is there.
    """

    teacher: Any
    argument: str
    task: str
    epochs: int
    lacks: list[str]
    data: Mapping[str, Any]
    goes_on: bool = False
    folder: Path | None = None
    begun: bool = False
    done: bool = False
    _held: list[Callable[[Any], None]] = field(default_factory=list)

    def reason(self) -> str:
        """Say why it is trained."""
        return f"{self.argument} does not know {listed(self.lacks)}"

    def announce(self, save_dir: Path | str, student_epochs: int) -> None:
        """Say what will happen, before anything is trained."""
        say(
            f"{self.reason()}, so it is trained on the data first: {self.epochs} epochs for the teacher, into "
            f"{Path(save_dir) / FOLDER}, then {student_epochs} for the student under its best weights "
            "(teacher_epochs sets the first number; 0 takes the teacher as it is)"
        )

    def holds_back(self, trainer: Any, event: str) -> bool:
        """Return whether an event of the student is not for Ultralytics' loggers yet: they log one run at a time.

        Its other callbacks are run.
        """
        if self.done or event != BEGINNING:
            return False
        for callback in trainer.callbacks.get(event, []):
            if callback.__module__.startswith("ultralytics.utils."):
                self._held.append(callback)
            else:
                callback(trainer)
        return True

    def run(self, args: Any, options: Mapping[str, Any] | None, save_dir: Path | str) -> Path:
        """Train the teacher, or use one that has been trained, and return the checkpoint of its best epoch.

        Args:
            args: The arguments of the run, as Ultralytics has checked them.
            options: Its options, as they were given; None if it is no run of a student.
            save_dir: Its folder.

        Raises:
            ConfigError: If Ultralytics refuses the training.
        """
        self.folder = Path(save_dir).absolute() / FOLDER
        with _unnoticed(args):
            last: Path | None = None
            trained = False
            if RANK in {-1, 0}:
                trained, last = self._prepared(args, options)
            trained, last = broadcast_object((trained, last))
            if not trained:
                self._train(args, last)
                if RANK in {-1, 0}:
                    self._finish()
        weights: Path = broadcast_object(weights_of(self.folder))
        _deliver(weights)
        self.done = True
        return weights

    def arguments(self, args: Any) -> dict[str, Any]:
        """Return the arguments of the teacher's training."""
        given = {name: value for name, value in vars(args).items() if name not in STUDENTS_OWN}
        if args.time:
            given["time"] = args.time * self.epochs / (self.epochs + args.epochs)
        return {**given, "mode": "train", "task": self.task, "epochs": self.epochs}

    def _prepared(self, args: Any, options: Mapping[str, Any] | None) -> tuple[bool, Path | None]:
        """Return whether there is such a trained teacher, and the checkpoint that its training goes on from."""
        assert self.folder is not None
        key = teacher_record.key_of(self.teacher, self.data, self.arguments(args))
        ours = teacher_record.read(self.folder)
        if ours and ours.complete and (ours.key == key or self.goes_on) and ours.weights.is_file():
            say(USED.format(folder=self.folder))
            return True, None
        goes_on = ours is not None and not ours.complete and (ours.key == key or self.goes_on) and ours.last.is_file()
        record = Record(self.folder, key, False, self.argument, {}, {})
        if options is not None:
            given = teacher_record.plain(options, self.teacher)
            record = record._replace(arguments=_plain_arguments(args), options=given)
        if ours is not None and goes_on:
            ours = ours._replace(arguments=record.arguments, options=record.options)
            if (left := _left_of(ours)) is not None:
                return left
        shutil.rmtree(self.folder, ignore_errors=True)
        if other := self._elsewhere(key):
            _copy(other, record)
            say(USED.format(folder=other.folder))
            return True, None
        record.write()
        if not isinstance(self.teacher, str | Path):
            as_checkpoint(self.teacher, self.folder / OBJECT)
        return False, None

    def _elsewhere(self, key: str) -> Record | None:
        """Return the record of a trained teacher of the same key in another run of the same project."""
        assert self.folder is not None
        for folder in sorted(self.folder.parents[1].glob(f"*/{FOLDER}")):
            record = teacher_record.read(folder)
            if record and record.complete and record.key == key and record.weights.is_file():
                return record
        return None

    def _train(self, args: Any, last: Path | None) -> None:
        assert self.folder is not None
        start = str(self.folder / OBJECT) if not isinstance(self.teacher, str | Path) else str(self.teacher)
        given = self.arguments(args)
        if last is not None:
            given = {name: value for name, value in given.items() if name in ON_RESUME}
            given |= {"resume": str(last), "model": str(last), "task": self.task}
        else:
            given["model"] = start
        trainer = TeacherTrainer(DEFAULT_CFG_DICT, {**given, "save_dir": str(self.folder)})
        if not trainer.ddp:
            trainer.add_callback("on_train_start", self._note)
        trainer.train()
        del trainer
        gc.collect()
        with suppress(Exception):
            torch.cuda.empty_cache()

    def _note(self, _: Any) -> None:
        self.begun = True

    def _finish(self) -> None:
        assert self.folder is not None
        record = teacher_record.read(self.folder)
        if record is None or not record.weights.is_file():
            raise ConfigError(f"{self.argument}: its training has left no checkpoint; give teacher_epochs=0, or more")
        record._replace(complete=True).write()

    def can_go_on(self) -> Path | None:
        """Return the checkpoint from which an interrupted run resumes; None if the teacher has no complete epoch."""
        if self.folder is None:
            return None
        checkpoint = last_of(self.folder)
        return checkpoint if checkpoint.is_file() else None

    def hand_over(self, trainer: Any) -> None:
        """Let Ultralytics' loggers begin with the student."""
        held, self._held = self._held, []
        for callback in held:
            callback(trainer)


Planned = tuple[TeacherStage | None, Settings]


def planned(
    teacher: Any, settings: Settings, options: Mapping[str, Any], args: Any, task: Task, goes_on: bool = False
) -> Planned:
    """Return the training of a teacher that does not know the data (None if it knows them, or teaches as it is).

    The second value are the options, with a small share where it teaches as it is.

    With `complete_labels` it teaches as it is: trained on the data, it would forget the classes that they leave out.

    Args:
        teacher: The frozen `Teacher`.
        settings: The checked options.
        options: The options as they were given.
        args: The arguments of the run, as Ultralytics has checked them.
        task: The student's task.
        goes_on: Whether a training of it that was interrupted goes on, even if arguments have changed.

    Raises:
        ConfigError: If it would have to be trained for a task that the labels are not for.
    """
    if args.resume or settings.complete_labels or not (settings.cwd or settings.labeling):
        return None, settings
    data = data_with_classes(args)
    lacks = lacking(teacher.names, data, args, task)
    given = options.get("teacher_epochs")
    if not lacks:
        if settings.teacher_epochs:
            warn(WITHOUT_EFFECT.format(epochs=given, argument=teacher.argument))
        return None, settings
    own, why_not = trainable_task(teacher.body, teacher.head)
    if not isinstance(settings.teacher, str | Path) and _is_fused(settings.teacher):
        own, why_not = None, "is fused, and cannot be trained any more"
    if own is None or settings.teacher_epochs == 0:
        reason = f"{why_not} and " if own is None else ""
        settings = settings.for_unknowing_teacher(options)
        warn(f"{teacher.argument} {reason}{AS_IT_IS.format(lacks=listed(lacks), share=settings.describe_schedule())}")
        return None, settings
    require_labels(own, task, data, args.data, teacher.argument, listed(lacks))
    epochs = args.epochs if settings.teacher_epochs is None else settings.teacher_epochs
    return TeacherStage(settings.teacher, teacher.argument, own, epochs, lacks, data, goes_on), settings


def as_checkpoint(teacher: Any, file: Path) -> None:
    """Write a model that was given as an object as a checkpoint of Ultralytics.

    Args:
        teacher: A `YOLO`, or the network in it.
        file: The file.
    """
    network: Any = deepcopy(
        teacher if isinstance(teacher, nn.Module) and not hasattr(teacher, "ckpt") else teacher.model
    )
    network.__dict__.pop("criterion", None)
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(file) as unfinished:
        torch.save({"model": network.float().cpu(), "train_args": {}}, unfinished)


def _is_fused(teacher: Any) -> bool:
    network = getattr(teacher, "model", teacher)
    fused = getattr(network, "is_fused", None) or getattr(teacher, "is_fused", None)
    return bool(fused and fused())


def _left_of(record: Record) -> tuple[bool, Path | None] | None:
    """Return whether an interrupted training had no epoch left, and what it goes on from; None if nothing can be read.

    Args:
        record: Its record, which is written anew.
    """
    remove_leftovers(record.last.parent)
    with suppress(ConfigError):
        if is_finished(read_checkpoint(record.last)):  # it was interrupted in its last validation
            record._replace(complete=True).write()
            say(USED.format(folder=record.folder))
            return True, None
    usable = newest_usable(record.last.parent.glob("*.pt"))
    if usable != record.last:
        remedy = f"goes on from {usable}" if usable else "begins again"
        warn(f"{record.last} cannot be read; the teacher's training {remedy}")
    if usable is None:
        return None
    record.write()
    return False, usable


def _plain_arguments(args: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(args).items() if name not in {"save_dir", "resume", "cfg"}}


def _copy(other: Record, record: Record) -> None:
    """Copy a trained teacher; its record comes last, so that a part of it is never taken for the whole."""
    (record.folder / "weights").mkdir(parents=True)
    for file in (other.weights, other.folder / "results.csv"):
        if file.is_file():
            with atomic_path(record.folder / file.relative_to(other.folder)) as unfinished:
                shutil.copyfile(file, unfinished)
    record._replace(complete=True).write()


def _deliver(weights: Path) -> None:
    """Bring the trained teacher to the machines of a training that do not see the folder of the first process."""
    if RANK == -1:
        return
    seen: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(seen, weights.is_file())
    if all(seen):
        return
    content = broadcast_object(weights.read_bytes() if RANK == 0 else None)
    if LOCAL_RANK == 0 and not weights.is_file():
        weights.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(weights, content)
    barrier()


@contextmanager
def _unnoticed(args: Any) -> Iterator[None]:
    """Leave random numbers and deterministic algorithms as the trainer of a student has set them."""
    with random_numbers_untouched():
        try:
            yield
        finally:
            init_seeds(args.seed + 1 + RANK, deterministic=args.deterministic)  # as Ultralytics' constructor does


def time_left(args: Any, begin: float) -> float:
    """Return the hours of a run limited by `time` that are left for the student.

    Args:
        args: The arguments of the run.
        begin: When it began, as `time.monotonic` has it.
    """
    left: float = broadcast_object(max(args.time - (time.monotonic() - begin) / 3600, LEAST_TIME))
    return left
