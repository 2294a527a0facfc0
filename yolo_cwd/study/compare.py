# SPDX-License-Identifier: AGPL-3.0-or-later
"""`yolo_cwd compare`: did distillation help on this data, and by how much beyond luck?

It trains every arm (a named set of options) with every seed, under the same schedule and data, into one folder:

    comparison.yaml            what is compared; the same command resumes it, and new arms and seeds are added to it
    runs/<arm>-<seed>/         one Ultralytics run each; a killed run resumes from its last epoch
    teacher/                   the teacher, if it does not know the data: trained first, once for all arms
    results/<arm>-<seed>.json  its scores, written when the run is complete; results/teacher.json for the teacher
    locks/                     one lock per run; the operating system frees it when the process dies
    summary.* and *.png        see summary.py

Several processes may work on one folder: each takes the first run that is neither complete nor locked.
"""

from __future__ import annotations

import gc
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import yaml
from filelock import FileLock, Timeout
from ultralytics.cfg import DEFAULT_CFG_DICT, get_cfg, get_save_dir, smart_value
from ultralytics.nn.tasks import load_checkpoint
from ultralytics.utils import LOGGER, colorstr
from ultralytics.utils.torch_utils import parse_device, strip_optimizer

from yolo_cwd import digits
from yolo_cwd.config import (
    OPTIONS,
    ConfigError,
    Settings,
    check_names,
    first_line,
    model_path,
    read_yaml,
    split_options,
)
from yolo_cwd.method.teacher import load_teacher
from yolo_cwd.run.files import write_atomic
from yolo_cwd.run.refusal import unwritable
from yolo_cwd.run.request import EXTRA_ARGUMENTS, refuse_unsupported, student_path
from yolo_cwd.run.results import drop_rows_after, read_rows
from yolo_cwd.run.score import classes_of_data, knows, score
from yolo_cwd.run.teacher_record import FOLDER
from yolo_cwd.run.teacher_stage import TeacherStage, planned
from yolo_cwd.study.dry_run import DistilledDryRun, plain_dry_run, scratch_folder, set_up, silence
from yolo_cwd.study.summary import BASELINE, RECORD, as_text, table, write_summary
from yolo_cwd.tasks import Task, task_of_student
from yolo_cwd.trainer import CWDTrainer

METHODS = ("plain", "cwd", "builtin")
OWN_ARGUMENTS = {"arms", "seeds", "split", "folder"}
SPLITS = ("val", "test", "train")
POLL_SECONDS = 2.0


