# SPDX-License-Identifier: AGPL-3.0-or-later
"""The command `yolo_cwd`: reads key=value arguments as `yolo` does, and delegates."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Collection, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from yolo_cwd import __version__
from yolo_cwd.config import OPTIONS, ConfigError, at_home, first_line, merge, path_or_value, read_cfg, recipe

HELP = """\
yolo_cwd: a small YOLO learns from a stronger one while it trains (channel-wise distillation)

  yolo_cwd train teacher=yolov8l student=yolov8n data=coco8.yaml epochs=100 imgsz=640
                       train the student, and its teacher first if it does not know the classes of the data; every
                       argument of 'yolo train' works here too
  yolo_cwd train resume model=runs/detect/train/weights/last.pt
                       resume after an interruption
  yolo_cwd check teacher=best.pt student=yolov8n.pt data=my.yaml imgsz=640
                       see what is distilled, what a step costs, and whether this teacher is worth it (format=json)
  yolo_cwd compare teacher=best.pt student=yolov8n.yaml data=my.yaml epochs=100 seeds=3 arms=plain,cwd,builtin
                       find out whether it helped, and by how much beyond luck
  yolo_cwd label teacher=best.pt source=path/to/images
                       label images with the teacher, to see the labels that 'train unlabeled=path/to/images' uses
  yolo_cwd demo        compare a plain and a distilled student on photographs of blood cells, in two minutes on a CPU
  yolo_cwd settings    list the options of distillation, with default and meaning
  yolo_cwd help train  show more about training; likewise 'help check', 'help compare', 'help label' and 'help demo'
  yolo_cwd version     print the version

The trained student is a plain Ultralytics model: use it with 'yolo val', 'yolo predict' and 'yolo export'."""

HELP_TRAIN = """\
yolo_cwd train teacher=MODEL student=MODEL data=DATA [option=value ...] [argument=value ...]

  MODEL     a name (yolov8n means yolov8n.pt, downloaded if Ultralytics knows it), the path of a .pt checkpoint, or a
            .yaml model; teacher and student may be of different families
  DATA      the YAML file of a data set, or 'bccd' for the blood cells that come with yolo_cwd
  option    an option of distillation: see 'yolo_cwd settings'
  argument  any training argument of Ultralytics: see 'yolo cfg'; cfg=file.yaml reads options and arguments from a file,
            cfg=finetune from a recipe that comes with yolo_cwd (also few-images, small-objects, coco, new-classes)

Examples:
  yolo_cwd train teacher=yolov8l student=yolov8n data=coco8.yaml epochs=100 imgsz=640
  yolo_cwd train teacher=runs/detect/train/weights/best.pt student=yolo11n.yaml data=my.yaml levels=P4,P5

A teacher that lacks a class of the data is trained on them first, in the same run (teacher_epochs=0 takes it as it is).

Results go to runs/detect/train*: weights/best.pt is the student, results.csv has a column for each distilled level;
teacher/weights/best.pt is the teacher, if it was trained."""


HELP_CHECK = """\
yolo_cwd check teacher=MODEL student=MODEL [data=DATA] [format=FORMAT] [option=value ...] [argument=value ...]

  MODEL, DATA, option, argument
            as in 'yolo_cwd train'; without data, the steps run on embedded images
  format    table (default), or json: the findings alone on stdout, for machines

The check sets up the training and runs a few steps. It prints whether the teacher will be trained first, what is
distilled, the time and memory of a step beside those of a plain one, the scores of teacher and student if they know the
classes of the data, and a verdict. It leaves nothing behind but the label cache that Ultralytics keeps beside the
labels.

Examples:
  yolo_cwd check teacher=best.pt student=yolov8n.pt data=my.yaml imgsz=640 batch=16
  yolo_cwd check teacher=yolov8l student=yolov8n format=json"""

HELP_COMPARE = """\
yolo_cwd compare teacher=MODEL student=MODEL data=DATA [arms=ARMS] [seeds=SEEDS] [split=SPLIT] [folder=FOLDER] [...]

  MODEL, DATA
            as in 'yolo_cwd train'; all other arguments and options work as there too, and apply to every arm
  arms      what to compare (default plain,cwd,builtin): plain is Ultralytics alone, cwd is distilled, builtin is
            Ultralytics' distill_model; give an arm options of its own (plain,cwd:tau=2,cwd=20), and any name: x:tau=2
            (the method is the one that the name begins with, or cwd; method=plain sets it); a list stands in brackets,
            "cwd:unlabeled=[one,two]"; or name a YAML file that maps names to options, and to method, teacher, student
            and against
  seeds     the number of seeds (default 3), or the seeds themselves: seeds=5,6,7
  split     the images to score the finished models on: val (default), test or train
  folder    where everything goes (default runs/detect/compare)

