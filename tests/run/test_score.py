"""A score is that of the best checkpoint on the split that was asked for, as Ultralytics' own `val` gives it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import STUDENT
from ultralytics import YOLO

from yolo_cwd.config import ConfigError
from yolo_cwd.run.score import classes_of_data, knows, score
from yolo_cwd.study import compare
from yolo_cwd.tasks import TASKS

WORDS = {"imgsz": 64, "batch": 4, "device": "cpu", "plots": False, "verbose": False}


@pytest.fixture(scope="module")
def learned(data: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two checkpoints that have learned the training images a little, so that no score of theirs is 0."""
    folder = tmp_path_factory.mktemp("learned")
    model = YOLO(STUDENT)
    words = {**WORDS, "epochs": 60, "val": False, "optimizer": "AdamW", "lr0": 0.01, "nbs": 4, "mosaic": 0.0, "seed": 1}
    model.train(data=data, project=str(folder), warmup_epochs=0, close_mosaic=0, save_period=45, **words)
    weights = Path(model.trainer.wdir)
    return {"less": str(weights / "epoch45.pt"), "more": str(weights / "last.pt")}


def of_val(weights: str, data: str, split: str, folder: Path, **arguments: Any) -> Any:
    """What Ultralytics' own `val` finds."""
    return YOLO(weights).val(data=data, split=split, project=str(folder / "val"), **{**WORDS, **arguments}).box


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_score_is_of_the_split_that_was_asked_for(
    split: str, learned: dict[str, str], data: str, tmp_path: Path
) -> None:
    found = score(learned["more"], {**WORDS, "data": data, "split": "test"}, split, tmp_path)
    expected = of_val(learned["more"], data, split, tmp_path)
    assert (found["score"], found["second"]) == (expected.map, expected.map50)
    assert found["score"] > 0
    by_class = {str(c): expected.maps[c] for c in expected.ap_class_index}
    assert found["classes"] == pytest.approx(by_class)
    assert len(found["classes"]) == len({line.split()[0] for line in lines_of(data, split)}) < 10


def lines_of(data: str, split: str) -> list[str]:
    """The lines of all label files of a split."""
    files = (Path(data).parent / "labels" / split).glob("*.txt")
    return [line for file in files for line in file.read_text().splitlines()]


def test_only_what_means_the_same_in_val_is_passed_on(learned: dict[str, str], data: str, tmp_path: Path) -> None:
    """Our options and arguments of the training alone are not; `val` leaves nothing behind but in the given folder."""
    of_training = {"model": "absent.pt", "mode": "train", "rect": False, "resume": True, "save_dir": "absent"}
    ours = {"tau": 2.0, "teacher": "absent.pt"}
    noisy = {"plots": True, "save_json": True, "save_txt": True, "exist_ok": False}
    folder = tmp_path / "run"
    arguments = {**WORDS, **of_training, **ours, **noisy, "data": data, "max_det": 3}
    for _ in range(2):
        found = score(learned["more"], arguments, "train", folder)
    assert found["score"] == of_val(learned["more"], data, "train", tmp_path, max_det=3).map
    assert found["score"] != of_val(learned["more"], data, "train", tmp_path).map
    assert [file.name for file in folder.rglob("*") if file.name != "score"] == []


def test_a_model_may_be_given_itself(learned: dict[str, str], data: str, tmp_path: Path) -> None:
    arguments = {**WORDS, "data": data}
    by_path = score(Path(learned["more"]), arguments, "train", tmp_path)
    assert score(YOLO(learned["more"]), arguments, "train", tmp_path) == by_path


def test_classes_of_data_are_those_of_the_training(sets: dict[str, str]) -> None:
    digits = {i: str(i) for i in range(10)}
    assert classes_of_data({"data": sets["detect"], "tau": 2.0}, "val", TASKS["detect"]) == digits
    assert classes_of_data({"data": sets["detect"], "single_cls": True}, "val", TASKS["detect"]) == {0: "item"}
    with pytest.raises(ConfigError, match="'test:' images not found"):
        classes_of_data({"data": sets["detect"]}, "test", TASKS["detect"])


def test_who_knows_the_classes_has_a_score(learned: dict[str, str]) -> None:
    digits = {i: str(i) for i in range(10)}
    assert knows(learned["more"], TASKS["detect"], digits)
    assert not knows(learned["more"], TASKS["detect"], {**digits, 0: "nought"})
    assert not knows(learned["more"], TASKS["segment"], digits)


def test_a_comparison_scores_best_checkpoints_on_its_split(
    learned: dict[str, str], data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The runs' and the teacher's; last.pt counts where there is no best.pt."""

    def train(method: str, task: Any, words: dict[str, Any], folder: Path) -> float:
        (folder / "weights").mkdir(parents=True)
        shutil.copy(learned["less"], folder / "weights" / "last.pt")
        if words["seed"] == 0:
            shutil.copy(learned["more"], folder / "weights" / "best.pt")
        return 1.0

    monkeypatch.setattr(compare, "_train", train)
    monkeypatch.setattr(compare, "rehearse", lambda comparison: None)
    words = {**WORDS, "teacher": learned["more"], "student": STUDENT, "data": data, "val": False, "epochs": 1}
    folder = tmp_path / "comparison"
    summary = compare.run({**words, "arms": "plain", "seeds": 2, "split": "train", "folder": str(folder)})
    found = [json.loads((folder / "results" / f"plain-{seed}.json").read_text()) for seed in range(2)]
    more, less = (of_val(learned[name], data, "train", tmp_path).map for name in ("more", "less"))
    assert [r["score"] for r in found] == [more, less]
    assert more != less
    assert [Path(r["weights"]).name for r in found] == ["best.pt", "last.pt"]
    assert summary["teacher"]["score"] == more


def test_a_teacher_that_was_trained_has_the_score_of_its_best_checkpoint(
    learned: dict[str, str], data: str, tmp_path: Path
) -> None:
    words = {**WORDS, "teacher": learned["less"], "student": STUDENT, "data": data, "split": "train"}
    comparison = compare.Comparison.parse({**words, "folder": str(tmp_path / "comparison")})
    comparison = replace(comparison, trained=learned["more"])
    for name in ("locks", "results", "teacher"):
        (comparison.folder / name).mkdir(parents=True)
    (comparison.folder / "teacher" / "results.csv").write_text("epoch,time\n1,2.5\n2,4\n")
    compare.score_teacher(comparison, {i: str(i) for i in range(10)})
    found = json.loads((comparison.folder / "results" / "teacher.json").read_text())
    assert found["score"] == of_val(learned["more"], data, "train", tmp_path).map
    assert found["seconds"] == 4
