# SPDX-License-Identifier: AGPL-3.0-or-later
"""What a run was asked for: separates options from arguments, checks them, and restores those of a resumed run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from ultralytics.cfg import _handle_deprecation, cfg2dict, get_cfg, get_save_dir
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.nn.tasks import load_checkpoint
from ultralytics.utils import DEFAULT_CFG_DICT, RANK
from ultralytics.utils.files import get_latest_run
from ultralytics.utils.torch_utils import parse_device

from yolo_cwd.config import (
    BALANCED,
    OPTIONS,
    ConfigError,
    Settings,
    check_names,
    merge,
    model_path,
    read_cfg,
    refuse_missing,
    split_options,
    unusable_data,
)
from yolo_cwd.log import warn
from yolo_cwd.run import teacher_record
from yolo_cwd.run.distributed import WORLD_SIZE
from yolo_cwd.run.state import RunState, load_state
from yolo_cwd.tasks import ALL, Task, task_of_student

EXTRA_ARGUMENTS = {"augmentations", "save_dir"}  # training arguments that Ultralytics takes without a default
REPLACEABLE = {"teacher", "trust_teacher"}  # options that may change when a run resumes
Need = tuple[str, Callable[[Settings], Any]]
NEEDS: dict[str, Need] = {  # what an option has no effect without, and whether it is there
    "share": (f"cwd={BALANCED}", lambda settings: settings.balanced),
    "cwd_final": ("schedule=cosine", lambda settings: settings.schedule != "constant"),
    "pool_conf": ("labels by the teacher: unlabeled= or complete_labels=True", lambda settings: settings.labeling),
    **dict.fromkeys(("pool_ratio", "pool_classes"), ("unlabeled=", lambda settings: settings.unlabeled)),
}


class Request(NamedTuple):
    """A checked request.

    Attributes:
        base: Ultralytics' arguments to start from.
        arguments: Arguments that take precedence over them.
        args: Both together, checked by Ultralytics.
        options: Our options as given, or as the resumed run had them.
        settings: The same, checked, with the defaults filled in.
        state: What a resumed run continues from; empty for a new run.
        goes_on: Whether the run resumes while its teacher is trained, before the student's first checkpoint.
    """

    base: dict[str, Any]
    arguments: dict[str, Any]
    args: Any
    options: dict[str, Any]
    settings: Settings
    state: RunState
    goes_on: bool = False


def read(cfg: Any, overrides: dict[str, Any]) -> Request:
    """Check what can be checked before a run folder exists.

    Args:
        cfg: Base configuration: a YAML path, a dictionary or a namespace, with or without our options.
        overrides: Arguments and options that take precedence.

    Raises:
        ConfigError: If an option or an argument cannot be used.
    """
    below, overrides, goes_on, ignored = teacher_record.taken_up(_below(cfg), overrides)
    if ignored:
        warn(f"a resumed run keeps its arguments; ignored: {', '.join(ignored)}")
    options, arguments = split_options(overrides)
    base = split_options(below)[1]
    options = split_options(merge(below, overrides))[0]
    base, arguments = _handle_deprecation(base), _handle_deprecation(arguments)
    check_names(base | arguments, DEFAULT_CFG_DICT.keys() | EXTRA_ARGUMENTS)

    base = {**DEFAULT_CFG_DICT, **base}
    student, model = options.pop("student", None), arguments.get("model")
    if teacher_record.goes_by_name({**arguments, **options, "student": student}):
        arguments |= _go_on_or_begin(base | arguments)
    checkpoint = checkpoint_to_resume(arguments.get("resume", base["resume"]), model or student or base["model"])
    if checkpoint:
        arguments["resume"] = arguments["model"] = str(checkpoint)
        if checkpoint.parent.name == "weights":  # where the run is now; the checkpoint has where it was
            arguments.setdefault("save_dir", str(checkpoint.absolute().parents[1]))
        if not (arguments.get("device") or base["device"]):
            arguments["device"] = arguments_of_run(checkpoint).get("device")
        state = load_state(checkpoint)
        run = checkpoint.absolute().parents[1]
        state.options["teacher"] = teacher_record.own_teacher(state.options.get("teacher"), run)
        options = _options_of_resumed_run(state, options)
    else:
        data = arguments.get("data", base["data"])
        refuse_missing({"teacher": options.get("teacher"), "student": student or model or base["model"], "data": data})
        arguments["model"] = student_path(student, model, base["model"])
        state = RunState({})
    settings = Settings.parse(options)
    _warn_of_idle(options, settings)
    args = get_cfg(base, {**arguments})
    refuse_unsupported(args)
    return Request(base, arguments, args, options, settings, state, goes_on)


def task_of(cfg: Any, overrides: dict[str, Any]) -> Task:
    """Return the task of the student that a request names.

    Args:
        cfg: As for `read`.
        overrides: As for `read`.

    Raises:
        ConfigError: If it cannot be trained.
    """
    below, overrides, *_ = teacher_record.taken_up(_below(cfg), overrides)
    given = merge(below, overrides)
    resumed = given.get("resume")
    student = teacher_record.named_to_resume(given) if resumed else given.get("student") or given.get("model")
    if not student:  # `read` says what is missing
        return ALL[0]
    named = model_path("student", student) if isinstance(student, str | Path) else student
    return task_of_student(named, overrides.get("task"))


def _below(cfg: Any) -> dict[str, Any]:
    return read_cfg(cfg) if isinstance(cfg, str | Path) else dict(cfg2dict(cfg))


def is_trained(kind: int, args: Any) -> bool:
    """Return whether a training has a class of the data."""
    return args.classes is None or kind in np.ravel(args.classes)


def data_of(args: Any) -> dict[str, Any]:
    """Return the data set that the arguments of a training name, resolved as Ultralytics does.

    Raises:
        ConfigError: If it cannot be used.
    """
    try:
        data: dict[str, Any] = BaseTrainer.get_dataset(SimpleNamespace(args=args))
        return data
    except RuntimeError as error:
        raise unusable_data(args.data, error.__cause__ or error) from error


def plain_options(settings: Settings, student: str, strides: Sequence[int]) -> dict[str, Any]:
    """Return the options of a run as plain values, from which a resumed run restores them.

    Args:
        settings: The checked options.
        student: The model that the student started from.
        strides: The distilled levels.
    """
    teacher = settings.teacher
    if isinstance(teacher, str):
        teacher = str(Path(teacher).resolve()) if Path(teacher).exists() else teacher
    else:
        teacher = None
    lists = {
        "levels": list(strides),
        "level_weights": list(settings.level_weights),
        "unlabeled": list(settings.unlabeled),
    }
    return {**vars(settings), "teacher": teacher, "student": student, **lists}


def checkpoint_to_resume(resume: Any, model: Any) -> Path | None:
    """Return the checkpoint to resume from, named by the arguments `resume` and `model`, or None for a new run.

    `resume` alone means the latest run below the working directory, as in Ultralytics.

    Raises:
        ConfigError: If there is none.
    """
    if not resume:
        return None
    given = isinstance(resume, str | Path)
    named = resume if given else model or get_latest_run()
    if named and Path(named).is_file() and (given or Path(named).suffix == ".pt"):
        return Path(named)
    if given:
        raise ConfigError(f"resume={resume}: no such checkpoint; name one: resume model=runs/.../last.pt")
    if not model:
        raise ConfigError(
            f"resume={resume}: there is no run below this folder; name one: resume model=runs/.../last.pt"
        )
    reason = f"model={model} is not a checkpoint to resume from; name one: resume model=runs/.../last.pt"
    raise ConfigError(f"resume={resume}: {reason}, or give name= and teacher= to start or continue a run")


def arguments_of_run(checkpoint: str | Path) -> dict[str, Any]:
    """Return Ultralytics' arguments of the run that a checkpoint is of; none if it cannot be read."""
    try:
        arguments: dict[str, Any] = load_checkpoint(checkpoint)[1]["train_args"]
    except Exception:
        return {}
    return arguments


