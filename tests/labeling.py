"""Fixtures and helpers for tests of labeling: untrained teachers, images without labels, and what teachers say."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import cv2
import digits
import numpy as np
import pytest
import torch
import yaml
from conftest import narrow, settled
from processes import together
from ultralytics import YOLO
from ultralytics.cfg import get_cfg
from ultralytics.engine.results import Results
from ultralytics.utils import DEFAULT_CFG_DICT

from yolo_cwd.config import Settings
from yolo_cwd.pool import store
from yolo_cwd.pool.pool import Labeler, Pool
from yolo_cwd.tasks import TASKS

MODELS = {
    "detect": "yolov8n.yaml",
    "segment": "yolov8n-seg.yaml",
    "pose": "yolov8n-pose.yaml",
    "obb": "yolov8n-obb.yaml",
    "semantic": "yolo26n-sem.yaml",
    "depth": "yolo26n-depth.yaml",
}

POOL = {"pool_conf": 0.004}  # what untrained teachers say


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "yolo_cwd" / "unlabeled"


def suited(name: str, data: str, folder: Path) -> YOLO:
    """A narrow model of random weights for the classes and key points of a data set."""
    description, content = (yaml.safe_load(Path(file).read_text()) for file in (narrow(name), data))
    description |= {"nc": len(content["names"])} | {k: content[k] for k in ("kpt_shape",) if k in content}
    file = folder / name
    file.write_text(yaml.safe_dump(description))
    return YOLO(str(file))


@pytest.fixture(scope="session")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Checkpoints by task: of random weights, settled, with the names of the data."""
    folder = tmp_path_factory.mktemp("teachers")
    for task, name in MODELS.items():
        data = str(digits.build(folder, {"train": 6, "val": 4}, task=task))
        torch.manual_seed(3)
        model = suited(name, data, folder)
        settled(model.model, data)
        model.model.names = yaml.safe_load(Path(data).read_text())["names"]
        model.save(folder / f"{task}.pt")
    return {task: str(folder / f"{task}.pt") for task in MODELS}


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 7 images without labels, two of them in a folder below."""
    root = tmp_path_factory.mktemp("pictures")
    built = digits.build(root / "set", {"train": 7, "val": 1}, seed=5).parent
    (root / "images" / "below").mkdir(parents=True)
    for i, file in enumerate(sorted((built / "images" / "train").iterdir())):
        shutil.copy(file, root / "images" / ("below" if i > 4 else ".") / file.name)
    return root / "images"


def arguments(data: str | None, **overrides: Any) -> Any:
    words = {"data": data, "imgsz": 64, "batch": 3, "device": "cpu", **overrides}
    return get_cfg(DEFAULT_CFG_DICT, words)


def settings(teacher: str, images: Any, **options: Any) -> Settings:
    return Settings.parse({"teacher": teacher, "unlabeled": images, **POOL, **options})


def label(teacher: str, images: Any, data: str | None, task: str = "detect", **options: Any) -> Pool:
    return Labeler(settings(teacher, images, **options), TASKS[task], arguments(data)).label()


def records(pool: Pool) -> dict[str, dict[str, Any]]:
    found = [json.loads(file.read_text()) for file in (pool.folder / "records").iterdir()]
    return {Path(record["source"]).name: record for record in found}


def rows(pool: Pool, record: dict[str, Any]) -> list[np.ndarray]:
    lines = (pool.folder / record["label"]).read_text().splitlines()
    return [np.array(line.split(), float) for line in lines]


def predicted(teacher: str, image: Path, conf: float = POOL["pool_conf"]) -> Any:
    return YOLO(teacher).predict(str(image), conf=conf, imgsz=64, device="cpu", verbose=False, save=False)[0]


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(f): (f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(folder.rglob("*"))}


def renamed(teacher: str, folder: Path, names: list[str]) -> str:
    model = YOLO(teacher)
    model.model.names = dict(enumerate(names))
    model.save(folder / "renamed.pt")
    return str(folder / "renamed.pt")


OLD_AND_NEW = {0: "old", 1: "new"}

OURS = [*"abcdefgh", "old", "new"]  # what the teacher calls its classes

OLD, NEW = OURS.index("old"), OURS.index("new")

CONFIDENT = {"complete_labels": True, "pool_conf": 0.5}


@pytest.fixture(scope="session")
def old(teachers: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Checkpoints by task that know a class that is called old, and one that is called new."""
    tasks = ("detect", "segment", "pose", "obb")
    return {task: renamed(teachers[task], tmp_path_factory.mktemp(task), OURS) for task in tasks}


