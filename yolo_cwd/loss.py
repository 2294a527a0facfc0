# SPDX-License-Identifier: AGPL-3.0-or-later
"""The loss: channel-wise divergence between two feature maps, and the criterion that adds it to the detection loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from yolo_cwd.fpn import Level, student_features

LARGEST_PART = 2**21  # elements of a map that are compared at once


def channel_wise_divergence(student: Tensor, teacher: Tensor, tau: float = 1.0) -> Tensor:
    """Return the channel-wise divergence of Shu et al., ICCV 2021 (arXiv 2011.13256), section 3.2, equations 3 and 4.

    The softmax over the positions i of a channel c turns its map into a distribution, p for the teacher and q for the
    student. The divergence is `tau^2 / (N C) * sum_{n,c,i} p * log(p / q)`: in nats, 0 where the maps differ by a
    constant per channel only, and without an upper bound. It is the paper's, averaged over the N images as well.

    Args:
        student: Student maps, [N, C, H, W] (any number of trailing position axes), of any floating dtype.
        teacher: Teacher maps of the same shape; no gradient flows into them.
        tau: Temperature, above 0.

    Returns:
        A scalar in float32, or in float64 if that is the dtype of the maps.

    Raises:
        ValueError: If the shapes differ.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"student maps {tuple(student.shape)} and teacher maps {tuple(teacher.shape)} differ in shape")
    divergence: Tensor = _Divergence.apply(student, teacher.detach(), tau)
    return divergence


class _Divergence(torch.autograd.Function):
    """The divergence with its derivative in closed form, tau * (q - p) / (N C): one saved tensor instead of four.

    It goes through the images in parts, so that what it needs in passing stays small beside that tensor.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, tau: float) -> Tensor:
        channels, total = student.shape[0] * student.shape[1], student.new_zeros((), dtype=_dtype(student))
        gradient = torch.empty_like(student, dtype=_dtype(student)) if ctx.needs_input_grad[0] else None
        images_at_once = max(1, LARGEST_PART // student[0].numel())
        for i in range(0, len(student), images_at_once):
            part = slice(i, i + images_at_once)
            log_q, log_p = log_distribution(student[part], tau), log_distribution(teacher[part], tau)
            p = log_p.exp()
            total += torch.sum(log_p.sub_(log_q).mul_(p))
            if gradient is not None:
                torch.sub(log_q.exp_(), p, out=gradient[part].flatten(2))
        if gradient is not None:
            ctx.save_for_backward(gradient.mul_(tau / channels))
            ctx.dtype = student.dtype
        return total.clamp_min_(0) * (tau**2 / channels)  # rounding can leave -1e-9

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        asked_for = upstream != 0  # a term that was dropped for not being finite has no gradient either
        return torch.where(asked_for, gradient * upstream, 0).to(ctx.dtype), None, None


def log_distribution(maps: Tensor, tau: float) -> Tensor:
    """Return the logarithm of every channel's distribution over the positions, [N, C, HW], of maps [N, C, H, W]."""
    return F.log_softmax(maps.flatten(2).to(_dtype(maps)) / tau, dim=-1)


def _dtype(maps: Tensor) -> torch.dtype:
    return torch.promote_types(maps.dtype, torch.float32)  # half precision overflows in the exponential


def standardize(maps: Tensor) -> Tensor:
    """Return maps [N, C, H, W] in float32 with mean 0 and variance 1 per channel, over the batch and all positions.

    A BatchNorm of the current batch without learned scale: what is left of a channel is where it is strong, not how
    strongly this network happens to scale it.
    """
    return F.batch_norm(maps.float(), None, None, training=True)


