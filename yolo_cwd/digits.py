# SPDX-License-Identifier: AGPL-3.0-or-later
"""The embedded data set: real handwritten digits, composed on textured backgrounds, in YOLO layout.

The scans are the 1,797 of the UCI "Optical Recognition of Handwritten Digits" test set (E. Alpaydin and C. Kaynak),
8x8 pixels in 17 shades, which scikit-learn ships. Digits are 10 to 90 pixels high, so that P3, P4 and P5 all have work.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import yaml

NAME = "digits"
VERSION = 1  # part of the folder's name: raise it with every change of what is built
SIZE = 128  # pixels, both sides of an image
IMAGES = {"train": 1600, "val": 300}
SEED = 0
VAL_SHARE = 5  # every fifth scan of a class is for validation only

Array = npt.NDArray[Any]


def build(root: Path | None = None, images: dict[str, int] | None = None, seed: int = SEED) -> Path:
    """Build the data set unless it is there, and return the path of its YAML file.

    It is built under another name and renamed when complete, so that a killed build leaves nothing that looks like a
    data set, and two at once do not disturb each other.

    Args:
        root: Folder to build in; by default the user's cache folder.
        images: Number of images by split.
        seed: The same seed gives the same images, bit for bit, with the same OpenCV.
    """
    images = images or IMAGES
    counts = "-".join(str(n) for n in images.values())
    folder = (root or _cache_folder()) / f"{NAME}-v{VERSION}-{counts}-{seed}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            _write(unfinished, folder, images, seed)
            unfinished.rename(folder)
        except OSError:
            if not folder.exists():  # otherwise another process was first, with the same content
                raise
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return folder / "digits.yaml"


def resolve(data: Any, task: str = "detect") -> Any:
    """Return the argument `data` as it is, but for `digits` the path of the data set, built where needed."""
    return str(build()) if data == NAME else data


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "yolo_cwd"


def _write(folder: Path, final: Path, images: dict[str, int], seed: int) -> None:
    scans = scans_by_split()
    for number, (split, count) in enumerate(images.items()):
        rng = np.random.default_rng([seed, number])
        for kind in ("images", "labels"):
            (folder / kind / split).mkdir(parents=True)
        for index in range(count):
            image, rows = compose(scans[split], rng)
            lines = [f"{digit} " + " ".join(f"{x:.6f}" for x in box) for digit, *box in rows]
            cv2.imwrite(str(folder / "images" / split / f"{index:05d}.jpg"), image, [cv2.IMWRITE_JPEG_QUALITY, 92])
            (folder / "labels" / split / f"{index:05d}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    description = {"path": str(final), **{split: f"images/{split}" for split in images}}
    names = {digit: str(digit) for digit in range(10)}
    (folder / "digits.yaml").write_text(yaml.safe_dump({**description, "names": names}), encoding="utf-8")


def scans_by_split() -> dict[str, list[tuple[int, Array]]]:
    """Return (digit, scan) pairs by split; a scan is [8, 8] with ink from 0 to 1, and no scan is in both splits."""
    from sklearn.datasets import load_digits

    data = load_digits()
    splits: dict[str, list[tuple[int, Array]]] = {"train": [], "val": []}
    seen = dict.fromkeys(range(10), 0)
    for digit, scan in zip(data.target.tolist(), data.images, strict=True):
        splits["train" if seen[digit] % VAL_SHARE else "val"].append((digit, scan / 16))
        seen[digit] += 1
    return splits


def compose(scans: list[tuple[int, Array]], rng: np.random.Generator) -> tuple[Array, list[tuple[Any, ...]]]:
    """Compose one image.

    Args:
        scans: (digit, scan) pairs to draw from.
        rng: Source of all that is random.

    Returns:
        The image, [SIZE, SIZE, 3] uint8, and one row a digit: class, then box centre and size as fractions of SIZE.
    """
    image = _background(rng)
    covered = np.zeros((SIZE, SIZE), bool)
    rows: list[tuple[Any, ...]] = []
    for height in sorted(_heights(rng), reverse=True):
        digit, scan = scans[rng.integers(len(scans))]
        ink = _render(scan, height, rng)
        place = _place(ink.shape, covered, rng)
        if place is None:
            continue
        (y, x), (h, w) = place, ink.shape
        alpha = (ink * rng.uniform(0.6, 1.0))[..., None]
        window = image[y : y + h, x : x + w]
        window += alpha * (_ink_colour(window, rng) - window)
        covered[y : y + h, x : x + w] = True
        rows.append((digit, (x + w / 2) / SIZE, (y + h / 2) / SIZE, w / SIZE, h / SIZE))
    image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.3, 0.9)) + rng.normal(0, rng.uniform(2, 14), image.shape)
    return np.clip(image, 0, 255).astype(np.uint8), rows


def _heights(rng: np.random.Generator) -> Array:
    heights: Array = np.exp(rng.uniform(np.log(10), np.log(90), size=rng.integers(2, 8)))
    return heights


def _background(rng: np.random.Generator) -> Array:
    """Return a texture [SIZE, SIZE, 3] in 0 to 255: noise at several scales around a random colour."""
    image: Array = np.full((SIZE, SIZE, 3), rng.uniform(40, 215, size=3))
    for cells in (2, 5, 16, 43):
        noise = rng.normal(0, rng.uniform(4, 22), size=(cells, cells, 3))
        image += cv2.resize(noise, (SIZE, SIZE), interpolation=cv2.INTER_CUBIC)
    return image.clip(0, 255)


def _render(scan: Array, height: float, rng: np.random.Generator) -> Array:
    """Return a scan's ink, 0 to 1, at about the given height in pixels, tilted, and cut to its box."""
    scale = height / 8
    width = max(round(8 * scale * rng.uniform(0.8, 1.2)), 6)
    large = cv2.resize(scan, (width, max(round(8 * scale), 6)), interpolation=cv2.INTER_CUBIC)
    large = np.pad(large, max(round(height / 6), 1))  # room to tilt in
    rows, columns = large.shape
    tilt = cv2.getRotationMatrix2D((columns / 2, rows / 2), rng.uniform(-12, 12), 1.0)
    ink = np.clip(cv2.warpAffine(large, tilt, (columns, rows), flags=cv2.INTER_LINEAR), 0, 1)
    ys, xs = np.nonzero(ink > 0.25)
    return ink[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]


def _place(shape: tuple[int, ...], covered: Array, rng: np.random.Generator) -> tuple[int, int] | None:
    """Return a corner where at most a fifth of the box is covered already, or None after ten tries."""
    h, w = shape
    if h > SIZE or w > SIZE:
        return None
    for _ in range(10):
        y, x = int(rng.integers(SIZE - h + 1)), int(rng.integers(SIZE - w + 1))
        if covered[y : y + h, x : x + w].mean() <= 0.2:
            return y, x
    return None


def _ink_colour(window: Array, rng: np.random.Generator) -> Array:
    """Return a colour that stands out from the window's mean brightness by at least 50 of 255."""
    mean = window.mean()
    room = [(0.0, mean - 50), (mean + 50, 255.0)]
    low, high = room[int(rng.random() < 0.5)] if min(mean - 50, 205 - mean) > 10 else room[int(mean < 128)]
    colour: Array = np.clip(rng.uniform(low, high) + rng.normal(0, 20, size=3), 0, 255)
    return colour
