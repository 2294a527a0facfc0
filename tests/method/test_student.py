"""Students that are no stock model: a pruned checkpoint keeps its shape."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import SHORT, TAUGHT, narrow, settled
from test_state import interrupted, resume
from test_trainer import rows
from torch import nn
from ultralytics import YOLO
from ultralytics.nn.tasks import DetectionModel, load_checkpoint

from yolo_cwd import CWDTrainer
from yolo_cwd.config import ConfigError
from yolo_cwd.study import compare

Train = Callable[..., CWDTrainer]
STUDENT = narrow("yolov8n.yaml")


def prune(model: nn.Module) -> nn.Module:
    """Take half of the channels inside the first bottleneck out."""
    block = model.model[2].m[0]
    first, second = block.cv1, block.cv2
    kept = first.conv.out_channels // 2
    first.conv.weight = nn.Parameter(first.conv.weight[:kept].detach().clone())
    first.conv.out_channels = kept
    first.bn = nn.BatchNorm2d(kept)
    second.conv.weight = nn.Parameter(second.conv.weight[:, :kept].detach().clone())
    second.conv.in_channels = kept
    return model


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in model.state_dict().items()}


@pytest.fixture
def pruned(tmp_path: Path) -> Path:
    """A pruned detector of the ten digits."""
    model = YOLO(STUDENT)
    model.model = prune(DetectionModel(STUDENT, nc=10, verbose=False))
    model.model.names = {i: str(i) for i in range(10)}
    model.save(tmp_path / "pruned.pt")
    return tmp_path / "pruned.pt"


def test_a_pruned_student_keeps_its_shape(
    train: Train, pruned: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("ultralytics.utils.LOGGER.propagate", True)
    expected = shapes(load_checkpoint(pruned)[0])
    assert (
        expected["model.2.m.0.cv1.conv.weight"]
        != shapes(DetectionModel(STUDENT, nc=10, verbose=False))["model.2.m.0.cv1.conv.weight"]
    )
    trainer = train(model=str(pruned), verbose=True, save_period=1)
    for name in ("last.pt", "best.pt", "epoch0.pt"):
        assert shapes(load_checkpoint(trainer.wdir / name)[0]) == expected, name
    assert "pruned, in the shape of its pruned checkpoint, learns P3, P4, P5" in caplog.text
    before = load_checkpoint(pruned)[0].state_dict()
    moved = [name for name, value in trainer.model.state_dict().items() if not torch.equal(value, before[name])]
    assert any(name.endswith("conv.weight") for name in moved), "it is trained"


def test_weights_of_a_pruned_student_are_those_of_its_checkpoint(train: Train, pruned: Path) -> None:
    begun: list[dict[str, torch.Tensor]] = []

    def look(trainer: CWDTrainer) -> None:
        begun.append({name: value.clone() for name, value in trainer.model.state_dict().items()})

    train(model=str(pruned), callbacks={"on_train_start": look})
    expected = load_checkpoint(pruned)[0].state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in begun[0].items())


def test_a_pruned_student_resumes_in_its_shape(train: Train, pruned: Path, tmp_path: Path) -> None:
    last = interrupted(train, tmp_path, 1, epochs=2, model=str(pruned))
    trainer = resume(last)
    assert trainer.reshaped
    assert shapes(load_checkpoint(trainer.last)[0]) == shapes(load_checkpoint(pruned)[0])


def test_a_pruned_student_of_yolo_train(pruned: Path, data: str, tmp_path: Path) -> None:
    model = YOLO(pruned)
    arguments = {k: v for k, v in SHORT.items() if k != "model"}
    model.train(trainer=CWDTrainer, data=data, project=str(tmp_path / "runs"), **TAUGHT, **arguments)
    assert shapes(model.model) == shapes(load_checkpoint(pruned)[0])


@pytest.mark.parametrize("arm", ["plain", "builtin"])
def test_a_pruned_student_keeps_its_shape_in_every_arm_of_a_comparison(
    arm: str, pruned: Path, data: str, tmp_path: Path
) -> None:
    teacher = YOLO(STUDENT)
    teacher.model.names = {i: str(i) for i in range(10)}
    teacher.save(tmp_path / "teacher.pt")
    words = {k: v for k, v in SHORT.items() if k not in {"model", "project", "name"}} | {"seeds": 1, "arms": arm}
    words |= {"student": str(pruned), "teacher": str(tmp_path / "teacher.pt"), "data": data, "folder": tmp_path / "c"}
    compare.run(words | {"teacher_epochs": 0})
    weights = tmp_path / "c" / "runs" / f"{arm}-0" / "weights" / "last.pt"
    assert shapes(load_checkpoint(weights)[0]) == shapes(load_checkpoint(pruned)[0])


def test_a_pruned_student_of_other_classes_is_refused(train: Train, tmp_path: Path) -> None:
    model = YOLO(STUDENT)
    prune(model.model)
    model.save(tmp_path / "other.pt")
    with pytest.raises(
        ConfigError, match=r"a pruned checkpoint keeps its shape and its 80 classes, data=.* has 10; fine"
    ):
        train(model=str(tmp_path / "other.pt"))
    assert not (tmp_path / "runs").exists()


def test_a_whole_checkpoint_is_built_anew(train: Train, tmp_path: Path) -> None:
    YOLO(STUDENT).save(tmp_path / "whole.pt")
    assert not train(model=str(tmp_path / "whole.pt")).reshaped


def test_a_student_is_trained_for_int8(train: Train, data: str, tmp_path: Path) -> None:
    pytest.importorskip("modelopt", reason="nvidia-modelopt is not installed, which Ultralytics asks for")
    teacher = YOLO(STUDENT)
    settled(teacher.model, data)
    trainer = train(teacher=teacher, quantize=8, epochs=2, cwd="balanced", adapter="fitted")
    assert rows(trainer)[-1]["train/P3_loss"] > 0
    trained = YOLO(trainer.last)
    assert any("quantizer" in name for name, _ in trained.model.named_modules())
    teacher.save(tmp_path / "teacher.pt")
    last = interrupted(train, tmp_path, 1, teacher=str(tmp_path / "teacher.pt"), epochs=2, quantize=8)
    assert [row["epoch"] for row in rows(resume(last))] == [1, 2]
