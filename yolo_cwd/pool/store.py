# SPDX-License-Identifier: AGPL-3.0-or-later
"""Stores the images of a pool and the teacher's labels in our own folder, in the layout that Ultralytics reads.

    <cache>/unlabeled/<key>/      one folder for a teacher and the options that decide what it says; completed/<key>/ is
                                  the same for images that have labels of their own (complete.py)
        images/<id>.jpg           a hard link to the user's image, a copy where links are impossible, or a painted copy
        labels/<id>.txt           what the teacher sees there; masks/<id>.png or depth/<id>.npy in tasks with maps;
                                  nothing, and no pixel that counts, with pool_weight=0
        records/<id>.json         what was found; written last, so it marks the image as done
        lists/<key>.txt           images for one training; .yaml is its data set, .json what is in it, written last

Nothing is written beside the user's images. Existing labels are used again by every run, even after a kill.
"""

from __future__ import annotations

import json
import locale
import os
import shutil
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import cv2
import torch
import yaml
from filelock import FileLock, Timeout
from ultralytics import YOLO
from ultralytics.nn.tasks import load_checkpoint
from ultralytics.utils import DEFAULT_CFG, LOCAL_RANK, LOGGER, TQDM, colorstr
from ultralytics.utils.checks import check_model_file_from_stem
from ultralytics.utils.downloads import attempt_download_asset
from ultralytics.utils.torch_utils import parse_device

from yolo_cwd.config import ConfigError, Settings, listed
from yolo_cwd.digits import cache_folder
from yolo_cwd.pool.images import (
    Split,
    Survey,
    content_of,
    cut_off,
    evenly,
    fingerprint,
    identity,
    images_of_data,
    list_images,
    survey,
)
from yolo_cwd.pool.labels import MAPS, NOTHING, Form, Own, label_of, no_label, painted
from yolo_cwd.run.distributed import first_here_first
from yolo_cwd.run.files import put, write_whole
from yolo_cwd.run.refusal import disk_is_full
from yolo_cwd.run.request import data_of

VERSION = 1  # part of the key: raise it whenever what is written changes
# Arguments that a resumed run takes from its checkpoint
OF_DATA = ("data", "imgsz", "single_cls", "classes", "fraction", "split")
PAINTABLE = {1, 3}  # numbers of channels of images that can be written as they were read
WRITABLE = {".jpg", ".jpeg", ".png", ".bmp"}  # suffixes of images that OpenCV can write as well as read
WRITERS = 4  # threads
MOST_WRITING = 64  # most images that wait to be written
QUALITY = [cv2.IMWRITE_JPEG_QUALITY, 95]


class Found(NamedTuple):
    """What is in a pool, as plain values.

    Attributes:
        task: The task that they are labelled for.
        images: Number of images to train on.
        objects: Number of objects by class; of pixels, in tasks where every pixel has a class.
        empty: Number of images without any object.
        painted: Number of images in which something was painted over.
        confidence: Mean confidence of the objects; 0 if there are none.
        left_out: What was left out, in words.
        scored_on: Number of images that were left out because models are scored on them.
        warnings: What else the user should know.
    """

    task: str
    images: int
    objects: dict[str, int]
    empty: int
    painted: int
    confidence: float
    left_out: str
    scored_on: int
    warnings: Sequence[str] = ()


class Pool(NamedTuple):
    """A labelled pool.

    Attributes:
        folder: Where its images and labels are.
        train: What to train on: the training images of the data, and the list of the pool's images.
        data: The YAML file of a data set with both; plain Ultralytics can use it too.
        found: What is in it.
    """

    folder: Path
    train: list[str]
    data: Path
    found: Found


class Plan(NamedTuple):
    """Who labels what, and where the labels go.

    Attributes:
        teacher: The model that labels; None if the images get no labels.
        settings: The checked options.
        form: What labels look like.
        args: The arguments of the training.
        folder: The folder for images and labels.
        own: The existing labels of the images; images without any are not in it.
    """

    teacher: YOLO | None
    settings: Settings
    form: Form
    args: Any
    folder: Path
    own: Mapping[Path, Own] = {}

    @property
    def labels(self) -> str:
        """The folder in which Ultralytics looks for labels."""
        return self.form.folder

    @property
    def doing(self) -> str:
        """What happens to the images, in a word."""
        return "labelling" if self.teacher else "gathering"

    def name(self, image: Path) -> str:
        """Return the name of an image's files; it depends on the existing labels."""
        if image not in self.own:
            return identity(image)
        return fingerprint(identity(image), self.own[image].content, sorted(self.form.classes.items()))[:16]


