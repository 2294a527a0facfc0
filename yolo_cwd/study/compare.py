# SPDX-License-Identifier: AGPL-3.0-or-later
"""`yolo_cwd compare`: did distillation help on this data, and by how much beyond luck?

It trains every arm (a named set of options) with every seed, under the same schedule and data, into one folder:

    comparison.yaml            what is compared, see record.py; the same command resumes it, and adds new arms and seeds
    runs/<arm>-<seed>/         one Ultralytics run each; a killed run resumes from its last epoch
    teacher/                   the teacher, if it does not know the data: trained first, once for all arms
    results/<arm>-<seed>.json  its scores, written when the run is complete; results/teacher.json for the teacher
    locks/                     one lock per run; the operating system frees it when the process dies
    summary.* and *.png        see summary.py

Several processes may work on one folder: each takes the first run that is neither complete nor locked.
"""

from __future__ import annotations

import gc
import shutil
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from ultralytics.cfg import DEFAULT_CFG_DICT, get_cfg
from ultralytics.nn.tasks import load_checkpoint
from ultralytics.utils import LOGGER, colorstr
from ultralytics.utils.torch_utils import strip_optimizer

from yolo_cwd import bccd
from yolo_cwd.config import ConfigError, Settings, split_options
from yolo_cwd.method.student import keeping_shape
from yolo_cwd.method.teacher import load_teacher
from yolo_cwd.run.refusal import unwritable
from yolo_cwd.run.results import drop_rows_after, read_rows
from yolo_cwd.run.score import classes_of_data, knows, score
from yolo_cwd.run.teacher_record import FOLDER
from yolo_cwd.run.teacher_stage import TeacherStage, planned
from yolo_cwd.study import results
from yolo_cwd.study.arms import METHODS, Arm
from yolo_cwd.study.comparison import Comparison
from yolo_cwd.study.content import contents
from yolo_cwd.study.dry_run import DistilledDryRun, plain_dry_run, scratch_folder, set_up, silence
from yolo_cwd.study.record import claim, joined, locked
from yolo_cwd.study.summary import RECORD, as_text, summary_of, table, write_summary
from yolo_cwd.tasks import Task
from yolo_cwd.trainer import CWDTrainer

POLL_SECONDS = 2.0


def run(words: dict[str, Any]) -> dict[str, Any]:
    """Train the missing runs of a comparison, print its summary, and return it.

    Args:
        words: The arguments of the command.

    Raises:
        ConfigError: If they cannot be used, or if the folder holds another comparison.
    """
    folder, was_complete = train_missing(words)
    summary = summary_of(folder)
    print(f"\n{as_text(table(summary))}\n\n{summary['verdict']}")
    try:
        write_summary(folder)
        print(f"Summary and pictures: {folder}")
    except OSError as error:
        if not was_complete:
            raise
        LOGGER.warning(f"{colorstr('compare:')} {unwritable(error, 'folder', folder, 'the table is all')}")
    return summary


def train_missing(words: dict[str, Any]) -> tuple[Path, bool]:
    """Train the missing runs of a comparison.

    Args:
        words: The arguments of the command.

    Returns:
        Its folder, and whether nothing was missing.

    Raises:
        ConfigError: If they cannot be used, or if the folder holds another comparison.
    """
    comparison = Comparison.parse(words)
    comparison.arguments["data"] = bccd.resolve(comparison.arguments["data"], comparison.task.name)
    complete = _complete(comparison)
    content = contents(comparison)
    joined(comparison, content, complete)  # refuses another comparison's folder before anything takes time
    if not complete:
        _train_missing(comparison, content)
    return comparison.folder, complete


def _complete(comparison: Comparison) -> bool:
    """Return whether nothing is left to train and to score."""
    done = all(_done(comparison, *run) for run in comparison.runs())
    return done and (comparison.folder / RECORD).exists() and results.of_teacher(comparison.folder)[0]


