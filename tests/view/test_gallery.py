"""Pictures of what a teacher and two students find."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import STUDENT, TEACHER
from ultralytics import YOLO

from yolo_cwd.view import gallery
from yolo_cwd.view.gallery import Boxes, Found, draw_comparison, find, match, read_labels
from yolo_cwd.view.plots import spread


def boxes(*rows: tuple[float, ...]) -> Boxes:
    """Boxes of (class, left, top, right, bottom)."""
    values = np.array(rows, float).reshape(-1, 5)
    return Boxes(values[:, 1:], values[:, 0].astype(int))


OBJECTS = boxes((0, 0.1, 0.1, 0.3, 0.3), (1, 0.5, 0.5, 0.9, 0.9))
ON_FIRST, ON_SECOND, ELSEWHERE = (0, 0.1, 0.1, 0.3, 0.28), (1, 0.5, 0.5, 0.9, 0.8), (1, 0.0, 0.6, 0.2, 0.9)


def test_items_are_spread_evenly() -> None:
    assert spread(list(range(10)), 3) == [0, 3, 6]
    assert spread([1, 2], 4) == [1, 2]


@pytest.mark.parametrize(
    ("found", "objects"),
    [
        pytest.param([ON_FIRST, ON_SECOND], [True, True], id="both"),
        pytest.param([ELSEWHERE, ON_SECOND], [False, True], id="one, and one elsewhere"),
        pytest.param([(1, *ON_FIRST[1:])], [False, False], id="of another class"),
        pytest.param([ON_FIRST, ON_FIRST], [True, False], id="twice"),
        pytest.param([(0, 0.1, 0.1, 0.3, 0.19)], [False, False], id="less than half of it"),
        pytest.param([], [False, False], id="nothing"),
    ],
)
def test_a_box_finds_an_object(found: list[tuple[float, ...]], objects: list[bool]) -> None:
    assert match(boxes(*found), OBJECTS).tolist() == objects


def test_two_boxes_find_two_objects_in_one_place() -> None:
    twins = boxes(ON_FIRST, ON_FIRST)
    assert match(boxes(ON_FIRST), twins).sum() == 1
    assert match(twins, twins).sum() == 2


def test_an_image_without_labels() -> None:
    assert match(boxes(ON_FIRST), boxes()).tolist() == []


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("weights")
    for name, model in {"teacher": TEACHER, "one": STUDENT, "two": STUDENT}.items():
        YOLO(model).save(folder / f"{name}.pt")
    return {name: folder / f"{name}.pt" for name in ("teacher", "one", "two")}


@pytest.fixture(scope="module")
def images(data: str) -> list[Path]:
    return sorted(Path(data).parent.glob("images/val/*.jpg"))


def test_labels_are_read_as_corners(images: list[Path]) -> None:
    labels = images[0].parents[2] / "labels" / "val" / f"{images[0].stem}.txt"
    number, x, y, w, h = map(float, labels.read_text().splitlines()[0].split())
    objects = read_labels(images[0])
    assert objects.classes[0] == number
    assert objects.corners[0] == pytest.approx([x - w / 2, y - h / 2, x + w / 2, y + h / 2])
    assert len(objects.classes) == len(labels.read_text().splitlines())


def test_as_many_boxes_of_a_class_as_are_labeled(
    images: list[Path], weights: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gallery, "LEAST_CONFIDENCE", 1e-6)
    labels = [read_labels(image) for image in images]
    results = YOLO(weights["one"]).predict(list(map(str, images)), imgsz=64, conf=1e-6, iou=0.5, verbose=False)
    found = find(weights["one"], images, labels, 64)
    predicted, ours, wanted = (
        np.bincount(np.concatenate(classes).astype(int), minlength=80)
        for classes in (
            [result.boxes.cls.numpy() for result in results],
            [of_image.boxes.classes for of_image in found],
            [objects.classes for objects in labels],
        )
    )
    assert ours.tolist() == np.minimum(predicted, wanted).tolist()
    assert ours.sum() > 0
    first = found[[bool(f.boxes.classes.size) for f in found].index(True)]
    corners = np.concatenate([result.boxes.xyxyn.numpy() for result in results])
    assert np.abs(corners - first.boxes.corners[0]).max(axis=1).min() < 1e-6


@pytest.mark.usefixtures("drawn_pictures")
def test_a_row_an_image(images: list[Path], weights: dict[str, Path], tmp_path: Path) -> None:
    sizes = []
    for rows in (1, 3):
        draw_comparison(tmp_path / "picture.png", images, weights, 64, rows)
        sizes.append(cv2.imread(str(tmp_path / "picture.png")).shape[:2])
    (height, width), (height_of_three, width_of_three) = sizes
    assert width == pytest.approx(width_of_three, abs=1)
    assert height_of_three > 2 * height


def test_images_in_which_the_students_differ_are_drawn(
    images: list[Path], weights: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the two students, the second finds everything in the third image, and nothing is found elsewhere."""
    drawn = []

    def found_by(file: Path, images: list[Path], labels: list[Boxes], *_: object) -> list[Found]:
        finds = [file.stem == "two" and i == 2 for i in range(len(images))]
        chosen = [(of_image if x else boxes()) for x, of_image in zip(finds, labels, strict=True)]
        return [Found(c, match(c, of_image)) for c, of_image in zip(chosen, labels, strict=True)]

    monkeypatch.setattr(gallery, "find", found_by)
    monkeypatch.setattr(gallery, "_draw", lambda file, rows, *_: drawn.extend(row.image for row in rows))
    monkeypatch.setattr(gallery, "LEAST_OBJECTS", 1)
    draw_comparison(tmp_path / "picture.png", images, weights, 64, 1)
    assert drawn == [images[2]]


def test_differences_are_marked_in_both_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    marks: list[tuple[str, list[float]]] = []
    monkeypatch.setattr(gallery, "_box", lambda axes, picture, corners, color, *_: marks.append((color, list(corners))))
    one, two = boxes(ON_FIRST, ELSEWHERE), boxes(ON_FIRST, ON_SECOND)
    first, second = (Found(b, match(b, OBJECTS)) for b in (one, two))
    second_object = list(OBJECTS.corners[1])
    gallery._mark(None, np.zeros((4, 4, 3)), OBJECTS, first, second)
    assert marks == [(gallery.MISSED, second_object)]
    marks.clear()
    gallery._mark(None, np.zeros((4, 4, 3)), OBJECTS, second, first)
    assert marks == [(gallery.ALONE, second_object)]
