# SPDX-License-Identifier: AGPL-3.0-or-later
"""A distilled step as one module, for Ultralytics' estimate of the batch that fits into a GPU (`batch=-1`).

The estimate runs a module forward and backward on growing batches and fits a line to the memory used. With the student
alone it would miss the teacher, the adapters and the divergences.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from yolo_cwd.method.loss import CWDLoss
from yolo_cwd.method.teacher import Teacher


class DistilledStep(nn.Module):
    """Maps images to a loss through the teacher, the student, the adapters and the divergences.

    Student and terms are copies, because profiling leaves gradients and statistics behind. The teacher has neither
    and is used directly. It has not chosen its precision yet, so its maps count in float32, the most they need.

    Attributes:
        student: The copy of the student.
        terms: The copies of the terms, with their adapters.
        criterion: The criterion of a training, with a stand-in for the task's own loss, which needs labels.
        yaml: The student's description, which Ultralytics reads together with its strides and classes.
    """

    def __init__(
        self,
        student: Any,
        terms: nn.ModuleList,
        teacher: Teacher,
        wrap: Callable[[Any, Any, nn.ModuleList], CWDLoss],
    ) -> None:
        """Copy what is trained.

        Args:
            student: The student, neither compiled nor parallel.
            terms: The terms it is compared in.
            teacher: The teacher, on the same device.
            wrap: Makes the criterion of a training from a task's criterion, a student and terms.
        """
        super().__init__()
        self.student, self.terms = deepcopy(student), deepcopy(terms)
        self.criterion = wrap(_sum_of_predictions, self.student, self.terms)
        self.criterion.weight = 1.0
        self.yaml, self.stride, self.names = student.yaml, student.stride, student.names
        self._teacher_maps = teacher.maps  # not the module itself, so that nobody counts, hooks or copies its layers

    def forward(self, images: Tensor) -> Tensor:
        """Return a scalar that depends on everything a step computes from images [N, C, H, W]."""
        batch: dict[str, Any] = {"img": images, "teacher": self._teacher_maps(images.detach())}
        loss, _ = self.criterion(self.student(images), batch)
        return loss.sum()

    def __deepcopy__(self, memo: dict[int, Any]) -> DistilledStep:
        """Return itself, since it consists of copies already."""
        return self


def _sum_of_predictions(preds: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    return torch.stack([leaf.sum() for leaf in tree_leaves(preds) if isinstance(leaf, Tensor)]).sum(), {}
