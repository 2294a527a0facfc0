"""`yolo_cwd check`: what is distilled, what it costs, and whether the teacher is worth it."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import digits
import pytest
import torch
import yaml
from conftest import SHORT, STUDENT, bare
from processes import Started
from torch import nn
from ultralytics import YOLO

from yolo_cwd.cli import main
from yolo_cwd.config import ConfigError
from yolo_cwd.study import check
from yolo_cwd.study.advice import as_text, compare_classes, verdict
from yolo_cwd.study.check import examine

WORDS = {**{k: v for k, v in SHORT.items() if k != "val"}, "teacher_dtype": "fp32"}
WHOLE = {"teacher": "yolov8s.yaml", "model": "yolov8n.yaml"}  # whose size others have published


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, data: str) -> dict[str, str]:
    """Checkpoints of teacher and student, untrained, with the classes of the data."""
    folder = tmp_path_factory.mktemp("pair")
    names = yaml.safe_load(Path(data).read_text())["names"]
    torch.manual_seed(0)
    for who, model in {"teacher": "yolov8s", "model": "yolo11n"}.items():
        yolo = YOLO(bare(f"{model}.yaml"))
        yolo.model.names = names
        yolo.save(folder / f"{who}.pt")
    return {who: str(folder / f"{who}.pt") for who in ("teacher", "model")}


def test_levels_adapters_and_models(tmp_path: Path) -> None:
    words = {**WORDS, **WHOLE, "imgsz": 96, "levels": "P4,P5", "level_weights": (1, 0.5)}
    found = examine(words, tmp_path)
    p4, p5 = found["levels"]
    (share, fixed), _ = [(level.pop("share"), level.pop("fixed_share")) for level in (p4, p5)]
    assert share > 0
    assert fixed > 0
    assert p4 == {
        "name": "P4",
        "stride": 16,
        "map": 6,
        "student_channels": 128,
        "teacher_channels": 256,
        "adapter_parameters": 128 * 256,
        "weight": 1,
    }
    assert (p5["map"], p5["adapter_parameters"], p5["weight"]) == (3, 256 * 512, 0.5)
    assert found["teacher"]["parameters"] == sum(p.numel() for p in YOLO("yolov8s.yaml").model.parameters())
    # 28.8 and 8.7 at 640 px by Ultralytics' own summary, with 80 classes; the teacher's head is not counted
    whole = 28.8 * (96 / 640) ** 2
    assert 0.5 * whole < found["teacher"]["gflops"] < whole
    assert found["student"]["gflops"] == pytest.approx(8.2 * (96 / 640) ** 2, abs=0.06)
    assert found["data"] is None
    assert "give data=" in found["verdict"]


def test_step_is_measured_against_a_plain_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    forward = nn.Module.__call__

    def count(module: nn.Module, *args: object, **kwargs: object) -> object:
        if type(module).__name__ == "Teacher":
            calls.append(module)
        return forward(module, *args, **kwargs)

    step = check._step

    def counted(trainer: check.CWDTrainer, raw: dict[str, torch.Tensor]) -> float:
        with monkeypatch.context() as patch:
            patch.setattr(nn.Module, "__call__", count)
            return step(trainer, raw)

    monkeypatch.setattr(check, "_step", counted)
    clock = SimpleNamespace(perf_counter=time.process_time)  # what else the machine does is none of its matter
    monkeypatch.setattr(check, "time", clock)
    found = examine({**WORDS, **WHOLE}, tmp_path)
    assert len(calls) == 6  # three turns of two batches, the plain steps without
    seconds = found["step_seconds"]
    assert seconds["distilled"] > seconds["plain"] > 0
    assert found["step_ratio"] == pytest.approx(seconds["distilled"] / seconds["plain"], abs=0.006)
    assert found["peak_mib"]["distilled"] > 100


@pytest.mark.parametrize("overrides", [{"batch": 66}, {"fraction": 0.1}], ids=lambda o: next(iter(o)))
def test_made_up_batches_are_full_and_the_student_is_the_one_named(
    overrides: dict[str, float], tmp_path: Path, pair: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes, step = set(), check._step

    def note(trainer: check.CWDTrainer, raw: dict[str, torch.Tensor]) -> float:
        shapes.add(tuple(raw["img"].shape))
        return step(trainer, raw)

    monkeypatch.setattr(check, "_step", note)
    monkeypatch.setattr(check, "TURNS", 2)
    found = examine({**WORDS, "teacher": pair["teacher"], **overrides}, tmp_path)
    assert shapes == {(found["batch"], 3, 64, 64)}
    assert found["batch"] == overrides.get("batch", WORDS["batch"])
    assert found["student"]["parameters"] == sum(p.numel() for p in YOLO(STUDENT).model.parameters())


def test_cost_is_that_of_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights of teacher and adapters are no part of plain training."""

    @contextmanager
    def peak(device: torch.device) -> Iterator[list[int]]:
        yield [100 * 2**20]

    monkeypatch.setattr(check, "_peak", peak)
    monkeypatch.setattr(check, "_step", lambda trainer, raw: 3.0 if trainer.distillation.criterion.weight else 1.0)
    found = examine({**WORDS, **WHOLE, "class_share": 0}, tmp_path)
    assert found["step_seconds"] == {"plain": 1.0, "distilled": 3.0}
    assert found["step_ratio"] == 3
    # a YOLOv8s body without its head and its normalization, and adapters, in float32
    weights = found["peak_mib"]["distilled"] - found["peak_mib"]["plain"]
    adapters = 4 * (64 * 128 + 128 * 256 + 256 * 512) / 2**20
    assert weights == pytest.approx(4 * 9.0e6 / 2**20 + adapters, rel=0.05)


