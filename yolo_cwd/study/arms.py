# SPDX-License-Identifier: AGPL-3.0-or-later
"""The arms of a comparison: named ways of training, as the argument `arms` or a YAML file describes them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from ultralytics.cfg import DEFAULT_CFG_DICT, smart_value

from yolo_cwd.config import OPTIONS, ConfigError, at_home, check_names, first_line, path_or_value, read_yaml
from yolo_cwd.run.request import EXTRA_ARGUMENTS, student_path
from yolo_cwd.study.summary import BASELINE

METHODS = ("plain", "cwd", "builtin")
DEFAULT_METHOD = "cwd"  # of an arm with a name of the user's
IGNORED = {  # arguments that a method ignores
    "plain": {*OPTIONS, "dis"} - {"student"},
    "cwd": {"dis"},
    "builtin": {*OPTIONS} - {"student", "teacher", "teacher_epochs"},
}
OF_ALL = {"seed", "project", "name", "exist_ok", "save_dir", "resume", "split", "task", "cfg"}  # no arm has its own
LONGEST_NAME = 100  # characters: names become those of files
COMMA = re.compile(r",(?![^\[\]]*\])")  # between arms and options, not within a list


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


def parse_arms(value: Any) -> tuple[Arm, ...]:
    """Return the arms of `plain,cwd:tau=2,cwd=20,builtin`, or of a YAML file that maps names to option sets.

    Names are free. The method of an arm is its option `method`, or else the one of `METHODS` that its name begins with,
    or else `cwd`, if it has options. A list of values stands in brackets: `levels=[P3,P4]`. Options may include a
    `teacher` and a `student`, and `against`, the arm to compare with.

    Raises:
        ConfigError: If there is no arm, two with the same name, an unknown method, or an option that is unknown or that
            the method ignores.
    """
    in_file = re.fullmatch(r"[^,:]*\.ya?ml", str(value)) or Path(str(value)).is_file()
    sets = _arms_of_file(value) if in_file else _arms_of_words(value)
    arms = tuple(_arm(name, options) for name, options in sets)
    names = [arm.name for arm in arms]
    if len({name.casefold() for name in names}) != len(arms) or not arms:  # some disks do not tell a from A
        raise ConfigError(f"arms={value}: must name at least one arm, and none twice, such as arms=plain,cwd,builtin")
    for arm in arms:
        if arm.against not in {BASELINE, *names}:
            raise ConfigError(f"against={arm.against}: arm {arm.name} is compared with an arm that there is not")
    return arms


def _arm(word: str, options: Mapping[str, Any]) -> Arm:
    """Return the arm of a name, which may have its options behind a colon, and of these options."""
    first, _, _ = word.partition(":")
    arguments = {name: at_home(value) for name, value in options.items()}
    method = _method(first, arguments)
    name = _file_name(word if first in METHODS else first)
    against = _file_name(str(arguments.pop("against", BASELINE)))
    if len(name) > LONGEST_NAME:
        raise ConfigError(f"arms={word}: too long for the name of a file; begin it with a name, NAME:option=value")
    check_names(arguments, {*OPTIONS, *DEFAULT_CFG_DICT, *EXTRA_ARGUMENTS})
    _refuse_ignored(first, method, arguments)
    if arguments.keys() & {"student", "model"}:
        arguments["model"] = student_path(arguments.pop("student", None), arguments.get("model"), None)
    return Arm(name, method, arguments, against)


def _method(name: str, arguments: dict[str, Any]) -> str:
    """Return the method of an arm, and take it out of its arguments."""
    begun_with = next((method for method in METHODS if name.startswith(method)), None)
    method = arguments.pop("method", None) or begun_with or (DEFAULT_METHOD if arguments else None)
    known = ", ".join(METHODS)
    if method is None:
        near = get_close_matches(name, METHODS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"give {name}:option=value; a list stands in brackets, [P3,P4]"
        raise ConfigError(f"arms={name}: is none of {known}, and has no options; {hint}")
    if method not in METHODS:
        raise ConfigError(f"arms={name}: its method {method} is none of {known}")
    return str(method)


def _refuse_ignored(name: str, method: str, arguments: Mapping[str, Any]) -> None:
    """Refuse what would change nothing about an arm.

    Raises:
        ConfigError: For the first such argument.
    """
    for key, value in arguments.items():
        if key in OF_ALL:
            raise ConfigError(f"arms={name}:{key}={value}: no arm has a {key} of its own; leave it out")
        if key in IGNORED[method]:
            user = "builtin" if key == "dis" else DEFAULT_METHOD
            raise ConfigError(
                f"arms={name}:{key}={value}: method={method} ignores {key}; leave it out, or give the arm method={user}"
            )
        if key == "teacher_epochs" and value != 0:
            raise ConfigError(
                f"arms={name}:{key}={value}: all arms share the teacher that is trained; give {key}= for all arms, or "
                f"{key}=0 for the one that takes it as it is"
            )


def _file_name(name: str) -> str:
    return "".join(c if c.isalnum() or c in "._=-" else "_" for c in name)


def _arms_of_words(value: Any) -> list[tuple[str, dict[str, Any]]]:
    sets: list[tuple[str, dict[str, Any]]] = []
    text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    for word in (word.strip() for word in COMMA.split(text) if word.strip()):
        start, colon, rest = word.partition(":")
        if "=" in start and sets:  # cwd:tau=2,cwd=20 continues after its comma
            name, arguments = sets.pop()
            sets.append((f"{name},{word}", arguments))
            rest = word
        else:
            sets.append((word, {}))
        if rest:
            key, _, given = rest.partition("=")
            sets[-1][1][key] = _value(key, given)
        elif colon:
            raise ConfigError(f"arms={word}: nothing follows the colon; write it as {start}:option=value")
    return sets


def _value(key: str, text: str) -> Any:
    """Return the value of an option as the command line reads it, or the values of a list in brackets."""
    if text.startswith("[") and text.endswith("]"):
        return [path_or_value(key, item.strip(), smart_value(item.strip())) for item in text[1:-1].split(",")]
    return path_or_value(key, text, smart_value(text))


def _arms_of_file(value: Any) -> list[tuple[str, dict[str, Any]]]:
    try:
        return [(str(name), dict(options or {})) for name, options in read_yaml(at_home(str(value))).items()]
    except (OSError, yaml.YAMLError, TypeError, ValueError) as error:
        raise ConfigError(f"arms={value}: {first_line(error)}; give a YAML file that maps names to options") from error
