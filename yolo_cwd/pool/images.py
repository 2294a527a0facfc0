# SPDX-License-Identifier: AGPL-3.0-or-later
"""Which images a pool has: all that its sources name, except unreadable ones, duplicates and images of the data set."""

from __future__ import annotations

import glob
import hashlib
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from ultralytics.data.utils import IMG_FORMATS
from ultralytics.utils import TQDM
from ultralytics.utils.patches import imread

from yolo_cwd.config import ConfigError, Settings, exists
from yolo_cwd.log import PREFIX
from yolo_cwd.run.files import content_of

HELD_OUT = ("val", "test", "minival")  # splits of the data that no training may see
LEAST_SIDE = 10  # pixels: Ultralytics trains on nothing smaller
VERIFIED = {"JPEG", "PNG"}  # formats that Pillow verifies as a whole, and that OpenCV reads under these suffixes:
SUFFIXES = {".jpg", ".jpeg", ".png"}
READERS = 8  # threads: the disk sets the pace


class Split(NamedTuple):
    """The images of a data set: those for training, as often as they are named there, and those held out."""

    train: list[Path]
    held_out: list[Path]


class Survey(NamedTuple):
    """What is in a pool.

    Attributes:
        images: The images that can be used, in the order of their paths.
        unreadable: Number of files that are not images, or too small.
        duplicates: Number of images with the same content as another one in the pool.
        held_out: Number of images that are among those that models are scored on.
        labeled: Number of images that are among the training images of the data.
    """

    images: list[Path]
    unreadable: int = 0
    duplicates: int = 0
    held_out: int = 0
    labeled: int = 0

    def left_out(self) -> str:
        """Return in words what has been left out; an empty string if nothing was."""
        parts = {
            "unreadable": self.unreadable,
            "there twice": self.duplicates,
            "among the training images": self.labeled,
            "among the images that models are scored on": self.held_out,
        }
        return ", ".join(f"{count:,} {reason}" for reason, count in parts.items() if count)

    def describe(self) -> str:
        """Return in words what is in it."""
        left_out = self.left_out()
        return f"{len(self.images):,} images can be used{left_out and f'; left out: {left_out}'}"


def list_images(sources: Iterable[str], argument: str = "") -> list[Path]:
    """Return the images that sources name, each once, in the order of their paths.

    Args:
        sources: Folders (searched to any depth), globs, `.txt` lists of paths, or images.
        argument: The argument that names them. With it, a source that names nothing is refused; without it, skipped.

    Raises:
        ConfigError: If a source names nothing.
    """
    return list(dict.fromkeys(_every_mention(sources, argument)))


def _every_mention(sources: Iterable[str], argument: str = "") -> list[Path]:
    """Return the images as `list_images` does, but each as often as it is named: Ultralytics trains on it so often."""
    found: list[str] = []
    for source in sources:
        try:
            files = _files_of(source)
        except UnicodeDecodeError as error:
            raise ConfigError(f"{argument or 'data'}={source}: not text in UTF-8; save the list as UTF-8") from error
        except OSError as error:
            reason = f"cannot be read ({error.strerror})"
            raise ConfigError(f"{argument or 'data'}={source}: {reason}; let yourself read the list") from error
        if not files and argument:
            raise ConfigError(f"{argument}={source}: names no file; give a folder, a glob, a .txt list, or an image")
        found.extend(file for file in files if file.rpartition(".")[-1].lower() in IMG_FORMATS)
    return [Path(file) for file in sorted(found)]


def _files_of(source: str) -> list[str]:
    path = Path(source).absolute()
    if not exists(path):
        return [file for match in _glob(str(path)) for file in _files_at(Path(match))] if glob.has_magic(source) else []
    if path.is_file() and path.suffix.lower() == ".txt":
        return _files_of_list(path)
    return _files_at(path)


def _files_at(path: Path) -> list[str]:
    """Return the files in a folder, at any depth, or the file itself."""
    return _glob(str(Path(glob.escape(str(path))) / "**" / "*.*")) if path.is_dir() else [str(path)]


def _glob(pattern: str) -> list[str]:
    return glob.glob(pattern, recursive=True)  # noqa: PTH207 - as Ultralytics does, through links to folders too


def _files_of_list(file: Path) -> list[str]:
    """Return the paths in a list; those with `./`, or not found from the working folder, are relative to the list."""
    lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    here, there = Path.cwd(), file.parent.absolute()
    return [str((here if not line.startswith("./") and exists(line) else there) / line) for line in lines]


def images_of_data(data: Mapping[str, Any]) -> Split:
    """Return the images of a data set as Ultralytics has resolved it."""
    held_out = list_images(path for split in HELD_OUT for path in _paths(data, split))
    return Split(_every_mention(_paths(data, "train")), held_out)


def _paths(data: Mapping[str, Any], split: str) -> list[str]:
    value = data.get(split) or []
    return value if isinstance(value, list) else [value]