def labeled_data(folder: Path, labels: dict[str, str | None], names: dict[int, str] = OLD_AND_NEW, **more: Any) -> str:
    """Make a data set of dark images, 100 by 50 pixels, with the given label files, and return its YAML file."""
    rng = np.random.default_rng(0)
    for part in ("images", "labels"):
        (folder / part / "train").mkdir(parents=True)
    for name, rows in labels.items():
        image = rng.integers(0, 99, (50, 100, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / "images" / "train" / f"{name}.png"), image)
        if rows is not None:
            (folder / "labels" / "train" / f"{name}.txt").write_bytes(rows.encode())
    held_out = digits.build(folder / "held-out", {"train": 1, "val": 2}).parent / "images" / "val"
    content = {"path": str(folder), "train": "images/train", "val": str(held_out), "names": names, **more}
    (folder / "data.yaml").write_text(yaml.safe_dump(content))
    return str(folder / "data.yaml")


class Said:
    """Stands for what teachers predict, and notes which images they are asked about."""

    def __init__(self, found: dict[str, list[list[float]]], kind: str = "boxes") -> None:
        self.found, self.kind = found, kind
        self.asked: list[str] = []

    def __call__(self, teacher: Any, _: Any, images: Mapping[Path, Path], *__: Any) -> Iterator[tuple[Path, Results]]:
        for source, image in images.items():
            self.asked.append(source.stem)
            rows = torch.tensor(self.found.get(source.stem, []))
            rows = rows if len(rows) else torch.zeros(0, 7 if self.kind == "obb" else 6)
            more = {"obb": rows} if self.kind == "obb" else {"boxes": rows}
            more |= {"keypoints": torch.full((len(rows), 4, 2), 25.0)} if self.kind == "keypoints" else {}
            yield source, Results(cv2.imread(str(image)), str(image), teacher.names, **more)


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Said]:
    """Let teachers predict rows of a box, a confidence and a class, by the name of the image."""

    def replace(found: dict[str, list[list[float]]], kind: str = "boxes") -> Said:
        said = Said(found, kind)
        monkeypatch.setattr(store, "predictions", said)
        return said

    return replace


def completed(teacher: str, data: str, task: str = "detect", **options: Any) -> Pool:
    overrides = {name: options.pop(name) for name in ("fraction", "single_cls") if name in options}
    images = options.pop("unlabeled", None)
    asked = settings(teacher, images, **{**CONFIDENT, **options})
    return Labeler(asked, TASKS[task], arguments(data, **overrides)).label()


def label_files(pool: Pool) -> dict[str, str]:
    return {
        Path(name).stem: (pool.folder / r["label"]).read_bytes().decode() for name, r in sorted(records(pool).items())
    }


def new_classes(folder: Path) -> str:
    """Make a data set of digits of which those from 5 on are labeled, and return its YAML file."""
    data = digits.build(folder, {"train": 6, "val": 4})
    for file in (data.parent / "labels" / "train").iterdir():
        file.write_text("".join(line for line in file.read_text().splitlines(True) if int(line[0]) > 4))
    return str(data)


def trained_by_two(words: dict[str, Any], folder: Path) -> str:
    """Train by two processes, and return what they have said."""
    ended = together(2, "processes:main", "train", *(f"{name}={value}" for name, value in words.items()), cwd=folder)
    assert [one.code for one in ended] == [0, 0], ended[0].stderr[-2000:]
    return "".join(one.stdout + one.stderr for one in ended)
