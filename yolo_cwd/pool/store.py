# SPDX-License-Identifier: AGPL-3.0-or-later
"""Stores labeled images and the teacher's labels in our own folder, in the layout that Ultralytics reads.

    <cache>/unlabeled/<key>/      one folder for a teacher and the options that decide what it says; completed/<key>/ is
                                  the same for images that have labels of their own
        images/<id>.jpg           a hard link to the user's image, or a copy where links are impossible
        labels/<id>.txt           what the teacher sees there; masks/<id>.png or depth/<id>.npy in tasks with maps
        records/<id>.json         what was found; written last, so it marks the image as done
        lists/                    what a training uses (lists.py)

Nothing is written beside the user's images. Existing labels are used again by every run, even after a kill.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout
from ultralytics import YOLO
from ultralytics.utils import TQDM

from yolo_cwd.config import ConfigError, Settings
from yolo_cwd.log import PREFIX, say, warn
from yolo_cwd.pool.images import fingerprint, identity, is_cut_off
from yolo_cwd.pool.labels import NO_LABELS, ExistingLabels, LabelFormat, label_of
from yolo_cwd.pool.teacher import file_of, predictions
from yolo_cwd.run.distributed import local_zero_first
from yolo_cwd.run.files import atomic_path, cache_folder, content_of, write_atomic
from yolo_cwd.run.refusal import disk_is_full, unwritable

VERSION = 3  # part of the key: raise it whenever what is written changes
WRITERS = 4  # threads
MOST_WRITING = 64  # most images that wait to be written


class Plan(NamedTuple):
    """Who labels images, and where the labels go.

    Attributes:
        teacher: The model that labels.
        settings: The checked options.
        args: The arguments of the training.
        folder: The folder for images and labels.
        form: What labels look like.
        existing: The existing labels of the images; images without any are not in it.
    """

    teacher: YOLO
    settings: Settings
    args: Any
    folder: Path
    form: LabelFormat
    existing: Mapping[Path, ExistingLabels] = {}

    def name(self, image: Path) -> str:
        """Return the name of an image's files; it depends on the existing labels and on what is added to them."""
        if image not in self.existing:
            return identity(image)
        return fingerprint(identity(image), self.existing[image].content, self.form.plain())[:16]


def folder_for(folder: str, settings: Settings, args: Any, *decisive: Any) -> Path:
    """Return the folder for a teacher's labels under what decides them.

    Args:
        folder: The folder's name for images of this kind: unlabeled or completed.
        settings: The checked options.
        args: The arguments of the training.
        decisive: Further plain values that decide what labels look like.
    """
    values = VERSION, content_of(file_of(settings.teacher)), decisive, settings.pool_conf, args.imgsz
    return cache_folder() / folder / fingerprint(*values)[:16]


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
    """Let one process at a time write into a folder; on each machine, the first rank is the first to try.

    Whoever waits for long waits for the lock, outside the barriers. There it would time out, and it would wait forever
    for a process of another machine that shares the folder: that one goes on only once all have passed the barrier.
    """
    lock = FileLock(folder.with_suffix(".lock"))
    with local_zero_first():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=1)
        except Timeout:
            say("waiting for another process that prepares such images")
        except OSError as error:
            raise _unwritable(error, argument, folder) from error
    if not lock.is_locked:
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


def label_images(plan: Plan, images: Sequence[Path]) -> list[dict[str, Any]]:
    """Label the images that have no label by this teacher yet, and return the record of each that could be labeled."""
    names = {image: plan.name(image) for image in images}
    missing = [image for image, name in names.items() if _record(plan.folder, name) is None]
    for part in ("images", plan.form.folder, "records"):
        (plan.folder / part).mkdir(parents=True, exist_ok=True)
    if missing:
        done = f", {len(images) - len(missing)} are done" if len(missing) < len(images) else ""
        say(f"{plan.settings.teacher} labels {len(missing)} images{done}, into {plan.folder}")
        try:
            _write_labels(plan, {image: names[image] for image in missing})
        except KeyboardInterrupt as interrupt:
            raise type(interrupt)("labeling is interrupted; run the same command again to continue") from None
    records = {image: _record(plan.folder, name) for image, name in names.items()}
    if lost := sum(record is None for record in records.values()):
        warn(f"{lost} images to label cannot be read, and are left out")
    return [record for image in images if (record := records[image])]


def _write_labels(plan: Plan, names: Mapping[Path, str]) -> None:
    """Label images, without making the teacher wait for the disk.

    The teacher sees each image under its new name, since its own may be one that Ultralytics takes for a pattern.
    """
    bar = TQDM(total=len(names), desc=f"{PREFIX} labeling")
    writing: deque[Future[None]] = deque()
    with closing(bar), ThreadPoolExecutor(WRITERS) as writers:
        linked = writers.map(lambda image: _link(image, plan.folder, names[image]), names)
        places = {image: place for image, place in zip(names, linked, strict=True) if place}
        words = plan.form.task, places, plan.args, plan.settings.pool_conf, plan.folder
        for source, result in predictions(plan.teacher, *words):
            result = result.cpu()  # those that wait would fill the GPU
            writing.append(writers.submit(_put, plan, result, source, places[source], names[source]))
            if len(writing) > MOST_WRITING:
                writing.popleft().result()
            bar.update(1)
        for rest in writing:
            rest.result()


def _put(plan: Plan, result: Any, source: Path, image: Path, name: str) -> None:
    """Write the label of an image, and the record last."""
    label = label_of(result, plan.form, plan.settings.pool_conf, plan.existing.get(source, NO_LABELS))
    file = Path(plan.form.folder) / f"{name}{plan.form.task.label_suffix}"
    write_atomic(plan.folder / file, label.content)
    record = {
        "source": str(source),
        "image": image.relative_to(plan.folder).as_posix(),
        "label": file.as_posix(),
        "classes": label.classes,
        "confidences": [round(x, 4) for x in label.confidences],
        "already_labeled": label.already_labeled,
    }
    write_atomic(plan.folder / "records" / f"{name}.json", json.dumps(record))


def _record(folder: Path, name: str) -> dict[str, Any] | None:
    """Return the record of a labeled image; None if it has yet to be labeled."""
    try:
        record: dict[str, Any] = json.loads((folder / "records" / f"{name}.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return record if all((folder / record[part]).exists() for part in ("image", "label")) else None


def _link(source: Path, folder: Path, name: str) -> Path | None:
    """Put an image into our folder; None if it is not there any more.

    As a link, or as a copy if that is impossible or the image will be repaired.
    """
    image = folder / "images" / f"{name}{source.suffix.lower()}"
    if image.exists() and not source.exists():
        return image
    image.unlink(missing_ok=True)
    try:
        with suppress(OSError, NotImplementedError):
            if not is_cut_off(source):
                os.link(source.resolve(), image)  # not to a link, which might point elsewhere from here
                return image
        with atomic_path(image) as unfinished:
            shutil.copyfile(source, unfinished)
    except FileNotFoundError:
        return None
    return image