class Arm(NamedTuple):
    """A named way of training: one of `METHODS`, with its own arguments and options, which may include the models.

    Attributes:
        name: The name it is shown by.
        method: One of `METHODS`.
        arguments: Its arguments and options.
        against: The arm that its scores are compared with.
    """

    name: str
    method: str
    arguments: dict[str, Any]
    against: str = BASELINE


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
        for name, remedy in {"seed": "seeds", "project": "folder", "name": "folder", "resume": "folder"}.items():
            if name in words:
                raise ConfigError(f"{name}={words[name]}: every run of a comparison has its own; use {remedy}=")
        own = {name: words[name] for name in OWN_ARGUMENTS & words.keys()}
        shared = {name: value for name, value in words.items() if name not in OWN_ARGUMENTS}
        options, arguments = split_options(shared)
        check_names(arguments, {*DEFAULT_CFG_DICT, *EXTRA_ARGUMENTS, *OWN_ARGUMENTS})
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
        folder = str(own.get("folder") or "") or get_save_dir(
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

    def result_file(self, name: str) -> Path:
        """Return the file that holds the scores of a complete run, or of the teacher."""
        return self.folder / "results" / f"{name}.json"

    def record(self) -> dict[str, Any]:
        """Return everything that decides the outcome, as plain values."""
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


def parse_arms(value: Any) -> tuple[Arm, ...]:
    """Return the arms of `plain,cwd:tau=2,cwd=20,builtin`, or of a YAML file that maps names to option sets.

    On the command line, an arm with another name (`warm:tau=4`) uses the method `cwd`. In a file, an option set may
    name its `method`; otherwise the arm's name must be one of `METHODS`. Options may include a `teacher` and a
    `student`, and `against`, the arm to compare with.

    Raises:
        ConfigError: If there is no arm, two with the same name, an unknown method, or an unknown option.
    """
    sets = _arms_of_file(value) if str(value).endswith((".yaml", ".yml")) else _arms_of_words(value)
    arms = []
    for name, arguments in sets:
        first, colon, _ = name.partition(":")
        if colon and first not in METHODS and not get_close_matches(first, METHODS):
            name, first = first, "cwd"
        method = arguments.pop("method", first)
        if method not in METHODS:
            raise ConfigError(f"arms={name}: its method {method} is none of {', '.join(METHODS)}")
        against = arguments.pop("against", BASELINE)
        check_names(arguments, {*OPTIONS, *DEFAULT_CFG_DICT, *EXTRA_ARGUMENTS})
        if arguments.keys() & {"student", "model"}:
            arguments["model"] = student_path(arguments.pop("student", None), arguments.get("model"), None)
        arms.append(Arm(_file_name(name), method, arguments, _file_name(against)))
    names = {arm.name for arm in arms}
    if len(names) != len(arms) or not arms:
        raise ConfigError(f"arms={value}: must name at least one arm, and none twice, such as arms=plain,cwd,builtin")
    for arm in arms:
        if arm.against not in {BASELINE, *names}:
            raise ConfigError(f"against={arm.against}: arm {arm.name} is compared with an arm that there is not")
    return tuple(arms)


def _file_name(name: str) -> str:
    return "".join(c if c.isalnum() or c in "._=-" else "_" for c in name)


def _arms_of_words(value: Any) -> list[tuple[str, dict[str, Any]]]:
    sets: list[tuple[str, dict[str, Any]]] = []
    words = value if isinstance(value, list | tuple) else str(value).split(",")
    for word in (str(w).strip() for w in words if str(w).strip()):
        start, colon, rest = word.partition(":")
        if "=" in start and sets:  # cwd:tau=2,cwd=20 continues after its comma
            name, arguments = sets.pop()
            sets.append((f"{name},{word}", arguments))
            rest = word
        else:
            sets.append((word, {}))
        if rest:
            key, _, text = rest.partition("=")
            sets[-1][1][key] = smart_value(text)
        elif colon:
            raise ConfigError(f"arms={word}: nothing follows the colon; write it as {start}:option=value")
    return sets


def _arms_of_file(value: Any) -> list[tuple[str, dict[str, Any]]]:
    try:
        return [(str(name), dict(options or {})) for name, options in read_yaml(value).items()]
    except (OSError, yaml.YAMLError, TypeError, ValueError) as error:
        raise ConfigError(f"arms={value}: {first_line(error)}; give a YAML file that maps names to options") from error


def run(words: dict[str, Any]) -> dict[str, Any]:
    """Train the missing runs of a comparison, and return its summary.

    Args:
        words: The arguments of the command.

    Raises:
        ConfigError: If they cannot be used, or if the folder holds another comparison.
    """
    comparison = Comparison.parse(words)
    comparison.arguments["data"] = digits.resolve(comparison.arguments["data"], comparison.task.name)
    classes = classes_of_data(comparison.arguments, comparison.split, comparison.task)
    _merged_record(comparison)  # refuses another comparison's folder before anything takes time
    rehearse(comparison)
    _claim_folder(comparison)
    comparison = train_teacher(comparison)
    score_teacher(comparison, classes)
    while waiting := [(arm, seed) for arm, seed in comparison.runs() if not _done(comparison, arm, seed)]:
        if not any(_train_if_free(comparison, arm, seed) for arm, seed in waiting):
            time.sleep(POLL_SECONDS)  # other processes have the remaining runs: wait, since one of them may die
    summary = write_summary(comparison.folder)
    print(f"\n{as_text(table(summary))}\n\n{summary['verdict']}\nSummary and pictures: {comparison.folder}")
    return summary


def rehearse(comparison: Comparison) -> None:
    """Set up one run of every unfinished arm, so that what cannot be trained is refused before the first run.

    Raises:
        ConfigError: If one of them, or the teacher, cannot be used.
    """
    _stage(comparison)
    for arm in comparison.arms:
        if all(_done(comparison, arm, seed) for seed in comparison.seeds):
            continue
        LOGGER.info(f"{colorstr('compare:')} checking {arm.name}")
        trainer_class = DistilledDryRun if arm.method == "cwd" else plain_dry_run(comparison.task)
        with scratch_folder() as folder:
            trainer = set_up(trainer_class, _overrides(comparison, arm, comparison.seeds[0]), folder)
            _refuse_own_teacher(arm, trainer)
            del trainer
        gc.collect()
        torch.cuda.empty_cache()


def _refuse_own_teacher(arm: Arm, trainer: Any) -> None:
    """Refuse an arm whose own teacher would be trained anew in each of its runs.

    Raises:
        ConfigError: If it does not know the data.
    """
    if "teacher" in arm.arguments and (stage := getattr(trainer, "stage", None)):
        raise ConfigError(
            f"arms={arm.name}: {stage.reason()}; train it first with 'yolo train', or give the arm teacher_epochs=0 to "
            "take it as it is"
        )


def _stage(comparison: Comparison) -> tuple[TeacherStage | None, Any]:
    """Return the training of the teacher that all arms share, if it does not know the data, and its arguments.

    Raises:
        ConfigError: If the teacher cannot be used.
    """
    options, arguments = split_options({**comparison.arguments, "teacher": comparison.teacher})
    settings = Settings.parse(options)
    teacher = load_teacher(comparison.teacher, settings.trust_teacher)
    args = get_cfg(DEFAULT_CFG_DICT, arguments)
    with silence():  # the arms say what they do
        return planned(teacher, settings, options, args, comparison.task)[0], args


def train_teacher(comparison: Comparison) -> Comparison:
    """Train the teacher once for all arms, if it does not know the data, and return the comparison under it."""
    stage, args = _stage(comparison)
    learning = [run for run in comparison.runs() if run[0].method != METHODS[0] and not _done(comparison, *run)]
    if stage is None or not learning:
        return comparison
    with _locked(comparison, "training-of-teacher", wait=True):
        LOGGER.info(f"\n{colorstr('compare:')} {stage.reason()}, so it is trained first, for {stage.epochs} epochs")
        stage.goes_on = True  # whatever has happened to the times of the files
        weights = stage.run(args, None, comparison.folder)
    return replace(comparison, trained=str(weights))


def _name(arm: Arm, seed: int) -> str:
    return f"{arm.name}-{seed}"


def _done(comparison: Comparison, arm: Arm, seed: int) -> bool:
    return comparison.result_file(_name(arm, seed)).exists()


def _claim_folder(comparison: Comparison) -> None:
    """Make the folder, or add new arms and seeds to the comparison in it."""
    try:
        for name in ("runs", "results", "locks"):
            (comparison.folder / name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(error, "folder", comparison.folder) from error
    with _locked(comparison, "comparison", wait=True):
        write_atomic(comparison.folder / RECORD, yaml.safe_dump(_merged_record(comparison), sort_keys=False))


def _merged_record(comparison: Comparison) -> dict[str, Any]:
    """Return the record of a comparison, with the arms and seeds that its folder has already.

    Raises:
        ConfigError: If the folder holds another comparison.
    """
    file = comparison.folder / RECORD
    ours: dict[str, Any] = json.loads(json.dumps(comparison.record()))
    if not file.exists():
        return ours
    theirs = yaml.safe_load(file.read_text(encoding="utf-8"))
    if differing := _differences(ours, theirs):
        reason = f"folder={comparison.folder}: holds a comparison with other {', '.join(differing)}"
        raise ConfigError(f"{reason}; give another folder=")
    seeds = [*theirs["seeds"], *(seed for seed in ours["seeds"] if seed not in theirs["seeds"])]
    return {**ours, "arms": theirs["arms"] | ours["arms"], "seeds": seeds}


def _differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Return the names of what differs between two records, except arms and seeds that only one of them has."""
    here, there = ({**r["arguments"], "teacher": r["teacher"], "split": r["split"]} for r in (ours, theirs))
    both = ours["arms"].keys() & theirs["arms"]
    arms = [f"arm {arm}" for arm in both if not _same(ours["arms"][arm], theirs["arms"][arm])]
    values = [name for name in here | there if name not in here.keys() & there or not _same(here[name], there[name])]
    return sorted(values) + sorted(arms)


def _same(here: Any, there: Any) -> bool:
    """Return whether two values are equal, or name the same file, as `a.pt` and `/runs/a.pt` may."""
    if isinstance(here, dict) and isinstance(there, dict):
        return here.keys() == there.keys() and all(_same(here[key], there[key]) for key in here)
    try:
        return here == there or Path(here).samefile(there)
    except (OSError, TypeError):
        return False


@contextmanager
def _locked(comparison: Comparison, name: str, wait: bool = False) -> Iterator[bool]:
    lock = FileLock(comparison.folder / "locks" / f"{name}.lock")
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def _train_if_free(comparison: Comparison, arm: Arm, seed: int) -> bool:
    """Train one run unless another process does or did so; return whether it is complete."""
    name = _name(arm, seed)
    with _locked(comparison, name) as free:
        if free and not _done(comparison, arm, seed):
            LOGGER.info(f"\n{colorstr('compare:')} {_progress(comparison, name)}")
            result = train_arm(comparison, arm, seed)
            write_atomic(comparison.result_file(name), json.dumps(result, indent=1))
            write_summary(comparison.folder)
    return free


def _progress(comparison: Comparison, name: str) -> str:
    runs = list(comparison.runs())
    files = [comparison.result_file(_name(*run)) for run in runs if _done(comparison, *run)]
    done = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    text = f"run {len(done) + 1} of {len(runs)} ({name})"
    if not done:
        return text
    seconds = {arm.name: [r["seconds"] for r in done if r["arm"] == arm.name] for arm in comparison.arms}
    of_all = [r["seconds"] for r in done]
    left = sum(fmean(seconds[arm.name] or of_all) for arm, seed in runs if not _done(comparison, arm, seed))
    return f"{text}, about {left / 60:.0f} min left"


def train_arm(comparison: Comparison, arm: Arm, seed: int) -> dict[str, Any]:
    """Train one arm with one seed, and return its scores, its curve and its time."""
    folder = comparison.folder / "runs" / _name(arm, seed)
    words = _overrides(comparison, arm, seed)
    seconds = _train(arm.method, comparison.task, words, folder)
    weights = next(file for file in _checkpoints(folder) if file.exists())
    scores = score(weights, words, comparison.split, folder)
    column = comparison.task.score.column
    curve = [row[column] for row in read_rows(folder / "results.csv")] if words.get("val", True) else []
    return {"arm": arm.name, "seed": seed, "seconds": seconds, "weights": str(weights), **scores, "curve": curve}


def _overrides(comparison: Comparison, arm: Arm, seed: int) -> dict[str, Any]:
    """Return all arguments of a run, including the options of a distilled one."""
    words = {**comparison.arguments, **arm.arguments, "teacher": comparison.teacher_of(arm), "seed": seed}
    words |= {"project": str(comparison.folder / "runs"), "name": _name(arm, seed), "exist_ok": True}
    if arm.method == "cwd":
        return words
    return {**split_options(words)[1], **({"distill_model": words["teacher"]} if arm.method == "builtin" else {})}


def _train(method: str, task: Task, words: dict[str, Any], folder: Path) -> float:
    """Do a run, or what remains of a killed one, and return the seconds it has taken in all."""
    left = _find_interrupted(folder)
    if left is None:
        shutil.rmtree(folder, ignore_errors=True)
    elif left.complete:
        for file in filter(Path.exists, _checkpoints(folder)):
            strip_optimizer(file)
        return left.seconds
    if left:
        kept: dict[str, Any] = {name: words[name] for name in ("teacher", "distill_model") if name in words}
        words = {**kept, "resume": str(folder / "weights" / "last.pt")}
    trainer = _trainer(method, task, words)
    begin = time.perf_counter()
    trainer.train()
    return time.perf_counter() - begin + (left.seconds if left else 0.0)


def _trainer(method: str, task: Task, words: dict[str, Any]) -> Any:
    return (CWDTrainer if method == "cwd" else task.trainer)(overrides=words)


def _checkpoints(folder: Path) -> list[Path]:
    return [folder / "weights" / name for name in ("best.pt", "last.pt")]


class Left(NamedTuple):
    """What a killed run has left: the seconds its complete epochs took, and whether those are all epochs."""

    seconds: float
    complete: bool


def _find_interrupted(folder: Path) -> Left | None:
    """Return what is left of a run that was killed before it was scored, or None if it has to start again.

    It starts again if its checkpoint is torn (Ultralytics writes it in place); if it was made in another folder, where
    the rest would then go; or if it has a time limit, which would start anew.
    """
    last = folder / "weights" / "last.pt"
    if not last.is_file():  # Ultralytics would search the network for it
        return None
    try:
        checkpoint = load_checkpoint(last)[1]
        epoch, arguments = checkpoint["epoch"] + 1, checkpoint["train_args"]
        complete = epoch in {0, arguments["epochs"]}  # Ultralytics numbers a stripped one -1
        if not complete and (arguments["save_dir"] != str(folder) or arguments["time"]):
            return None
        drop_rows_after(folder / "results.csv", epoch or arguments["epochs"])
        return Left(_seconds(read_rows(folder / "results.csv")), complete)
    except Exception:
        return None


def _seconds(rows: list[dict[str, float]]) -> float:
    """Return the time of all epochs in `results.csv`, whose clock restarts whenever the run is resumed."""
    times = [row["time"] for row in rows]
    return sum(now for now, following in pairwise([*times, 0.0]) if following < now)


def score_teacher(comparison: Comparison, classes: dict[int, str]) -> None:
    """Score the teacher once, or note that it has no score because its task or its classes differ."""
    file = comparison.result_file("teacher")
    with _locked(comparison, "teacher", wait=True):
        if not file.exists():
            teacher = comparison.trained or comparison.teacher
            fits = knows(teacher, comparison.task, classes)
            folder = comparison.folder / "runs" / "teacher"
            scores = score(teacher, comparison.arguments, comparison.split, folder) if fits else None
            if scores and comparison.trained:
                scores["seconds"] = _seconds(read_rows(comparison.folder / FOLDER / "results.csv"))
            write_atomic(file, json.dumps(scores))