A teacher that lacks a class of the data is trained on them first, once for all arms.
Repeat the command to resume an interrupted comparison, or with other arms or seeds to add them.

Examples:
  yolo_cwd compare teacher=best.pt student=yolov8n.yaml data=my.yaml epochs=100 seeds=3
  yolo_cwd compare teacher=best.pt student=yolov8n.pt data=my.yaml epochs=30 arms=plain,cwd,cwd:share=2 split=test"""

HELP_LABEL = """\
yolo_cwd label teacher=MODEL source=IMAGES [data=DATA] [option=value ...] [argument=value ...]
yolo_cwd label teacher=MODEL data=DATA complete_labels=True [option=value ...] [argument=value ...]

  MODEL     a trained .pt checkpoint
  IMAGES    folders, globs, .txt lists or images, separated by commas; 'unlabeled' is another name for 'source'
  DATA      the data of the training to come: its images are left out, and its classes are those of the labels; without
            it, the labels have the teacher's classes
  option    pool_conf (lowest confidence of a label), pool_ratio, pool_classes, complete_labels, trust_teacher: see
            'yolo_cwd settings'
  argument  imgsz, batch, device, fraction, single_cls, task

The command counts what the teacher finds, and draws some images with their labels; it says where both are. A training
with the same options ('train unlabeled=IMAGES', or 'train complete_labels=True') then uses these labels.

Examples:
  yolo_cwd label teacher=best.pt source=path/to/images
  yolo_cwd label teacher=best.pt source=path/to/images data=my.yaml pool_conf=0.5"""

HELP_DEMO = """\
yolo_cwd demo [seed=SEED]

  SEED      0 by default

