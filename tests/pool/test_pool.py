"""Trainings on images that the teacher has labeled: what they see, resume and refuse."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import digits
import numpy as np
import pytest
import yaml
from conftest import SHORT, STUDENT, bare
from labeling import (
    CONFIDENT,
    MODELS,
    POOL,
    arguments,
    label,
    new_classes,
    records,
    renamed,
    settings,
    trained_by_two,
)
from test_state import interrupted, resume
from ultralytics import YOLO

from yolo_cwd import CWDTrainer
from yolo_cwd.cli import main
from yolo_cwd.config import ConfigError, Settings
from yolo_cwd.pool import pool as pool_module
from yolo_cwd.pool.pool import Labeler
from yolo_cwd.study import compare
from yolo_cwd.tasks import TASKS

pytestmark = pytest.mark.usefixtures("cache")


@pytest.mark.parametrize("task", MODELS)
def test_a_training_sees_the_images_of_the_pool_and_their_labels(
    train: Callable[..., CWDTrainer], teachers: dict[str, str], sets: dict[str, str], pictures: Path, task: str
) -> None:
    seen: list[Any] = []
    words = {"unlabeled": str(pictures), "cwd": 0 if task == "obb" else "balanced", **POOL}
    callbacks = {"on_train_start": lambda trainer: seen.append(trainer.train_loader.dataset)}
    model = bare(MODELS[task])
    trainer = train(model=model, data=sets[task], teacher=teachers[task], callbacks=callbacks, **words)
    assert len(seen[0]) == 8 + 7
    ours = [label for label in seen[0].labels if str(trainer.pool.folder) in label["im_file"]]
    assert len(ours) == 7
    if task not in {"semantic", "depth"}:
        written = [
            set((trainer.pool.folder / r["label"]).read_text().splitlines()) for r in records(trainer.pool).values()
        ]
        read = sum(len(label["cls"]) for label in ours)
        assert 2 < read <= sum(map(len, written))  # 8.4.116 takes outlines with the same box for duplicates
        assert read == sum(map(len, written)) or task in {"segment", "obb"}
    assert trainer.args.data == sets[task]
    assert str(trainer.pool.folder) not in str(YOLO(trainer.last).ckpt["train_args"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unlabeled": True}, "unlabeled=True: not a path"),
        ({"pool_conf": 2}, "pool_conf=2: must be a number"),
        ({"pool_ratio": 0}, "pool_ratio=0: must be a number above 0"),
        ({"pool_classes": "some"}, "pool_classes=some: must be one of all, known"),
    ],
)
def test_refused_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Settings.parse({"teacher": "t", **options})


def test_a_pool_without_a_usable_image_is_refused_and_leaves_nothing(
    teachers: dict[str, str], sets: dict[str, str], cache: Path
) -> None:
    held_out = Path(sets["detect"]).parent / "images" / "val"
    with pytest.raises(
        ConfigError, match="0 images can be used; left out: 4 among the images that models are"
    ) as error:
        label(teachers["detect"], str(held_out), sets["detect"])
    assert len(str(error.value)) < 300
    assert list(cache.rglob("*")) == []


def test_the_ratio_bounds_the_pool_evenly(teachers: dict[str, str], sets: dict[str, str], pictures: Path) -> None:
    pool = label(teachers["detect"], str(pictures), sets["detect"], pool_ratio=0.375)
    everything = sorted(pictures.rglob("*.jpg"))
    assert set(records(pool)) == {everything[i].name for i in (0, 3, 6)}


def test_a_fraction_of_the_data_is_trained_on_beside_the_pool(
    teachers: dict[str, str], sets: dict[str, str], pictures: Path
) -> None:
    asked = settings(teachers["detect"], str(pictures), pool_ratio=0.75)
    labeler = Labeler(asked, TASKS["detect"], arguments(sets["detect"], fraction=0.5))
    assert labeler.survey() == {"unlabeled": "3 images can be used"}
    own, added = ([Path(line) for line in Path(file).read_text().splitlines()] for file in labeler.label().train)
    assert own == sorted((Path(sets["detect"]).parent / "images" / "train").iterdir())[:4]
    assert len(added) == 3


def test_a_fraction_of_the_data_is_completed(teachers: dict[str, str], tmp_path: Path) -> None:
    data = new_classes(tmp_path / "new")
    teacher = renamed(teachers["detect"], tmp_path, [*"01234", "a", "b", "c", "d", "e"])
    labeler = Labeler(settings(teacher, None, **CONFIDENT), TASKS["detect"], arguments(data, fraction=0.5))
    assert "the labels of 3 images will be completed" in labeler.survey()["complete_labels"]
    images = sorted((Path(data).parent / "images" / "train").iterdir())
    assert sorted(records(labeler.label())) == [image.name for image in images[:3]]


def test_teachers_that_cannot_label_are_refused(
    teachers: dict[str, str], sets: dict[str, str], pictures: Path, cache: Path
) -> None:
    with pytest.raises(ConfigError, match="a model for task=segment cannot label images for task=detect"):
        label(teachers["segment"], str(pictures), sets["detect"])
    with pytest.raises(ConfigError, match=r"\.yaml: cannot label images, it is not trained; give a \.pt checkpoint"):
        label(bare("yolov8n.yaml"), str(pictures), sets["detect"])
    with pytest.raises(ConfigError, match="teacher=YOLO: cannot label images as an object"):
        label(YOLO(teachers["detect"]), str(pictures), sets["detect"])
    assert not cache.exists()


def test_a_resumed_run_finds_its_pool_again(
    train: Callable[..., CWDTrainer],
    teachers: dict[str, str],
    sets: dict[str, str],
    pictures: Path,
    tmp_path: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(pictures.parent)
    words = {"data": sets["detect"], "teacher": teachers["detect"], "unlabeled": pictures.name, **POOL}
    last = interrupted(train, tmp_path, 1, epochs=2, fraction=0.5, **words)
    files = {file.name for file in last.parents[1].rglob("*")}
    assert files == {"args.yaml", "cwd.yaml", "results.csv", "weights", "last.pt", "best.pt", "cwd.pt"}
    monkeypatch.chdir(tmp_path)
    shutil.rmtree(cache)
    trainer = resume(last)
    assert len(trainer.train_loader.dataset) == 4 + 7
    assert trainer.epoch == 1


def test_a_pool_that_has_moved_is_named_anew_on_resuming(
    train: Callable[..., CWDTrainer], teachers: dict[str, str], sets: dict[str, str], pictures: Path, tmp_path: Path
) -> None:
    shutil.copytree(pictures, tmp_path / "before")
    words = {"data": sets["detect"], "teacher": teachers["detect"], "unlabeled": str(tmp_path / "before"), **POOL}
    last = interrupted(train, tmp_path, 1, epochs=2, **words)
    (tmp_path / "before").rename(tmp_path / "after")
    with pytest.raises(ConfigError, match="before: names no file"):
        resume(last)
    assert len(resume(last, unlabeled=str(tmp_path / "after")).train_loader.dataset) == 8 + 7


def test_images_of_the_data_without_a_label_file_are_told(
    train: Callable[..., CWDTrainer], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = digits.build(tmp_path, {"train": 4, "val": 2})
    next((data.parent / "labels" / "train").iterdir()).unlink()
    train(data=str(data), verbose=True)
    assert sum("1 of 4 training images have no label file, and count" in r.message for r in caplog.records) == 1


def test_check_counts_without_labeling(
    teachers: dict[str, str],
    sets: dict[str, str],
    pictures: Path,
    cache: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [f"teacher={teachers['detect']}", f"student={STUDENT}", f"data={sets['detect']}", f"unlabeled={pictures}"]
    assert main(["check", *words, "imgsz=64", "batch=2", "device=cpu"]) == 0
    assert "unlabeled 7 images can be used" in capsys.readouterr().out
    assert not cache.exists()


def test_an_arm_may_have_a_pool(teachers: dict[str, str], sets: dict[str, str], pictures: Path, tmp_path: Path) -> None:
    pool = "".join(f",{name}={value}" for name, value in POOL.items())
    words: dict[str, Any] = {**SHORT, "student": STUDENT, "teacher": teachers["detect"], "data": sets["detect"]}
    words |= {"folder": str(tmp_path / "compared"), "seeds": 1}
    del words["model"]
    summary = compare.run({**words, "arms": f"unl:unlabeled={pictures},cwd=0{pool}"})
    assert list(summary["arms"]) == ["unl"]
    assert str(pictures) in (tmp_path / "compared" / "runs" / "unl-0" / "cwd.yaml").read_text()


@pytest.mark.slow
def test_several_processes_label_once(
    teachers: dict[str, str], sets: dict[str, str], pictures: Path, tmp_path: Path, cache: Path
) -> None:
    words = {**SHORT, "teacher": teachers["detect"], "data": sets["detect"], "unlabeled": pictures, **POOL}
    words |= {"verbose": True, "project": tmp_path / "runs", "model": teachers["detect"]}
    said = trained_by_two(words, tmp_path)
    assert said.count("labels 7 images") == 1
    assert "15 images" in said
    assert len(list(cache.glob("*/records/*.json"))) == 7


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside a pool"])
def test_a_training_sees_the_completed_labels(
    train: Callable[..., CWDTrainer], teachers: dict[str, str], pictures: Path, tmp_path: Path, beside: bool
) -> None:
    data = new_classes(tmp_path / "new")
    teacher = renamed(teachers["detect"], tmp_path, [*"01234", "a", "b", "c", "d", "e"])
    options = {"complete_labels": True, "pool_conf": 0.001, "fraction": 0.5}
    options |= {"unlabeled": str(pictures), "pool_classes": "known"} if beside else {}
    seen: list[Any] = []
    callbacks = {"on_train_start": lambda trainer: seen.append(trainer.train_loader.dataset.labels)}
    trainer = train(data=data, teacher=teacher, callbacks=callbacks, **options)
    ours = [label for label in seen[0] if "completed" in label["im_file"]]
    assert (len(ours), len(seen[0])) == (3, 10 if beside else 3)
    files = sorted((Path(data).parent / "labels" / "train").iterdir())[:3]
    own = [float(line.split()[1]) for file in files for line in file.read_text().splitlines()]
    kinds, boxes = (np.concatenate([label[part] for label in ours]) for part in ("cls", "bboxes"))
    assert sorted(boxes[kinds[:, 0] > 4, 0]) == pytest.approx(sorted(own))
    assert (kinds < 5).sum() >= 3
    assert "completed" not in str(trainer.validator.dataloader.dataset.im_files)
    description = yaml.safe_load(trainer.pool.data.read_text())
    assert [str(Path(path).parents[2].name) for path in description["train"]] == ["completed", "unlabeled"][
        : 1 + beside
    ]
    assert trainer.args.fraction == 0.5


def test_a_resumed_run_finds_its_completed_labels_again(
    train: Callable[..., CWDTrainer], teachers: dict[str, str], tmp_path: Path, cache: Path
) -> None:
    data = new_classes(tmp_path / "new")
    teacher = renamed(teachers["detect"], tmp_path, [*"01234", "a", "b", "c", "d", "e"])
    words = {"data": data, "teacher": teacher, "complete_labels": True, "fraction": 0.5, **POOL}
    last = interrupted(train, tmp_path, 1, epochs=2, **words)
    shutil.rmtree(cache.parent)
    trainer = resume(last)
    assert trainer.epoch == 1
    assert len(trainer.train_loader.dataset) == 3
    assert all("completed" in file for file in trainer.train_loader.dataset.im_files)


@pytest.mark.slow
def test_several_processes_complete_once(teachers: dict[str, str], tmp_path: Path, cache: Path) -> None:
    data = new_classes(tmp_path / "new")
    teacher = renamed(teachers["detect"], tmp_path, [*"01234", "a", "b", "c", "d", "e"])
    words = {**SHORT, "teacher": teacher, "data": data, "complete_labels": True, **POOL}
    words |= {"verbose": True, "project": tmp_path / "runs", "model": teachers["detect"]}
    said = trained_by_two(words, tmp_path)
    assert said.count("labels 6 images") == 1
    assert len(list((cache.parent / "completed").glob("*/records/*.json"))) == 6


def test_a_teacher_that_is_trained_first_need_not_know_the_classes_before(
    teachers: dict[str, str], sets: dict[str, str], pictures: Path, tmp_path: Path, cache: Path
) -> None:
    other = renamed(teachers["detect"], tmp_path, list("abcdefghij"))
    labeler = Labeler(settings(other, str(pictures)), TASKS["detect"], arguments(sets["detect"]))
    with pytest.raises(ConfigError, match="does not know 0, 1, 2, 3 and 6 more of the data"):
        labeler.refuse()
    labeler.refuse(will_be_trained=True)
    assert not cache.exists()
    pool = labeler.label(teachers["detect"])
    assert pool == label(teachers["detect"], str(pictures), sets["detect"])
    with pytest.raises(ConfigError, match=r"unlabeled=.*nowhere: names no file"):
        Labeler(settings("t.yaml", "nowhere"), TASKS["detect"], arguments(sets["detect"])).refuse(will_be_trained=True)


def test_a_pool_has_the_labels_of_the_teacher_that_was_trained_first(
    staged: Callable[..., CWDTrainer], data: str, pictures: Path
) -> None:
    trainer = staged(unlabeled=str(pictures), cwd=0, pool_conf=1e-4, model=STUDENT)
    trained = trainer.save_dir / "teacher" / "weights" / "best.pt"
    assert trainer.pool == label(str(trained), str(pictures), data, pool_conf=1e-4)
    assert trainer.pool.summary.objects


def test_the_teacher_and_the_data_are_read_once(
    teachers: dict[str, str], sets: dict[str, str], pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    data_of, whole_teacher = pool_module.data_of, pool_module.whole_teacher
    monkeypatch.setattr(pool_module, "data_of", lambda *words: (read.append("data"), data_of(*words))[1])
    monkeypatch.setattr(pool_module, "whole_teacher", lambda *words: (read.append("teacher"), whole_teacher(*words))[1])
    labeler = Labeler(settings(teachers["detect"], str(pictures)), TASKS["detect"], arguments(sets["detect"]))
    labeler.refuse()
    labeler.survey()
    labeler.label()
    assert sorted(read) == ["data", "teacher"]
