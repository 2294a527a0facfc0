"""A data set for tests, with labels for every task: handwritten digits on textured backgrounds, in YOLO layout.

The scans are the 1,797 of the UCI "Optical Recognition of Handwritten Digits" test set (E. Alpaydin and C. Kaynak),
8x8 pixels in 17 shades, which scikit-learn ships. Digits are 10 to 90 pixels high, so that P3, P4 and P5 all have work.

The pictures are the same for every task; only the labels differ. `compose` makes a picture and says what is in it. A
small function for each task turns that into labels.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
import yaml

from yolo_cwd.run.files import build_once

NAME = "digits"
VERSION = 1  # part of the folder's name: raise it whenever what is built changes
SIZE = 128  # pixels, both sides of an image
SEED = 0
VAL_SHARE = 5  # every fifth scan of a class is for validation only
INK = 0.25  # a scan has ink where it is darker than this
CLASSES = {number: str(number) for number in range(10)}
BACKGROUND = len(CLASSES)  # in class maps: the class after the last digit, as Ultralytics has it for polygons
KEY_POINTS = {"top_left": (-1, -1), "top_right": (1, -1), "bottom_right": (1, 1), "bottom_left": (-1, 1)}
FLIPPED = [1, 0, 3, 2]  # which key point each of them becomes in a mirrored image
FAR = 20.0  # metres to the background
METRES = 100.0  # distance of a digit one pixel high: as if all had one real size, so that large ones are near

Array = npt.NDArray[Any]


class Digit(NamedTuple):
    """One digit of an image.

    Attributes:
        number: Its class.
        x: Left side of its box, in pixels.
        y: Top of its box, in pixels.
        ink: Where in its box there is ink, [h, w] bool, including what later digits cover.
        tilt: Its counter-clockwise rotation, in degrees.
    """

    number: int
    x: int
    y: int
    ink: Array
    tilt: float


def build(root: Path, images: dict[str, int], seed: int = SEED, task: str = "detect") -> Path:
    """Build the data set unless it exists, and return the path of its YAML file.

    Args:
        root: Folder to build in.
        images: Number of images by split.
        seed: The same seed gives the same images, bit for bit, with the same OpenCV.
        task: The task that the labels are for, one of `TASKS`; the images are the same for all of them.
    """
    counts = "-".join(str(n) for n in images.values())
    name = NAME if task == "detect" else f"{NAME}-{task}"
    folder = root / f"{name}-v{VERSION}-{counts}-{seed}"
    build_once(folder, lambda unfinished: _write(unfinished, folder, images, seed, task))
    return folder / "digits.yaml"


def _write(folder: Path, final: Path, images: dict[str, int], seed: int, task: str) -> None:
    scans = scans_by_split()
    for number, (split, count) in enumerate(images.items()):
        rng = np.random.default_rng([seed, number])
        pictures, labels = folder / "images" / split, folder / LABEL_FOLDERS.get(task, "labels") / split
        pictures.mkdir(parents=True)
        labels.mkdir(parents=True)
        for index in range(count):
            image, digits = compose(scans[split], rng)
            cv2.imwrite(str(pictures / f"{index:05d}.jpg"), image, [cv2.IMWRITE_JPEG_QUALITY, 92])
            _write_labels(labels / f"{index:05d}", digits, task)
    description = {"path": str(final), **{split: f"images/{split}" for split in images}, **_description(task)}
    (folder / "digits.yaml").write_text(yaml.safe_dump(description), encoding="utf-8")


def _write_labels(stem: Path, digits: list[Digit], task: str) -> None:
    """Write the labels of one image: a map, or one line per digit."""
    if task == "semantic":
        cv2.imwrite(f"{stem}.png", class_map(digits))
    elif task == "depth":
        np.save(f"{stem}.npy", depth_map(digits))
    else:
        lines = [f"{digit.number} " + " ".join(f"{x:.6f}" for x in ROWS[task](digit).flat) for digit in digits]
        Path(f"{stem}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _description(task: str) -> dict[str, Any]:
    """Return what the YAML file says about the labels."""
    if task == "semantic":
        return {"names": {**CLASSES, BACKGROUND: "background"}, "masks_dir": LABEL_FOLDERS[task]}
    if task == "depth":
        return {"names": {0: "depth"}}
    if task == "pose":
        shape = [len(KEY_POINTS), 2]
        names = {number: list(KEY_POINTS) for number in CLASSES}
        return {"names": CLASSES, "kpt_shape": shape, "flip_idx": FLIPPED, "kpt_names": names}
    return {"names": CLASSES}


def scans_by_split() -> dict[str, list[tuple[int, Array]]]:
    """Return (digit, scan) pairs by split. A scan is [8, 8] with ink from 0 to 1; no scan is in both splits."""
    from sklearn.datasets import load_digits

    data = load_digits()
    splits: dict[str, list[tuple[int, Array]]] = {"train": [], "val": []}
    seen = dict.fromkeys(range(10), 0)
    for digit, scan in zip(data.target.tolist(), data.images, strict=True):
        splits["train" if seen[digit] % VAL_SHARE else "val"].append((digit, scan / 16))
        seen[digit] += 1
    return splits


def compose(scans: list[tuple[int, Array]], rng: np.random.Generator) -> tuple[Array, list[Digit]]:
    """Compose one image.

    Args:
        scans: (digit, scan) pairs to draw from.
        rng: Source of all randomness.

    Returns:
        The image, [SIZE, SIZE, 3] uint8, and its digits in the order in which they were drawn, large ones first.
    """
    image = _background(rng)
    covered = np.zeros((SIZE, SIZE), bool)
    digits: list[Digit] = []
    for height in sorted(_heights(rng), reverse=True):
        number, scan = scans[rng.integers(len(scans))]
        ink, tilt = _render(scan, height, rng)
        place = _place(ink.shape, covered, rng)
        if place is None:
            continue
        (y, x), (h, w) = place, ink.shape
        alpha = (ink * rng.uniform(0.6, 1.0))[..., None]
        window = image[y : y + h, x : x + w]
        window += alpha * (_ink_color(window, rng) - window)
        covered[y : y + h, x : x + w] = True
        digits.append(Digit(number, x, y, ink > INK, tilt))
    image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.3, 0.9)) + rng.normal(0, rng.uniform(2, 14), image.shape)
    return np.clip(image, 0, 255).astype(np.uint8), digits


def _heights(rng: np.random.Generator) -> Array:
    heights: Array = np.exp(rng.uniform(np.log(10), np.log(90), size=rng.integers(2, 8)))
    return heights


def _background(rng: np.random.Generator) -> Array:
    """Return a texture [SIZE, SIZE, 3] in 0 to 255: noise at several scales around a random color."""
    image: Array = np.full((SIZE, SIZE, 3), rng.uniform(40, 215, size=3))
    for cells in (2, 5, 16, 43):
        noise = rng.normal(0, rng.uniform(4, 22), size=(cells, cells, 3))
        image += cv2.resize(noise, (SIZE, SIZE), interpolation=cv2.INTER_CUBIC)
    return image.clip(0, 255)


def _render(scan: Array, height: float, rng: np.random.Generator) -> tuple[Array, float]:
    """Return a scan's ink (0 to 1), scaled to about the given height in pixels, tilted and cropped; and the tilt."""
    scale = height / 8
    width = max(round(8 * scale * rng.uniform(0.8, 1.2)), 6)
    large = cv2.resize(scan, (width, max(round(8 * scale), 6)), interpolation=cv2.INTER_CUBIC)
    large = np.pad(large, max(round(height / 6), 1))  # room to tilt in
    rows, columns = large.shape
    tilt = rng.uniform(-12, 12)
    turn = cv2.getRotationMatrix2D((columns / 2, rows / 2), tilt, 1.0)
    ink = np.clip(cv2.warpAffine(large, turn, (columns, rows), flags=cv2.INTER_LINEAR), 0, 1)
    ys, xs = np.nonzero(ink > INK)
    return ink[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1], tilt


