"""Completed labels: what the user labeled stays, and which classes are added."""

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import cv2
import pytest
import yaml
from conftest import narrow
from labeling import NEW, OLD, OURS, Said, completed, label_files, labeled_data, new_classes, records, renamed, snapshot

from yolo_cwd.config import ConfigError, Settings
from yolo_cwd.pool import store
from yolo_cwd.pool.images import list_images

pytestmark = pytest.mark.usefixtures("cache")


def test_labels_are_completed_and_what_the_user_labeled_stays(
    old: dict[str, str], say: Callable[..., Said], tmp_path: Path
) -> None:
    own = "1 0.3 0.5 0.40 0.8\r\n\n1 0.900000 0.1 .1 0.1"  # x 10 to 50, y 5 to 45, and a small one; no end of line
    data = labeled_data(tmp_path / "new", {"a": own, "b": "", "c": None, "d": "1 0.5 0.5 0.5 0.5\n"})
    say(
        {
            "a": [
                [60, 10, 80, 30, 0.9, OLD],
                [12, 6, 52, 44, 0.8, OLD],  # the same as the first label
                [80, 0, 100, 50, 0.7, OLD],  # one that has the small label in it
                [15, 10, 25, 20, 0.6, OLD],  # one that is in the first label
                [60, 32, 70, 48, 0.95, NEW],
                [70, 32, 78, 48, 0.95, 0],
            ],
            "c": [[0, 0, 50, 50, 0.5, OLD]],
        }
    )
    before = snapshot(tmp_path / "new")
    pool = completed(old["detect"], data)
    assert label_files(pool) == {
        "a": own
        + "\n0 0.700000 0.400000 0.200000 0.400000\n"
        + "0 0.900000 0.500000 0.200000 1.000000\n"
        + "0 0.200000 0.300000 0.100000 0.200000\n",
        "b": "",
        "c": "0 0.250000 0.500000 0.500000 1.000000\n",
        "d": "1 0.5 0.5 0.5 0.5\n",
    }
    assert snapshot(tmp_path / "new") == before
    assert (pool.summary.images, pool.summary.objects, pool.summary.empty) == (4, {"old": 4}, 2)
    assert pool.summary.left_out == "1 that are labeled as something else"
    assert all(Path(r["source"]).samefile(pool.folder / r["image"]) for r in records(pool).values())


def test_completed_labels_are_used_again_until_a_label_file_changes(
    old: dict[str, str], say: Callable[..., Said], tmp_path: Path
) -> None:
    data = labeled_data(tmp_path / "new", {"a": "1 0.2 0.5 0.2 0.4\n", "b": "", "c": None})
    said = say({"b": [[60, 10, 80, 30, 0.9, OLD]]})
    pool = completed(old["detect"], data)
    assert completed(old["detect"], data) == pool
    assert said.asked == ["a", "b", "c"]
    (tmp_path / "new" / "labels" / "train" / "b.txt").write_text("1 0.7 0.4 0.2 0.4\n")
    said.asked.clear()
    again = completed(old["detect"], data)
    assert said.asked == ["b"]
    assert again.folder == pool.folder
    listed = [Path(line).stem for line in Path(again.train[0]).read_text().splitlines()]
    files = {name: (again.folder / "labels" / f"{name}.txt").read_text() for name in listed}
    assert sorted(files.values()) == ["", "1 0.2 0.5 0.2 0.4\n", "1 0.7 0.4 0.2 0.4\n"]
    (tmp_path / "new" / "labels" / "train" / "c.txt").write_text("")
    (tmp_path / "new" / "labels" / "train" / "a.txt").touch()
    said.asked.clear()
    completed(old["detect"], data)
    assert said.asked == []


def test_an_image_that_is_listed_twice_counts_twice(
    old: dict[str, str], say: Callable[..., Said], tmp_path: Path
) -> None:
    say({"a": [[10, 10, 20, 20, 0.9, 0]]})
    data = Path(labeled_data(tmp_path, {"a": "1 0.5 0.5 0.2 0.2\n", "b": "1 0.5 0.5 0.2 0.2\n"}))
    content = yaml.safe_load(data.read_text())
    a, b = list_images([str(tmp_path / "images" / "train")])
    (tmp_path / "twice.txt").write_text(f"{a}\n{b}\n{a}\n")
    data.write_text(yaml.safe_dump({**content, "train": str(tmp_path / "twice.txt")}))
    pool = completed(old["detect"], str(data))
    assert len(list(Path(pool.train[0]).read_text().splitlines())) == 3
    assert len(set(Path(pool.train[0]).read_text().splitlines())) == 2


def test_completing_that_is_cut_off_goes_on(
    old: dict[str, str], say: Callable[..., Said], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = labeled_data(tmp_path / "new", {name: "1 0.2 0.5 0.2 0.4\n" for name in "abc"})
    said = say({})

    def cut_off(*words: Any) -> Iterator[Any]:
        yield from islice(said(*words), 2)
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "predictions", cut_off)
    with pytest.raises(KeyboardInterrupt, match="run the same command again to continue"):
        completed(old["detect"], data)
    monkeypatch.setattr(store, "predictions", said)
    assert completed(old["detect"], data).summary.images == 3
    assert said.asked == ["a", "b", "c"]


