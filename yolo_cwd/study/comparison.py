# SPDX-License-Identifier: AGPL-3.0-or-later
"""What a comparison is of: its arms, seeds and shared arguments, checked, and where its files are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ultralytics.cfg import DEFAULT_CFG_DICT, get_cfg, get_save_dir
from ultralytics.utils.torch_utils import parse_device

from yolo_cwd.config import (
    ConfigError,
    Settings,
    at_home,
    check_names,
    first_line,
    model_path,
    refuse_missing,
    split_options,
)
from yolo_cwd.run.request import EXTRA_ARGUMENTS, refuse_unsupported, student_path
from yolo_cwd.study.arms import METHODS, Arm, parse_arms
from yolo_cwd.study.summary import BASELINE
from yolo_cwd.tasks import Task, task_of_student

OWN_ARGUMENTS = {"arms", "seeds", "split", "folder"}
OF_RUNS = {  # arguments that every run has its own of, and what to give instead
    "seed": "seeds",
    **dict.fromkeys(("project", "name", "resume", "save_dir"), "folder"),
}
SPLITS = ("val", "test", "train")


@dataclass(frozen=True)
class Comparison:
    """What is compared.

    Attributes:
        folder: Where everything goes.
        teacher: The checkpoint to learn from.
        arguments: Training arguments and options that all arms share.
        arms: The arms, in the order in which they are trained and shown.
        seeds: The seeds; every arm is trained once with each.
        split: The split that the finished models are scored on.
        task: The task of the student.
        trained: The teacher once it is trained on the data; None if it learns nothing first.
    """

    folder: Path
    teacher: str
    arguments: dict[str, Any]
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    split: str
    task: Task
    trained: str | None = None

    @classmethod
    def parse(cls, words: dict[str, Any]) -> Comparison:
        """Check the arguments of the command and return the comparison they describe.

        Raises:
            ConfigError: If one of them cannot be used.
        """
        for name, remedy in OF_RUNS.items():
            if name in words:
                raise ConfigError(f"{name}={words[name]}: every run of a comparison has its own; use {remedy}=")
        own = {name: words[name] for name in OWN_ARGUMENTS & words.keys()}
        shared = {name: value for name, value in words.items() if name not in OWN_ARGUMENTS}
        options, arguments = split_options(shared)
        check_names(arguments, {*DEFAULT_CFG_DICT, *EXTRA_ARGUMENTS, *OWN_ARGUMENTS})
        student = options.get("student") or arguments.get("model")
        refuse_missing({"teacher": options.get("teacher"), "student": student, "data": arguments.get("data")})
        student = student_path(options.pop("student", None), arguments.pop("model", None), None)
        _check(arguments)
        teacher = Settings.parse(options).teacher
        options.pop("teacher", None)
        task = task_of_student(student, arguments.pop("task", None))
        arms = parse_arms(own.get("arms", ",".join(METHODS[: 3 if task.builtin else 2])))
        for arm in arms:
            if arm.method == "builtin" and not task.builtin:
                raise ConfigError(
                    f"arms={arm.name}: Ultralytics' own distillation takes no task={task.name}; leave it out"
                )
            arm_options, arm_arguments = split_options(arm.arguments)
            Settings.parse({**options, "teacher": teacher, **arm_options})
            _check({**arguments, **arm_arguments})
        folder = str(at_home(own.get("folder") or "")) or get_save_dir(
            SimpleNamespace(project="", task=task.name, name="compare", mode="train", exist_ok=True)
        )
        split = own.get("split", SPLITS[0])
        if split not in SPLITS:
            raise ConfigError(f"split={split}: must be one of {', '.join(SPLITS)}")
        shared = {**arguments, **options, "model": student}
        seeds = parse_seeds(own.get("seeds", 3))
        return cls(Path(folder).resolve(), str(teacher), shared, arms, seeds, split, task)

    def runs(self) -> Iterator[tuple[Arm, int]]:
        """Yield arm and seed of every run: all arms of one seed before the next seed, so that they advance together."""
        for seed in self.seeds:
            for arm in self.arms:
                yield arm, seed

    def teacher_of(self, arm: Arm) -> str:
        """Return the checkpoint that an arm learns from: its own, or the shared one, trained first or as it is."""
        own = {**self.arguments, **arm.arguments}
        as_it_is = "teacher" in arm.arguments or own.get("teacher_epochs") == 0 or own.get("complete_labels")
        shared = self.teacher if as_it_is else self.trained or self.teacher
        return model_path("teacher", str(arm.arguments.get("teacher", shared)))

    def record(self) -> dict[str, Any]:
        """Return everything that was asked for, as plain values."""
        return {
            "task": self.task.name,
            "teacher": self.teacher,
            "split": self.split,
            "seeds": list(self.seeds),
            "arguments": self.arguments,
            "arms": {arm.name: _plain(arm) for arm in self.arms},
        }


def _plain(arm: Arm) -> dict[str, Any]:
    against = {} if arm.against == BASELINE else {"against": arm.against}
    return {"method": arm.method, **arm.arguments, **against}


def _check(arguments: dict[str, Any]) -> None:
    try:
        args = get_cfg(overrides={**arguments})
        refuse_unsupported(args)
    except (TypeError, ValueError) as error:
        raise ConfigError(first_line(error)) from error
    if args.batch < 1:
        raise ConfigError(f"batch={args.batch}: would be another in every arm; give a number of images, batch=16")
    if "," in (device := parse_device(arguments.get("device"))):
        raise ConfigError(
            f"device={device}: a run of a comparison has one device; start the comparison once for each, with "
            "CUDA_VISIBLE_DEVICES=0, 1 and so on: the runs are shared out"
        )


def parse_seeds(value: Any) -> tuple[int, ...]:
    """Return the seeds: 3 means 0, 1, 2; several numbers are the seeds themselves.

    Raises:
        ConfigError: If the value is neither.
    """
    seeds = tuple(value) if isinstance(value, list | tuple) else (value,)
    if not seeds or not all(isinstance(s, int) and not isinstance(s, bool) and s >= 0 for s in seeds):
        raise ConfigError(f"seeds={value}: must be a number of seeds or the seeds themselves, such as seeds=3")
    if len(set(seeds)) != len(seeds) or seeds == (0,):
        raise ConfigError(f"seeds={value}: every seed counts once, and there must be one; give seeds=3 or seeds=5,6,7")
    return seeds if isinstance(value, list | tuple) else tuple(range(seeds[0]))
