# SPDX-License-Identifier: AGPL-3.0-or-later
"""The options of channel-wise distillation: their defaults, meanings and checks.

Nothing here imports torch, so that `help` and `settings` answer at once.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import yaml

SCHEDULES = ("constant", "linear", "cosine")
ADAPTERS = ("fitted", "conv")
UNKNOWING_SHARE = 0.03  # of a teacher that does not know the data: more has cost points
BALANCED, AUTO = "balanced", "auto"  # what cwd, class_share and teacher_epochs may be instead of a number
WEIGHT_COLUMN = "train/cwd_weight"  # of results.csv: the overall weight
LONGEST, REMEDY = 299, 190  # the most characters of a message, and how many of its end are always kept
SYNONYMS = {"student", "model"}
IMAGES = ("source", "unlabeled")  # arguments that name files and folders of images
EXAMPLES = {  # of what a command needs
    "teacher": "yolov8l.pt",
    "student": "yolov8n.pt",
    "data": "coco8.yaml",
    "source": "path/to/images",
}
POOL_CLASSES = ("all", "known")
TEACHER_DTYPES = ("auto", "fp32", "bf16", "fp16")


class ConfigError(ValueError):
    """Input that cannot be used; its message is one line that names the argument, the value and the remedy.

    The line always has fewer than 300 characters. A longer one loses its middle, since it begins with the argument and
    ends with the remedy.
    """

    def __init__(self, message: object = "") -> None:
        """Turn a message into one line."""
        line = " ".join(str(message).split())
        if len(line) > LONGEST:
            line = f"{line[: LONGEST - REMEDY - 5].rstrip()} ... {line[-REMEDY:].lstrip()}"
        super().__init__(line)


@contextmanager
def refused_as(refusal: Callable[[Exception], ConfigError]) -> Iterator[None]:
    """Turn an error of another library into the line that a user reads; our own lines pass.

    Args:
        refusal: Makes the line.
    """
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        raise refusal(error) from error


def listed(names: Sequence[str], most: int = 4) -> str:
    """Return names separated by commas; after the first `most`, say how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more}"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message as plain text, or the error's class if it has no message."""
    return (_plain_lines(error) or [type(error).__name__])[0].rstrip(".;")


def unusable_data(data: Any, error: BaseException) -> ConfigError:
    """Return the error to raise for a data set that Ultralytics cannot use."""
    if _is_missing(error) and not Path(str(data)).exists():
        return ConfigError(f"data={data}: no such file; give the path of a data set's YAML file")
    reason = " ".join(_plain_lines(error)).replace(f"Dataset '{data}' ", "").removeprefix(str(data)).strip(" .;")
    if Path(str(data)).is_dir():
        return ConfigError(f"data={data}: {reason}; give the path of a data set's YAML file")
    return ConfigError(f"data={data}: {reason}; correct the data set, see https://docs.ultralytics.com/datasets")


def unusable_model(argument: str, error: BaseException, remedy: str) -> ConfigError:
    """Return the error to raise for a model that cannot be loaded.

    Args:
        argument: The argument as the user gave it (`teacher=yolov8l.pt`); Ultralytics' messages may name another file.
        error: What was raised.
        remedy: What to do.
    """
    return ConfigError(f"{argument}: {'no such file' if _is_missing(error) else first_line(error)}; {remedy}")


def _is_missing(error: BaseException) -> bool:
    return isinstance(error, FileNotFoundError)


def _plain_lines(error: BaseException) -> list[str]:
    """Return the lines of a message without colors, emoji, links and a leading name of a split."""
    cause: BaseException | None = error
    while cause is not None:
        if mark := getattr(cause, "problem_mark", None):
            return [f"line {mark.line + 1} is not YAML: {getattr(cause, 'problem', None) or 'it cannot be read'}"]
        cause = cause.__cause__ or cause.__context__
    text = _of_key(error) if isinstance(error, KeyError) else str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text)
    text = re.sub(r"[\u2190-\u2bff\ufe0f\U0001f000-\U0001faff]", "", text)
    text = re.sub(r"Note dataset download directory[^\n]*", "", text)
    text = re.sub(r"(?:See|Verify|Request|Install|Supported)[^.\n]*https?://\S+[^\n]*", "", text)
    text = re.sub(r"^(train|val|test): ", "", text)
    return [" ".join(line.replace(" .", ".").split()) for line in text.splitlines() if line.strip()]