def test_classes_that_are_labeled_anywhere_are_left_to_the_labels(
    old: dict[str, str], say: Callable[..., Said], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Anywhere in the training images, whatever `fraction` of them is trained on."""
    names = {0: "e", 1: "new", 2: "old", 3: "strange"}
    own, old_line = "1 0.2 0.5 0.2 0.4\n", "2 0.700000 0.400000 0.200000 0.400000\n"
    data = labeled_data(tmp_path / "new", {"a": own, "b": None, "c": ""}, names)
    say({"a": [[0, 0, 50, 50, 0.9, OURS.index("e")], [60, 10, 80, 30, 0.8, OLD]]})
    both = label_files(completed(old["detect"], data, fraction=2))
    assert both == {"a": own + "0 0.250000 0.500000 0.500000 1.000000\n" + old_line, "b": ""}
    (tmp_path / "new" / "labels" / "train" / "c.txt").write_text("0 0.2 0.5 0.2 0.4\n")
    caplog.clear()
    pool = completed(old["detect"], data, fraction=2)
    assert pool.summary.objects == {"old": 1}
    assert [Path(line).exists() for line in Path(pool.train[0]).read_text().splitlines()] == [True, True]
    assert own + old_line in [file.read_text() for file in (pool.folder / "labels").iterdir()]
    for expected in ("1 of 3 training images have no label file", "no label has strange, and"):
        assert [r.levelname for r in caplog.records if expected in r.message] == ["WARNING"]
    completed(old["detect"], data, fraction=2)
    assert sum("no label has strange, and" in r.message for r in caplog.records) == 2
    assert completed(old["detect"], data).summary.images == 3
    (tmp_path / "new" / "labels" / "train" / "b.txt").write_text("2 0.9 0.9 0.1 0.1\n")
    with pytest.raises(ConfigError, match=r"labeled: e, new, old; the teacher's: a, b, c, d and 6 more.*name the old"):
        completed(old["detect"], data)


@pytest.mark.usefixtures("whole_messages")
def test_images_that_cannot_be_used_are_told_and_left_out(
    old: dict[str, str], say: Callable[..., Said], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = labeled_data(tmp_path / "new", {"a": "1 0.2 0.5 0.2 0.4\n", "b": "1 0.2 5 0.2 0.4\n"})
    say({})
    assert list(label_files(completed(old["detect"], data))) == ["a"]
    assert "b.png: ignoring corrupt image/label" in caplog.text
    (tmp_path / "new" / "labels" / "train" / "a.txt").write_text("none\n")
    with pytest.raises(ConfigError, match=r"data=.*: no training .*a\.png: ignoring corrupt"):
        completed(old["detect"], data)


@pytest.mark.parametrize("task", ["semantic", "depth"])
def test_maps_are_not_completed(teachers: dict[str, str], sets: dict[str, str], cache: Path, task: str) -> None:
    with pytest.raises(ConfigError, match=f"complete_labels=True: labels of task={task} are maps.*; leave compl"):
        completed(teachers[task], sets[task], task)
    assert not cache.parent.exists()


def test_labels_that_cannot_be_completed_are_refused_and_leave_nothing(
    teachers: dict[str, str], sets: dict[str, str], cache: Path
) -> None:
    with pytest.raises(ConfigError, match=r"complete_labels=some: must be one of True, False"):
        Settings.parse({"teacher": "t", "complete_labels": "some"})
    with pytest.raises(ConfigError, match=r"it is not trained; give a \.pt checkpoint, or leave complete_labels out"):
        completed(narrow("yolov8n.yaml"), sets["detect"])
    with pytest.raises(ConfigError, match="task=segment; give a teacher for segment, or leave complete_labels out"):
        completed(teachers["detect"], sets["segment"], "segment")
    teacher = renamed(teachers["detect"], cache.parents[2], list("abcdefghij"))
    new = new_classes(cache.parents[2] / "new")
    teacher_of_old = renamed(teachers["detect"], cache.parents[2] / "new", [*"01234", "a", "b", "c", "d", "e"])
    with pytest.raises(ConfigError, match="does not know 5, 6, 7, 8 and 1 more of the data"):
        completed(teacher_of_old, new, unlabeled=str(Path(sets["depth"]).parent / "images"))
    with pytest.raises(ConfigError, match=r"unlabeled=.*: names no file"):
        completed(teacher_of_old, new, unlabeled="nowhere")
    with pytest.raises(ConfigError, match="knows no class of the data without labels") as error:
        completed(teacher, sets["detect"])
    assert len(str(error.value)) < 300
    assert list((cache.parent / "completed").rglob("*")) == []


def test_boxes_of_a_teacher_are_outlines_where_any_image_has_some(
    old: dict[str, str], say: Callable[..., Said], tmp_path: Path
) -> None:
    """Ultralytics drops all outlines of data in which one image has boxes, even one without labels of its own."""
    data = labeled_data(tmp_path / "new", {"a": "1 0.1 0.1 0.3 0.1 0.3 0.9 0.1 0.9\n", "b": "", "c": None})
    say({name: [[60, 10, 80, 30, 0.9, OLD]] for name in "abc"})
    outline = "0 0.600000 0.200000 0.800000 0.200000 0.800000 0.600000 0.600000 0.600000\n"
    written = label_files(completed(old["detect"], data))
    assert [text.splitlines(True)[-1] for text in written.values()] == [outline] * 3


def test_an_image_that_ultralytics_would_repair_stays_as_it_is(
    old: dict[str, str], say: Callable[..., Said], tmp_path: Path
) -> None:
    data = Path(labeled_data(tmp_path / "new", {"a": "1 0.2 0.5 0.2 0.4\n"}))
    image = tmp_path / "new" / "images" / "train" / "a.png"
    cv2.imwrite(str(jpeg := image.with_suffix(".jpg")), cv2.imread(str(image)))
    torn = jpeg.read_bytes() + b"\n"  # Ultralytics writes one anew that does not end as JPEGs do
    jpeg.unlink()
    image.write_bytes(torn)
    say({})
    assert completed(old["detect"], str(data)).summary.images == 1
    assert image.read_bytes() == torn
