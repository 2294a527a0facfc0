"""The label of one image, from a prediction that is given: rows, thresholds, classes and existing labels."""

import io
from collections import Counter
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from ultralytics.engine.results import Results
from ultralytics.utils.ops import xywhr2xyxyxyxy

from yolo_cwd.pool.labels import ExistingLabels, LabelFormat, corners_of, label_of
from yolo_cwd.tasks import TASKS

NAMES = {i: str(i) for i in range(4)}
HEIGHT, WIDTH = 50, 100  # pixels
BOX = [10.0, 20.0, 30.0, 40.0]  # corners of it, in pixels
CENTER = "0.200000 0.600000 0.200000 0.400000"  # the same as fractions: center and size
CORNERS = "0.100000 0.400000 0.300000 0.400000 0.300000 0.800000 0.100000 0.800000"


def said(**found: Any) -> Results:
    """What a teacher has found in an image, as Ultralytics says it."""
    tensors = {name: torch.tensor(value) for name, value in found.items()}
    return Results(np.zeros((HEIGHT, WIDTH, 3), np.uint8), "image.jpg", NAMES, **tensors)


def form(task: str = "detect", classes: dict[int, int] | None = None, **more: Any) -> LabelFormat:
    return LabelFormat(TASKS[task], {0: 0, 1: 1, 2: 2, 3: 3} if classes is None else classes, **more)


def lines(label: Any) -> list[str]:
    return label.content.decode().splitlines()


def test_objects_have_the_classes_of_the_data_and_are_sure_enough() -> None:
    found = said(boxes=[[*BOX, 0.9, 0], [*BOX, 0.5, 1], [*BOX, 0.49, 1], [*BOX, 0.8, 2], [*BOX, 0.7, 1]])
    label = label_of(found, form(classes={0: 3, 1: 0}), 0.5)
    assert label.content == f"3 {CENTER}\n0 {CENTER}\n0 {CENTER}\n".encode()
    assert label.classes == Counter({0: 2, 3: 1})
    assert label.confidences == pytest.approx([0.9, 0.5, 0.7])
    assert label.already_labeled == 0
    nothing = label_of(said(boxes=np.zeros((0, 6)).tolist() or [[*BOX, 0.1, 0]]), form(), 0.5)
    assert (nothing.content, nothing.classes, nothing.confidences) == (b"", Counter(), [])


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        pytest.param(b"1 0.2 0.6 0.2 0.4\n", f"1 0.2 0.6 0.2 0.4\n2 {CENTER}\n", id="ends its line"),
        pytest.param(b"1 0.2 0.6 0.2 0.4", f"1 0.2 0.6 0.2 0.4\n2 {CENTER}\n", id="does not"),
        pytest.param(b"", f"2 {CENTER}\n", id="empty"),
    ],
)
def test_existing_labels_stay_in_front(content: bytes, expected: str) -> None:
    found = said(boxes=[[*BOX, 0.9, 2]])
    assert label_of(found, form(), 0.5, ExistingLabels(content)).content == expected.encode()
    assert label_of(found, form(), 0.95, ExistingLabels(content)).content == content, "nothing is added to it"


@pytest.mark.parametrize(
    ("width", "is_same"),
    [
        pytest.param(20, True, id="the same box"),
        pytest.param(10, True, id="half of it"),
        pytest.param(9, False, id="less than half of it"),
        pytest.param(40, True, id="twice as large"),
        pytest.param(41, False, id="larger than that"),
    ],
)
def test_an_object_that_is_labeled_already_is_counted(width: int, is_same: bool) -> None:
    """Half of the larger box is shared."""
    shape = np.array([[10, 20], [10 + width, 20], [10 + width, 40], [10, 40]]) / (WIDTH, HEIGHT)
    elsewhere = [70.0, 5.0, 90.0, 15.0]
    found = said(boxes=[[*BOX, 0.9, 2], [*elsewhere, 0.8, 1], [*BOX, 0.2, 2]])
    label = label_of(found, form(), 0.5, ExistingLabels(b"0 x\n", [np.array([[0.9, 0.9], [1, 1]]), shape]))
    assert label.already_labeled == is_same
    assert label.classes == Counter({1: 1} if is_same else {1: 1, 2: 1})
    assert label.confidences == pytest.approx([0.8] if is_same else [0.9, 0.8])
    assert lines(label)[-1] == "1 0.800000 0.200000 0.200000 0.200000"


