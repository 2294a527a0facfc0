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
from ultralytics.utils import DEFAULT_CFG, LOCAL_RANK, LOGGER, TQDM, colorstr
from ultralytics.utils.torch_utils import parse_device

from yolo_cwd.config import ConfigError, Settings
from yolo_cwd.pool.images import (
    Split,
    Survey,
    cut_off,
    evenly,
    fingerprint,
    identity,
    images_of_data,
    list_images,
    survey,
)
from yolo_cwd.pool.labels import MAPS, NOTHING, Form, label_of, no_label, painted
from yolo_cwd.pool.plan import Plan, changed, plan_of, shown
from yolo_cwd.run.distributed import first_here_first
from yolo_cwd.run.files import write_whole, written_whole
from yolo_cwd.run.refusal import disk_is_full, unwritable
from yolo_cwd.run.request import data_of

WRITABLE = {".jpg", ".jpeg", ".png", ".bmp"}  # suffixes of images that OpenCV can write as well as read
MOST_OBJECTS = 1000  # in an image, certain or not: more would need too much memory for their masks
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
    return _chosen(settings, images, split, len(share(split.train, args.fraction, data)))


def _chosen(settings: Settings, images: Sequence[Path], split: Split, labelled: int) -> Survey:
    found = survey(images, split)
    if not found.images:
        reason = found.told() if found.left_out() else "there are none"
        raise ConfigError(f"unlabeled={shown(settings)}: {reason}; give other images")
    if settings.pool_ratio is None or not split.train:
        return found
    return found._replace(images=evenly(found.images, max(1, round(settings.pool_ratio * labelled))))


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
    pool = made_once(plan.folder, f"unlabeled={shown(plan.settings)}", lambda: _lists(plan, data, labelled))
    LOGGER.info(f"{colorstr('CWD:')} {_told(pool.found, plan)}; in {pool.folder}")
    if pool.found.left_out:
        say = LOGGER.warning if pool.found.scored_on else LOGGER.info
        say(f"{colorstr('CWD:')} images of unlabeled= that are left out: {pool.found.left_out}")
    return pool


def made_once(folder: Path, argument: str, make: Callable[[], Path]) -> Pool:
    """Return the pool that the lists in a folder describe; one process at a time makes them.

    Args:
        folder: The folder.
        argument: The argument that asks for the lists, with its value.
        make: Returns the file that says what is in the lists; writes it if missing.

    Raises:
        ConfigError: If nothing can be written there.
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
        ConfigError: If nothing can be written there.
    """
    try:
        with _alone(folder, argument):
            yield
    except OSError as error:
        if not disk_is_full(error):
            raise
        raise _unwritable(error, argument, folder) from error


def _unwritable(error: OSError, argument: str, folder: Path) -> ConfigError:
    full = "make room, or set XDG_CACHE_HOME to a folder on another disk"
    remedy = full if disk_is_full(error) else "set XDG_CACHE_HOME to a folder of yours"
    return unwritable(error, argument, None, remedy, file=folder)


@contextmanager
def _alone(folder: Path, argument: str) -> Iterator[None]:
    """Let one process at a time write into a folder; on each machine, the first rank goes first.

    The others wait for the lock, not at a barrier, which would time out.
    """
    lock = FileLock(folder.with_suffix(".lock"))
    with first_here_first():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=1)
        except Timeout:
            if LOCAL_RANK in {-1, 0}:
                LOGGER.info(f"{colorstr('CWD:')} waiting for another process that prepares such images")
            lock.acquire()
        except OSError as error:
            raise _unwritable(error, argument, folder) from error
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
    labelled = share(split.train, args.fraction, data)
    what = [identity(image) for part in (images, labelled, split.held_out) for image in part if image.exists()]
    description = described(data)
    file = plan.folder / "lists" / f"{fingerprint(what, settings.pool_ratio, description, *others)[:16]}.json"
    if is_whole(file, plan.form):
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


def is_whole(file: Path, form: Form) -> bool:
    """Return whether a list is complete, and neither an image of it nor a label has been removed.

    Args:
        file: The file that says what is in it.
        form: What its labels look like.
    """
    if not file.exists():
        return False
    images = map(Path, file.with_suffix(".txt").read_text(encoding="utf-8").splitlines())
    folder = file.parents[1] / form.folder
    return all(image.exists() and (folder / f"{image.stem}{form.suffix}").exists() for image in images)


def share(images: list[Path], fraction: Any, data: Mapping[str, Any]) -> list[Path]:
    """Return the images of a data set that Ultralytics would use under its argument `fraction`."""
    part = fraction[0] if isinstance(fraction, list) else fraction
    if part == 1 or data.get("complete"):  # downloaded in part already
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
    """Label the images that have no label by this teacher yet, and return the record of each that could be labelled."""
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
    records = {image: _record(plan.folder, name) for image, name in names.items()}
    found = [record for record in (records[str(image)] for image in images) if record]
    if lost := len(names) - len({record["source"] for record in found}):
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
    with tempfile.TemporaryDirectory(dir=plan.folder) as passing:
        listing = Path(passing) / "images.txt"
        listing.write_text("\n".join(images), encoding=locale.getpreferredencoding(False))  # as it is read
        batch = args.batch if args.batch >= 1 else DEFAULT_CFG.batch  # one below 1 is estimated later, for the training
        asked = {"conf": conf, "imgsz": args.imgsz, "batch": batch, "device": _device(args.device)}
        asked |= {"max_det": MOST_OBJECTS, "stream": True, "verbose": False, "save": False}
        crowded = 0
        for result in plan.teacher.predict(str(listing), **asked):
            if result.path in asked_for:
                crowded += plan.form.task not in MAPS and len(result) >= MOST_OBJECTS
                yield result
    if crowded:
        LOGGER.warning(
            f"{colorstr('CWD:')} {crowded} images may have more than {MOST_OBJECTS:,} objects; the rest of them counts "
            "as background: cut such images into smaller ones"
        )


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
    write_whole(plan.folder / plan.labels / f"{name}{plan.form.suffix}", label.content)
    record = {
        "source": str(source),
        "image": f"images/{image.name}",
        "label": f"{plan.labels}/{name}{plan.form.suffix}",
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
    with written_whole(image) as unfinished:
        shutil.copyfile(source, unfinished)


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