def test_what_is_compiled_is_what_a_training_compiles(
    tmp_path: Path, pair: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The student with images, and not its loss: that would be traced for minutes, and time something else."""
    given: list[object] = []

    class Compiled(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self._orig_mod = model

        def forward(self, images: object) -> object:
            given.append(images)
            return self._orig_mod(images)

    monkeypatch.setattr("ultralytics.engine.trainer.attempt_compile", lambda model, **_: Compiled(model))
    found = examine({**WORDS, **pair, "compile": True}, tmp_path)
    assert [tuple(images.shape) for images in given if isinstance(images, torch.Tensor)] == [(4, 3, 64, 64)] * 12
    assert len(given) == 12  # three turns of two batches, plain and distilled
    assert found["step_seconds"]["distilled"] > 0


def test_a_step_that_does_not_fit_is_bad_input(tmp_path: Path, pair: dict[str, str], monkeypatch) -> None:
    def full(*args: object) -> float:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(check, "_step", full)
    with pytest.raises(ConfigError, match="batch=4: a step does not fit into the memory of cpu; give a smaller batch"):
        examine({**WORDS, "teacher": pair["teacher"]}, tmp_path)


def test_a_fault_of_ours_is_not_called_bad_input(pair: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> float:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(check, "_step", fail)
    with pytest.raises(RuntimeError, match="a fault of ours"):
        main(["check", *(f"{k}={v}" for k, v in {**WORDS, "teacher": pair["teacher"]}.items())])
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(
    ("teacher", "other", "expected"),
    [
        (["a", "b"], ["a", "b"], "teacher and data have the same 2, in the same order"),
        (
            ["a", "b"],
            ["b", "a"],
            "the teacher has 2 and the data 2; the names are the same in another order",
        ),
        (
            ["a", *"vwxyz"],
            ["a", "b"],
            "the teacher has 6 and the data 2; only the teacher has v, w, x, y and 1 more; only the data has b",
        ),
        (["a"], [], "not compared: the data has none before training; give data="),
    ],
)
def test_classes(teacher: list[str], other: list[str], expected: str) -> None:
    assert compare_classes(dict(enumerate(teacher)), dict(enumerate(other)), "data") == expected


def test_scores_of_both(tmp_path: Path, pair: dict[str, str], data: str) -> None:
    found = examine({**WORDS, **pair, "data": data}, tmp_path)
    assert found["same_classes"]
    expected = YOLO(pair["teacher"]).val(data=data, imgsz=64, batch=4, project=str(tmp_path), plots=False).box.map
    assert found["scores"]["teacher"] == pytest.approx(expected, abs=1e-6)
    assert found["scores"]["student"] == 0
    assert found["verdict"].startswith("no: ")


def test_a_score_is_that_of_val_with_the_arguments_of_the_training(
    tmp_path: Path, pair: dict[str, str], data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored = []
    val = YOLO.val
    monkeypatch.setattr(YOLO, "val", lambda yolo, **given: (scored.append(given), val(yolo, **given))[1])
    own = {"classes": [1], "conf": 0.002, "max_det": 5, "agnostic_nms": True}
    examine({**WORDS, "teacher": pair["teacher"], "model": STUDENT, "data": data, **own}, tmp_path)
    (given,) = scored
    assert {name: given[name] for name in own} == own
    assert not given.keys() & {"rect", "save_dir"}  # of another meaning in training


def test_other_classes_are_no_score(tmp_path: Path, pair: dict[str, str], data: str) -> None:
    found = examine({**WORDS, "teacher": "yolov8n.yaml", "data": data}, tmp_path)
    assert not found["same_classes"]
    assert found["scores"] == {"teacher": None, "student": None}
    assert "does not know the task or the classes" in found["verdict"]
    assert "classes   the teacher has 80 and the data 10; only the teacher has 10, 11, 12, 13" in as_text(found)
    assert max(map(len, as_text(found).splitlines())) <= 100


@pytest.mark.parametrize(
    ("scores", "beginning"),
    [
        ((True, 0.5, 0.3), "yes: the teacher leads the student by 20.0 points"),
        ((True, 0.5, 0.46), "hardly: the teacher leads the student by 4.0 points only"),
        ((True, 0.4, 0.45), "no: the teacher is 5.0 points behind"),
        ((True, None, 0.3), "no: the teacher has not been trained"),
        ((True, 0.5, None), "the teacher reaches 50.0 points"),
        ((False, None, None), "doubtful: "),
    ],
)
def test_verdicts(scores: tuple[bool, float | None, float | None], beginning: str) -> None:
    assert verdict(*scores).startswith(beginning)


def test_json_stands_alone_and_nothing_is_left(tmp_path: Path, pair: dict[str, str]) -> None:
    data = digits.build(tmp_path / "data", {"train": 8, "val": 4})
    (place := tmp_path / "here").mkdir()
    given = {**WORDS, **pair, "data": data, "format": "json", "cache": "disk", "save_dir": place / "run"}
    before = set(tmp_path.rglob("*"))
    result = Started("processes:main", "check", *(f"{k}={v}" for k, v in given.items()), cwd=place).wait()
    assert len(json.loads(result.stdout)["levels"]) == 3
    left = {file.name for file in set(tmp_path.rglob("*")) - before}
    assert left <= {"train.cache", "val.cache"}  # of the labels: Ultralytics writes them in any training


def test_without_a_strength_there_is_no_share_to_tell(pair: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    check.run({**WORDS, **pair, "cwd": 0, "format": "json"})
    said = capsys.readouterr().out
    found = json.loads(said, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert [level["fixed_share"] for level in found["levels"]] == [None] * 3
    assert "P3" in as_text(found)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("format=xml", "format=xml: must be one of table, json"),
        ("resume=True", "resume=True: a run that has begun"),
        ("teacher=absent.pt", "teacher=absent.pt: "),
        ("tau=0", "tau=0: must be a number above 0"),
        ("student=absent.pt", "student=absent.pt: "),
        ("device=0,1", "device=0,1: one device is enough to check"),
        ("batch=-1", "batch=-1: a check measures a given one, such as batch=16"),
        ("batch=many", "batch=many"),
        ("data=absent.yaml", "data=absent.yaml: "),
    ],
)
def test_bad_input(word: str, message: str, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    changed = dict([word.split("=")])
    given = {**WORDS, **WHOLE} | changed
    if "student" in changed:
        del given["model"]
    assert main(["check", *(f"{k}={v}" for k, v in given.items())]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("yolo_cwd: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert not list(tmp_path.iterdir())
