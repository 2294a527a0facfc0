"""What only a GPU can tell: mixed precision with a loss scale, float16, memory. Skipped where there is none."""

import copy
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import pytest
import torch
import torch.nn.functional as F
from conftest import SHORT, STUDENT, TEACHER, settled
from test_state import interrupted, resume
from test_trainer import rows
from ultralytics import YOLO

from yolo_cwd import CWDTrainer
from yolo_cwd.cli import main
from yolo_cwd.method.divergence import channel_wise_divergence
from yolo_cwd.method.teacher import MAX_ERROR, load_teacher

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
Train = Callable[..., CWDTrainer]
DEVICE = "0"


@pytest.fixture(autouse=True)
def _nothing_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ultralytics.engine.trainer.check_amp", lambda model: True)  # it fetches a model


@pytest.fixture
def device() -> torch.device:
    """The GPU."""
    return torch.device("cuda", int(DEVICE))


@pytest.fixture
def teacher(data: str, tmp_path: Path) -> str:
    """A checkpoint whose maps do not vanish in float16, as those of random weights alone do."""
    torch.manual_seed(0)
    model = YOLO(TEACHER)
    settled(model.model, data)
    model.save(tmp_path / "teacher.pt")
    return str(tmp_path / "teacher.pt")


def exact(student: torch.Tensor, teacher: torch.Tensor, tau: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The divergence and its gradient by automatic differentiation in float64 on the CPU."""
    leaf = student.detach().cpu().double().requires_grad_()
    log_q, log_p = ((m.flatten(2) / tau).log_softmax(-1) for m in (leaf, teacher.cpu().double()))
    value = F.kl_div(log_q, log_p, log_target=True, reduction="sum") * tau**2 / leaf[..., 0, 0].numel()
    return value.detach(), torch.autograd.grad(value, leaf)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tau", [1.0, 4.0])
def test_loss_and_gradient_are_those_of_float64(dtype: torch.dtype, tau: float, device: torch.device) -> None:
    torch.manual_seed(0)
    student, teacher = ((3 * torch.randn(2, 16, 40, 40)).to(device, dtype) for _ in range(2))
    value, gradient = exact(student, teacher, tau)
    found = channel_wise_divergence(student.requires_grad_(), teacher, tau)
    found.backward()
    assert found.item() == pytest.approx(value.item(), rel=1e-5)
    error = (student.grad.cpu().double() - gradient).norm() / gradient.norm()
    assert error < (1e-5 if dtype is torch.float32 else 1e-2)


def test_the_largest_numbers_of_float16_do_not_overflow(device: torch.device) -> None:
    student = torch.zeros(2, 4, 8, 8, dtype=torch.float16, device=device)
    student[..., 3, 3] = torch.finfo(torch.float16).max
    with torch.autocast(device.type, dtype=torch.float16 if device.type == "cuda" else torch.bfloat16):
        value = channel_wise_divergence(student.requires_grad_(), -student.detach())
    value.backward()
    assert value.item() == pytest.approx(65504 * 63 / 63, rel=1e-3)  # p is flat over 63 positions, q all at the other
    assert student.grad.isfinite().all()


def test_an_infinite_gradient_skips_the_step_of_student_and_adapters_alike(train: Train, teacher: str) -> None:
    changed: list[tuple[bool, bool]] = []
    scales: list[float] = []

    def spoil_the_first(trainer: CWDTrainer) -> None:
        trainer.scaler, step = torch.amp.GradScaler(trainer.device.type, init_scale=8.0), trainer.optimizer_step

        def noted() -> None:
            if not changed:
                trainer.model.model[0].conv.weight.grad.fill_(torch.inf)
            watched = trainer.model.model[0].conv.weight, trainer.distillation.terms[0].adapter.weight
            before = copy.deepcopy(watched)
            step()
            changed.append(tuple(not torch.equal(b, w) for b, w in zip(before, watched, strict=True)))
            scales.append(trainer.scaler.get_scale())

        trainer.optimizer_step = noted

    train(teacher=teacher, device=DEVICE, amp=True, callbacks={"on_train_start": spoil_the_first})
    assert changed == [(False, False), (True, True)]
    assert scales == [4.0, 4.0]


def test_adapters_are_unscaled_with_the_student(train: Train, teacher: str) -> None:
    """The gradients that the optimizer sees are those of a training without a loss scale, but for the precision."""
    seen: list[list[torch.Tensor]] = []

    def note(trainer: CWDTrainer) -> None:
        trainer.scaler = torch.amp.GradScaler(trainer.device.type, init_scale=8.0, enabled=trainer.amp)
        step = trainer.optimizer.step

        def noted(*args: Any, **kwargs: Any) -> Any:
            if len(seen[-1]) == 0:
                seen[-1].extend(p.grad.detach().clone() for p in trainer.distillation.terms.parameters())
            return step(*args, **kwargs)

        trainer.optimizer.step = noted
        seen.append([])

    for amp in (True, False):
        train(teacher=teacher, device=DEVICE, amp=amp, callbacks={"on_train_start": note})
    for mixed, full in zip(*seen, strict=True):
        assert (mixed - full).norm() < 0.1 * full.norm()


def test_a_teacher_that_overflows_leaves_the_student_finite(train: Train, teacher: str) -> None:
    dropped: list[int] = []

    def overflow(trainer: CWDTrainer) -> None:
        maps = trainer.distillation.teacher.maps

        def too_large(images: torch.Tensor) -> Any:
            made = maps(images)
            return made._replace(pyramid=[(m.half().abs() + 1) * 60000 * 60000 for m in made.pyramid])

        trainer.distillation.teacher.maps = too_large

    def read(trainer: CWDTrainer) -> None:
        dropped.append(int(trainer.distillation.criterion.skipped_terms))

    trainer = train(
        teacher=teacher, device=DEVICE, amp=True, callbacks={"on_train_start": overflow, "on_train_batch_end": read}
    )
    assert dropped == [3, 6]
    assert all(p.isfinite().all() for p in [*trainer.model.parameters(), *trainer.distillation.terms.parameters()])


def test_the_teacher_takes_float16_in_channels_last_order(teacher: str, data: str, device: torch.device) -> None:
    loaded = load_teacher(teacher)
    loaded.place(device)
    image = cv2.imread(str(next(Path(data).parent.glob("images/train/*.jpg"))))
    images = torch.from_numpy(image).permute(2, 0, 1)[None].to(device) / 255
    loaded.calibrate("auto", images)
    assert loaded.precision.name == "fp16"
    assert 0 < loaded.precision.error <= MAX_ERROR
    weights = [p for p in loaded.parameters() if p.ndim == 4]
    assert {p.dtype for p in weights} == {torch.float16}
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in weights)
    assert {maps.dtype for maps in loaded(images)} == {torch.float16}


def test_the_command_trains_on_a_gpu(data: str, teacher: str, tmp_path: Path) -> None:
    words = {**SHORT, "amp": True, "student": STUDENT, "teacher": teacher, "data": data, "device": DEVICE}
    del words["model"]
    words |= {"project": tmp_path, "name": "run", "val": True}
    assert main(["train", *(f"{name}={value}" for name, value in words.items())]) == 0
    assert (tmp_path / "run" / "weights" / "best.pt").is_file()


def test_a_training_with_the_defaults_is_taught_at_every_level_and_resumes(
    train: Train, teacher: str, tmp_path: Path
) -> None:
    """At 640 pixels sums over positions exceed float16; Ultralytics' AdamW is a fused one here."""
    options = {"cwd": "balanced", "adapter": "fitted", "schedule": "cosine", "imgsz": 640, "batch": 8, "amp": True}
    last = interrupted(train, tmp_path, 2, epochs=3, teacher=teacher, device=DEVICE, **options)
    trainer = resume(last)
    assert trainer.start_epoch == 2
    assert trainer.distillation.criterion.unmeasured == []
    assert all(p.isfinite().all() for p in trainer.distillation.terms.parameters())
    assert all(row[f"train/{level}_share"] > 0 for row in rows(trainer)[:2] for level in ("P3", "P4", "P5"))


def test_memory_is_returned(train: Train, teacher: str, device: torch.device) -> None:
    def left() -> int:
        train(teacher=teacher, device=DEVICE, amp=True)
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated(device)

    first = left()  # what libraries keep for good is there now
    assert left() <= first + 2**20


def test_balanced_weights_do_not_depend_on_mixed_precision(train: Train, teacher: str) -> None:
    weights, balanced = [], {"cwd": "balanced", "adapter": "fitted"}

    def scale(trainer: CWDTrainer) -> None:
        """Begin with a scale at which no gradient overflows: a step whose gradients do so updates no mean."""
        trainer.scaler = torch.amp.GradScaler(trainer.device.type, init_scale=8.0, enabled=trainer.amp)

    def read(trainer: CWDTrainer) -> None:
        weights.append(trainer.distillation.criterion.weights.tolist())

    for amp in (True, False):
        callbacks = {"on_train_start": scale, "on_train_batch_end": read}
        train(**balanced, teacher=teacher, device=DEVICE, amp=amp, callbacks=callbacks)
    mixed, full = weights[:2], weights[2:]
    assert all(weight > 0 for step in full for weight in step)
    for ours, theirs in zip(mixed, full, strict=True):
        assert ours == pytest.approx(theirs, rel=0.1)


def test_the_batch_is_estimated(train: Train, teacher: str) -> None:
    trainer = train(batch=0.5, teacher=teacher, device=DEVICE, amp=True)
    assert 1 <= trainer.batch_size <= 8  # as many images as there are; 16 is what an error falls back to
