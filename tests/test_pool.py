"""Images without labels: what the teacher's labels are, where they lie, which images are left out, and the training."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import yaml
from conftest import narrow, settled
from ultralytics import YOLO
from ultralytics.cfg import get_cfg
from ultralytics.utils import DEFAULT_CFG_DICT

from yolo_cwd import CWDTrainer, digits
from yolo_cwd.config import Settings
from yolo_cwd.pool import store

MODELS = {
    "detect": "yolov8n.yaml",
    "segment": "yolov8n-seg.yaml",
    "pose": "yolov8n-pose.yaml",
    "obb": "yolov8n-obb.yaml",
    "semantic": "yolo26n-sem.yaml",
    "depth": "yolo26n-depth.yaml",
}
POOL = {"pool_conf": 0.004, "pool_unsure": 0.004}  # what untrained teachers say


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "yolo_cwd" / "unlabeled"


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """YAML paths of the digits by task, 6 training and 4 validation images each."""
    root = tmp_path_factory.mktemp("sets")
    return {task: str(digits.build(root, {"train": 6, "val": 4}, task=task)) for task in MODELS}


@pytest.fixture(scope="module")
def teachers(sets: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Checkpoints by task: of random weights, settled, with the names of the data."""
    folder = tmp_path_factory.mktemp("teachers")
    for task, name in MODELS.items():
        data = yaml.safe_load(Path(sets[task]).read_text())
        torch.manual_seed(3)
        description = yaml.safe_load(Path(narrow(name)).read_text()) | {"nc": len(data["names"])}
        if task == "pose":
            description["kpt_shape"] = data["kpt_shape"]
        file = folder / f"{task}-{name}"
        file.write_text(yaml.safe_dump(description))
        model = YOLO(str(file), task=task)
        settled(model.model, sets[task])
        model.model.names = data["names"]
        model.save(folder / f"{task}.pt")
    return {task: str(folder / f"{task}.pt") for task in MODELS}


@pytest.fixture(scope="module")
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


def label(teacher: str, images: Any, data: str | None, task: str = "detect", **options: Any) -> store.Pool:
    return store.prepare(settings(teacher, images, **options), task, arguments(data))


def records(pool: store.Pool) -> dict[str, dict[str, Any]]:
    found = [json.loads(file.read_text()) for file in (pool.folder / "records").iterdir()]
    return {Path(record["source"]).name: record for record in found}


def rows(pool: store.Pool, record: dict[str, Any]) -> list[np.ndarray]:
    lines = (pool.folder / record["label"]).read_text().splitlines()
    return [np.array(line.split(), float) for line in lines]


def predicted(teacher: str, image: Path, conf: float = POOL["pool_conf"]) -> Any:
    return YOLO(teacher).predict(str(image), conf=conf, imgsz=64, device="cpu", verbose=False, save=False)[0]


def within(corners: np.ndarray) -> np.ndarray:
    """Corners as they are, unless the upright box around them is none that Ultralytics would read."""
    low, high = corners.min(axis=0), corners.max(axis=0)
    usable = ((low + high) / 2 >= 0).all() and ((low + high) / 2 <= 1).all() and (high - low <= 1).all()
    return corners if usable else corners.clip(0, 1)


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(f): (f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(folder.rglob("*"))}


@pytest.mark.parametrize("task", ["detect", "segment", "pose", "obb"])
def test_labels_are_what_the_teacher_predicts(
    teachers: dict[str, str], sets: dict[str, str], pictures: Path, task: str
) -> None:
    before = snapshot(pictures)
    pool = label(teachers[task], str(pictures), sets[task], task)
    assert snapshot(pictures) == before
    found = records(pool)
    assert pool.found.images == len(found) == 7
    objects = 0  # one image at a time differs in the last digits
    for image in pictures.rglob("*.jpg"):
        result = predicted(teachers[task], image)
        written = rows(pool, found[image.name])
        boxes = result.obb if task == "obb" else result.boxes
        assert len(written) == len(boxes)
        for row, i in zip(written, range(len(boxes)), strict=True):
            objects += 1
            assert row[0] == int(boxes.cls[i])
            if task == "detect":
                expected = boxes.xywhn[i].numpy()
            elif task == "segment":
                expected = result.masks.xyn[i].ravel()
                if len(expected) < 6:
                    continue
            elif task == "obb":
                expected = within(boxes.xyxyxyxyn[i].numpy()).ravel()
            else:
                expected = np.concatenate([boxes.xywhn[i].numpy(), result.keypoints.xyn[i].numpy().clip(0, 1).ravel()])
            assert row[1:] == pytest.approx(expected, abs=1e-4)
    assert objects == sum(pool.found.objects.values()) >= 7


def test_class_maps_are_what_the_teacher_predicts(
    teachers: dict[str, str], sets: dict[str, str], pictures: Path
) -> None:
    pool = label(teachers["semantic"], str(pictures), sets["semantic"], "semantic")
    for name, record in records(pool).items():
        written = cv2.imread(str(pool.folder / record["label"]), cv2.IMREAD_UNCHANGED)
        expected = predicted(teachers["semantic"], Path(record["source"])).semantic_mask.data
        assert record["label"].startswith("masks/")
        assert written.tolist() == np.asarray(expected).squeeze().tolist(), name
    assert sum(pool.found.objects.values()) == 7 * digits.SIZE**2


def test_depth_maps_are_what_the_teacher_predicts(
    teachers: dict[str, str], sets: dict[str, str], pictures: Path
) -> None:
    pool = label(teachers["depth"], str(pictures), sets["depth"], "depth")
    for record in records(pool).values():
        written = np.load(pool.folder / record["label"])
        assert written == pytest.approx(
            np.asarray(predicted(teachers["depth"], Path(record["source"])).depth.data), abs=1e-4
        )


@pytest.mark.parametrize("task", MODELS)
def test_a_training_sees_the_images_of_the_pool_and_their_labels(
    train: Callable[..., CWDTrainer], teachers: dict[str, str], sets: dict[str, str], pictures: Path, task: str
) -> None:
    seen: list[Any] = []
    words = {"unlabeled": str(pictures), "cwd": 0 if task == "obb" else "balanced", **POOL}
    callbacks = {"on_train_start": lambda trainer: seen.append(trainer.train_loader.dataset)}
    model = narrow(MODELS[task])
    trainer = train(model=model, data=sets[task], teacher=teachers[task], callbacks=callbacks, **words)
    assert len(seen[0]) == 6 + 7
    ours = [label for label in seen[0].labels if str(trainer.pool.folder) in label["im_file"]]
    assert len(ours) == 7
    if task not in {"semantic", "depth"}:
        written = [
            set((trainer.pool.folder / r["label"]).read_text().splitlines()) for r in records(trainer.pool).values()
        ]
        assert sum(len(label["cls"]) for label in ours) == sum(map(len, written)) > 2
    assert trainer.args.data == sets[task]
    assert str(trainer.pool.folder) not in str(YOLO(trainer.last).ckpt["train_args"])