def _of_key(error: KeyError) -> str:
    """Return what a key error says: the key alone, or a whole sentence, which str() would put into quotes."""
    what = str(error.args[0]) if error.args else ""
    return what if " " in what else f"{error} is missing in it, or unknown"


class _Loader(yaml.SafeLoader):
    """YAML that reads numbers as the command line does: in YAML 1.1, `1e2` would be text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def read_yaml(file: str | Path) -> dict[str, Any]:
    """Return the mapping in a YAML file; an empty file holds an empty one.

    Raises:
        OSError: If it cannot be read.
        yaml.YAMLError: If it is not YAML.
        TypeError: If it holds no mapping.
    """
    content = yaml.load(Path(file).read_text(encoding="utf-8"), _Loader)
    if content is not None and not isinstance(content, dict):
        raise TypeError("holds no mapping of names to values")
    return content or {}


def recipe(name: str | Path) -> Path | None:
    """Return the shipped recipe of a name such as `finetune`; None if there is none, or if a file has that name."""
    file = _cfg_folder() / "recipes" / f"{str(name).removesuffix('.yaml')}.yaml"
    is_name = Path(name).name == str(name) and not Path(name).is_file()
    return file if is_name and file.is_file() else None


def read_cfg(file: str | Path) -> dict[str, Any]:
    """Return the arguments in a YAML file, or in the shipped recipe of that name.

    Raises:
        ConfigError: If it cannot be read.
    """
    try:
        return read_yaml(recipe(file) or file)
    except (OSError, yaml.YAMLError, TypeError, ValueError) as error:
        reason, remedy = first_line(error), "give the path of a YAML file of arguments"
        if _is_missing(error):
            names = sorted(shipped.stem for shipped in (_cfg_folder() / "recipes").glob("*.yaml"))
            near = get_close_matches(Path(file).stem, names, n=1)
            reason = "no such file"
            remedy += f"; did you mean the recipe {near[0]}?" if near else f", or a recipe: {', '.join(names)}"
        raise ConfigError(f"cfg={file}: cannot be read ({reason}); {remedy}") from error


def refuse_missing(given: Mapping[str, Any]) -> None:
    """Refuse a command that lacks several arguments, with all of them in the line.

    A single one is refused where it is read.

    Args:
        given: What the command needs, by name.

    Raises:
        ConfigError: If several have no value.
    """
    missing = [name for name, value in given.items() if value is None or (isinstance(value, str) and not value)]
    if len(missing) > 1:
        examples = " ".join(f"{name}={EXAMPLES[name]}" for name in missing)
        raise ConfigError(f"{', '.join(missing)}: missing; give them, such as {examples}")


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Merge two layers of arguments; the upper one wins, even where the two use different names for one argument."""
    hidden = SYNONYMS if any(above.get(name) for name in SYNONYMS) else set()
    return {**{name: value for name, value in below.items() if name not in hidden}, **above}


class Option(NamedTuple):
    """One line of `cfg/default.yaml`."""

    default: Any
    meaning: str


def _cfg_folder() -> Path:
    package = Path(__file__).parent
    packed = package / "cfg"  # a wheel has cfg/ inside the package, a checkout beside it
    return packed if packed.exists() else package.parent / "cfg"


def _read_options() -> dict[str, Option]:
    text = (_cfg_folder() / "default.yaml").read_text(encoding="utf-8")
    meanings = dict(re.findall(r"^(\w+):.*? # (.*)$", text, flags=re.MULTILINE))
    return {name: Option(default, meanings[name]) for name, default in yaml.safe_load(text).items()}


OPTIONS = _read_options()


