"""The form of labels, decided from a teacher and data that are described: nothing is read or labeled."""

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from yolo_cwd.config import ConfigError, Settings
from yolo_cwd.pool.format import are_outlined, classes_by_name, data_like, format_of, refuse_polygons
from yolo_cwd.pool.labels import LabelFormat
from yolo_cwd.tasks import TASKS

NAMES = {0: "car", 1: "cat", 2: "dog"}


def teacher(task: str = "detect", names: Mapping[int, str] = NAMES, points: Any = None, **description: Any) -> Any:
    """Stands for a teacher: what is asked of it before it sees an image."""
    network = SimpleNamespace(yaml=description, model=[None, None, SimpleNamespace(kpt_shape=points)])
    return SimpleNamespace(task=task, names=names, model=network)


def form(of: Any, outlined: bool = False, classes: Mapping[int, int] | None = None, **data: Any) -> LabelFormat:
    settings = Settings.parse({"teacher": "t.pt"})
    return format_of(of, {"names": NAMES, **data}, settings, {2: 0} if classes is None else classes, outlined)


@pytest.mark.parametrize(
    ("of", "more"),
    [
        pytest.param(teacher(), {"channels": 3}, id="detect"),
        pytest.param(teacher("depth", channels=1), {"channels": 1}, id="of gray images"),
        pytest.param(teacher("pose", points=(4, 2)), {"channels": 3, "kpt_shape": [4, 2]}, id="pose"),
        pytest.param(teacher("semantic"), {"channels": 3, "masks_dir": "masks"}, id="semantic"),
    ],
)
def test_without_data_labels_are_like_the_teachers(of: Any, more: dict[str, Any]) -> None:
    assert data_like(of) == {"names": NAMES, **more}
    assert data_like(of)["names"] is not NAMES, "nobody changes the teacher's"


def test_only_class_maps_of_polygons_are_refused() -> None:
    with pytest.raises(ConfigError) as error:
        refuse_polygons(TASKS["semantic"], {"names": NAMES}, "unlabeled=a")
    assert str(error.value) == (
        "unlabeled=a: class maps are written as images, the data have polygons; give data with masks_dir"
    )
    refuse_polygons(TASKS["semantic"], {"masks_dir": "masks"}, "unlabeled=a")
    refuse_polygons(TASKS["segment"], {"names": NAMES}, "unlabeled=a")


@pytest.mark.parametrize("outlined", [True, False])
def test_boxes(outlined: bool) -> None:
    expected = LabelFormat(TASKS["detect"], {2: 0}, "labels", 3, 0, {}, outlined)
    assert form(teacher(), outlined, masks_dir="masks", label_mapping={7: 1}) == expected, "whatever is of class maps"


def test_rows_that_would_be_taken_for_key_points() -> None:
    """Five columns of a box, and those of all points; where there are such points, they are no accident."""
    assert form(teacher("segment"), kpt_shape=[4, 2]).point_columns == 5 + 4 * 2
    assert form(teacher("segment"), kpt_shape=None).point_columns == 0
    assert form(teacher("pose", points=(4, 2)), kpt_shape=[4, 2]).point_columns == 0


def test_key_points_are_as_many_as_the_teachers() -> None:
    assert form(teacher("pose", points=(4, 3)), kpt_shape=[4, 2]).point_values == 2
    assert form(teacher("pose", points=(4, 2)), kpt_shape=[4, 3]).point_values == 3
    for points, shape in ((5, [5, 2]), (0, None)):
        with pytest.raises(ConfigError) as error:
            form(teacher("pose", points=(4, 2)), kpt_shape=shape)
        assert str(error.value) == (
            f"teacher=t.pt: has 4 key points, the data have {points}; give a teacher trained on such data"
        )


def test_images_have_the_channels_of_the_teachers() -> None:
    for of, data in (({}, {}), ({}, {"channels": 3}), ({"channels": 3}, {}), ({"channels": 4}, {"channels": 4})):
        assert form(teacher(**of), **data).classes == {2: 0}
    for of, data, ours, theirs in (({"channels": 1}, {}, 1, 3), ({}, {"channels": 4}, 3, 4)):
        with pytest.raises(ConfigError) as error:
            form(teacher(**of), **data)
        assert str(error.value) == (
            f"teacher=t.pt: takes images of {ours} channels, the data have {theirs}; "
            "choose a teacher trained on such images"
        )