A comparison in two minutes: a YOLOv8n is trained on 52 embedded photographs of blood cells, plainly and under a teacher
that has seen four times as many. It prints their scores, draws what each finds, and says where everything is. It needs
no GPU and no network."""

HELPS = {"train": HELP_TRAIN, "check": HELP_CHECK, "compare": HELP_COMPARE, "label": HELP_LABEL, "demo": HELP_DEMO}
TASKS = ("detect", "segment", "pose", "obb", "semantic", "depth", "classify")  # as 'yolo' has them
ELSEWHERE = ("val", "predict", "export", "track", "benchmark")  # commands of 'yolo' alone


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments without the program's name; those of the process by default.

    Returns:
        The exit code: 0 on success, 1 if another process of the training is lost, 2 for input that cannot be used, 130
        after an interrupt, 143 after SIGTERM.
    """
    commands = {
        "train": train,
        "check": check,
        "compare": compare,
        "label": label,
        "demo": demo,
        "settings": settings,
        "help": help_,
        "version": version,
    }
    foremost = threading.current_thread() is threading.main_thread()  # Python allows signals nowhere else
    before = signal.signal(signal.SIGTERM, _terminate) if foremost else None
    try:
        command, rest = command_of(sys.argv[1:] if argv is None else argv, commands)
        commands[command](rest)
    except ConfigError as error:
        _complain(error)
        return 2
    except ChildProcessError as error:
        print(f"yolo_cwd: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interrupt:
        if _first_here():
            _complain(str(interrupt) or "interrupted")
        return 128 + (signal.SIGTERM if isinstance(interrupt, Terminated) else signal.SIGINT)
    finally:
        if foremost:
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
    return 0


def _first_here() -> bool:
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _complain(reason: object) -> None:
    if not _first_here():  # torchrun ends all processes when one ends: let the first say why, if it fails too
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(10)
    print(f"yolo_cwd: {reason}", file=sys.stderr)


class Terminated(KeyboardInterrupt):
    """The process was asked to end, by SIGTERM."""


def _terminate(number: int, frame: Any) -> None:
    raise Terminated("terminated")


def command_of(typed: Sequence[str], commands: Collection[str]) -> tuple[str, list[str]]:
    """Return the command and its arguments, which may come in any order, as in `yolo`.

    Args:
        typed: What was typed.
        commands: The known commands.

    Raises:
        ConfigError: If there is no command, or an unknown one.
    """
    words = ["train" if word == "mode=train" else word for word in (word.lstrip("-") for word in typed)]
    alone = [i for i, word in enumerate(words) if "=" not in word and not _beside_equals(words, i)]
    asked = [words[i] for i in alone]
    flags = {typed[i] for i in alone}
    named = [word for word in asked if word in commands and word not in {"help", "version"}]
    unknown = [word for word in asked if word not in {*TASKS, *commands}]
    if not words or "help" in asked or flags & {"-h", "--h"} or words[:1] == ["h"]:
        if not named and (rest := [word for word in unknown if word != "h"]):
            raise _unknown(rest[0], commands)
        return "help", named
    if "version" in asked or flags & {"-v", "-V"}:
        return "version", []
    if not named:
        elsewhere = [word for word in asked if word in ELSEWHERE]
        if asked_for := elsewhere or unknown:
            raise _unknown(asked_for[0], commands)
        raise ConfigError(f"{typed[0]}: no command; give one of {', '.join(commands)}")
    taken = {i for i in alone if words[i] in {named[0], *TASKS}}
    tasks = [f"task={word}" for word in asked if word in TASKS]
    return named[0], [*tasks, *(word for i, word in enumerate(words) if i not in taken)]


def _unknown(word: str, commands: Collection[str]) -> ConfigError:
    """Return the error to raise for a word that is none of our commands."""
    if word in ELSEWHERE:
        return ConfigError(f"{word}: a command of Ultralytics; use 'yolo {word}'")
    near = get_close_matches(word, commands, n=1)
    return ConfigError(
        f"{word}: unknown command; " + (f"did you mean {near[0]}?" if near else f"give one of {', '.join(commands)}")
    )


def _beside_equals(words: Sequence[str], i: int) -> bool:
    return any(word.endswith("=") for word in words[max(i - 1, 0) : i]) or words[i + 1 : i + 2][:1] == ["="]


def help_(words: list[str]) -> None:
    """Print the general help, or the help for a command."""
    print(HELPS.get(words[0], HELP) if words else HELP)


def version(words: list[str]) -> None:
    """Print the version."""
    print(__version__)


def settings(words: list[str]) -> None:
    """Print the options of distillation: name, default and meaning."""
    shown = {name: "" if option.default is None else str(option.default).lower() for name, option in OPTIONS.items()}
    widths = max(map(len, shown)), max(map(len, shown.values()))
    for name, option in OPTIONS.items():
        print(f"{name:{widths[0]}}  {shown[name]:{widths[1]}}  {option.meaning}")


def demo(words: list[str]) -> None:
    """Train and compare the students of the demonstration."""
    arguments = parse(words)
    from yolo_cwd.study.demo import run

    run(arguments)


def train(words: list[str]) -> None:
    """Train a student under a teacher."""
    overrides = parse(words)
    from yolo_cwd.run.distributed import lost_peer
    from yolo_cwd.run.refusal import disk_is_full, refusal, unwritable
    from yolo_cwd.trainer import CWDTrainer

    trainer = None
    try:
        trainer = CWDTrainer(overrides=overrides)
        trainer.train()
    except ConfigError:
        raise
    except KeyboardInterrupt as interrupt:
        if not (resume := _resume(trainer)):
            raise
        raise _with_remedy(interrupt, resume) from None
    except ChildProcessError:
        raise
    except Exception as error:
        if disk_is_full(error) and (resume := _resume(trainer)):
            raise unwritable(error, "project", overrides.get("project"), f"make room, and {resume}") from error
        if lost_peer(error):
            ours = f"process {os.environ['RANK']} of {os.environ['WORLD_SIZE']}"
            reason = "another one has ended or is silent; 'resume' continues from the last epoch"
            raise ChildProcessError(f"{ours} ends, since {reason}") from error
        begun = trainer is not None and trainer.has_begun
        if begun and not disk_is_full(error):  # a fault, not bad input
            raise
        raise refusal(error, overrides) from error


def _resume(trainer: Any) -> str:
    """Return how to resume a training, or what is left of one without epochs to train; nothing if it has none yet."""
    from yolo_cwd.run.state import FILE

    if trainer is None:
        return ""
    if trainer.finished:
        weights = trainer.best if trainer.best.exists() else trainer.last
        score = f"'yolo val model={weights} data={trainer.args.data}'"
        return f"all epochs are trained, the last pictures are missing, and {score} makes up for the last validation"
    last = trainer.last if trainer.last.exists() and (trainer.wdir / FILE).exists() else None
    elsewhere = trainer.ddp and trainer.last.exists()  # the processes that Ultralytics starts have finished the run
    last = last or (not elsewhere and trainer.stage and trainer.stage.can_go_on())
    return f"'yolo_cwd train resume model={last}' continues it" if last else ""


def _with_remedy(interrupt: KeyboardInterrupt, remedy: str) -> KeyboardInterrupt:
    return type(interrupt)(f"{str(interrupt) or 'interrupted'}; {remedy}")


def check(words: list[str]) -> None:
    """Examine a training before it starts."""
    arguments = parse(words)
    from yolo_cwd.study.check import run

    run(arguments)


def label(words: list[str]) -> None:
    """Let the teacher label images that nobody has annotated."""
    arguments = parse(words)
    from yolo_cwd.run.refusal import refusal
    from yolo_cwd.study.label import run

    try:
        run(arguments)
    except ConfigError:
        raise
    except (OSError, TypeError, ValueError) as error:
        raise refusal(error, arguments) from error


def compare(words: list[str]) -> None:
    """Train the arms of a comparison and summarize them."""
    arguments = parse(words)
    from yolo_cwd.run.refusal import disk_is_full, unwritable
    from yolo_cwd.study.compare import run

    remedy = "run the same command again to continue"
    try:
        run(arguments)
    except KeyboardInterrupt as interrupt:
        raise _with_remedy(interrupt, remedy) from None
    except OSError as error:
        if not disk_is_full(error):
            raise
        raise unwritable(error, "folder", arguments.get("folder"), f"make room, and {remedy}") from error


def parse(words: list[str]) -> dict[str, Any]:
    """Return the arguments of `key=value` words; they take precedence over a file that `cfg` names.

    Raises:
        ConfigError: If a word is no argument, or the file cannot be read.
    """
    from ultralytics.cfg import DEFAULT_CFG_DICT, _handle_deprecation, merge_equals_args, parse_key_value_pair
    from ultralytics.utils.checks import check_yaml

    given: dict[str, Any] = {}
    try:
        merged = merge_equals_args(words)
    except SyntaxError as error:
        raise ConfigError(f"{first_line(error)}; close it, or quote the value") from error
    for word in merged:
        if "=" in word:
            try:
                key, value = parse_key_value_pair(word.rstrip(","))
            except (AssertionError, ValueError, SyntaxError) as error:
                raise ConfigError(f"{word}: has no value; write it as key=value") from error
            given[key] = path_or_value(key, word.partition("=")[2].strip(), value)
        elif isinstance(OPTIONS[word].default if word in OPTIONS else DEFAULT_CFG_DICT.get(word), bool):
            given[word] = True  # a bare switch, as 'yolo train cos_lr' has it
        else:
            switches = [name for name, value in DEFAULT_CFG_DICT.items() if isinstance(value, bool)]
            near = get_close_matches(word, [*switches, *(n for n, o in OPTIONS.items() if isinstance(o.default, bool))])
            remedy = f"did you mean {near[0]}?" if near else "'yolo_cwd help train' shows examples"
            raise ConfigError(f"{word}: not of the form key=value; {remedy}")
    file = at_home(given.pop("cfg", None))
    if file and not recipe(file) and Path(str(file)).suffix in {".yaml", ".yml"}:
        file = check_yaml(file, hard=False) or file
    below = read_cfg(file) if file else {}
    try:
        everything = merge(_handle_deprecation(below), _handle_deprecation(given))
        return {name: at_home(value) for name, value in everything.items()}
    except TypeError as error:
        raise ConfigError(first_line(error)) from error
