"""What a score asks of Ultralytics' `val`, and what it takes from the answer; no model is scored."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml

from yolo_cwd.config import ConfigError
from yolo_cwd.run import score as scoring
from yolo_cwd.run.score import classes_of_data, knows, score
from yolo_cwd.tasks import TASKS

RESULTS = {
    "metrics/mAP50-95(B)": 0.1,
    "metrics/mAP50(B)": 0.2,
    "metrics/mAP50-95(M)": 0.3,
    "metrics/mAP50-95(P)": 0.4,
    "metrics/mIoU": np.float64(0.5),
    "metrics/pixel_acc": np.float64(0.6),
    "metrics/abs_rel": 0.7,
    "metrics/delta1": 0.8,
}
NAMES = {0: "car", 1: "cat", 2: "dog"}


class Model:
    """Stands for a YOLO, which notes what its validation is asked."""

    task, names = "detect", NAMES

    def __init__(self, weights: Any = None) -> None:
        self.weights, self.asked = weights, {}
        Model.last = self

    def val(self, **asked: Any) -> Any:
        self.asked = asked
        parts = {name: SimpleNamespace(maps=np.arange(3) + i, ap_class_index=[0, 2]) for i, name in enumerate(PARTS)}
        return SimpleNamespace(
            results_dict=RESULTS, names=NAMES, ap_class_index=[0, 2], class_result=lambda i: (10.0 + i, -1.0), **parts
        )


Model.last = Model()
PARTS = ("box", "seg", "pose")


@pytest.fixture(autouse=True)
def no_model_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "YOLO", Model)


def test_val_is_asked_as_the_training_asks_it(tmp_path: Path) -> None:
    """What means something else there is not passed on, nor are our options; nothing is left behind."""
    kept = {"data": "d.yaml", "imgsz": 64, "max_det": 3, "device": "cpu", "single_cls": True, "half": True}
    others = {"model": "a.pt", "mode": "train", "rect": True, "compile": True, "resume": True, "save_dir": "s"}
    ours = {"teacher": "t.pt", "tau": 2.0}
    replaced = {"project": "p", "name": "n", "split": "val", "exist_ok": False, "cache": "ram"}
    replaced |= dict.fromkeys(("plots", "verbose", "save_json", "save_txt"), True)
    score("best.pt", {**kept, **others, **ours, **replaced}, "test", tmp_path)
    silent = dict.fromkeys(("plots", "verbose", "save_json", "save_txt", "cache"), False)
    asked = {**kept, **silent, "exist_ok": True, "project": str(tmp_path), "name": "score", "split": "test"}
    assert (Model.last.weights, Model.last.asked) == ("best.pt", asked)


def test_a_model_in_memory_is_scored_itself(tmp_path: Path) -> None:
    model = Model()
    score(model, {"imgsz": 32}, "val", tmp_path)
    assert (Model.last, model.asked["imgsz"]) == (model, 32)


@pytest.mark.parametrize(
    ("task", "first", "second", "classes"),
    [
        ("detect", 0.1, 0.2, {"car": 0, "dog": 2}),
        ("obb", 0.1, 0.2, {"car": 0, "dog": 2}),
        ("segment", 0.3, 0.1, {"car": 1, "dog": 3}),
        ("pose", 0.4, 0.1, {"car": 2, "dog": 4}),
        ("semantic", 0.5, 0.6, {"car": 10, "dog": 11}),
        ("depth", 0.7, 0.8, {}),
    ],
)
def test_every_task_has_its_scores(
    task: str, first: float, second: float, classes: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As plain numbers, which can be written as JSON; by class, for each class that occurs."""
    monkeypatch.setattr(Model, "task", task)
    found = score("best.pt", {}, "val", tmp_path)
    assert found == {"score": first, "second": second, "classes": classes}
    assert all(type(value) is float for value in (found["score"], found["second"], *found["classes"].values()))


def data(folder: Path, **more: Any) -> str:
    (folder / "images").mkdir()
    content = {"path": str(folder), "train": "images", "val": "images", "names": NAMES, **more}
    (folder / "data.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    return str(folder / "data.yaml")


def test_classes_are_those_that_a_training_sees(tmp_path: Path) -> None:
    """Class maps that are drawn from polygons have the background as a class; options of ours do not disturb."""
    words = {"data": data(tmp_path), "tau": 2.0}
    for task in ("detect", "depth"):
        assert classes_of_data({**words, "task": task}, "val", TASKS[task]) == NAMES
    drawn = classes_of_data({**words, "task": "semantic"}, "val", TASKS["semantic"])
    assert drawn == {**NAMES, 3: "background"}


def test_the_split_is_one_of_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether Ultralytics says so, or gives data without it."""
    words = {"data": data(tmp_path), "split": "val"}
    with pytest.raises(ConfigError, match="'test:' images not found"):
        classes_of_data(words, "test", TASKS["detect"])
    resolved = {"names": NAMES, "val": "images", "test": None}
    monkeypatch.setattr(scoring, "data_of", lambda args: resolved)
    assert classes_of_data(words, "val", TASKS["detect"]) == NAMES
    with pytest.raises(ConfigError) as error:
        classes_of_data(words, "test", TASKS["detect"])
    assert str(error.value) == f"split=test: data={words['data']} names no images for it; give split=val"


def test_a_model_of_another_task_or_other_classes_has_no_score(monkeypatch: pytest.MonkeyPatch) -> None:
    assert knows("a.pt", TASKS["detect"], NAMES) is True
    assert Model.last.weights == "a.pt"
    assert knows("a.pt", TASKS["detect"], {**NAMES, 0: "bus"}) is False
    assert knows("a.pt", TASKS["segment"], NAMES) is False
    monkeypatch.setattr(Model, "task", "depth")
    assert knows("a.pt", TASKS["depth"], {}) is True, "depth has no classes"