def _options_of_resumed_run(state: RunState, given: dict[str, Any]) -> dict[str, Any]:
    kept = state.options
    may_change = REPLACEABLE | ({"unlabeled"} if kept.get("unlabeled") else set())  # the images may have moved
    replaced = {name: value for name, value in given.items() if name in may_change and value}
    if ignored := sorted(n for n in given.keys() - replaced.keys() if given[n] != kept.get(n)):
        warn(f"a resumed run keeps its options; ignored: {', '.join(ignored)}")
    kept.update(replaced)
    return kept


def student_path(student: Any, model: Any, default: Any) -> str:
    """Return the student's path from its two names, `student` and Ultralytics' `model`.

    Raises:
        ConfigError: If both are given and differ, or if none is given.
    """
    for name, value in {"student": student, "model": model}.items():
        if value and not isinstance(value, str | Path):
            reason = f"{name}={type(value).__name__}: takes the path of a model"
            raise ConfigError(f"{reason}; to train a YOLO object call its train(trainer=CWDTrainer, teacher=...)")
    if student and model and str(student) != str(model):
        raise ConfigError(f"student={student}: model={model} names another one; give one of the two")
    chosen = student or model or default
    if not isinstance(chosen, str | Path):
        raise ConfigError(f"student={chosen}: missing; name the model to train, such as student=yolov8n.pt")
    return model_path("student", chosen)