def test_boxes_are_outlines_where_labels_are() -> None:
    found = said(boxes=[[*BOX, 0.9, 2]])
    assert lines(label_of(found, form(outlined=True), 0.5)) == [f"2 {CORNERS}"]
    assert lines(label_of(found, form(outlined=True, point_columns=9), 0.5)) == [f"2 {CORNERS} 0.100000 0.800000"]
    assert lines(label_of(found, form(outlined=True, point_columns=8), 0.5)) == [f"2 {CORNERS}"]
    outside = label_of(said(boxes=[[-10.0, 20.0, 30.0, 60.0, 0.9, 2]]), form(outlined=True), 0.5)
    values = [float(x) for x in lines(outside)[0].split()[1:]]
    assert values == [0, 0.4, 0.3, 0.4, 0.3, 1, 0, 1], "clipped to the image"


def test_the_outline_of_a_mask_or_the_box_without_one() -> None:
    masks = np.zeros((2, HEIGHT, WIDTH), np.float32)
    masks[0, 20:41, 10:31] = 1
    found = said(boxes=[[*BOX, 0.9, 2], [*BOX, 0.8, 1]], masks=masks)
    first, second = lines(label_of(found, form("segment"), 0.5))
    points = np.array(first.split()[1:], float).reshape(-1, 2)
    assert first.startswith("2 ")
    assert points.min(axis=0).tolist() == pytest.approx([0.1, 0.4])
    assert points.max(axis=0).tolist() == pytest.approx([0.3, 0.8])
    assert second == f"1 {CORNERS}"
    assert lines(label_of(said(boxes=[[*BOX, 0.9, 2]]), form("segment"), 0.5)) == [f"2 {CORNERS}"]


def test_an_outline_of_three_points_is_one() -> None:
    masks = np.zeros((1, HEIGHT, WIDTH), np.float32)
    masks[0, 20, 10] = masks[0, 21, 10] = masks[0, 21, 11] = 1
    (row,) = lines(label_of(said(boxes=[[*BOX, 0.9, 2]], masks=masks), form("segment"), 0.5))
    points = np.array(row.split()[1:], float).reshape(-1, 2)
    assert sorted(points.tolist()) == [[0.1, 0.4], [0.1, 0.42], [0.11, 0.42]]


@pytest.mark.parametrize(
    ("box", "clipped"),
    [
        pytest.param([50, 25, 40, 20, 0.3], False, id="inside"),
        pytest.param([95, 25, 40, 20, 0.3], False, id="a corner outside, the middle inside"),
        pytest.param([110, 25, 40, 20, 0.3], True, id="the middle to the right of the image"),
        pytest.param([50, -10, 40, 20, 0.3], True, id="the middle above it"),
        pytest.param([50, 25, 120, 20, 0.3], True, id="wider than it"),
        pytest.param([20, 25, 92, 30, 0.2], False, id="large, to the left"),
        pytest.param([80, 25, 92, 30, 0.2], False, id="large, to the right"),
        pytest.param([0, 25, 40, 20, 0], False, id="the middle on the left edge"),
        pytest.param([100, 25, 40, 20, 0], False, id="the middle on the right edge"),
        pytest.param([50, 25, 100, 20, 0], False, id="as wide as the image"),
    ],
)
def test_corners_of_a_turned_box(box: list[float], clipped: bool) -> None:
    corners = xywhr2xyxyxyxy(torch.tensor([box]))[0].numpy() / (WIDTH, HEIGHT)
    expected = corners.clip(0, 1) if clipped else corners
    (row,) = lines(label_of(said(obb=[[*box, 0.9, 2]]), form("obb"), 0.5))
    assert np.array(row.split()[1:], float) == pytest.approx(expected.ravel(), abs=1e-5)
    assert (abs(corners - corners.clip(0, 1)).max() > 0) == (box[0] != 50 or clipped)


def test_a_turned_object_is_the_same_only_at_the_same_angle() -> None:
    corners = xywhr2xyxyxyxy(torch.tensor([[50, 25, 40, 6, 0.6]]))[0].numpy() / (WIDTH, HEIGHT)
    found = said(obb=[[50, 25, 40, 6, 0.6, 0.9, 2], [50, 25, 40, 6, -0.6, 0.9, 2]])
    label = label_of(found, form("obb"), 0.5, ExistingLabels(b"0\n", [corners]))
    assert (label.already_labeled, label.classes) == (1, Counter({2: 1}))


