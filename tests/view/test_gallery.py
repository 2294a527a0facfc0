"""Pictures of what several models see."""

from pathlib import Path

import cv2
from conftest import STUDENT, TEACHER
from ultralytics import YOLO

from yolo_cwd.view.gallery import draw_side_by_side
from yolo_cwd.view.plots import spread


def test_items_are_spread_evenly() -> None:
    assert spread(list(range(10)), 3) == [0, 3, 6]
    assert spread([1, 2], 4) == [1, 2]


def test_a_row_an_image_and_a_column_a_model(data: str, tmp_path: Path) -> None:
    images = sorted(Path(data).parent.glob("images/val/*.jpg"))
    models = {"one": STUDENT, "two": TEACHER}
    for name in models:
        YOLO(models[name]).save(tmp_path / f"{name}.pt")
    weights = {name: tmp_path / f"{name}.pt" for name in models}
    sizes = []
    for shown in (images[:1], images[:3]):
        draw_side_by_side(tmp_path / "picture.png", shown, weights, size=64)
        sizes.append(cv2.imread(str(tmp_path / "picture.png")).shape[:2])
    (height, width), (height_of_three, width_of_three) = sizes
    assert width == width_of_three
    assert height_of_three > 2 * height


def test_what_is_found_is_drawn(data: str, tmp_path: Path) -> None:
    images = sorted(Path(data).parent.glob("images/val/*.jpg"))[:1]
    YOLO(STUDENT).save(tmp_path / "one.pt")
    pictures = []
    for confidence in (1e-6, 0.99):
        draw_side_by_side(tmp_path / "picture.png", images, {"one": tmp_path / "one.pt"}, 64, confidence)
        pictures.append(cv2.imread(str(tmp_path / "picture.png")))
    assert (pictures[0] != pictures[1]).mean() > 0.01
