"""What a step may not do, whatever the clock says."""

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import narrow
from test_bench import bench
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from ultralytics.nn.modules.head import Detect

from yolo_cwd.method.teacher import TeacherMaps
from yolo_cwd.trainer import CWDTrainer

__all__ = ["bench"]  # a fixture


def test_a_step_runs_one_head_and_no_graph_through_the_teacher(train: Callable[..., CWDTrainer]) -> None:
    ours: set[int] = set()
    heads: list[nn.Module] = []
    outputs: list[torch.Tensor] = []  # of the teacher's convolutions, image by image or in parts
    steps: list[int] = []

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(module, Detect):
            heads.append(module)
        if id(module) in ours:
            outputs.append(output)

    def begin(trainer: CWDTrainer) -> None:
        ours.update(id(m) for m in trainer.distillation.teacher.modules() if isinstance(m, nn.Conv2d))
        hooks.append(torch.nn.modules.module.register_module_forward_hook(note))

    def end(trainer: CWDTrainer) -> None:
        steps.append(trainer.batch_size)
        if len(steps) == 2:
            hooks.pop().remove()

    hooks: list[Any] = []
    try:
        models = {"model": narrow("yolov8n.yaml"), "teacher": narrow("yolov8s.yaml")}
        train(**models, callbacks={"on_train_start": begin, "on_train_batch_end": end})
    finally:
        for hook in hooks:
            hook.remove()
    assert len(heads) == len(steps) == 2
    assert len(ours) > 40
    assert sum(len(output) for output in outputs) == sum(steps) * len(ours)  # every image once
    assert not any(output.requires_grad for output in outputs)


@pytest.mark.parametrize("copied", [False, True], ids=["as it is", "a copy, as PyTorch may pass to the student"])
def test_the_teachers_maps_do_not_outlive_the_step(train: Callable[..., CWDTrainer], copied: bool) -> None:
    """They would need their memory once more while the next batch is loaded, and in the backward pass until then."""
    batches: list[dict[str, Any]] = []
    maps: list[Any] = []

    def begin(trainer: CWDTrainer) -> None:
        taught, preprocess, student = trainer.distillation.teacher.maps, trainer.preprocess_batch, trainer.model

        def noted(images: torch.Tensor) -> Any:
            made = taught(images)
            maps.extend(weakref.ref(m) for m in made.pyramid)
            return made

        def kept(raw: dict[str, Any]) -> dict[str, Any]:
            batches.append(preprocess(raw))
            return batches[-1]

        def container(value: Any) -> Any:
            return TeacherMaps(list(value.pyramid), value.branches) if isinstance(value, TeacherMaps) else value

        def forward(batch: Any, *more: Any) -> Any:
            return plain({k: container(v) for k, v in batch.items()} if isinstance(batch, dict) else batch, *more)

        trainer.distillation.teacher.maps, trainer.preprocess_batch = noted, kept
        plain = student.forward
        if copied:
            student.forward = forward

    def end(trainer: CWDTrainer) -> None:
        alive.append(sum(m() is not None for m in maps))

    alive: list[int] = []
    train(callbacks={"on_train_start": begin, "on_train_batch_end": end})
    assert len(batches) == 2
    assert len(maps) == 6
    assert alive == [0, 0]


BUDGETS = {"kernels": 150, "GB": 2.5}  # of the loss, the hooks and the meter, at 640 px and batch 16
FORBIDDEN = ("index_add", "index_put", "nonzero", "_local_scalar_dense", "unique")  # slow, or they wait for the GPU


class Names(TorchDispatchMode):
    """Notes the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(func._schema.name.split("::")[1])
        return func(*args, **(kwargs or {}))


def test_the_loss_of_a_step_on_a_gpu_keeps_its_budgets(bench: Any, tmp_path: Path) -> None:
    rows: dict[str, dict[str, Any]] = {}
    words = bench.parse(["part=count", "device=cpu", f"out={tmp_path / 'found'}"])
    bench.count(words, lambda name, **found: rows.update({name: found}))
    found, larger = rows["ours, all, batch 16"], rows["ours, all, batch 64"]
    for name, most in BUDGETS.items():
        assert found[name] <= most, f"{name}: {found[name]}"
    assert larger["kernels"] <= found["kernels"]
    assert rows["alive at once, batch 16"]["added_MiB"] < 120
    assert rows["alive at once, batch 64"]["added_MiB"] < 4.5 * rows["alive at once, batch 16"]["added_MiB"]
    assert found["copies"] == larger["copies"] == 0


@pytest.mark.parametrize("known", ["all", "some"])
def test_a_step_on_a_gpu_neither_waits_nor_sorts(bench: Any, known: str) -> None:
    student, distillation = bench.distilled(bench.parse(["student=yolov8n", "teacher=yolov8n", "device=cpu"]))
    classes = next(term for term in distillation.terms if term.name == "classmap")
    if known == "some":
        classes.classes = list(range(79, -1, -1))
        classes.known = torch.tensor(classes.classes)
    for module, dtype in ((student, None), (distillation.terms, None), (distillation.teacher, torch.float16)):
        bench.on_paper(module, dtype)
    distillation.teacher.precision = bench.Precision("fp16")
    with Names() as names:
        bench.count_step(student, distillation, 2, 64)
    assert "divergence" in names.seen
    assert not [name for name in names.seen if name.startswith(FORBIDDEN)]
