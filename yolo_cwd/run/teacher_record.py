# SPDX-License-Identifier: AGPL-3.0-or-later
"""The record of a teacher that a run trains first: what it depends on, and how to start the whole run again.

It is the file `teacher/cwd.yaml` in the run's folder, beside `teacher/weights`. Since it comes before the student's
first checkpoint, it is what a run that is interrupted until then resumes from.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import yaml
from torch import nn
from ultralytics.data.base import BaseDataset
from ultralytics.data.utils import get_hash, img2label_paths
from ultralytics.nn.tasks import yaml_model_load
from ultralytics.utils.checks import check_model_file_from_stem
from ultralytics.utils.downloads import attempt_download_asset
from ultralytics.utils.files import get_latest_run

from yolo_cwd.config import ConfigError, read_yaml, split_options
from yolo_cwd.run.files import content_of, write_atomic
from yolo_cwd.run.state import FILE as STATE

FOLDER, FILE = "teacher", "cwd.yaml"
OBJECT = "start.pt"  # a teacher that was given as an object
ON_RESUME = {  # what Ultralytics lets a resumed training change
    *("device", "workers", "cache", "batch", "imgsz", "patience", "data", "val", "plots", "save_period"),
    "close_mosaic",
}
REPLACEABLE = {*ON_RESUME, "time", "trust_teacher"}  # what may change when a run goes on with its teacher
NAMING = {"model", "student", "resume", "task", "mode", "name", "project", "exist_ok", "save_dir", "pretrained"}
NO_MATTER = {  # arguments that do not affect what a teacher becomes
    *("device", "workers", "project", "name", "exist_ok", "plots", "verbose", "cache", "save_period", "save_dir"),
    *("save", "save_json", "show", "model", "data", "mode", "resume", "cfg"),
}


class Record(NamedTuple):
    """The record of a teacher's training.

    Attributes:
        folder: The folder it is in.
        key: Identifies what the teacher depends on.
        complete: Whether the teacher is trained.
        teacher: What the user named the teacher by.
        arguments: Ultralytics' arguments of the run; none if the teacher is that of a comparison.
        options: The options of the run.
    """

    folder: Path
    key: str
    complete: bool
    teacher: str
    arguments: dict[str, Any]
    options: dict[str, Any]

    def write(self) -> None:
        """Write it into its folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        content = json.loads(json.dumps({k: v for k, v in self._asdict().items() if k != "folder"}, default=str))
        write_atomic(self.folder / FILE, yaml.safe_dump(content, sort_keys=False))

    @property
    def last(self) -> Path:
        """The checkpoint of the last epoch."""
        return last_of(self.folder)

    @property
    def weights(self) -> Path:
        """The checkpoint of the best epoch, or of the last one if there is none."""
        return weights_of(self.folder)


def last_of(folder: Path) -> Path:
    """Return the checkpoint of the last epoch of the teacher in a folder."""
    return folder / "weights" / "last.pt"


def weights_of(folder: Path) -> Path:
    """Return the checkpoint of its best epoch, or of the last one if there is none."""
    best = folder / "weights" / "best.pt"
    return best if best.is_file() else last_of(folder)


def read(folder: Path) -> Record | None:
    """Return the record in a folder; None if there is none, or if it cannot be read."""
    try:
        content = read_yaml(folder / FILE)
        return Record(folder, **{name: content[name] for name in Record._fields if name != "folder"})
    except (OSError, KeyError, TypeError, ValueError, yaml.YAMLError):
        return None


def key_of(teacher: Any, data: Mapping[str, Any], arguments: Mapping[str, Any]) -> str:
    """Return what identifies a teacher that is trained.

    Args:
        teacher: What it starts from: a path or known name, or the model itself.
        data: The data set as Ultralytics resolves it.
        arguments: The arguments of its training.
    """
    splits = {split: files for split in ("train", "val") if (files := images_of(data, split))}
    images = [file for files in splits.values() for file in files]
    values = {name: value for name, value in arguments.items() if name not in NO_MATTER}
    files = get_hash(images + labels_of(data, images))
    parts = [content_of_model(teacher), data["names"], list(splits), files, sorted(values.items())]
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()


def images_of(data: Mapping[str, Any], split: str) -> list[str]:
    """Return the image files of a split of a data set, as Ultralytics finds them; none if it has no such split."""
    if not data.get(split):
        return []
    found: list[str] = BaseDataset.get_img_files(SimpleNamespace(prefix="", fraction=1.0), data[split])
    return found


def labels_of(data: Mapping[str, Any], images: list[str]) -> list[str]:
    """Return the label files of images, whether they are there or not, and the maps of labels that are."""
    labels = [*img2label_paths(images)]
    for folder, end in ((data.get("masks_dir"), ".png"), ("depth", ".png"), ("depth", ".npy")):
        files = img2label_paths(images, folder, end) if folder else []
        labels += [file for file in files if Path(file).is_file()]
    return labels