def whole_teacher(settings: Settings, task: str | None) -> YOLO:
    """Return the teacher with its head.

    Args:
        settings: The checked options; the restricted loader has already admitted the teacher.
        task: The task to label for; None for the teacher's own.

    Raises:
        ConfigError: If it cannot label for the task.
    """
    teacher, why = settings.teacher, "cannot label images"
    asking = " and ".join(settings.labelling)
    if not isinstance(teacher, str):
        raise ConfigError(f"teacher={type(teacher).__name__}: {why} as an object; give the path of its checkpoint")
    if not teacher.lower().endswith(".pt"):
        raise ConfigError(f"teacher={teacher}: {why}, it is not trained; give a .pt checkpoint, or leave {asking} out")
    model = YOLO(str(_file_of(teacher)))
    if task and model.task != task:
        raise ConfigError(
            f"teacher={teacher}: a model for task={model.task} {why} for task={task}; give a teacher for {task}, or "
            f"leave {asking} out"
        )
    return model


def _file_of(teacher: str) -> Path:
    return Path(attempt_download_asset(check_model_file_from_stem(teacher)))


def changed(args: Any, **changes: Any) -> SimpleNamespace:
    """Return a copy of a training's arguments with some of them changed."""
    return SimpleNamespace(**{**vars(args), **changes})


def as_begun(args: Any) -> Any:
    """Return the arguments of a run; where the pool depends on them, a resumed run keeps those of its checkpoint."""
    if not args.resume:
        return args
    begun = load_checkpoint(args.resume)[1]["train_args"]
    return changed(args, **{name: begun[name] for name in OF_DATA if name in begun})


def count(settings: Settings, args: Any) -> Survey:
    """Return which images of the pool can be used, without labelling them.

    Args:
        settings: The checked options.
        args: The arguments of the training.

    Raises:
        ConfigError: If there is none.
    """
    data = data_of(changed(args, single_cls=False)) if args.data else {}
    split = images_of_data(data)
    images = list_images(settings.unlabeled, "unlabeled")
    return _chosen(settings, images, split, len(share(split.train, args.fraction)))


def _chosen(settings: Settings, images: Sequence[Path], split: Split, labelled: int) -> Survey:
    found = survey(images, split)
    if not found.images:
        reason = found.told() if found.left_out() else "there are none"
        raise ConfigError(f"unlabeled={_shown(settings)}: {reason}; give other images")
    if settings.pool_ratio is None or not split.train:
        return found
    return found._replace(images=evenly(found.images, max(1, round(settings.pool_ratio * labelled))))


def _shown(settings: Settings) -> str:
    text = ",".join(settings.unlabeled)
    return text if len(text) <= 100 else f"{text[:97]}..."


def prepare(settings: Settings, task: str | None, args: Any) -> Pool:
    """Return the pool that the options name, labelled by the teacher; existing labels are used again.

    Args:
        settings: The checked options.
        task: The task of the student; None for the teacher's.
        args: The arguments of the training. If `data` is None, labels have the teacher's classes.

    Raises:
        ConfigError: If the teacher cannot label for the data, or if there is nothing to label.
    """
    return label_pool(*plan_of(settings, task, args))


def label_pool(plan: Plan, data: dict[str, Any], labelled: Sequence[str] = ()) -> Pool:
    """Return the pool of a plan, labelled; existing labels are used again.

    Args:
        plan: Who labels what.
        data: The data set.
        labelled: Lists of images to train on beside the pool; the data's by default.

    Raises:
        ConfigError: If there is nothing to label.
    """
    pool = made_once(plan.folder, f"unlabeled={_shown(plan.settings)}", lambda: _lists(plan, data, labelled))
    LOGGER.info(f"{colorstr('CWD:')} {_told(pool.found, plan)}; in {pool.folder}")
    if pool.found.left_out:
        say = LOGGER.warning if pool.found.scored_on else LOGGER.info
        say(f"{colorstr('CWD:')} images of unlabeled= that are left out: {pool.found.left_out}")
    return pool


