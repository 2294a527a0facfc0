"""The data set of the other tests: are its labels right?"""

from collections.abc import Callable
from itertools import permutations
from math import isfinite
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import digits
import numpy as np
import pytest
import yaml
from conftest import SHORT, STUDENT, bare
from processes import CONTEXT
from ultralytics import YOLO
from ultralytics.data.utils import polygon2mask

SMALL = {"train": 40, "val": 10}
TINY = {"train": 8, "val": 4}
MODELS = {
    "detect": STUDENT,
    "segment": bare("yolov8n-seg.yaml"),
    "obb": bare("yolov8n-obb.yaml"),
    "pose": bare("yolov8n-pose.yaml"),
    "semantic": bare("yolo26n-sem.yaml"),
    "depth": bare("yolo26n-depth.yaml"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return digits.build(tmp_path_factory.mktemp("digits"), SMALL).parent


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.*")) if p.suffix != ".yaml"}


def test_layout(folder: Path) -> None:
    for split, count in SMALL.items():
        images, labels = (sorted((folder / kind / split).iterdir()) for kind in ("images", "labels"))
        assert [p.stem for p in images] == [p.stem for p in labels]
        assert len(images) == count
        assert cv2.imread(str(images[0])).shape == (digits.SIZE, digits.SIZE, 3)


def test_the_same_seed_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    assert files(digits.build(tmp_path, SMALL).parent) == files(folder)
    assert files(digits.build(tmp_path, SMALL, seed=1).parent) != files(folder)


def test_detection_is_as_it_has_always_been(folder: Path) -> None:
    assert folder.name == "digits-v1-40-10-0"
    assert (folder / "labels" / "train" / "00000.txt").read_text().splitlines() == [
        "1 0.718750 0.355469 0.468750 0.695312",
        "0 0.183594 0.351562 0.070312 0.109375",
        "3 0.371094 0.394531 0.054688 0.085938",
    ]
    image = cv2.imread(str(folder / "images" / "train" / "00000.jpg"))
    assert image.mean(axis=(0, 1)) == pytest.approx([165.266, 101.941, 65.774], abs=0.01)


def test_no_scan_is_in_both_splits() -> None:
    splits = {name: {scan.tobytes() for _, scan in scans} for name, scans in digits.scans_by_split().items()}
    assert not splits["train"] & splits["val"]
    assert sum(len(scans) for scans in digits.scans_by_split().values()) == 1797
    assert {digit for digit, _ in digits.scans_by_split()["val"]} == set(range(10))


def test_labels_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a black background without noise, the box of each digit is the box of its ink."""
    monkeypatch.setattr(digits, "_background", lambda rng: np.zeros((digits.SIZE, digits.SIZE, 3)))
    monkeypatch.setattr(digits, "_heights", lambda rng: np.array([40.0]))
    monkeypatch.setattr(digits, "_ink_color", lambda window, rng: np.full(3, 255.0))
    monkeypatch.setattr(digits.cv2, "GaussianBlur", lambda image, *args: image)
    rng = np.random.default_rng(0)
    monkeypatch.setattr(digits, "_render", lambda scan, height, rng: (np.ones((40, 25)), 0.0))
    image, [digit] = digits.compose(digits.scans_by_split()["train"], rng)
    x, y, w, h = digits.box(digit)
    rows, columns = np.nonzero(image[..., 0] > 100)
    box = np.array([x - w / 2, y - h / 2, x + w / 2, y + h / 2]) * digits.SIZE
    assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def test_rendered_ink_fills_its_box() -> None:
    rng = np.random.default_rng(0)
    for _, scan in digits.scans_by_split()["train"][:50]:
        ink, _ = digits._render(scan, rng.uniform(10, 90), rng)
        edges = [ink[0], ink[-1], ink[:, 0], ink[:, -1]]
        assert all(edge.max() > 0.25 for edge in edges)


def test_sizes_give_every_level_work(folder: Path) -> None:
    lines = [line.split() for p in (folder / "labels").rglob("*.txt") for line in p.read_text().splitlines()]
    heights = np.array([float(line[4]) for line in lines]) * digits.SIZE
    assert heights.min() < 16
    assert heights.max() > 64
    assert {line[0] for line in lines} == {str(d) for d in range(10)}
    assert all(0 <= float(v) <= 1 for line in lines for v in line[1:])


def test_an_existing_data_set_is_not_built_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digits, "_write", lambda *args: pytest.fail("built again"))
    assert digits.build(folder.parent, SMALL).exists()


def test_a_killed_build_leaves_nothing_that_looks_like_a_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(digits.cv2, "imwrite", killed)
    with pytest.raises(KeyboardInterrupt):
        digits.build(tmp_path, SMALL)
    assert not list(tmp_path.iterdir())


def _build(root: Path) -> Path:
    return digits.build(root, SMALL)


def test_two_builds_at_once(folder: Path, tmp_path: Path) -> None:
    with CONTEXT.Pool(2) as pool:
        first, second = pool.map(_build, [tmp_path, tmp_path])
    assert first == second
    assert [p.name for p in tmp_path.iterdir()] == [first.parent.name]
    assert files(first.parent) == files(folder)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The YAML file of each task's data set."""
    root = tmp_path_factory.mktemp("tasks")
    return {task: digits.build(root, TINY, task=task) for task in digits.TASKS}


@pytest.fixture(scope="module")
def pictures() -> list[list[digits.Digit]]:
    """The digits of some pictures."""
    rng = np.random.default_rng(0)
    scans = digits.scans_by_split()["train"]
    return [digits.compose(scans, rng)[1] for _ in range(40)]


@pytest.fixture(scope="module")
def drawn(pictures: list[list[digits.Digit]]) -> list[digits.Digit]:
    """The digits of all these pictures."""
    return [digit for picture in pictures for digit in picture]


def whole(digit: digits.Digit) -> np.ndarray:
    """A digit's ink in its place in the picture."""
    ink = np.zeros((digits.SIZE, digits.SIZE), bool)
    h, w = digit.ink.shape
    ink[digit.y : digit.y + h, digit.x : digit.x + w] = digit.ink
    return ink


def filled(digit: digits.Digit) -> np.ndarray:
    """What Ultralytics makes of a digit's polygon, written with six digits."""
    polygon = np.round(digits.outline(digit), 6) * digits.SIZE
    return polygon2mask((digits.SIZE, digits.SIZE), [polygon.reshape(-1)]).astype(bool)


def test_every_task_has_the_same_images(built: dict[str, Path]) -> None:
    images = [{k: v for k, v in files(file.parent).items() if k.endswith(".jpg")} for file in built.values()]
    assert len(images[0]) == sum(TINY.values())
    assert all(other == images[0] for other in images)
    assert len({file.parent for file in built.values()}) == len(digits.TASKS) == 6


@pytest.mark.parametrize("task", MODELS)
def test_ultralytics_trains_every_task(task: str, built: dict[str, Path], tmp_path: Path) -> None:
    model = YOLO(MODELS[task])
    assert model.task == task
    model.train(**{**SHORT, "model": MODELS[task], "data": str(built[task]), "project": str(tmp_path)})
    trainer = model.trainer
    assert [len(loader.dataset) for loader in (trainer.train_loader, trainer.test_loader)] == list(TINY.values())
    losses = {name: float(value) for name, value in trainer.label_loss_items(trainer.tloss).items()}
    assert all(isfinite(value) for value in losses.values())
    assert sum(value > 0 for value in losses.values()) >= 2
    assert trainer.metrics
    assert all(isfinite(value) for value in trainer.metrics.values())


def test_polygons_are_the_ink(drawn: list[digits.Digit]) -> None:
    """Ultralytics fills them to the pixels with ink: holes stay open, and their boxes are those of detection."""
    overlaps = np.array([(whole(d) & filled(d)).sum() / (whole(d) | filled(d)).sum() for d in drawn])
    assert overlaps.min() > 0.97
    assert overlaps.mean() > 0.999
    for digit in drawn:
        x, y, w, h = digits.box(digit) * digits.SIZE
        corners = np.array([digits.outline(digit).min(axis=0), digits.outline(digit).max(axis=0)]) * digits.SIZE
        assert corners == pytest.approx(np.array([[x - w / 2, y - h / 2], [x + w / 2, y + h / 2]]), abs=1 / 8 + 1e-6)


def test_a_digit_in_two_parts_is_one_polygon() -> None:
    ink = np.zeros((30, 20), bool)
    ink[:18], ink[4:14, 4:16] = True, False  # a ring
    ink[24:, 5:15] = True
    digit = digits.Digit(0, 50, 60, ink, 0.0)
    wrong = whole(digit) ^ filled(digit)
    assert wrong.sum() <= 6  # the cut through the six rows between the parts


def test_oriented_boxes_are_tight(drawn: list[digits.Digit]) -> None:
    for digit in drawn:
        corners = (digits.oriented_box(digit) * digits.SIZE).astype(np.float32)
        points = np.argwhere(whole(digit))[:, ::-1] + 0.5
        assert all(cv2.pointPolygonTest(corners, point, False) >= 0 for point in points.tolist())
        assert cv2.contourArea(corners) <= digit.ink.size
    areas = [cv2.contourArea((digits.oriented_box(d) * digits.SIZE).astype(np.float32)) / d.ink.size for d in drawn]
    assert np.median(areas) < 0.97


def test_an_oriented_box_is_turned_as_the_ink_is() -> None:
    bar = cv2.boxPoints(((40, 40), (50, 12), 30))
    ink = cv2.fillPoly(np.zeros((80, 80), np.uint8), [bar.round().astype(np.int32)], 1).astype(bool)
    corners = digits.oriented_box(digits.Digit(1, 0, 0, ink, 0.0)) * digits.SIZE - 0.5
    assert all(np.linalg.norm(corners - corner, axis=1).min() < 2 for corner in bar)


def test_key_points_are_on_the_ink(drawn: list[digits.Digit]) -> None:
    for digit in drawn:
        columns, rows = (digits.key_points(digit) * digits.SIZE).astype(int).T
        assert whole(digit)[rows, columns].all()
    top_left, top_right, bottom_right, bottom_left = np.mean([digits.key_points(d) for d in drawn], axis=0)
    assert top_left[0] < top_right[0]
    assert bottom_left[0] < bottom_right[0]
    assert max(top_left[1], top_right[1]) < min(bottom_left[1], bottom_right[1])


def test_key_points_turn_with_the_digit() -> None:
    """They are the same places on a glyph at any tilt."""

    def around_the_middle(scan: np.ndarray, tilt: float) -> np.ndarray:
        rng: Any = SimpleNamespace(uniform=lambda low, high: tilt if low < 0 else 1.0)
        digit = digits.Digit(0, 0, 0, digits._render(scan, 60, rng)[0] > digits.INK, tilt)
        middle = np.argwhere(digit.ink).mean(axis=0)[::-1] + 0.5
        turn = cv2.getRotationMatrix2D((0, 0), -tilt, 1)[:, :2]
        return (digits.key_points(digit) * digits.SIZE - middle) @ turn.T

    scans = [scan for _, scan in digits.scans_by_split()["train"][:40]]
    for tilt in (-12, 12):
        moved = [np.linalg.norm(around_the_middle(s, tilt) - around_the_middle(s, 0), axis=1) for s in scans]
        assert np.mean(moved) < 1.5


def test_a_mirrored_digit_has_the_key_points_that_the_yaml_file_tells(
    built: dict[str, Path], drawn: list[digits.Digit]
) -> None:
    told = yaml.safe_load(built["pose"].read_text())
    assert told["kpt_shape"] == [4, 2]
    assert told["kpt_names"][3] == ["top_left", "top_right", "bottom_right", "bottom_left"]
    moved = []
    for digit in drawn:
        mirrored = digit._replace(
            x=digits.SIZE - digit.x - digit.ink.shape[1], ink=digit.ink[:, ::-1], tilt=-digit.tilt
        )
        expected = (digits.key_points(digit) * [-1, 1] + [1, 0])[told["flip_idx"]]
        moved += np.linalg.norm(digits.key_points(mirrored) - expected, axis=1).tolist()
    assert np.mean(np.array(moved) < 1e-9) > 0.95  # the rest are ties


def test_class_maps_agree_with_the_polygons(pictures: list[list[digits.Digit]], built: dict[str, Path]) -> None:
    for picture in pictures:
        expected = np.full((digits.SIZE, digits.SIZE), 10)
        for digit in picture:
            expected[filled(digit)] = digit.number
        assert (digits.class_map(picture) == expected).mean() > 0.999
    assert yaml.safe_load(built["semantic"].read_text())["names"][10] == "background"


@pytest.mark.parametrize("paint", [digits.class_map, digits.depth_map])
def test_later_digits_cover_earlier_ones(paint: Callable[[list[digits.Digit]], np.ndarray]) -> None:
    large, small = (digits.Digit(n, 5, 5, np.ones((n, n), bool), 0.0) for n in (9, 4))
    both = paint([large, small])
    assert (both[5:9, 5:9] == paint([small])[5, 5]).all()
    assert both[9, 9] == paint([large])[5, 5] != both[5, 5]


def test_larger_digits_are_nearer(pictures: list[list[digits.Digit]]) -> None:
    for picture in pictures:
        distances = [digits.depth_map([digit]).min() for digit in picture]
        heights = [len(digit.ink) for digit in picture]
        assert all(
            (distances[i] < distances[j]) == (heights[i] > heights[j]) for i, j in permutations(range(len(picture)), 2)
        )
        assert set(np.unique(digits.depth_map(picture))) == {*distances, np.float16(20)}
        assert 1 < min(distances) <= max(distances) < 12


def test_maps_are_of_their_images(built: dict[str, Path]) -> None:
    _, picture = digits.compose(digits.scans_by_split()["val"], np.random.default_rng([0, 1]))
    depth = np.load(built["depth"].parent / "depth" / "val" / "00000.npy")
    assert (depth == digits.depth_map(picture)).all()
    mask = cv2.imread(str(built["semantic"].parent / "masks" / "val" / "00000.png"), cv2.IMREAD_UNCHANGED)
    assert (mask == digits.class_map(picture)).all()
