"""`yolo_cwd label`: what it says, and what it refuses."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import yaml
from conftest import STUDENT
from labeling import POOL, new_classes, records, renamed

from yolo_cwd import CWDTrainer
from yolo_cwd.cli import main
from yolo_cwd.pool import store
from yolo_cwd.pool.lists import PoolSummary
from yolo_cwd.study import label as label_command

pytestmark = pytest.mark.usefixtures("cache")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param({"imgsz": "abc"}, "imgsz", id="a wrong argument"),
        pytest.param({"device": "7"}, "device", id="a device that is not there"),
        pytest.param({"source": "a" * 400 + ".jpg,b.jpg"}, "names no file", id="a name that is too long"),
    ],
)
def test_bad_input_of_the_command_is_one_line(
    teachers: dict[str, str],
    sets: dict[str, str],
    pictures: Path,
    capsys: pytest.CaptureFixture[str],
    words: dict[str, str],
    message: str,
) -> None:
    given = {"teacher": teachers["detect"], "source": str(pictures), "data": sets["detect"], "device": "cpu", **words}
    assert main(["label", *(f"{name}={value}" for name, value in given.items())]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("yolo_cwd: ")]
    assert message in line


def test_a_validation_image_that_is_missing_does_not_matter(
    teachers: dict[str, str], sets: dict[str, str], pictures: Path, tmp_path: Path
) -> None:
    content = yaml.safe_load(Path(sets["detect"]).read_text())
    folder = Path(sets["detect"]).parent
    (tmp_path / "val.txt").write_text("\n".join([*map(str, (folder / "images" / "val").iterdir()), "/absent.jpg"]))
    content |= {"path": str(folder), "val": str(tmp_path / "val.txt")}
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(content))
    words = {"teacher": teachers["detect"], "source": pictures, "data": tmp_path / "data.yaml", "imgsz": 64, **POOL}
    assert main(["label", *(f"{name}={value}" for name, value in words.items())]) == 0


def test_the_command_says_what_was_found(
    teachers: dict[str, str], sets: dict[str, str], pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"teacher={teachers['detect']}", f"source={pictures}", f"data={sets['detect']}", "imgsz=64", "device=cpu"]
    assert main(["label", *words, *(f"{name}={value}" for name, value in POOL.items())]) == 0
    said = capsys.readouterr().out
    places = dict(re.findall(r"^(labels|pictures|data)\s+(/.*)$", said, flags=re.MULTILINE))
    assert "7 images labeled by" in said
    assert "warning: no image has 0, 1" in said
    assert cv2.imread(places["pictures"]) is not None
    assert len(yaml.safe_load(Path(places["data"]).read_text())["train"]) == 2
    assert main(["label", f"teacher={teachers['detect']}"]) == 2
    assert "source: missing" in capsys.readouterr().err


def test_a_training_uses_the_labels_of_the_command(
    train: Callable[..., CWDTrainer],
    teachers: dict[str, str],
    sets: dict[str, str],
    pictures: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = {"teacher": teachers["detect"], "data": sets["detect"], "unlabeled": str(pictures), "imgsz": 64, **POOL}
    assert main(["label", *(f"{name}={value}" for name, value in words.items()), "device=cpu"]) == 0

    def refuse(*_: Any) -> None:
        raise AssertionError("asked for labels")

    monkeypatch.setattr(store, "predictions", refuse)
    trainer = train(**words)
    assert [entry for entry in cache.iterdir() if entry.is_dir()] == [trainer.pool.folder]
    assert len(records(trainer.pool)) == 7
    assert len(trainer.train_loader.dataset) == 8 + 7


def test_the_command_warns_of_images_of_another_kind() -> None:
    found = PoolSummary("detect", 9, {"a": 9}, 0, confidence=0.4, left_out="", scored_on=0)
    assert not label_command._warnings(found, {0: "a"}, usual=0.5)
    assert "mean confidence 0.40, there 0.60" in label_command._warnings(found, {0: "a"}, usual=0.6)[0]
    nothing = found._replace(objects={}, confidence=0.0)
    assert label_command._warnings(nothing, {0: "a"}, usual=0.6) == ["no image has a"]


def test_completed_labels_can_be_seen_and_checked_before(
    teachers: dict[str, str], tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = new_classes(tmp_path / "new")
    teacher = renamed(teachers["detect"], tmp_path, [*"01234", "a", "b", "c", "d", "e"])
    words = [f"teacher={teacher}", f"data={data}", "imgsz=64", "device=cpu", "complete_labels=True"]
    words += [f"{name}={value}" for name, value in POOL.items()]
    assert main(["check", *words, f"student={STUDENT}", "batch=2"]) == 0
    assert "completed the labels of 6 images will be completed with: 0, 1, 2, 3, 4" in capsys.readouterr().out
    assert not cache.parent.exists()
    assert main(["label", *words]) == 0
    said = capsys.readouterr().out
    assert "6 images completed by" in said
    drawn = re.findall(r"^pictures\s+(/.*)$", said, flags=re.MULTILINE)
    assert cv2.imread(drawn[0]) is not None
    assert main(["label", *(word for word in words if "data" not in word)]) == 2
    assert "complete_labels=True: is about the labels of a data set; give data=" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("conf=0.5", "conf=0.5: changes nothing about labels; give pool_conf="),
        ("model=a.pt", "model=a.pt: changes nothing about labels; give teacher="),
        *((word, f"{word}: changes nothing about labels; leave it out") for word in ("iou=0.3", "save_txt=True")),
        *((word, f"{word}: changes nothing about labels; leave it out") for word in ("project=a", "name=b", "tau=2")),
        *((word, f"{word}: changes nothing about labels; leave it out") for word in ("student=a.pt", "format=json")),
        *((word, f"{word}: changes nothing about labels; leave it out") for word in ("resume=True", "classes=1")),
        ("unlabeled=elsewhere", "unlabeled=elsewhere: source=images names the images already; give one of the two"),
        ("imgsz=0", "imgsz=0: a teacher that labels needs some pixels; give imgsz=640"),
        ("imgsz=[64,0]", "imgsz=[64, 0]: a teacher that labels needs some pixels; give imgsz=640"),
        ("imgsz=abc", "imgsz=abc: a teacher that labels needs some pixels; give imgsz=640"),
        ("imgsz=-1", "imgsz=-1: a teacher that labels needs some pixels; give imgsz=640"),
        ("source=nowhere", "source={folder}/nowhere: names no file; give a folder, a glob, a .txt list, or an image"),
        ("source=2024_06_15", "source={folder}/2024_06_15: names no file; give a folder, a glob, a .txt list, or an"),
    ],
)
def test_what_changes_nothing_is_refused(
    teachers: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: str,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    given = [f"teacher={teachers['detect']}", "device=cpu", *([] if "source" in words else ["source=images"]), words]
    if "imgsz" in words:
        cv2.imwrite("images.png", np.zeros((20, 20, 3), np.uint8))
        given[2] = "source=images.png"
    before = list(tmp_path.rglob("*"))
    assert main(["label", *given]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("yolo_cwd: ")]
    assert line.startswith(f"yolo_cwd: {message.format(folder=tmp_path)}")
    assert list(tmp_path.rglob("*")) == before