@pytest.mark.parametrize(
    ("values", "confidences", "points"),
    [
        pytest.param(3, [0.5, 0.4], "0.400000 0.400000 2.000000 0.000000 0.000000 0.000000", id="visible or not"),
        pytest.param(3, None, "0.400000 0.400000 2.000000 1.000000 0.500000 2.000000", id="all are visible"),
        pytest.param(2, [0.5, 0.4], "0.400000 0.400000 1.000000 0.500000", id="without visibility"),
    ],
)
@pytest.mark.parametrize("shift", [0.0, -80.0])
def test_key_points(values: int, confidences: list[float] | None, points: str, shift: float) -> None:
    """Those outside of the image are on its edge."""
    seen = [[40.0 + shift, 20.0], [120.0, 25.0]]
    points = points.replace("0.400000", "0.000000", 1) if shift else points
    if confidences:
        seen = [[*point, c] for point, c in zip(seen, confidences, strict=True)]
    found = said(boxes=[[*BOX, 0.9, 2]], keypoints=[seen])
    assert lines(label_of(found, form("pose", point_values=values), 0.5)) == [f"2 {CENTER} {points}"]


def test_class_maps_have_the_classes_and_values_of_the_data() -> None:
    """Pixels of a class that the data do not have count as nothing."""
    values = np.zeros((HEIGHT, WIDTH), np.uint8)
    values[:10], values[10:15] = 1, 2
    found = said(semantic_mask=values)
    label = label_of(found, form("semantic", {0: 1, 1: 0}, raw_ids={0: 7, 1: 0}), 0.5)
    written = cv2.imdecode(np.frombuffer(label.content, np.uint8), cv2.IMREAD_UNCHANGED)
    assert (written.shape, written.dtype) == ((HEIGHT, WIDTH), np.uint8)
    assert [set(written[a:b].ravel().tolist()) for a, b in ((0, 10), (10, 15), (15, HEIGHT))] == [{7}, {255}, {0}]
    assert label.classes == Counter({0: 10 * WIDTH, 1: 35 * WIDTH})


def test_teachers_of_many_classes_make_class_maps_too() -> None:
    values = np.full((HEIGHT, WIDTH), 300, np.int64)
    values[0] = 299
    label = label_of(said(semantic_mask=values), form("semantic", {300: 4}), 0.5)
    written = cv2.imdecode(np.frombuffer(label.content, np.uint8), cv2.IMREAD_UNCHANGED)
    assert (set(written[0].tolist()), set(written[1:].ravel().tolist())) == ({255}, {4})
    assert label.classes == Counter({4: (HEIGHT - 1) * WIDTH})


def test_depth_maps_are_arrays_of_the_values() -> None:
    values = np.random.default_rng(0).random((1, HEIGHT, WIDTH)).astype(np.float32)
    for found in (said(depth=values), SimpleNamespace(depth=values.astype(np.float64))):
        label = label_of(found, form("depth"), 0.5)
        written = np.load(io.BytesIO(label.content))
        assert (written.dtype, written.shape) == (np.float32, (HEIGHT, WIDTH))
        assert written == pytest.approx(values[0])
        assert (label.classes, label.confidences) == (Counter(), ())


def test_what_decides_on_labels_tells_formats_apart() -> None:
    ours = form(classes={1: 0, 0: 1}, raw_ids={1: 3, 0: 2})
    assert ours.plain() == form(classes={0: 1, 1: 0}, raw_ids={0: 2, 1: 3}).plain(), "in whatever order"
    others = [
        ours._replace(task=TASKS["segment"]),
        ours._replace(classes={0: 1}),
        ours._replace(raw_ids={}),
        ours._replace(folder="masks"),
        ours._replace(point_values=2),
        ours._replace(point_columns=9),
        ours._replace(outlined=True),
    ]
    assert len({str(other.plain()) for other in (ours, *others)}) == 8


def test_corners_of_upright_boxes() -> None:
    found = corners_of(np.array([[1, 2, 3, 4], [5, 6, 8, 9]]))
    assert found.tolist() == [[[1, 2], [3, 2], [3, 4], [1, 4]], [[5, 6], [8, 6], [8, 9], [5, 9]]]