class CWDLoss:
    """The student's criterion: its detection criterion plus one weighted divergence for each distilled level.

    It stands in for the wrapped criterion, whose other attributes it passes on. It is no module, so that neither
    teacher nor adapters become a part of the student.

    Attributes:
        criterion: The wrapped detection criterion.
        weight: Overall weight of the divergences; the trainer sets it for every epoch.
        dropped: How many terms were not finite and were left out since somebody set it to 0.
        levels_mean: Mean weighted term of each level by name since the epoch began.
    """

    def __init__(
        self,
        criterion: Any,
        adapters: nn.ModuleList,
        levels: Sequence[Level],
        level_weights: Sequence[float] | None = None,
        tau: float = 1.0,
        normalize: bool = False,
        weight: float = 1.0,
    ) -> None:
        """Wrap a detection criterion.

        Args:
            criterion: Callable that takes (predictions, batch) and returns the loss vector and its items by name.
            adapters: One module for each level, from student to teacher channels.
            levels: The distilled levels, finest first.
            level_weights: One weight for each level; 1 for all by default.
            tau: Temperature of the softmax.
            normalize: Whether both sides are standardized first.
            weight: Overall weight.
        """
        self.criterion = criterion
        self.adapters = adapters
        self.levels = list(levels)
        self.level_weights = list(level_weights or [1.0] * len(self.levels))
        self.tau = tau
        self.normalize = normalize
        self.weight = weight
        self.dropped: Tensor | int = 0
        self._sums, self._calls = torch.zeros(len(self.levels)), 0

    def begin_epoch(self, weight: float) -> None:
        """Set the overall weight, and begin new means of the levels' terms."""
        self.weight = weight
        self._sums, self._calls = torch.zeros(len(self.levels)), 0

    @property
    def levels_mean(self) -> dict[str, float]:
        """The mean over the calls since the epoch began; the items hold the sum alone, to keep progress bars narrow."""
        means = (self._sums / max(self._calls, 1)).tolist()
        return {f"{level.name}_loss": mean for level, mean in zip(self.levels, means, strict=True)}

    def __call__(self, preds: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss vector, scaled by the batch size as Ultralytics' own terms are, and its detached items.

        The items are those of the detection loss and `cwd_loss`, the weighted sum over the levels.

        Args:
            preds: What the student's head returned. Predictions of the evaluation mode get the detection loss alone.
            batch: Ultralytics' batch; `img` holds images [N, 3, H, W] in 0 to 1, and `teacher_maps` the teacher's
                pyramid of them, which is taken out to free it after use. Without it the divergences are 0.
        """
        loss, items = self.criterion(preds, batch)
        if not isinstance(preds, dict):
            return loss, items
        pyramid: Any = batch.pop("teacher_maps", None)
        if pyramid is None:
            terms = torch.zeros(len(self.levels), device=loss.device)
        else:
            terms = torch.stack(self.divergences(student_features(preds), pyramid))
            finite = terms.isfinite()
            self.dropped = self.dropped + (~finite).sum().detach()  # on the device: reading it would wait for the step
            terms = torch.where(finite, terms, 0)
            terms = terms * terms.new_tensor(self.level_weights) * self.weight
            loss = torch.cat([loss, terms * len(batch["img"])])
        terms = terms.detach()
        self._sums, self._calls = self._sums.to(terms.device) + terms, self._calls + 1
        return loss, {**items, "cwd_loss": terms.sum()}

    def divergences(self, features: Sequence[Tensor], pyramid: Sequence[Tensor]) -> list[Tensor]:
        """Return the unweighted divergence of every distilled level.

        Args:
            features: The student's pyramid, one map [N, C, H, W] for each input of its head.
            pyramid: The teacher's.
        """
        return [channel_wise_divergence(s, t, self.tau) for s, t in self.pairs(features, pyramid)]

    def pairs(self, features: Sequence[Tensor], pyramid: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the maps of student and teacher [N, C, H, W] that are compared, for every distilled level.

        Args:
            features: The student's pyramid, one map for each input of its head.
            pyramid: The teacher's.
        """
        for level, adapter in zip(self.levels, self.adapters, strict=True):
            student = adapter(features[level.student_index])
            teacher = pyramid[level.teacher_index]
            if self.normalize:
                student, teacher = standardize(student), standardize(teacher)
            yield student, teacher

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the wrapped criterion: end-to-end heads expect `update` once an epoch."""
        if name == "criterion":  # asked for before it is set, while an instance is being rebuilt
            raise AttributeError(name)
        return getattr(self.criterion, name)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Return a copy of the wrapped criterion alone: whoever copies the student gets a plain model."""
        return deepcopy(self.criterion, memo)