def plan_of(settings: Settings, task: str | None, args: Any) -> tuple[Plan, dict[str, Any]]:
    """Return the plan for labelling a pool, and the data set; nothing is labelled yet.

    Raises:
        ConfigError: If the teacher cannot label for the data.
    """
    args = as_begun(args)
    if task and "unlabeled" not in settings.labelling:
        return _plan_without_labels(settings, task, args)
    with first_here_first():
        teacher = whole_teacher(settings, task)
        data = data_of(changed(args, single_cls=False)) if args.data else _data_like(teacher)
    form = form_of(teacher, data, settings, _translation(teacher, data, settings, bool(args.single_cls)))
    said = sorted(form.classes.items()), form.point_values, sorted(form.raw_ids.items()), data.get("masks_dir")
    folder = folder_of("unlabeled", settings, form.task, said, args.imgsz)
    return Plan(teacher, settings, form, args, folder), data


def _plan_without_labels(settings: Settings, task: str, args: Any) -> tuple[Plan, dict[str, Any]]:
    """Return the plan for a pool that teaches by the teacher's maps alone; what the teacher knows does not matter."""
    with first_here_first():
        data = data_of(changed(args, single_cls=False))
    polygons = task == "semantic" and not data.get("masks_dir")
    form = Form("segment" if polygons else task, {}, _label_folder(task, data))
    folder = cache_folder() / "unlabeled" / fingerprint(VERSION, form.task, form.folder)[:16]
    return Plan(None, settings, form, args, folder), data


def folder_of(kind: str, settings: Settings, task: str, said: Any, imgsz: int) -> Path:
    """Return the folder for a teacher's labels under the options that decide what it says.

    Args:
        kind: The folder's name for images of this kind: unlabeled or completed.
        settings: The checked options.
        task: The task to label for.
        said: Plain values that tell what labels look like.
        imgsz: The size at which the teacher sees images.
    """
    asked = settings.pool_conf, settings.pool_unsure, imgsz
    key = fingerprint(VERSION, content_of(_file_of(settings.teacher)), task, said, asked)[:16]
    return cache_folder() / kind / key


def made_once(folder: Path, argument: str, make: Callable[[], Path]) -> Pool:
    """Return the pool that the lists in a folder describe; one process at a time makes them.

    Args:
        folder: The folder.
        argument: The argument that asks for the lists, with its value.
        make: Returns the file that says what is in the lists; writes it if missing.

    Raises:
        ConfigError: If the disk is full.
    """
    with writing_alone(folder, argument):
        lists = make()
    data = lists.with_suffix(".yaml")
    train = yaml.safe_load(data.read_text(encoding="utf-8"))["train"]
    return Pool(folder, train, data, Found(**json.loads(lists.read_text(encoding="utf-8"))))


@contextmanager
def writing_alone(folder: Path, argument: str) -> Iterator[None]:
    """Let one process at a time write into a folder of ours.

    Args:
        folder: The folder.
        argument: The argument that asks for what is written, with its value.

    Raises:
        ConfigError: If the disk is full.
    """
    try:
        with _alone(folder):
            yield
    except OSError as error:
        if not disk_is_full(error):
            raise
        raise ConfigError(
            f"{argument}: cannot write {error.filename or folder} ({error.strerror}); make room, or set "
            "XDG_CACHE_HOME to a folder on another disk"
        ) from error


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Let one process at a time write into a folder; on each machine, the first rank goes first.

    The others wait for the lock, not at a barrier, which would time out.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_suffix(".lock"))
    with first_here_first():
        try:
            lock.acquire(timeout=1)
        except Timeout:
            if LOCAL_RANK in {-1, 0}:
                LOGGER.info(f"{colorstr('CWD:')} waiting for another process that prepares such images")
            lock.acquire()
    try:
        yield
    except ConfigError:  # bad input leaves nothing behind
        if not (folder / "records").exists():
            shutil.rmtree(folder, ignore_errors=True)
            Path(lock.lock_file).unlink(missing_ok=True)
        raise
    finally:
        lock.release()