@dataclass(frozen=True)
class Settings:
    """The checked options of one training; `cfg/default.yaml` has the meaning and the default of each.

    Attributes:
        teacher: Path of the model to learn from, with its suffix, or the model itself.
        teacher_epochs: Epochs to train the teacher first, if it does not know the data; 0 to take it as it is, None for
            as many as the student is trained.
        cwd: `BALANCED`, or a fixed overall weight, at least 0.
        share: Gradient of a level's divergence relative to the task's own under the balanced rule, at least 0.
        class_share: The same for the class maps of the head, under any rule.
        tau: Temperature of the softmax, above 0.
        levels: Strides to distill, in ascending order, or None for every level that teacher and student share.
        level_weights: One weight for all levels, or one for each of them, finest first; each at least 0.
        schedule: One of `SCHEDULES`.
        cwd_final: Fraction of `cwd` left in the last epoch of a falling schedule, 0 to 1.
        adapter: One of `ADAPTERS`.
        teacher_dtype: One of `TEACHER_DTYPES`.
        trust_teacher: Whether the teacher's checkpoint may run its author's code while it is loaded.
        unlabeled: Absolute paths of images for the teacher to label: folders, globs, lists or images.
        pool_conf: Lowest confidence of an object that becomes a label.
        pool_ratio: The most unlabeled images for each labeled one, above 0; None for all of them.
        pool_classes: One of `POOL_CLASSES`.
        complete_labels: Whether the teacher's objects of unlabeled classes join the labels of the training images.
    """

    teacher: Any
    teacher_epochs: int | None
    cwd: float | str
    share: float
    class_share: float
    tau: float
    levels: tuple[int, ...] | None
    level_weights: tuple[float, ...]
    schedule: str
    cwd_final: float
    adapter: str
    teacher_dtype: str
    trust_teacher: bool
    unlabeled: tuple[str, ...]
    pool_conf: float
    pool_ratio: float | None
    pool_classes: str
    complete_labels: bool

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> Settings:
        """Check the given options and fill in the defaults of the others.

        Args:
            given: Options by name, with values from Python or from the command line.

        Raises:
            ConfigError: If a value is missing, of the wrong type or out of range.
        """
        value = {name: given.get(name, option.default) for name, option in OPTIONS.items()}
        if value["share"] == AUTO:
            value["share"] = 1.0
        if value["class_share"] == AUTO:
            value["class_share"] = value["share"] if value["cwd"] == BALANCED else 0.0
        return cls(
            teacher=_teacher(value["teacher"]),
            teacher_epochs=_epochs("teacher_epochs", value["teacher_epochs"]),
            cwd=BALANCED if value["cwd"] == BALANCED else _number("cwd", value["cwd"], or_else=f"{BALANCED} or "),
            share=_number("share", value["share"], or_else=f"{AUTO} or "),
            class_share=_number("class_share", value["class_share"], or_else=f"{AUTO} or "),
            tau=_number("tau", value["tau"], zero=False),
            levels=_levels(value["levels"]),
            level_weights=_level_weights(value["level_weights"]),
            schedule=_choice("schedule", value["schedule"], SCHEDULES),
            cwd_final=_number("cwd_final", value["cwd_final"], most=1),
            adapter=_choice("adapter", value["adapter"], ADAPTERS),
            teacher_dtype=_choice("teacher_dtype", value["teacher_dtype"], TEACHER_DTYPES),
            trust_teacher=_choice("trust_teacher", value["trust_teacher"], (True, False)),
            unlabeled=_paths("unlabeled", value["unlabeled"]),
            pool_conf=_number("pool_conf", value["pool_conf"], most=1),
            pool_ratio=None if value["pool_ratio"] is None else _number("pool_ratio", value["pool_ratio"], zero=False),
            pool_classes=_choice("pool_classes", value["pool_classes"], POOL_CLASSES),
            complete_labels=_choice("complete_labels", value["complete_labels"], (True, False)),
        )

    def for_unknowing_teacher(self, given: Mapping[str, Any]) -> Settings:
        """Return the options for a teacher that teaches although it does not know the data: shares not given are small.

        Args:
            given: The options as they were given.
        """
        share = UNKNOWING_SHARE if given.get("share", AUTO) == AUTO and self.balanced else self.share
        follows = given.get("class_share", AUTO) == AUTO and self.balanced
        return replace(self, share=share, class_share=share if follows else self.class_share)

    def weight(self, epoch: int, epochs: int) -> float:
        """Return the overall weight in an epoch (counted from 0) of a training of `epochs` epochs."""
        progress = min(epoch / max(epochs - 1, 1), 1.0)
        fallen = {"constant": 0.0, "linear": progress, "cosine": (1 - math.cos(math.pi * progress)) / 2}[self.schedule]
        return self.strength * (1 - fallen * (1 - self.cwd_final))

    @property
    def strength(self) -> float:
        """The overall weight at its peak; 1 under the balanced rule, where each level has its own share."""
        return 1.0 if self.balanced else float(self.cwd)

    @property
    def balanced(self) -> bool:
        """Whether the weights follow the gradients."""
        return self.cwd == BALANCED

    @property
    def labeling(self) -> list[str]:
        """The options that ask the teacher for labels."""
        asked = {"unlabeled": self.unlabeled, "complete_labels": self.complete_labels}
        return [name for name, value in asked.items() if value]

    def describe_schedule(self) -> str:
        """Return the overall weight and its schedule in words."""
        full = self.share if self.balanced else float(self.cwd)
        fall = "" if self.schedule == "constant" else f" falling to {full * self.cwd_final:g} ({self.schedule})"
        kind = "gradient share" if self.balanced else "weight"
        return f"{kind} {full:g}{fall}"

    def weights_of(self, names: list[str]) -> list[float]:
        """Return one weight for each of the named levels.

        Raises:
            ConfigError: If `level_weights` is neither one number nor as many as there are levels.
        """
        given = self.level_weights * (len(names) if len(self.level_weights) == 1 else 1)
        if len(given) != len(names):
            raise ConfigError(
                f"level_weights={','.join(map(str, given))}: {len(given)} weights for the {len(names)} distilled "
                f"levels {', '.join(names)}; give one number, or one for each level"
            )
        return [weight * (self.share if self.balanced else 1) for weight in given]


