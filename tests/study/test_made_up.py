"""Images with labels for any task, of which only the cost of a step counts."""

from math import isfinite
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml
from conftest import SHORT
from test_digits import MODELS
from ultralytics import YOLO

from yolo_cwd.study import made_up

NAMES = {0: "cell", 1: "other"}


@pytest.mark.parametrize("task", MODELS)
def test_ultralytics_trains_every_task(task: str, tmp_path: Path) -> None:
    data = made_up.build(tmp_path / "data", {"train": 8, "val": 4}, task, NAMES)
    model = YOLO(MODELS[task])
    assert model.task == task
    model.train(**{**SHORT, "model": MODELS[task], "data": str(data), "project": str(tmp_path)})
    trainer = model.trainer
    assert [len(loader.dataset) for loader in (trainer.train_loader, trainer.test_loader)] == [8, 4]
    losses = {name: float(value) for name, value in trainer.label_loss_items(trainer.tloss).items()}
    assert all(isfinite(value) for value in losses.values())
    assert sum(value > 0 for value in losses.values()) >= 2


def test_images_repeat_when_there_are_not_enough(tmp_path: Path) -> None:
    data = made_up.build(tmp_path, {"train": 212, "val": 1}, "detect", {0: "cell", 1: "b"}, channels=3)
    images = [file.read_bytes() for file in sorted((tmp_path / "images" / "train").iterdir())]
    assert images[211] == images[0] != images[1]
    content = yaml.safe_load(data.read_text(encoding="utf-8"))
    assert (content["names"], content["channels"]) == ({0: "cell", 1: "b"}, 3)


def test_every_label_is_of_the_same_boxes(tmp_path: Path) -> None:
    for task in MODELS:
        made_up.build(tmp_path / task, {"train": 1}, task, NAMES)
    first = {task: tmp_path / task / "labels" / "train" / "00000.txt" for task in ("detect", "segment", "obb", "pose")}
    rows = {task: np.loadtxt(file) for task, file in first.items()}
    assert all((values[:, 0] == 0).all() for values in rows.values())
    x, y, w, h = rows["detect"][0, 1:]
    expected = [x - w / 2, y - h / 2, x + w / 2, y - h / 2, x + w / 2, y + h / 2, x - w / 2, y + h / 2]
    assert rows["segment"][0, 1:] == pytest.approx(np.clip(expected, 0, 1), abs=1e-5)
    assert rows["obb"].tolist() == rows["segment"].tolist()
    assert rows["pose"][0, 1:] == pytest.approx([x, y, w, h, *np.clip(expected, 0, 1)], abs=1e-5)
    image = cv2.imread(str(tmp_path / "detect" / "images" / "train" / "00000.jpg"))
    mask = cv2.imread(str(tmp_path / "semantic" / "masks" / "train" / "00000.png"), cv2.IMREAD_GRAYSCALE)
    depth = np.load(tmp_path / "depth" / "depth" / "train" / "00000.npy")
    assert mask.shape == depth.shape == image.shape[:2]
    assert mask[int(y * mask.shape[0]), int(x * mask.shape[1])] == 0
    assert (mask == 0).tolist() == (depth == made_up.NEAR).tolist()
    assert set(np.unique(mask)) == {0, 1}