def identity(file: Path) -> str:
    """Return a name for a file in its present state: a new path, size or modification time gives a new name."""
    state = file.stat()
    return fingerprint(str(file), state.st_size, state.st_mtime_ns)[:16]


def fingerprint(*values: Any) -> str:
    """Return a hash of some plain values that is the same everywhere and always."""
    return hashlib.sha256(repr(values).encode()).hexdigest()


def survey(images: Sequence[Path], data: Split) -> Survey:
    """Return which images of a pool can be used.

    Args:
        images: The images of the pool.
        data: The images of the data set. Content decides whether an image is one of them, not its name.
    """
    with ThreadPoolExecutor(READERS) as threads:
        readable = with_progress(threads.map(is_readable, images), len(images), "looking at the images")
        usable = [image for image, good in zip(images, readable, strict=True) if good]
        contents = _contents_by_need([*data.held_out, *data.train, *usable], threads)
    held_out, train = ({contents[image] for image in part if image in contents} for part in (data.held_out, data.train))
    kept: dict[Any, Path] = {}
    found: Counter[str] = Counter()
    for image in usable:
        content = contents[image]
        reason = "held_out" if content in held_out else "labeled" if content in train else "duplicates"
        if content in held_out or content in train or content in kept:
            found[reason] += 1
        else:
            kept[content] = image
    return Survey(list(kept.values()), unreadable=len(images) - len(usable), **found)


def _contents_by_need(files: Sequence[Path], threads: ThreadPoolExecutor) -> dict[Path, Any]:
    """Return something that identifies the content of each file: its size if unique, otherwise a digest."""
    sizes = {file: size for file, size in zip(files, threads.map(_size, files), strict=True) if size}
    of_size = Counter(sizes.values())
    shared = [file for file, size in sizes.items() if of_size[size] > 1]
    digests = with_progress(threads.map(content_of, shared), len(shared), "comparing images of one size")
    return {**sizes, **dict(zip(shared, digests, strict=True))}


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0


def is_readable(file: Path) -> bool:
    """Return whether Ultralytics can train on a file: its check admits it, and its reader reads it."""
    try:
        with Image.open(file) as image:
            image.verify()
            admitted = min(image.size) >= LEAST_SIDE and str(image.format).lower() in IMG_FORMATS | {"jpeg2000"}
            verified = image.format in VERIFIED and file.suffix.lower() in SUFFIXES
        if not verified or is_cut_off(file):
            with Image.open(file) as image:
                image.load()
        str(file).encode()  # lists of images are in UTF-8
        return admitted and (verified or imread(str(file)) is not None)
    except Exception:
        return False


def is_cut_off(file: Path) -> bool:
    """Return whether a file is a JPEG, whatever its name, that lacks its end; Ultralytics would repair it in place."""
    with file.open("rb") as opened:
        begin = opened.read(2)
        opened.seek(-2, 2)
        return begin == b"\xff\xd8" and opened.read() != b"\xff\xd9"


@contextmanager
def unrepaired(image: Path) -> Iterator[Path]:
    """Yield an image for Ultralytics to check: a copy if it would be repaired in place, since it is the user's."""
    try:
        repair = is_cut_off(image)
    except OSError:  # Ultralytics says what is wrong
        repair = False
    if not repair:
        yield image
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(shutil.copyfile(image, Path(folder) / image.name))


def select_images(
    settings: Settings, images: Sequence[Path], data: Split, labeled: int, argument: str = "unlabeled"
) -> Survey:
    """Return which images of a pool are used: all that can be, or as many as `pool_ratio` allows.

    Args:
        settings: The checked options.
        images: The images of the pool.
        data: The images of the data set.
        labeled: How many of its training images are used.
        argument: The argument that names the pool.

    Raises:
        ConfigError: If there is none.
    """
    found = survey(images, data)
    if not found.images:
        reason = found.describe() if found.left_out() else "there are none"
        raise ConfigError(f"{argument}={abbreviated(settings)}: {reason}; give other images")
    if settings.pool_ratio is None or not data.train:
        return found
    return found._replace(images=evenly(found.images, max(1, round(settings.pool_ratio * labeled))))


def abbreviated(settings: Settings) -> str:
    """Return what names the images of a pool, for a message."""
    text = ",".join(settings.unlabeled)
    return text if len(text) <= 100 else f"{text[:97]}..."


def evenly(images: Sequence[Path], most: int) -> list[Path]:
    """Return at most so many images, at even intervals."""
    if len(images) <= most:
        return list(images)
    return [images[i] for i in np.linspace(0, len(images) - 1, most).round().astype(int).tolist()]


def with_progress(results: Iterable[Any], total: int, doing: str) -> list[Any]:
    """Return a list of results that are being worked on, and show the progress."""
    return list(TQDM(results, total=total, desc=f"{PREFIX} {doing}")) if total else []
