# SPDX-License-Identifier: AGPL-3.0-or-later
"""Turns what Ultralytics refuses before a training into one line with the argument, its value and a remedy."""

from __future__ import annotations

import errno
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ultralytics.utils import SETTINGS
from ultralytics.utils.checks import check_model_file_from_stem, check_yolov5u_filename
from ultralytics.utils.downloads import GITHUB_ASSETS_NAMES

from yolo_cwd.config import ConfigError, first_line, unusable_data, unusable_model

PLACES = {"get_dataset": "data", "get_dataloader": "data", "setup_model": "model"}  # what each function works on
PACKAGES = {"modelopt": "nvidia-modelopt"}  # where the name of a module is not that of its package
OPTIMIZERS = "auto, SGD, MuSGD, Adam, Adamax, AdamW, NAdam, RAdam, RMSProp"
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}  # these end any training, even one that has begun
NO_ACCESS = {errno.EACCES, errno.EPERM, errno.ENOTDIR}


def refusal(error: BaseException, arguments: Mapping[str, Any]) -> ConfigError:
    """Return the error to raise for one that Ultralytics raised while setting up a training.

    Args:
        error: What was raised.
        arguments: The arguments of the training, as they were given.
    """
    called = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
    about = next((PLACES[name] for name in called if name in PLACES), None)
    number = error.errno if isinstance(error, OSError) else None
    if number and (number in FULL or "claim" in called or (number in NO_ACCESS and not about)):
        return unwritable(error, "project", arguments.get("project"))
    if about == "data":
        return unusable_data(arguments.get("data"), error.__cause__ or error)
    if about == "model":
        return unusable_student(arguments, error)
    if isinstance(error, NotImplementedError) and called[-1:] == ["build_optimizer"]:
        return ConfigError(
            f"optimizer={arguments.get('optimizer')}: there is none of this name; give one of {OPTIMIZERS}"
        )
    if isinstance(error, ModuleNotFoundError):
        quantized = error.name == "modelopt" and "quantize" in arguments
        what = f"quantize={arguments['quantize']}" if quantized else error.name
        package = PACKAGES.get(str(error.name), error.name)
        return ConfigError(f"{what}: needs the package {package}, which is not installed; pip install {package}")
    return ConfigError(first_line(error))


def is_obtainable(checkpoint: str | Path) -> bool:
    """Return whether a checkpoint is there, or one that Ultralytics downloads.

    For any other name Ultralytics asks the network all the same, and waits for a minute where there is none.
    """
    name = check_yolov5u_filename(check_model_file_from_stem(str(checkpoint).strip()), verbose=False)
    here = Path(name).exists() or (Path(SETTINGS["weights_dir"]) / name).exists()
    return here or name.lower().startswith(("http:/", "https:/")) or Path(name).name in GITHUB_ASSETS_NAMES


def require_models(arguments: Mapping[str, Any]) -> None:
    """Refuse a training whose student or `pretrained` weights are neither there nor known to Ultralytics.

    Args:
        arguments: The arguments of the training.

    Raises:
        ConfigError: For the first of them.
    """
    student = arguments.get("model") or arguments.get("student")
    given = {"student": student if str(student).lower().endswith(".pt") else None}
    if not arguments.get("resume"):
        given["pretrained"] = arguments.get("pretrained")
    for name, value in given.items():
        if isinstance(value, str | Path) and not is_obtainable(value):
            raise unusable_student({name: value}, FileNotFoundError())


def unusable_student(arguments: Mapping[str, Any], error: BaseException) -> ConfigError:
    """Return the error to raise for a student that cannot be built or whose `pretrained` weights cannot be loaded."""
    pretrained = arguments.get("pretrained")
    if isinstance(pretrained, str | Path) and not Path(pretrained).is_file():
        return unusable_model(f"pretrained={pretrained}", error, "give an existing .pt checkpoint, or True")
    student = arguments.get("student") or arguments.get("model")
    return unusable_model(f"student={student}", error, "give an existing .pt checkpoint or .yaml model")


def require_autocast(amp: Any, device: Any) -> None:
    """Refuse a mixed precision that Ultralytics does not have on a device.

    Raises:
        ConfigError: If it is bfloat16, and the device none of CUDA.
    """
    if amp == "bf16" and device.type != "cuda":
        raise ConfigError(f"amp=bf16: Ultralytics has it on CUDA only, not on device={device}; use amp=False")


def disk_is_full(error: BaseException) -> bool:
    """Return whether an error means that nothing can be written any more."""
    return isinstance(error, OSError) and error.errno in FULL


def unwritable(error: Any, argument: str, place: Any, remedy: str = "", file: Any = "a file") -> ConfigError:
    """Return the error to raise if a file cannot be written.

    Args:
        error: The `OSError` that was raised.
        argument: The argument that says where files go.
        place: Its value, if it was given.
        remedy: What to do; by default to choose another place.
        file: What could not be written, where the error does not know.
    """
    where = f"{argument}={place}" if place else argument
    reason = f"cannot write {error.filename or file} ({error.strerror})"
    return ConfigError(
        f"{where}: {reason}; {remedy or 'give a folder on a disk that has room and that you may write to'}"
    )