def _place(shape: tuple[int, ...], covered: Array, rng: np.random.Generator) -> tuple[int, int] | None:
    """Return a corner at which at most a fifth of the box is already covered, or None after ten tries."""
    h, w = shape
    if h > SIZE or w > SIZE:
        return None
    for _ in range(10):
        y, x = int(rng.integers(SIZE - h + 1)), int(rng.integers(SIZE - w + 1))
        if covered[y : y + h, x : x + w].mean() <= 0.2:
            return y, x
    return None


def _ink_color(window: Array, rng: np.random.Generator) -> Array:
    """Return a color that stands out from the window's mean brightness by at least 50 of 255."""
    mean = window.mean()
    room = [(0.0, mean - 50), (mean + 50, 255.0)]
    low, high = room[int(rng.random() < 0.5)] if min(mean - 50, 205 - mean) > 10 else room[int(mean < 128)]
    color: Array = np.clip(rng.uniform(low, high) + rng.normal(0, 20, size=3), 0, 255)
    return color


def box(digit: Digit) -> Array:
    """Return the centre and the size of a digit's box, as fractions of SIZE."""
    h, w = digit.ink.shape
    return np.array([digit.x + w / 2, digit.y + h / 2, w, h]) / SIZE


def outline(digit: Digit) -> Array:
    """Return the outline of a digit's ink as one polygon, [K, 2] fractions of SIZE.

    Cuts there and back join its parts and its holes. Ultralytics fills by the even-odd rule, which leaves the holes
    open. The outline is traced at four times the size, so that it follows the edges of the pixels.
    """
    fine = digit.ink.astype(np.uint8).repeat(4, axis=0).repeat(4, axis=1)
    contours, _ = cv2.findContours(fine, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    polygon, *others = (contour[:, 0] for contour in contours)  # [K, 2] each
    for other in others:
        gaps = np.linalg.norm(polygon[:, None] - other, axis=2)
        here, there = np.unravel_index(gaps.argmin(), gaps.shape)
        around = np.roll(other, -there, axis=0)
        polygon = np.concatenate([polygon[: here + 1], around, around[:1], polygon[here:]])
    return ((polygon + 0.5) / 4 + (digit.x, digit.y)) / SIZE


def oriented_box(digit: Digit) -> Array:
    """Return the corners of the smallest box at any angle around a digit's ink, [4, 2] fractions of SIZE.

    They may lie outside the image if the digit is at its edge.
    """
    corners: Array = cv2.boxPoints(cv2.minAreaRect(outline(digit).astype(np.float32)))
    return corners


def key_points(digit: Digit) -> Array:
    """Return the outermost ink towards each corner of the untilted digit, [4, 2] fractions of SIZE."""
    ink = np.argwhere(digit.ink)[:, ::-1]  # [K, 2]: x and y of every pixel with ink
    upright = ink @ cv2.getRotationMatrix2D((0, 0), -digit.tilt, 1)[:, :2].T
    upright /= np.ptp(upright, axis=0) + 1  # so that width and height count alike
    ends = (upright @ np.array(list(KEY_POINTS.values())).T).argmax(axis=0)
    points: Array = (ink[ends] + 0.5 + (digit.x, digit.y)) / SIZE
    return points


def class_map(digits: list[Digit]) -> Array:
    """Return the class of each pixel, [SIZE, SIZE] uint8."""
    return _paint(np.full((SIZE, SIZE), BACKGROUND, np.uint8), digits, lambda digit: digit.number)


def depth_map(digits: list[Digit]) -> Array:
    """Return the distance of each pixel in metres, [SIZE, SIZE] float16: the larger a digit, the nearer.

    It is stored as an array because older releases of Ultralytics do not read depth from PNG.
    """
    return _paint(np.full((SIZE, SIZE), FAR, np.float16), digits, lambda digit: METRES / len(digit.ink))


def _paint(canvas: Array, digits: list[Digit], value: Callable[[Digit], float]) -> Array:
    """Set a value where each digit has ink, with later digits over earlier ones, as in the image."""
    for digit in digits:
        h, w = digit.ink.shape
        canvas[digit.y : digit.y + h, digit.x : digit.x + w][digit.ink] = value(digit)
    return canvas


ROWS: dict[str, Callable[[Digit], Array]] = {  # what follows the class in a line of a label file
    "detect": box,
    "segment": outline,
    "obb": oriented_box,
    "pose": lambda digit: np.append(box(digit), key_points(digit)),
}
LABEL_FOLDERS = {"semantic": "masks", "depth": "depth"}  # tasks whose labels are one map per image
TASKS = (*ROWS, *LABEL_FOLDERS)
