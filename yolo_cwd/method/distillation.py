# SPDX-License-Identifier: AGPL-3.0-or-later
"""The distillation of one training: its teacher, the levels that both models share, the terms and the criterion.

It knows nothing of the trainer, which asks it at each seam with Ultralytics.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from ultralytics.nn.modules.head import Detect

from yolo_cwd.config import Settings
from yolo_cwd.method import prepare
from yolo_cwd.method.balance import clip_gradients
from yolo_cwd.method.fpn import HeadTap, Level, match_levels, pyramid_taps, student_features
from yolo_cwd.method.loss import CWDLoss
from yolo_cwd.method.memory import DistilledStep
from yolo_cwd.method.teacher import HandedOver, Teacher
from yolo_cwd.method.terms import ClassTerm, Term, build_terms
from yolo_cwd.run import distributed

STUDENT_CLIP_NORM = 10.0  # what Ultralytics clips the student's gradient norm to


class Distillation:
    """Teacher, levels, terms and criterion of one training.

    Attributes:
        settings: The checked options.
        teacher: The frozen teacher.
        levels: The distilled levels, finest first; known once the student is built.
        terms: What is compared, an `nn.ModuleList` of `Term`; their adapters are trained with the student.
        criterion: The student's criterion, once the training has begun.
    """

    def __init__(self, settings: Settings, teacher: Teacher) -> None:
        """Begin with a teacher and without a student."""
        self.settings, self.teacher = settings, teacher
        self.levels: list[Level] = []
        self.terms = nn.ModuleList()
        self.criterion: CWDLoss | None = None
        self._device = torch.device("cpu")
        self._batches = 0  # of this epoch

    @property
    def is_on(self) -> bool:
        """Whether anything is distilled."""
        return bool(self.settings.cwd)

    @property
    def shares(self) -> dict[str, float]:
        """The weight of every term by its name, before the overall weight."""
        return {term.name: term.share for term in self._terms}

    @property
    def classes(self) -> list[int]:
        """The data's classes whose maps are compared; none if class maps are not."""
        return next((term.classes for term in self._terms if isinstance(term, ClassTerm)), [])

    @property
    def explained(self) -> list[float]:
        """The share of the teacher's variance that the fit of each level explained; nothing without a fit."""
        return [term.explained for term in self._terms if term.explained is not None]

    @property
    def _terms(self) -> list[Term]:
        return [term for term in self.terms if isinstance(term, Term)]

    def build(self, student: Any, argument: str, names: Sequence[str], device: torch.device) -> None:
        """Match the student's pyramid with the teacher's, and build the terms.

        Args:
            student: The student, neither compiled nor parallel.
            argument: The student's argument, for messages.
            names: The data's classes by index; an empty name for a class that is not trained.
            device: The device of the training.

        Raises:
            ConfigError: If the two share no level, or not those that are asked for.
        """
        taps = pyramid_taps(student, argument)
        self.levels = match_levels(taps, self.teacher.taps, self.settings.levels)
        self.terms = build_terms(self.settings, self.levels, list(taps), student, self.teacher, names).to(device)
        distributed.broadcast_module(self.terms)
        self._device = device
        if self.is_on:
            self.teacher.place(device)

    def attach(self, student: Any) -> None:
        """Wrap the criterion of a student, with weight 0 until an epoch begins."""
        own = getattr(student, "criterion", None) or student.init_criterion()
        self.criterion = student.criterion = self._wrap(own, student, self.terms)

    def _wrap(self, own: Any, student: Any, terms: nn.ModuleList) -> CWDLoss:
        features: Callable[[Any], list[Tensor] | None] = student_features
        if not isinstance(student.model[-1], Detect):  # others do not return what they have received
            features = (tap := HeadTap()).take
            student.model[-1].register_forward_pre_hook(tap)
        return CWDLoss(own, terms, weight=0.0, device=self._device, features=features)

    def prepare(
        self,
        student: nn.Module,
        dataset: Any,
        batches: prepare.Batches,
        size: int,
        autocast: Callable[[], AbstractContextManager[Any]],
        scale: float,
        resumed: dict[str, list[float]],
    ) -> None:
        """Choose the teacher's precision, then fit and measure, or continue from what a resumed run had measured.

        Args:
            student: The student, neither compiled nor parallel.
            dataset: The validation images, a data set of Ultralytics.
            batches: See `prepare.fit_and_measure`, as the three that follow.
            size: Images in a batch.
            autocast: The mixed precision of the training.
            scale: Its loss scale.
            resumed: The state of the meter in the resumed run; empty where the adapters begin anew.
        """
        if not self.is_on or self.criterion is None:
            return
        prepare.choose_precision(self.teacher, self.settings.teacher_dtype, dataset, self._device)
        if not resumed:
            prepare.fit_and_measure(self.criterion, student, self.teacher, batches, size, autocast, scale)
        else:
            self.criterion.meter.restore(resumed)

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        """Set the weight of an epoch (counted from 0) of a training of `epochs` epochs."""
        assert self.criterion is not None
        self.teacher.eval().requires_grad_(False)  # whatever a callback has done to it
        self.criterion.features(None)  # forget the maps of a step that ran out of memory
        self.criterion.begin_epoch(self.settings.weight(epoch, epochs))
        self._batches = 0

    def past_first_batch(self) -> None:
        """Count a batch, so that the next one is not measured as the first of an epoch may be."""
        self._batches += 1

    def teach(self, batch: dict[str, Any], student: nn.Module, compiled: bool, scale: Callable[[], float]) -> None:
        """Add the teacher's maps of a batch's images to it, for the criterion.

        Before the student's forward pass, so that the teacher's passing memory and the activations that the student
        keeps for its gradient are never needed at once.

        Args:
            batch: Ultralytics' batch, with images [N, 3, H, W] in 0 to 1 on the device.
            student: The student, not compiled.
            compiled: Whether the training runs a compiled one, inside of which gradients cannot be watched.
            scale: Returns the loss scale.
        """
        criterion, first = self.criterion, self._batches == 0
        self._batches += 1
        if criterion is None or not criterion.weight:
            return
        if first and ((compiled and self.settings.balanced) or criterion.unmeasured):
            prepare.measure(criterion, student, self.teacher, prepare.some_images(batch), scale())
        batch["teacher"] = HandedOver(self.teacher.maps(batch["img"]))

    def step(self, scale: Tensor) -> None:
        """Clip the adapters' gradient by its own norm before an optimizer step, and update the measured ratios.

        By its own norm, so that the student is clipped as it would be without adapters.

        Args:
            scale: The loss scale that the gradients carry, and so does the bound.
        """
        if self.criterion is None or not self.is_on:
            return
        meter, parameters = self.criterion.meter, list(self.terms.parameters())
        distributed.average_gradients(parameters, meter.recorded)
        meter.step(self.criterion.weights, scale)
        clip_gradients(parameters, STUDENT_CLIP_NORM * scale)

    def end_epoch(self, scale: Tensor) -> None:
        """Count what was measured since the last optimizer step among the epoch that ends.

        Args:
            scale: The loss scale that the gradients carry.
        """
        if self.criterion is not None and self.is_on:
            meter = self.criterion.meter
            meter.recorded.copy_(distributed.all_reduce_sum(meter.recorded))
            meter.count(self.criterion.weights, scale)

    def join_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Add the adapters to Ultralytics' optimizer as the last group, so that warm-up and schedule apply to them."""
        if parameters := list(self.terms.parameters()):
            plain = [group for group in optimizer.param_groups if group["param_group"] == "weight"]
            optimizer.add_param_group({**min(plain, key=lambda group: float(group["lr"])), "params": parameters})

    def measured(self) -> dict[str, list[float]]:
        """Return what the meter has measured, from which a resumed run continues."""
        return self.criterion.meter.state() if self.criterion is not None else {}

    def as_module(self, student: nn.Module) -> nn.Module:
        """Return a distilled step as one module, for the estimate of the batch; the student alone if nothing is."""
        return DistilledStep(student, self.terms, self.teacher, self._wrap) if self.is_on else student
