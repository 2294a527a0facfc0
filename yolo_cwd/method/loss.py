# SPDX-License-Identifier: AGPL-3.0-or-later
"""The criterion of a distilled student: the task's own loss plus the weighted terms. All weights are applied here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from yolo_cwd.method.balance import GradientMeter
from yolo_cwd.method.fpn import student_features
from yolo_cwd.method.parts import Pair, divergences
from yolo_cwd.method.teacher import HandedOver, TeacherMaps
from yolo_cwd.method.terms import StudentMaps

LossAndItems = tuple[Tensor, dict[str, Tensor]]
MAX_RATIO = 1e4  # of gradients: where the maps agree to the last digits, more would teach rounding errors


class CWDLoss:
    """The student's criterion: that of its task plus one weighted divergence for each term.

    It stands in for the wrapped criterion, whose other attributes it passes on. It is no module, so that neither
    teacher nor adapters become a part of the student.

    A term's weight is `weight` times its share. A balanced term is also multiplied by the measured ratio of the
    gradients at its map (balance.py): its weight is then the share of the task's gradient that it has there.

    Attributes:
        criterion: The wrapped criterion of the task.
        terms: The terms [K], an `nn.ModuleList` of `Term`.
        weight: Overall weight of the terms; the trainer sets it for every epoch.
        meter: What is measured of the gradients.
        batches_distilled: How many batches have been compared with the teacher's.
        has_gradient: Whether the divergence of one of them could reach the student, and not the adapters alone.
        skipped_terms: How many terms were not finite and were left out since somebody set it to 0.
    """

    def __init__(
        self,
        criterion: Any,
        terms: nn.ModuleList,
        weight: float = 1.0,
        device: torch.device | None = None,
        features: Callable[[Any], list[Tensor] | None] = student_features,
    ) -> None:
        """Wrap the criterion of a task.

        Args:
            criterion: Callable that takes (predictions, batch) and returns the loss, multiplied by the batch size, and
                its items by name.
            terms: The terms; they see a few images at a time.
            weight: Overall weight.
            device: Where the student is.
            features: Finds the student's pyramid, one map [N, C, H, W] for each input of its head, by its predictions;
                returns None for those of the evaluation mode.
        """
        self.criterion, self.terms, self.weight, self.features = criterion, terms, weight, features
        self.meter = GradientMeter([term.name for term in self._terms], device)
        self._shares = torch.tensor([term.share for term in self._terms], device=device)  # of the overall weight [K]
        self._balanced = torch.tensor([term.balanced for term in self._terms], device=device)
        self.batches_distilled, self.has_gradient = 0, False
        self.skipped_terms: Tensor | int = 0
        self._sums, self._calls = torch.zeros(2, len(terms), device=device), 0
        self._weighed: tuple[float, Tensor, Tensor] | None = None  # weight, means, and the weights that follow

    @property
    def _terms(self) -> list[Any]:
        return list(self.terms)

    def begin_epoch(self, weight: float) -> None:
        """Set the overall weight, and begin new means of the terms."""
        self.weight = weight
        self._sums, self._calls = torch.zeros_like(self._sums), 0
        self.meter.begin_epoch()

    @property
    def weights(self) -> Tensor:
        """The weight of every term now [K]; 0 for a balanced one of which nothing is known yet."""
        known, means = self._weighed, self.meter.means
        if known is None or known[0] != self.weight or known[1] is not means:
            ratios = torch.where(self._balanced, self.meter.ratios.nan_to_num(0.0).clamp_max(MAX_RATIO), 1.0)
            known = self._weighed = self.weight, means, self.weight * self._shares * ratios
        return known[2]

    @property
    def is_balanced(self) -> bool:
        """Whether a term has a share of the task's gradient as its weight, so that gradients must be measured."""
        return any(term.balanced for term in self._terms)

    @property
    def unmeasured(self) -> list[str]:
        """The balanced terms that should have a weight and have none yet, since nothing is known of their gradients."""
        waiting = self._balanced & (self._shares > 0) & ~self.meter.means.all(1)
        return [name for name, waits in zip(self.meter.names, waiting.tolist(), strict=True) if waits]

    @property
    def columns(self) -> dict[str, dict[str, float]]:
        """What happened since the epoch began, by kind and name.

        `loss`: the mean weighted term; `share`: its gradient beside the task's; `nats`: the mean divergence itself.
        """
        terms, nats = (self._sums / max(self._calls, 1)).tolist()
        names = self.meter.names
        return {
            "loss": dict(zip(names, terms, strict=True)),
            "share": self.meter.shares,
            "nats": dict(zip(names, nats, strict=True)),
        }

    def __call__(self, preds: Any, batch: dict[str, Any]) -> LossAndItems:
        """Return the loss vector, scaled by the batch size as Ultralytics' own terms are, and its detached items.

        The items are those of the task's loss and `cwd_loss`, the weighted sum over the terms.

        Args:
            preds: What the student's head returned. Predictions of the evaluation mode get the task's loss alone.
            batch: Ultralytics' batch; `img` holds images [N, 3, H, W] in 0 to 1, and `teacher` the `TeacherMaps` of
                them, handed over or not, which are taken out to free them after use. Without them the divergences are
                0.
        """
        loss, items = self.criterion(preds, batch)
        student = self.student_maps(preds)
        if student is None:
            return loss, items
        given = batch.pop("teacher", None)
        teacher: TeacherMaps | None = given.take() if isinstance(given, HandedOver) else given
        if teacher is None:
            values = terms = torch.zeros(len(self.terms), device=loss.device)
        else:
            values = self._finite(torch.stack(divergences(self._watched(self.pairs(student, teacher)))))
            terms = values * self.weights.to(values.device)
            loss = torch.cat([loss.reshape(-1), terms * len(batch["img"])])
            self.batches_distilled += 1
        self._sums = self._sums.to(terms.device) + torch.stack([terms, values]).detach()
        self._calls += 1
        return loss, {**items, "cwd_loss": terms.detach().sum()}

    def student_maps(self, preds: Any) -> StudentMaps | None:
        """Return what a student makes of some images, by its predictions; None if they are of the evaluation mode."""
        features = self.features(preds)
        return None if features is None else StudentMaps(features, preds)

    def pairs(self, student: StudentMaps, teacher: TeacherMaps) -> list[Pair]:
        """Return what every term compares."""
        return [Pair(term, term.of_student(student), term.of_teacher(teacher)) for term in self._terms]

    def _watched(self, pairs: Sequence[Pair]) -> list[Pair]:
        self.has_gradient = self.has_gradient or any(pair.student.requires_grad for pair in pairs)
        return [pair._replace(student=self.meter.watch(i, pair.student)) for i, pair in enumerate(pairs)]

    def _finite(self, values: Tensor) -> Tensor:
        unusable = ~(values.detach() < torch.inf)  # or not a number; none is below 0
        self.skipped_terms = self.skipped_terms + unusable.sum()  # on the device: reading would synchronize
        return values.masked_fill(unusable, 0)

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the wrapped criterion: end-to-end heads expect `update` once an epoch."""
        if name == "criterion":  # asked for before it is set, while an instance is being rebuilt
            raise AttributeError(name)
        return getattr(self.criterion, name)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Return a copy of the wrapped criterion alone: whoever copies the student gets a plain model."""
        return deepcopy(self.criterion, memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle as the wrapped criterion alone: a student that is saved loads where yolo_cwd is not installed."""
        return self.criterion.__reduce_ex__(min(protocol, 1))  # protocols above 1 check the class against ours
