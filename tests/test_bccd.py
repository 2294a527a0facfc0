"""The embedded data set and models."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from conftest import SHORT
from processes import CONTEXT
from ultralytics import YOLO

from yolo_cwd import ConfigError, CWDTrainer, bccd
from yolo_cwd.run.score import score


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bccd.build(tmp_path_factory.mktemp("bccd"))


def test_layout(file: Path) -> None:
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert content["path"] == str(file.parent)
    assert content["names"] == {0: "Platelets", 1: "RBC", 2: "WBC"}
    for split, count in {"train": 52, "val": 159}.items():
        images, labels = (sorted((file.parent / kind / split).iterdir()) for kind in ("images", "labels"))
        assert [p.stem for p in images] == [p.stem for p in labels]
        assert len(images) == count
        assert cv2.imread(str(images[0])).shape == (240, 320, 3)
        rows = np.concatenate([np.loadtxt(label, ndmin=2) for label in labels])
        assert set(rows[:, 0]) == {0, 1, 2}
        assert ((rows[:, 1:] >= 0) & (rows[:, 1:] <= 1)).all()


def test_no_image_is_in_both_splits(file: Path) -> None:
    train, val = ({p.name for p in (file.parent / "images" / split).iterdir()} for split in ("train", "val"))
    assert not train & val


def test_it_is_small() -> None:
    assert bccd.ARCHIVE.stat().st_size < 2e6
    assert bccd.TEACHER.stat().st_size < 5.6e6
    assert bccd.STUDENT.stat().st_size < 6.6e6


def test_license_and_source_are_beside_it() -> None:
    assert (bccd.FOLDER / "LICENSE").read_text(encoding="utf-8").startswith("MIT License")
    assert "https://github.com/Shenggan/BCCD_Dataset" in (bccd.FOLDER / "README.md").read_text(encoding="utf-8")


def test_it_is_unpacked_once(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bccd, "_unpack", lambda *_: pytest.fail("unpacked again"))
    assert bccd.build(file.parent.parent) == file


def test_a_killed_process_leaves_nothing_that_looks_like_a_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bccd.yaml, "safe_dump", killed)
    with pytest.raises(KeyboardInterrupt):
        bccd.build(tmp_path)
    assert not list(tmp_path.iterdir())


def test_two_processes_at_once(tmp_path: Path) -> None:
    with CONTEXT.Pool(2) as pool:
        first, second = pool.map(bccd.build, [tmp_path, tmp_path])
    assert first == second
    assert [p.name for p in tmp_path.iterdir()] == [first.parent.name]


def test_a_training_takes_it_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    words = {"model": str(bccd.STUDENT), "teacher": str(bccd.TEACHER), "data": "bccd", "project": str(tmp_path)}
    trainer = CWDTrainer(overrides={**words, "device": "cpu"})
    assert trainer.data["nc"] == 3
    assert Path(trainer.args.data).is_relative_to(tmp_path / "cache" / "yolo_cwd")
    assert trainer.stage is None, "the teacher knows the data"


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"data=bccd: cannot write .*; set XDG_CACHE_HOME to a folder of yours$"):
        bccd.resolve("bccd")


def test_other_tasks_and_other_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ConfigError, match=r"^data=bccd: has boxes alone, not the labels of task=pose; give other"):
        bccd.resolve("bccd", "pose")
    assert bccd.resolve("mine.yaml", "pose") == "mine.yaml"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("weights", [bccd.TEACHER, bccd.STUDENT], ids=["teacher", "student"])
def test_models_are_plain_halves_without_paths(weights: Path) -> None:
    checkpoint = torch.load(weights, map_location="cpu", weights_only=False)
    model = checkpoint["model"]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
    said = str([{name: value for name, value in checkpoint.items() if name != "model"}, model.args, vars(model).keys()])
    assert "/tmp" not in said
    assert "pt_path" not in said
    assert checkpoint.get("optimizer") is None


def test_the_teacher_has_learned(file: Path, tmp_path: Path) -> None:
    assert YOLO(bccd.TEACHER).names == bccd.CLASSES
    words = {name: SHORT[name] for name in ("device", "batch")} | {"data": str(file), "imgsz": 160, "batch": 16}
    assert score(bccd.TEACHER, words, "val", tmp_path)["score"] > 0.5
