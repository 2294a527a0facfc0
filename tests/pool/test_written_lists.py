"""Lists of labeled images, written from records that are given: what is in them, and what they say of it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from yolo_cwd.pool.labels import LabelFormat
from yolo_cwd.pool.lists import (
    Pool,
    PoolSummary,
    is_complete,
    plain_data,
    read_pool,
    share,
    summary_of,
    write_list,
    write_pool,
)
from yolo_cwd.tasks import TASKS

FORM = LabelFormat(TASKS["detect"], {0: 0})
MASKS = LabelFormat(TASKS["semantic"], {0: 0}, folder="maps")
SUMMARY = PoolSummary("detect", 1200, {"größe": 3400, "b": 2}, 1001, 0.5, "1 unreadable", 3, ["mind"])


def test_a_summary_in_words() -> None:
    said = "1,200 images without labels are labeled by the teacher"
    assert SUMMARY.describe() == f"{said}: 3,402 objects, 1,001 images without any"
    assert SUMMARY._replace(task="semantic").describe() == said, "pixels are not counted"


def test_completed_labels_in_words() -> None:
    said = "the labels of 1,200 images are completed by the teacher: größe 3,400, b 2"
    assert SUMMARY.describe_completed() == f"{said}, without 1 unreadable"
    assert SUMMARY._replace(left_out="").describe_completed() == said
    many = SUMMARY._replace(objects={str(i): i for i in range(9)}, left_out="")
    assert many.describe_completed().endswith("teacher: 0 0, 1 1, 2 2, 3 3, 4 4, 5 5, 6 6, 7 7 and 1 more")


def record(classes: dict[str, int], *confidences: float) -> dict[str, Any]:
    return {"classes": classes, "confidences": confidences}


def test_a_summary_counts_what_records_hold() -> None:
    records = [record({"0": 1, "1": 2}, 0.5, 0.75, 1.0), record({}), record({"1": 3, "7": 1}, 0.25, 0.25, 0.25, 0.5)]
    assert summary_of(records, FORM, {0: "car", 1: "cat"}, "2 unreadable", 4) == PoolSummary(
        "detect", 3, {"cat": 5, "car": 1, "class 7": 1}, 1, 0.5, "2 unreadable", 4
    )
    assert list(summary_of(records, FORM, {0: "car", 1: "cat"}, "").objects) == ["cat", "car", "class 7"]
    assert summary_of([record({})], MASKS, {}, "") == PoolSummary("semantic", 1, {}, 1, 0.0, "", 0, ())


@pytest.fixture
def written(tmp_path: Path, ascii_locale: None) -> Path:
    """The file that says what is in a pool of two images, beside 'others', and labels as class maps."""
    folder = tmp_path / "größer"
    for name in ("images", "maps", "others"):
        (folder / name).mkdir(parents=True)
    for name in ("a", "b"):
        (folder / "images" / f"{name}.jpg").touch()
        (folder / "maps" / f"{name}.png").touch()
    records = [{"image": "images/b.jpg"}, {"image": "images/a.jpg"}]
    description = {"names": {1: "größe", 0: "b"}, "train": "old", "val": "held out", "nc": 2}
    file = folder / "lists" / "key.json"
    plan: Any = SimpleNamespace(folder=folder)
    write_pool(file, plan, [str(folder / "others")], records, description, SUMMARY)
    return file


def test_a_pool_reads_as_it_was_written(written: Path) -> None:
    """In UTF-8 whatever the locale, with the names as the user wrote them."""
    folder = written.parents[1]
    data, images = written.with_suffix(".yaml"), written.with_suffix(".txt")
    assert images.read_text(encoding="utf-8") == f"{folder / 'images' / 'b.jpg'}\n{folder / 'images' / 'a.jpg'}\n"
    train = [str(folder / "others"), str(images)]
    assert read_pool(folder, written) == Pool(folder, train, data, SUMMARY)
    content = {"names": {1: "größe", 0: "b"}, "train": train, "val": "held out", "nc": 2}
    text = data.read_text(encoding="utf-8")
    assert yaml.safe_load(text) == content
    assert "größe" in text
    assert [line.split(":")[0] for line in text.splitlines() if line[0].isalpha()] == ["names", "train", "val", "nc"]


def test_data_without_held_out_images_are_validated_on_what_is_trained_on(tmp_path: Path) -> None:
    plan: Any = SimpleNamespace(folder=tmp_path)
    for value in ({}, {"val": None}):
        write_pool(tmp_path / "lists" / "key.json", plan, ["others"], [], {"names": {}, **value}, SUMMARY)
        content = yaml.safe_load((tmp_path / "lists" / "key.yaml").read_text())
        assert content["val"] == content["train"] == ["others", str(tmp_path / "lists" / "key.txt")]


def test_a_pool_with_all_its_files_is_complete(written: Path) -> None:
    assert is_complete(written, MASKS) is True
    assert is_complete(written, FORM) is False, "labels of another form are not there"
    assert is_complete(written, MASKS._replace(folder="masks")) is False


@pytest.mark.parametrize(
    "gone", ["lists/key.json", "lists/key.yaml", "lists/key.txt", "images/b.jpg", "maps/a.png", "maps/b.png", "others"]
)
def test_a_pool_that_lacks_a_file_is_not(gone: str, written: Path) -> None:
    path = written.parents[1] / gone
    path.rename(path.with_name("elsewhere"))
    assert is_complete(written, MASKS) is False


def test_a_list_of_nothing_is_empty(tmp_path: Path) -> None:
    for _ in range(2):  # its folder is there at the second time
        assert write_list(tmp_path / "lists" / "a.txt", []) == str(tmp_path / "lists" / "a.txt")
    assert (tmp_path / "lists" / "a.txt").read_bytes() == b""


def test_plain_data_can_be_written_as_yaml() -> None:
    data = {"path": Path("a"), "names": {0: "b"}, "yaml_file": "c.yaml", "train": ["d"]}
    assert plain_data(data) == {"path": "a", "names": {0: "b"}, "train": ["d"]}


@pytest.mark.parametrize(
    ("fraction", "number"),
    [(1.0, 7), (1, 7), (0.5, 4), (0.3, 2), (0.01, 1), (2, 2), (20, 7), ([0.3, 1.0], 2), ([1.0, 0.3], 7)],
)
def test_the_share_of_images_is_that_of_ultralytics(fraction: Any, number: int) -> None:
    """A whole number counts images; of a list, the first is for the training."""
    images = [Path(f"{i}.jpg") for i in range(7)]
    assert share(images, fraction, {}) == images[:number]
    assert share(images, fraction, {"complete": False}) == images[:number]
    assert share(images, fraction, {"complete": True}) == images