def test_class_maps_are_where_and_what_the_datas_are() -> None:
    """A value that is no class, or fits no image of bytes, is never written."""
    mapping = {"7": 1, 0: 0, 255: 2, 256: 3, -1: 4, 8: None}
    found = form(teacher("semantic"), masks_dir="maps", label_mapping=mapping)
    assert found == LabelFormat(TASKS["semantic"], {2: 0}, folder="maps", raw_ids={1: 7, 0: 0, 2: 255})
    assert form(teacher("semantic")) == LabelFormat(TASKS["semantic"], {2: 0}, folder="masks")


def test_a_single_map_is_1_where_the_class_is() -> None:
    one = {0: "car"}
    assert form(teacher("semantic", one), classes={0: 0}, names=one).classes == {0: 0, 1: 1}
    assert form(teacher("semantic", one), classes={0: 0}).classes == {0: 0}
    assert form(teacher("segment", one), classes={0: 0}, names=one).classes == {0: 0}


OUTLINE = "0 0.1 0.1 0.2 0.1 0.2 0.2\n"


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        pytest.param([OUTLINE], True, id="an outline"),
        pytest.param(["0 0.1 0.1 0.2 0.1\n"], False, id="a box"),
        pytest.param(["0 0.1 0.1 0.2 0.1 0.2\n" + OUTLINE], False, id="six numbers are a box"),
        pytest.param([b"\xff\xfe", None, "", "\n \n", f"\n{OUTLINE}0 1\n"], True, id="the first that can be read"),
        pytest.param(["0 0.1 0.1 0.2 0.1\n", OUTLINE], False, id="the first decides"),
        pytest.param([OUTLINE, "0 0.1 0.1 0.2 0.1\n"], True, id="whatever follows"),
        pytest.param(["", None], False, id="no label"),
        pytest.param([], False, id="no image"),
    ],
)
def test_boxes_are_outlined_where_the_first_label_is(
    labels: list[str | bytes | None], expected: bool, tmp_path: Path
) -> None:
    (tmp_path / "labels").mkdir()
    images = [tmp_path / "images" / f"{i}.jpg" for i in range(len(labels))]
    for image, label in zip(images, labels, strict=True):
        if label is not None:
            content = label.encode() if isinstance(label, str) else label
            (tmp_path / "labels" / f"{image.stem}.txt").write_bytes(content)
    assert are_outlined(images, TASKS["detect"], {}) is expected
    assert are_outlined(images, TASKS["segment"], {}) is False
    assert are_outlined(images, TASKS["detect"], {"kpt_shape": [1, 2]}) is False, "seven are a box with a key point"
    assert are_outlined(images, TASKS["detect"], {"kpt_shape": [2, 2]}) is expected


def known(of: Any, single_class: bool = False, pool_classes: str = "all", **data: Any) -> dict[int, int]:
    settings = Settings.parse({"teacher": "t.pt", "pool_classes": pool_classes})
    return classes_by_name(of, {"names": NAMES, **data}, settings, single_class)


def test_classes_have_the_numbers_of_the_data() -> None:
    theirs = {0: "dog", 1: "bus", 2: "cat", 3: "car"}
    assert known(teacher(names=theirs)) == {0: 2, 2: 1, 3: 0}
    assert known(teacher("depth", {0: "x"})) == {}, "labels have no classes"


def test_of_a_single_class() -> None:
    """A model that was trained on all classes as one calls it item, and the data's names say nothing of it."""
    assert known(teacher(names={0: "item"}), single_class=True) == {0: 0}
    assert known(teacher(), single_class=True) == {0: 0, 1: 1, 2: 2}
    with pytest.raises(ConfigError, match="does not know car, cat, dog of the data"):
        known(teacher(names={0: "item"}))


def test_classes_that_the_teacher_lacks() -> None:
    some = teacher(names={0: "dog", 1: "bus"})
    assert known(some, pool_classes="known") == {0: 2}
    ending = "of the data, and would call them background in unlabeled images; give a teacher that does, or"
    for of, asked, lacks, remedy in (
        (some, "all", "car, cat", "pool_classes=known"),
        (teacher(names={0: "bus"}), "all", "car, cat, dog", "leave unlabeled out"),
        (teacher(names={0: "bus"}), "known", "car, cat, dog", "leave unlabeled out"),
    ):
        with pytest.raises(ConfigError) as error:
            known(of, pool_classes=asked)
        assert str(error.value) == f"teacher=t.pt: does not know {lacks} {ending} {remedy}"
