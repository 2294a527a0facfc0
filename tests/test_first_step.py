"""What precedes the first step: with all of it, the student begins as in plain Ultralytics and sees the same images."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SHORT, TAUGHT
from test_state import interrupted, resume
from torch import nn
from torch.nn.functional import avg_pool2d
from ultralytics.models.yolo.detect import DetectionTrainer

from yolo_cwd import CWDTrainer
from yolo_cwd.method.prepare import FITTED, MEASURED, measure
from yolo_cwd.method.teacher import Teacher, TeacherMaps
from yolo_cwd.run.state import load_state

State = dict[str, torch.Tensor]


def begun(trainer: Any) -> tuple[State, State, list[dict[str, Any]]]:
    """Train, and return student and EMA as they were before the first step, and the batches of all steps."""
    student: State = {}
    average: State = {}
    batches: list[dict[str, Any]] = []
    preprocess = trainer.preprocess_batch

    def note(batch: dict[str, Any]) -> dict[str, Any]:
        batch = preprocess(batch)
        batches.append({name: batch[name].clone() for name in ("img", "cls", "bboxes", "batch_idx")})
        return batch

    def begin(trainer: Any) -> None:
        for kept, model in ((student, trainer.model), (average, trainer.ema.ema)):
            kept.update({name: value.clone() for name, value in model.state_dict().items()})
        trainer.preprocess_batch = note

    trainer.add_callback("on_train_start", begin)
    trainer.final_eval = lambda: None
    trainer.train()
    return student, average, batches


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"adapter": "fitted", "cwd": 100.0}, id="adapters are fitted"),
        pytest.param({"adapter": "conv", "cwd": "balanced"}, id="gradients are measured"),
        pytest.param({"adapter": "fitted", "cwd": "balanced", "teacher_dtype": "auto"}, id="defaults"),
    ],
)
def test_preparation_leaves_the_student_and_its_images_alone(
    options: dict[str, Any], data: str, tmp_path: Path
) -> None:
    """Weights, normalization statistics with their counts, and what the augmentation draws."""
    words = {**SHORT, "data": data, "project": str(tmp_path), "epochs": 2, "seed": 3}
    plain = begun(DetectionTrainer(overrides=words))
    trainer = CWDTrainer(overrides={**words, **TAUGHT, "share": 1.0, **options})
    ours = begun(trainer)
    assert len(trainer.distillation.explained) == (3 if options["adapter"] == "fitted" else 0)
    assert trainer.distillation.criterion.meter.means.all(), "each was measured"
    for expected, got in zip(plain[:2], ours[:2], strict=True):
        assert expected.keys() == got.keys()
        assert [name for name in expected if not torch.equal(expected[name], got[name])] == []
    assert len(plain[2]) == len(ours[2]) == 4
    for there, here in zip(plain[2], ours[2], strict=True):
        assert all(torch.equal(there[name], here[name]) for name in there)


class Shrunk(nn.Module):
    """A teacher whose maps tell which images they are of."""

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        return [avg_pool2d(images, stride) for stride in (8, 16, 32)]


def test_the_teacher_is_shown_the_images_of_the_student(
    train: Callable[..., CWDTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the fit, in the measurement and in every step, each image at its place in the batch."""
    shown: list[torch.Tensor] = []
    taught: list[TeacherMaps] = []
    maps = Teacher.maps

    def note(teacher: Teacher, images: torch.Tensor) -> TeacherMaps:
        taught.append(maps(teacher, images))
        return taught[-1]

    def watch(trainer: CWDTrainer) -> None:
        trainer.model.model[0].register_forward_pre_hook(lambda _, given: shown.append(given[0].clone()))

    monkeypatch.setattr(Teacher, "maps", note)
    options = {"adapter": "fitted", "cwd": "balanced", "epochs": 2}
    train(teacher=Shrunk(), callbacks={"on_pretrain_routine_end": watch}, **options)
    assert len(shown) == len(taught) == FITTED + MEASURED + 4
    for images, found in zip(shown, taught, strict=True):
        for level, stride in zip(found.pyramid, (8, 16, 32), strict=True):
            torch.testing.assert_close(level, avg_pool2d(images, stride))


def test_a_term_that_a_resumed_run_knows_nothing_of_is_measured_at_its_first_batch(
    train: Callable[..., CWDTrainer], tmp_path: Path
) -> None:
    last = interrupted(train, tmp_path, 1, epochs=2, cwd="balanced")
    state = load_state(last)
    del state.epochs[0]["measured"]["P4"]
    state.save(last.parent)
    losses: list[dict[str, float]] = []

    def note(trainer: CWDTrainer) -> None:
        losses.append(trainer.distillation.criterion.columns["loss"])

    resume(last, {"on_train_batch_end": note})
    assert all(loss > 0 for loss in losses[0].values())


def test_gradients_outside_a_step_are_those_of_a_step(train: Callable[..., CWDTrainer]) -> None:
    """The first weights follow from the former, all later ones from the latter. Other terms would add to the latter."""
    found: list[torch.Tensor] = []

    def both(trainer: CWDTrainer) -> None:
        criterion, teacher = trainer.distillation.criterion, trainer.distillation.teacher
        batch, student = next(trainer._batches(4)), trainer.model.train()
        criterion.begin_epoch(1.0)
        criterion.meter.means.zero_()
        measure(criterion, student, teacher, batch)
        found.append(criterion.meter.means.clone())
        weights = criterion.weights
        batch["teacher"] = teacher.maps(batch["img"])
        loss, _ = student(batch)
        loss.sum().backward()
        criterion.meter.means.zero_()
        criterion.meter.step(weights)
        found.append(criterion.meter.means.clone())
        student.zero_grad()

    train(cwd="balanced", class_share=0, levels="P5", callbacks={"on_train_start": both})
    assert found[0].min() > 0
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=0)