def content_of_model(model: Any) -> str:
    """Return a hash of the content of a model: a path or known name, or the model itself."""
    if isinstance(model, str | Path) and Path(model).suffix not in {".yaml", ".yml"}:
        return content_of(Path(attempt_download_asset(check_model_file_from_stem(str(model)))))
    digest = hashlib.sha256()
    if isinstance(model, str | Path):
        description = {k: v for k, v in yaml_model_load(model).items() if k != "yaml_file"}
        digest.update(json.dumps(description, default=str).encode())
    else:
        network = model if isinstance(model, nn.Module) else model.model
        for name, value in network.state_dict().items():
            digest.update(
                name.encode() + value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            )
    return digest.hexdigest()


def of_checkpoint(checkpoint: Path) -> Record | None:
    """Return the record that a teacher's checkpoint lies beside; None if it is no such checkpoint."""
    place = checkpoint.absolute().parents
    if len(place) < 3 or place[0].name != "weights" or place[1].name != FOLDER:
        return None
    return read(place[1])


def goes_by_name(given: Mapping[str, Any]) -> bool:
    """Return whether a request starts or continues the run of a name, unless it names a checkpoint to resume from."""
    if given.get("resume") is not True or not given.get("name") or not given.get("teacher"):
        return False
    named = given.get("model") or given.get("student")
    if not named or not isinstance(named, str | Path):
        return True
    return not (Path(named).parent / STATE).is_file() and of_checkpoint(Path(named)) is None


def named_to_resume(given: Mapping[str, Any]) -> Any:
    """Return what a request with `resume` goes on from: the checkpoint that it names, or that of the latest run."""
    resume = given["resume"]
    return resume if isinstance(resume, str | Path) else given.get("model") or given.get("student") or get_latest_run()


class TakenUp(NamedTuple):
    """The arguments of a request.

    Attributes:
        below: Those to start from.
        overrides: Those that take precedence.
        goes_on: Whether the teacher's training goes on, if it is not complete.
        ignored: The names of what was given in vain, since the run that goes on keeps its own.
    """

    below: dict[str, Any]
    overrides: dict[str, Any]
    goes_on: bool = False
    ignored: tuple[str, ...] = ()


def taken_up(below: dict[str, Any], overrides: dict[str, Any]) -> TakenUp:
    """Return the arguments of a request; where it resumes from a teacher's checkpoint, those of the run.

    The student goes on from its own checkpoint if it has one. Otherwise the run starts again in its folder.

    Args:
        below: The arguments to start from.
        overrides: Those that take precedence.
    """
    given = {**below, **overrides}
    if not given.get("resume") or goes_by_name(given):
        return TakenUp(below, overrides)
    named = named_to_resume(given)
    record = of_checkpoint(Path(named)) if isinstance(named, str | Path) and named else None
    if record is None:
        return TakenUp(below, overrides)
    if not record.arguments:
        raise ConfigError(
            f"resume={named}: is the teacher of a comparison; repeat the command 'yolo_cwd compare' instead"
        )
    run = record.folder.parent
    if (last := run / "weights" / "last.pt").is_file():
        own = {name: value for name, value in overrides.items() if name not in NAMING}
        return TakenUp(below, {**own, "resume": str(last), "model": str(last)})
    replaced = {name: value for name, value in overrides.items() if name in REPLACEABLE and value is not None}
    begun = {**record.arguments, **record.options}
    others = sorted(overrides.keys() - replaced.keys() - NAMING)
    ignored = tuple(name for name in others if overrides[name] not in {None, begun.get(name)})
    start = record.folder / OBJECT
    teacher = {"teacher": str(start)} if start.is_file() else {}
    return TakenUp({}, {**begun, **teacher, **replaced, "resume": False, "save_dir": str(run)}, True, ignored)


def own_teacher(kept: Any, run: Path) -> Any:
    """Return the teacher of a resumed run: where the run has trained it itself, its file is where the run is now.

    Args:
        kept: The path that the run had it by.
        run: The folder of the run.
    """
    if not kept or Path(kept).parts[-3:-1] != (FOLDER, "weights"):
        return kept
    here = run.absolute() / FOLDER / "weights" / Path(kept).name
    return str(here) if here.is_file() else kept


def plain(options: Mapping[str, Any], teacher: Any) -> dict[str, Any]:
    """Return the options of a run as plain values, with the absolute path of its teacher."""
    if isinstance(teacher, str | Path):
        teacher = str(Path(teacher).resolve()) if Path(teacher).exists() else str(teacher)
    else:
        teacher = OBJECT  # in the folder of the record
    return {**split_options(options)[0], "teacher": teacher}