def split_options(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split arguments into our options and the rest, which are Ultralytics'."""
    ours = {name: value for name, value in arguments.items() if name in OPTIONS}
    return ours, {name: value for name, value in arguments.items() if name not in OPTIONS}


def check_names(arguments: Mapping[str, Any], known: Collection[str]) -> None:
    """Refuse arguments that neither yolo_cwd nor Ultralytics knows.

    Args:
        arguments: Arguments other than our options.
        known: The names that Ultralytics accepts.

    Raises:
        ConfigError: For the first unknown one, with the nearest known name.
    """
    for name, value in arguments.items():
        if name not in known:
            near = get_close_matches(name, [*OPTIONS, *known], n=1)
            remedy = f"did you mean {near[0]}?" if near else "'yolo_cwd settings' and 'yolo cfg' list the known ones"
            raise ConfigError(f"{name}={value}: unknown argument; {remedy}")


def level_name(stride: int) -> str:
    """Return the usual name of a pyramid level: stride 8 is P3, stride 16 is P4."""
    return f"P{stride.bit_length() - 1}"


def with_suffix(model: str) -> str:
    """Return a model's name, with `.pt` added if it has no suffix: yolov8l becomes yolov8l.pt."""
    return model if Path(model).suffix else f"{model}.pt"


def at_home(value: Any) -> Any:
    """Return a value with the user's home folder filled in: for a path below `~`, or each item of a list."""
    if isinstance(value, list | tuple):
        return type(value)([at_home(item) for item in value])
    is_below = isinstance(value, str | Path) and (str(value) == "~" or str(value).startswith("~/"))
    return type(value)(Path(value).expanduser()) if is_below else value


def path_or_value(name: str, text: str, value: Any) -> Any:
    """Return what was typed for an argument: the text where it names images, since a folder 2024_06_15 is no number.

    Args:
        name: The argument.
        text: What was typed.
        value: The same, as Ultralytics reads it.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return text if name in IMAGES and is_number else value


def model_path(argument: str, value: str | Path) -> str:
    """Return the path of a model, with its suffix and the user's home filled in.

    Raises:
        ConfigError: If it is a folder.
    """
    path = at_home(value)
    named = with_suffix(str(path))
    if Path(path).is_dir() and not Path(named).is_file():
        raise ConfigError(f"{argument}={value}: is a folder; name the model in it, such as {value}/weights/best.pt")
    return named


def _teacher(value: Any) -> Any:
    if value is None or value == "":
        raise ConfigError("teacher: missing; name the stronger model to learn from, such as teacher=yolov8l.pt")
    if isinstance(value, str | Path):
        return model_path("teacher", value)
    if isinstance(value, bool | int | float | list | tuple | dict):
        shown = type(value).__name__ if isinstance(value, list | tuple | dict) else value
        raise ConfigError(f"teacher={shown}: not a model; give a name, a .pt or .yaml path, or a YOLO model")
    return value


def _number(name: str, value: Any, zero: bool = True, most: float = math.inf, or_else: str = "") -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not 0 <= value <= most or (value == 0 and not zero):
        bound = "at least 0" if zero else "above 0"
        upper = f" and at most {most:g}" if most < math.inf else ""
        example = _example(name)
        raise ConfigError(f"{name}={value}: must be {or_else}a number {bound}{upper}, such as {name}={example}")
    return float(value)


def _epochs(name: str, value: Any) -> int | None:
    if value is None or value == AUTO:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ConfigError(f"{name}={value}: must be {AUTO} or a whole number of at least 0, such as {name}=100")
    return value


def _choice(name: str, value: Any, choices: tuple[Any, ...]) -> Any:
    if not any(value is c or (isinstance(value, str) and value == c) for c in choices):
        raise ConfigError(f"{name}={value}: must be one of {', '.join(map(str, choices))}")
    return value


def exists(path: str | Path) -> bool:
    """Return whether there is a file or folder; false for what cannot be the name of one."""
    return os.path.exists(path)  # noqa: PTH110 - Path.exists raises an error for a name that is too long


def _paths(name: str, value: Any) -> tuple[str, ...]:
    """Return absolute paths; a string holds one path, or several separated by commas."""
    paths = () if value is None else value
    if isinstance(value, str | Path | int) and not isinstance(value, bool):  # 2024 may be a folder
        paths = [value] if exists(str(value)) else str(value).split(",")
    if not isinstance(paths, list | tuple) or not all(isinstance(p, str | Path | int) and str(p) for p in paths):
        raise ConfigError(f"{name}={value}: not a path; give a folder, a glob, a .txt list, or several with commas")
    return tuple(str(Path(at_home(str(path).strip())).absolute()) for path in paths)


def _level_weights(value: Any) -> tuple[float, ...]:
    weights = tuple(_number("level_weights", x) for x in (value if isinstance(value, list | tuple) else [value]))
    if not weights:
        raise ConfigError("level_weights=[]: give one number, or one for each level, such as level_weights=1,1,0.5")
    return weights


def _levels(value: Any) -> tuple[int, ...] | None:
    if value == "all":
        return None
    items = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
    strides = {_stride(item) for item in items}
    if not strides or None in strides:
        raise ConfigError(f"levels={value}: must be all, names or strides, such as levels=P3,P4 or levels=8,16")
    return tuple(sorted(s for s in strides if s is not None))


def _stride(item: Any) -> int | None:
    if isinstance(item, str):
        name = re.fullmatch(r"[Pp]([2-7])", item.strip())
        item = 2 ** int(name[1]) if name else int(item) if item.strip().isdecimal() else None
    return item if isinstance(item, int) and item in {4, 8, 16, 32, 64, 128} else None


def _example(name: str) -> float:
    default = {"cwd": 100.0, "pool_ratio": 4.0}.get(name, OPTIONS[name].default)
    return default if isinstance(default, int | float) else 1.0
