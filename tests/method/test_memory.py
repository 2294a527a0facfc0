"""The estimate of the batch: what is profiled, what it leaves behind, and what the training makes of it."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import digits
import pytest
import torch
from conftest import narrow
from torch import nn
from ultralytics.utils.torch_utils import profile_ops

from yolo_cwd import CWDTrainer
from yolo_cwd.method.memory import DistilledStep

Train = Callable[..., CWDTrainer]
ESTIMATE = "ultralytics.utils.autobatch.autobatch"


@contextmanager
def counted(modules: dict[str, nn.Module]) -> Iterator[dict[str, int]]:
    """Count the forward passes of modules."""
    calls = dict.fromkeys(modules, 0)

    def count(name: str) -> Callable[..., None]:
        return lambda *_: calls.update({name: calls[name] + 1})

    hooks = [module.register_forward_hook(count(name)) for name, module in modules.items()]
    yield calls
    for hook in hooks:
        hook.remove()


def test_the_whole_step_is_estimated_and_leaves_no_trace(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def estimate(model: Any, imgsz: int, **given: Any) -> int:
        """Run it as Ultralytics' profile does, and answer 4."""
        teacher = model._teacher_maps.__self__
        watched = {"teacher": teacher, "student": model.student, "adapter": model.terms[0].adapter}
        with counted(watched) as calls:
            y = model(torch.linspace(0, 1, 2 * 3 * imgsz**2).view(2, 3, imgsz, imgsz).requires_grad_())
        y.backward()
        seen.append((model, given, calls))
        assert all(p.grad is None for p in teacher.parameters())
        return 4

    monkeypatch.setattr(ESTIMATE, estimate)
    trainer = train(batch=-1)
    ((model, given, calls),) = seen
    assert isinstance(model, DistilledStep)
    assert model.training
    assert given["fraction"] == 0.6
    assert given["dataset_size"] == 8
    assert calls == {"teacher": 1, "student": 1, "adapter": 1}
    for part in (model.student.model[0], *model.terms):
        assert all(p.grad.norm() > 0 for p in part.parameters())
    assert trainer.args.batch == trainer.batch_size == 4
    monkeypatch.setattr(ESTIMATE, lambda *_, **__: 4)
    usual = train(batch=-1)
    for ours, theirs in zip(trainer.model.parameters(), usual.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_cpu_has_ultralytics_default(train: Train) -> None:
    trainer = train(batch=-1, cwd="balanced", adapter="fitted")
    assert trainer.batch_size == trainer.args.batch == 16
    assert trainer.distillation.criterion.batches_distilled


def test_without_a_teacher_the_student_alone_is_estimated(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(ESTIMATE, lambda model, *_, **__: seen.append(model) or 4)
    train(batch=-1, cwd=0)
    assert [type(model).__name__ for model in seen] == ["DetectionModel"]


@pytest.mark.parametrize("task", ["detect", "semantic"])
def test_ultralytics_profile_runs_the_step_whatever_the_head_returns(
    task: str, train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """Forward and backward; what fails there is left out of the estimate without a word."""
    profiles: list[Any] = []

    def estimate(model: Any, imgsz: int, **given: Any) -> int:
        assert given["fraction"] == 0.7
        images, objects = torch.empty(2, 3, imgsz, imgsz), given["max_num_obj"]
        profiles.extend(profile_ops([images], model, n=1, device=torch.device("cpu"), max_num_obj=objects))
        return 4

    monkeypatch.setattr(ESTIMATE, estimate)
    monkeypatch.setattr(CWDTrainer, "_do_train", lambda trainer: trainer._setup_train())
    suffix = {"detect": "", "semantic": "-sem"}[task]
    names = [narrow(f"yolo26{size}{suffix}.yaml") for size in "ns"]
    data = digits.build(tmp_path, {"train": 8, "val": 4}, task=task)
    train(model=names[0], teacher=names[1], data=str(data), batch=0.7, cwd="balanced")
    ((parameters, _, _, forward, backward, *_),) = profiles
    assert parameters
    assert forward > 0
    assert not math.isnan(backward)