def _train_missing(comparison: Comparison, content: dict[str, str]) -> None:
    classes = classes_of_data(comparison.arguments, comparison.split, comparison.task)
    rehearse(comparison)
    claim(comparison, content)
    comparison = train_teacher(comparison)
    score_teacher(comparison, classes)
    while waiting := [(arm, seed) for arm, seed in comparison.runs() if not _done(comparison, arm, seed)]:
        if not any(_train_if_free(comparison, arm, seed) for arm, seed in waiting):
            time.sleep(POLL_SECONDS)  # other processes have the remaining runs: wait, since one of them may die


def rehearse(comparison: Comparison) -> None:
    """Set up one run of every unfinished arm, so that what cannot be trained is refused before the first run.

    Raises:
        ConfigError: If one of them, or the teacher, cannot be used.
    """
    stage, _ = _stage(comparison)
    for arm in comparison.arms:
        if all(_done(comparison, arm, seed) for seed in comparison.seeds):
            continue
        method = "" if arm.name == arm.method else f" ({arm.method})"
        LOGGER.info(f"{colorstr('compare:')} checking {arm.name}{method}")
        trainer_class = DistilledDryRun if arm.method == "cwd" else plain_dry_run(comparison.task)
        words = _overrides(comparison, arm, comparison.seeds[0])
        if _lacks_checkpoint(arm, words, trained_first=stage is not None):
            del words["distill_model"]
        with scratch_folder() as folder:
            trainer = set_up(trainer_class, words, folder)
            _refuse_own_teacher(arm, trainer)
            del trainer
        gc.collect()
        torch.cuda.empty_cache()


def _lacks_checkpoint(arm: Arm, words: dict[str, Any], trained_first: bool) -> bool:
    """Return whether Ultralytics' own distillation has to wait for its teacher, which is a description until trained.

    Raises:
        ConfigError: If nobody will train it.
    """
    teacher = str(words.get("distill_model", ""))
    if not teacher.endswith((".yaml", ".yml")):
        return False
    if not trained_first or "teacher" in arm.arguments:
        raise ConfigError(
            f"teacher={teacher}: is not trained, and Ultralytics' own distillation takes a .pt; "
            f"leave arm {arm.name} out"
        )
    return True


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
    with locked(comparison.folder, "training-of-teacher", wait=True):
        LOGGER.info(f"\n{colorstr('compare:')} {stage.reason()}, so it is trained first, for {stage.epochs} epochs")
        stage.goes_on = True  # whatever has happened to the times of the files
        weights = stage.run(args, None, comparison.folder)
    return replace(comparison, trained=str(weights))


def _name(arm: Arm, seed: int) -> str:
    return f"{arm.name}-{seed}"


def _done(comparison: Comparison, arm: Arm, seed: int) -> bool:
    return results.of_run(comparison.folder, _name(arm, seed)) is not None


def _train_if_free(comparison: Comparison, arm: Arm, seed: int) -> bool:
    """Train one run unless another process does or did so; return whether it is complete."""
    name = _name(arm, seed)
    with locked(comparison.folder, name) as free:
        if free and not _done(comparison, arm, seed):
            LOGGER.info(f"\n{colorstr('compare:')} {_progress(comparison, name)}")
            results.write(comparison.folder, name, train_arm(comparison, arm, seed))
            write_summary(comparison.folder)
    return free


def _progress(comparison: Comparison, name: str) -> str:
    runs = list(comparison.runs())
    done = [scores for run in runs if (scores := results.of_run(comparison.folder, _name(*run)))]
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
        own = {"teacher_epochs"} if comparison.trained == words["teacher"] else set()  # the teacher has had them
        return {name: value for name, value in words.items() if name not in own}
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
    """Return the trainer of a run: ours, or Ultralytics' own, which would train a pruned student at full width."""
    return (CWDTrainer if method == "cwd" else keeping_shape(task.trainer))(overrides=words)


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
    with locked(comparison.folder, results.TEACHER, wait=True):
        if results.of_teacher(comparison.folder)[0]:
            return
        teacher = comparison.trained or comparison.teacher
        fits = knows(teacher, comparison.task, classes)
        folder = comparison.folder / "runs" / "teacher"
        scores = score(teacher, comparison.arguments, comparison.split, folder) if fits else None
        if scores and comparison.trained:
            scores["seconds"] = _seconds(read_rows(comparison.folder / FOLDER / "results.csv"))
        results.write(comparison.folder, results.TEACHER, scores)