def refuse_unsupported(args: Any) -> None:
    """Refuse Ultralytics arguments that make no sense with a teacher.

    Raises:
        ConfigError: For the first one found.
    """
    processes = WORLD_SIZE if RANK != -1 else len(parse_device(args.device).split(","))
    refusals: tuple[tuple[str, bool, str], ...] = (
        (
            "data",
            args.data is None and not args.resume,
            "missing; give a data set, such as data=coco8.yaml or data=bccd",
        ),
        ("mode", args.mode != "train", f"'yolo_cwd train' trains; use 'yolo {args.mode}'"),
        ("distill_model", args.distill_model is not None, "is Ultralytics' own distillation; use teacher= instead"),
        (
            "batch",
            args.batch < 1 and (processes > 1 or RANK != -1),
            f"is estimated for one process only; give a number of images, batch={16 * processes}",
        ),
        (
            "batch",
            args.batch >= 1 and args.batch != int(args.batch),
            "must be a whole number of images, or a share of the memory below 1",
        ),
        (
            "batch",
            args.batch >= 1 and args.batch % processes != 0,
            f"does not divide over {processes} processes; give a multiple of {processes}",
        ),
    )
    for name, refused, reason in refusals:
        if refused:
            raise ConfigError(f"{name}={getattr(args, name)}: {reason}")


def _warn_of_idle(options: Mapping[str, Any], settings: Settings) -> None:
    """Say which of the given options have no effect, because another one is missing."""
    idle = [
        f"{name}={options[name]} needs {need}"
        for name, (need, is_there) in NEEDS.items()
        if name in options and options[name] != OPTIONS[name].default and not is_there(settings)
    ]
    if idle:
        warn(f"options without effect: {'; '.join(idle)}")


def _go_on_or_begin(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments that resume a named run, or start it if it has no checkpoint yet.

    So one command, repeated by `torchrun --max-restarts` or a scheduler, brings a training to its end.
    """
    folder = get_save_dir(get_cfg(DEFAULT_CFG_DICT, {**arguments, "resume": False, "exist_ok": True}))
    last = folder / "weights" / "last.pt"
    return {"resume": str(last)} if last.is_file() else {"resume": False, "exist_ok": True}