def _lists(plan: Plan, data: dict[str, Any], others: Sequence[str]) -> Path:
    """Return the file that says what is in a pool; make it, and the lists beside it, if missing."""
    settings, args = plan.settings, plan.args
    images, split = list_images(settings.unlabeled, "unlabeled"), images_of_data(data)
    labelled = share(split.train, args.fraction)
    what = [identity(image) for part in (images, labelled, split.held_out) for image in part if image.exists()]
    description = described(data)
    file = plan.folder / "lists" / f"{fingerprint(what, settings.pool_ratio, description, *others)[:16]}.json"
    if is_whole(file):
        return file
    chosen = _chosen(settings, images, split, len(labelled))
    records = label_images(plan, chosen.images)
    train = list(others) or _as_list(description.get("train"))
    if args.fraction != 1 and train and not others:
        train = [_write_list(file.with_name(f"{file.stem}-labelled.txt"), labelled)]
    found = found_in(records, plan.form, data["names"], chosen.left_out(), chosen.held_out)
    return write_lists(file, plan, train, records, description, found)


def described(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the plain values of a data set that Ultralytics has resolved."""
    return {name: _plain(value) for name, value in data.items() if name != "yaml_file"}


def write_lists(
    file: Path,
    plan: Plan,
    others: Sequence[str],
    records: Sequence[Mapping[str, Any]],
    description: Mapping[str, Any],
    found: Found,
) -> Path:
    """Write a list of labelled images, a data set with it, and the file that says what is in it; return that file.

    Args:
        file: The file to return; it is written last.
        plan: Where the images are.
        others: What else to train on.
        records: The records of the images.
        description: The data set without these images.
        found: What is in the list.
    """
    images = _write_list(file.with_suffix(".txt"), [plan.folder / record["image"] for record in records])
    train = [*others, images]
    content = {**description, "train": train, "val": description.get("val") or train}
    write_whole(file.with_suffix(".yaml"), yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
    write_whole(file, json.dumps(found._asdict()))
    return file


def found_in(
    records: Sequence[Mapping[str, Any]], form: Form, names: Mapping[int, str], left_out: str, scored_on: int = 0
) -> Found:
    """Return what the records of labelled images say is in them."""
    objects: Counter[str] = Counter()
    for record in records:
        objects.update({names.get(int(kind), f"class {kind}"): number for kind, number in record["classes"].items()})
    sure = [confidence for record in records for confidence in record["confidences"]]
    return Found(
        task=form.task,
        images=len(records),
        objects=dict(objects.most_common()),
        empty=sum(not record["classes"] for record in records),
        painted=sum(record["painted"] for record in records),
        confidence=sum(sure) / len(sure) if sure else 0.0,
        left_out=left_out,
        scored_on=scored_on,
    )


def is_whole(file: Path) -> bool:
    """Return whether a list is complete and no image of it has been removed."""
    if not file.exists():
        return False
    images = file.with_suffix(".txt").read_text(encoding="utf-8").splitlines()
    return all(Path(image).exists() for image in images)


def share(images: list[Path], fraction: Any) -> list[Path]:
    """Return the images that Ultralytics would use under its argument `fraction`."""
    part = fraction[0] if isinstance(fraction, list) else fraction
    if part == 1:
        return images
    return images[: part if isinstance(part, int) else max(1, round(len(images) * part))]


def _write_list(file: Path, images: Sequence[Path]) -> str:
    file.parent.mkdir(exist_ok=True)
    write_whole(file, "".join(f"{image}\n" for image in images))
    return str(file)


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _as_list(value: Any) -> list[str]:
    return [] if not value else list(value) if isinstance(value, list) else [value]


def label_images(plan: Plan, images: Sequence[Path]) -> list[dict[str, Any]]:
    """Label the images that have no label by this teacher yet, and return the records of all that could be labelled."""
    names = {str(image): plan.name(image) for image in images}
    missing = [image for image in names if _record(plan.folder, names[image]) is None]
    for part in ("images", plan.labels, "records"):
        (plan.folder / part).mkdir(parents=True, exist_ok=True)
    if missing:
        done = f", {len(images) - len(missing)} are done" if len(missing) < len(images) else ""
        who = f"{plan.settings.teacher} labels" if plan.teacher else plan.doing
        LOGGER.info(f"{colorstr('CWD:')} {who} {len(missing)} images{done}, into {plan.folder}")
        try:
            _write_labels(plan, missing, names)
        except KeyboardInterrupt as interrupt:
            raise type(interrupt)(f"{plan.doing} is interrupted; run the same command again to continue") from None
    records = [_record(plan.folder, name) for name in names.values()]
    found = [record for record in records if record]
    if lost := len(records) - len(found):
        LOGGER.warning(f"{colorstr('CWD:')} {lost} images to label cannot be read, and are left out")
    return found


def _write_labels(plan: Plan, images: Sequence[str], names: Mapping[str, str]) -> None:
    """Label images, without making the teacher wait for the disk."""
    bar = TQDM(total=len(images), desc=f"{colorstr('CWD:')} {plan.doing}")
    writing: deque[Future[None]] = deque()
    with closing(bar), ThreadPoolExecutor(WRITERS) as writers:
        results = predictions(plan, images) if plan.teacher else (SimpleNamespace(path=image) for image in images)
        for result in results:
            writing.append(writers.submit(_put, plan, result, Path(result.path), names[result.path]))
            if len(writing) > MOST_WRITING:
                writing.popleft().result()
            bar.update(1)
        for rest in writing:
            rest.result()


def predictions(plan: Plan, images: Sequence[str]) -> Iterator[Any]:
    """Yield the teacher's predictions on images, in any order."""
    settings, args = plan.settings, plan.args
    assert plan.teacher is not None
    conf = min(settings.pool_conf, settings.pool_unsure)
    asked_for = set(images)
    listing = Path(tempfile.mkstemp(suffix=".txt", dir=plan.folder)[1])  # Ultralytics loads a list all at once
    try:
        listing.write_text("\n".join(images), encoding=locale.getpreferredencoding(False))  # as it is read
        batch = args.batch if args.batch >= 1 else DEFAULT_CFG.batch  # one below 1 is estimated later, for the training
        asked = {"conf": conf, "imgsz": args.imgsz, "batch": batch, "device": _device(args.device)}
        for result in plan.teacher.predict(str(listing), stream=True, verbose=False, save=False, **asked):
            if result.path in asked_for:
                yield result
    finally:
        listing.unlink(missing_ok=True)


def _device(device: Any) -> torch.device | str | None:
    """Return the device for this process, out of those of the training."""
    devices = parse_device(device).split(",")
    mine = devices[max(LOCAL_RANK, 0) % len(devices)]
    return torch.device("cuda", int(mine)) if mine.isdecimal() else mine or None


def _put(plan: Plan, result: Any, source: Path, name: str) -> None:
    """Write the label of an image, the image beside it, and the record last."""
    if plan.teacher:
        label = label_of(result, plan.form, plan.settings.pool_conf, plan.own.get(source, NOTHING))
    else:
        label = no_label(source, plan.form)
    image = plan.folder / "images" / f"{name}{source.suffix.lower()}"
    if label.uncertain:
        image = image.with_suffix(image.suffix if image.suffix in WRITABLE else ".png")
        gray = painted(result.orig_img, label.uncertain, label.certain)
        write_whole(image, cv2.imencode(image.suffix, gray, QUALITY)[1].tobytes())
    else:
        _present(source, image)
    write_whole(plan.folder / plan.labels / f"{name}{label.suffix}", label.content)
    record = {
        "source": str(source),
        "image": f"images/{image.name}",
        "label": f"{plan.labels}/{name}{label.suffix}",
        "classes": label.classes,
        "confidences": [round(x, 4) for x in label.confidences],
        "painted": bool(label.uncertain),
        "labelled": label.labelled,
    }
    write_whole(plan.folder / "records" / f"{name}.json", json.dumps(record))


def _record(folder: Path, name: str) -> dict[str, Any] | None:
    """Return the record of a labelled image; None if it has yet to be labelled."""
    try:
        record: dict[str, Any] = json.loads((folder / "records" / f"{name}.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return record if all((folder / record[part]).exists() for part in ("image", "label")) else None


def _present(source: Path, image: Path) -> None:
    """Put an image into our folder: as a link, or as a copy if that is impossible or the image will be repaired."""
    image.unlink(missing_ok=True)
    with suppress(OSError, NotImplementedError):
        if not cut_off(source):
            os.link(source.resolve(), image)  # not to a link, which might point elsewhere from here
            return
    unfinished = image.with_name(f".{image.name}.{os.getpid()}")
    shutil.copyfile(source, unfinished)
    put(unfinished, image)


def _told(found: Found, plan: Plan) -> str:
    if not plan.teacher:
        return f"{found.images:,} images without labels teach by the teacher's maps alone (pool_weight=0)"
    said = f"{found.images:,} images without labels are labelled by the teacher"
    weight = plan.settings.pool_weight
    count = "" if weight == 1 else f"; each counts as {weight:g} of a labelled one in the task's own loss"
    if found.task in MAPS:
        return said + count
    objects = f"{sum(found.objects.values()):,} objects, {found.empty:,} images without any"
    return f"{said}: {objects}, {found.painted:,} with uncertain ones painted over{count}"


def _data_like(teacher: YOLO) -> dict[str, Any]:
    """Return the description of a data set with the teacher's own classes."""
    shape = {"kpt_shape": list(teacher.model.model[-1].kpt_shape)} if teacher.task == "pose" else {}
    masks = {"masks_dir": "masks"} if teacher.task == "semantic" else {}
    channels = teacher.model.yaml.get("channels", 3)
    return {"names": dict(teacher.names), "channels": channels, **shape, **masks}


def form_of(teacher: YOLO, data: Mapping[str, Any], settings: Settings, translation: Mapping[int, int]) -> Form:
    """Return what labels of a teacher for a data set look like.

    Args:
        teacher: The teacher with its head.
        data: The data set, as Ultralytics has resolved it.
        settings: The checked options.
        translation: The data's class for each of the teacher's classes.

    Raises:
        ConfigError: If it cannot make them.
    """
    task, name = teacher.task, f"teacher={settings.teacher}"
    channels = teacher.model.yaml.get("channels", 3)
    if channels != data.get("channels", 3):
        raise ConfigError(
            f"{name}: takes images of {channels} channels, the data have {data.get('channels', 3)}; "
            "choose a teacher trained on such images"
        )
    most = settings.pool_conf if settings.pool_precision is None else 1.0  # not chosen yet
    if channels not in PAINTABLE and settings.pool_unsure < most:
        raise ConfigError(
            f"pool_unsure={settings.pool_unsure:g}: images of {channels} channels cannot be painted over; give "
            f"pool_unsure={most:g} to paint none"
        )
    if task == "semantic" and not data.get("masks_dir"):
        raise ConfigError(
            f"unlabeled={_shown(settings)}: class maps are written as images, the data have polygons; give data with "
            "masks_dir"
        )
    if task == "pose" and (ours := data.get("kpt_shape", [0])[0]) != (theirs := teacher.model.model[-1].kpt_shape[0]):
        raise ConfigError(f"{name}: has {theirs} key points, the data have {ours}; give a teacher trained on such data")
    classes = dict(translation)
    if task == "semantic" and len(data["names"]) == 1:  # its maps have 1 where the class is, and 0 elsewhere
        classes[1] = 1
    raw = _raw_ids(data) if task == "semantic" else {}
    return Form(task, classes, _label_folder(task, data), int(data.get("kpt_shape", [0, 3])[1]), raw)


def _label_folder(task: str, data: Mapping[str, Any]) -> str:
    return {"semantic": data.get("masks_dir"), "depth": "depth"}.get(task) or "labels"


def _translation(teacher: YOLO, data: Mapping[str, Any], settings: Settings, single_class: bool) -> dict[int, int]:
    """Return the data's class for each of the teacher's classes with the same name; none if labels have no classes."""
    theirs, ours = teacher.names, data["names"]
    if teacher.task == "depth":
        return {}
    if single_class and list(theirs.values()) == ["item"]:  # Ultralytics' name for the one class of such a model
        return {0: 0}
    by_name = {name: i for i, name in ours.items()}
    known = {i: by_name[name] for i, name in theirs.items() if name in by_name}
    missing = [name for i, name in ours.items() if i not in known.values()]
    if missing and (settings.pool_classes != "known" or not known):
        remedy = " or pool_classes=known" if known else ""
        raise ConfigError(
            f"teacher={settings.teacher}: does not know {listed(missing)} of the data, and would call "
            f"them background in unlabelled images; give a teacher that does,{remedy or ' or leave unlabeled out'}"
        )
    return known


def _raw_ids(data: Mapping[str, Any]) -> dict[int, int]:
    """Return the value in the data's class maps for each class: `label_mapping` reversed."""
    mapping = {int(raw): kind for raw, kind in (data.get("label_mapping") or {}).items()}
    return {kind: raw for raw, kind in mapping.items() if isinstance(kind, int) and 0 <= raw < 256}
