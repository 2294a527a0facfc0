"""What a step may not do, whatever the clock says."""

from collections.abc import Callable
from typing import Any

import torch
from conftest import narrow
from torch import nn
from ultralytics.nn.modules.head import Detect

from yolo_cwd.trainer import CWDTrainer


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
