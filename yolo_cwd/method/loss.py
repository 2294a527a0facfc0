# SPDX-License-Identifier: AGPL-3.0-or-later
"""The loss: channel-wise divergence between two feature maps, and the criterion that adds it to the task's own loss."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from yolo_cwd.method.balance import GradientMeter
from yolo_cwd.method.fpn import Level, student_features, student_scores
from yolo_cwd.method.parallel import in_parts
from yolo_cwd.method.teacher import Lesson

LossAndItems = tuple[Tensor, dict[str, Tensor]]
ValueAndGradient = tuple[Tensor, Sequence[Tensor]]
MOST = 1e4  # ratio of gradients: where the maps agree to the last digits, more would teach rounding errors
CLASS_MAPS = "classmap"  # the name of their term
PART_ELEMENTS = defaultdict(lambda: 2**24, cpu=2**19)  # of the teacher's maps that are compared at once, by device


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


class ChannelWiseDivergence(nn.Module):
    """`channel_wise_divergence` as a module, for a training loop of one's own."""

    def __init__(self, tau: float = 1.0) -> None:
        """Set the temperature.

        Args:
            tau: Temperature of the softmax, above 0.

        Raises:
            ValueError: If it is not above 0.
        """
        super().__init__()
        if not tau > 0:
            raise ValueError(f"tau={tau}: must be above 0, such as tau=1")
        self.tau = tau

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the divergence of student maps [N, C, H, W] from teacher maps of the same shape, a scalar in nats."""
        return channel_wise_divergence(student, teacher, self.tau)

    def extra_repr(self) -> str:
        """Return what is shown of it."""
        return f"tau={self.tau:g}"


class _Divergence(torch.autograd.Function):
    """The divergence with its derivative in closed form, tau * (q - p) / (N C): one saved tensor."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, tau: float) -> Tensor:
        maps = student.shape[0] * student.shape[1]
        log_q, log_p = log_distribution(student, tau), log_distribution(teacher, tau)
        p = log_p.exp()
        total = log_p.sub_(log_q).mul_(p).sum().clamp_min_(0)  # rounding can leave -1e-9
        ctx.save_for_backward(log_q.exp_().sub_(p).view(student.shape))
        ctx.scale, ctx.dtype = tau / maps, student.dtype
        return total * (tau**2 / maps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (difference,) = ctx.saved_tensors
        return (difference * (upstream * ctx.scale)).to(ctx.dtype), None, None


class _Known(torch.autograd.Function):
    """A value in parts, each with its gradient: `value_and_gradient` of some images, for the images together."""

    @staticmethod
    def forward(
        ctx: Any, parts: Sequence[tuple[Tensor, Sequence[Tensor]]], maps: Tensor, *parameters: Tensor
    ) -> Tensor:
        values, gradients = zip(*parts, strict=True)
        of_maps, *of_parameters = zip(*gradients, strict=True)
        ctx.save_for_backward(torch.cat(of_maps), *(torch.stack(g).sum(0) for g in of_parameters))
        ctx.dtype = maps.dtype
        return torch.stack(values).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        kept = upstream != 0  # a term that was dropped for not being finite has no gradient either
        of_maps, *of_parameters = (torch.where(kept, gradient * upstream, 0) for gradient in ctx.saved_tensors)
        return None, of_maps.to(ctx.dtype), *of_parameters


def value_and_gradient(
    function: Callable[[Tensor], Tensor], maps: Tensor, parameters: Sequence[Tensor]
) -> ValueAndGradient:
    """Return a function of maps and of parameters, and its gradient to both, without waiting for backward.

    In float32 whatever the autocast around it: the gradient has no loss scale yet that would keep it in the range of
    float16.
    """
    leaf = maps.detach().to(_dtype(maps)).requires_grad_()
    with torch.enable_grad(), torch.autocast(maps.device.type, enabled=False):
        value = function(leaf)
    return value.detach(), torch.autograd.grad(value, (leaf, *parameters))


def log_distribution(maps: Tensor, tau: float) -> Tensor:
    """Return the logarithm of every channel's distribution over the positions, [N, C, HW], of maps [N, C, H, W]."""
    flat = maps.to(_dtype(maps), memory_format=torch.contiguous_format).flatten(2)
    return F.log_softmax(flat if tau == 1 else flat / tau, dim=-1)


def _dtype(maps: Tensor) -> torch.dtype:
    return torch.promote_types(maps.dtype, torch.float32)  # half precision overflows in the exponential


def standardize(maps: Tensor) -> Tensor:
    """Return maps [N, C, H, W] in float32 with mean 0 and variance 1 per channel, over the batch and all positions.

    A BatchNorm of the current batch without learned scale: what is left of a channel is where it is strong, not how
    strongly this network happens to scale it.
    """
    return F.batch_norm(maps.float(), None, None, training=True)


class CWDLoss:
    """The student's criterion: that of its task plus one weighted divergence for each distilled level.

    It stands in for the wrapped criterion, whose other attributes it passes on. It is no module, so that neither
    teacher nor adapters become a part of the student.

    A term's weight is `weight` times its level's weight. A balanced term is also multiplied by the measured ratio of
    the gradients at its map (balance.py): its weight is then the share of the task's gradient that it has there.

    Attributes:
        criterion: The wrapped criterion of the task.
        features: Finds the pyramid that the student's head received, by what it returned; None without training.
        weight: Overall weight of the divergences; the trainer sets it for every epoch.
        meter: What is measured of the gradients.
        balanced: Which of the terms are balanced [K].
        taught: How many batches have been compared with the teacher's.
        reaches: Whether the divergence of one of them could reach the student, and not the adapters alone.
        dropped: How many terms were not finite and were left out since somebody set it to 0.
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
        balanced: bool = False,
        classes: Sequence[int] = (),
        class_weight: float = 0.0,
        device: torch.device | None = None,
        features: Callable[[Any], list[Tensor] | None] = student_features,
    ) -> None:
        """Wrap the criterion of a task.

        Args:
            criterion: Callable that takes (predictions, batch) and returns the loss, multiplied by the batch size, and
                its items by name.
            adapters: One module for each level, from student to teacher channels; they see a few images at a time.
            levels: The distilled levels, finest first.
            level_weights: One weight for each level; 1 for all by default.
            tau: Temperature of the softmax.
            normalize: Whether both sides are standardized first.
            weight: Overall weight.
            balanced: Whether the weights of the levels are shares of the task's gradient.
            classes: The student's classes whose maps are compared with the teacher's, in the order in which the teacher
                has them.
            class_weight: Their weight beside a level's, always a share; 0 leaves them out.
            device: Where the student is.
            features: Finds the student's pyramid by its predictions.
        """
        self.criterion = criterion
        self.features = features
        self.adapters = adapters
        self.levels = list(levels)
        self.tau = tau
        self.normalize = normalize
        self.weight = weight
        self.classes = list(classes) if class_weight else []
        self._chosen = torch.tensor(self.classes, dtype=torch.long, device=device)
        names = [level.name for level in self.levels] + [CLASS_MAPS] * bool(self.classes)
        self.meter = GradientMeter(names, device)
        weights = [*(level_weights or [1.0] * len(self.levels)), class_weight][: len(names)]
        self._shares = torch.tensor(weights, device=device)  # of the overall weight [K]
        self.balanced = torch.tensor([balanced] * len(self.levels) + [True] * bool(self.classes), device=device)
        self.taught, self.reaches = 0, False
        self.dropped: Tensor | int = 0
        self._sums, self._calls = torch.zeros(2, len(names)), 0

    def begin_epoch(self, weight: float) -> None:
        """Set the overall weight, and begin new means of the terms."""
        self.weight = weight
        self._sums, self._calls = torch.zeros_like(self._sums), 0
        self.meter.begin_epoch()

    @property
    def weights(self) -> Tensor:
        """The weight of every term now [K]; 0 for a balanced one of which nothing is known yet."""
        ratios = torch.where(self.balanced, self.meter.ratios.nan_to_num(0.0).clamp_max(MOST), 1.0)
        return self.weight * self._shares * ratios

    @property
    def unknown(self) -> list[str]:
        """The balanced terms that should have a weight and have none yet, since nothing is known of their gradients."""
        waiting = self.balanced & (self._shares > 0) & ~self.meter.means.all(1)
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

    def __call__(self, preds: Any, batch: dict[str, Tensor]) -> LossAndItems:
        """Return the loss vector, scaled by the batch size as Ultralytics' own terms are, and its detached items.

        The items are those of the task's loss and `cwd_loss`, the weighted sum over the terms.

        Args:
            preds: What the student's head returned. Predictions of the evaluation mode get the task's loss alone.
            batch: Ultralytics' batch; `img` holds images [N, 3, H, W] in 0 to 1, and `lesson` what the teacher makes of
                them, which is taken out to free it after use. Without it the divergences are 0.
        """
        loss, items = self.criterion(preds, batch)
        features = self.features(preds)
        if features is None:
            return loss, items
        lesson: Any = batch.pop("lesson", None)
        if lesson is None:
            divergences = terms = torch.zeros(len(self.meter.names), device=loss.device)
        else:
            scores = student_scores(preds) if self.classes else None
            divergences = torch.stack(self.compare(*self._watched(features, scores), lesson))
            self.taught += 1
            finite = divergences.isfinite()
            self.dropped = self.dropped + (~finite).sum().detach()  # on the device: reading it would wait for the step
            divergences = torch.where(finite, divergences, 0)
            terms = divergences * self.weights.to(divergences.device)
            loss = torch.cat([loss.reshape(-1), terms * len(batch["img"])])
        self._sums = self._sums.to(terms.device) + torch.stack([terms, divergences]).detach()
        self._calls += 1
        return loss, {**items, "cwd_loss": terms.detach().sum()}

    def _watched(self, features: Sequence[Tensor], scores: Tensor | None) -> tuple[list[Tensor], Tensor | None]:
        features = list(features)
        self.reaches = self.reaches or any(features[level.student_index].requires_grad for level in self.levels)
        for i, level in enumerate(self.levels):
            features[level.student_index] = self.meter.watch(i, features[level.student_index])
        return features, None if scores is None else self.meter.watch(len(self.levels), scores)

    def compare(self, features: Sequence[Tensor], scores: Tensor | None, lesson: Lesson) -> list[Tensor]:
        """Return the unweighted divergence of every distilled level, and last that of the class maps if they count.

        Args:
            features: The student's pyramid, one map [N, C, H, W] for each input of its head.
            scores: The logits of its classes, [N, classes, positions of all levels], or of the finest level alone,
                [N, classes, H, W].
            lesson: What the teacher shows of the same images.
        """
        lesson.wait()
        found = self.divergences(features, lesson.pyramid)
        if not self.classes or scores is None:
            return found
        sizes = [maps.shape[-2:].numel() for maps in features]
        sizes = sizes[:1] if scores.ndim == 4 else sizes
        chosen = self._chosen.to(scores.device)

        def divergence(leaf: Tensor) -> Tensor:
            ours, theirs = torch.split(leaf.flatten(2), sizes, dim=-1), lesson.classes  # [N, classes, HW] a level
            shown = [x for x in self.levels if x.student_index < len(ours) and x.teacher_index < len(theirs)]
            pairs = [(ours[x.student_index].index_select(1, chosen), theirs[x.teacher_index].flatten(2)) for x in shown]
            return torch.stack([channel_wise_divergence(s, t, self.tau) for s, t in pairs]).sum()

        return [*found, _Known.apply([value_and_gradient(divergence, scores, [])], scores)]

    def divergences(self, features: Sequence[Tensor], pyramid: Sequence[Tensor]) -> list[Tensor]:
        """Return the unweighted divergence of every distilled level.

        The gradient is taken at once, a few images at a time and on a CPU by the idle cores. What is kept for backward
        is then of the student's channels, fewer than the teacher's, and what is needed in passing stays small.

        Args:
            features: The student's pyramid, one map [N, C, H, W] for each input of its head.
            pyramid: The teacher's.
        """
        sides = [(features[level.student_index], pyramid[level.teacher_index]) for level in self.levels]
        parameters = [[p for p in adapter.parameters() if p.requires_grad] for adapter in self.adapters]
        parts = [self._parts(teacher) for _, teacher in sides]

        def compare(part_of_level: tuple[int, slice]) -> ValueAndGradient:
            i, part = part_of_level
            student, teacher = sides[i][0][part], sides[i][1][part]
            share = len(student) / len(sides[i][0])

            def divergence(leaf: Tensor) -> Tensor:
                return share * channel_wise_divergence(*self._compared(i, leaf, teacher), self.tau)

            return value_and_gradient(divergence, student, parameters[i])

        numbered = [(i, part) for i, of_level in enumerate(parts) for part in of_level]
        found = iter(in_parts(compare, numbered, features[0].device))
        return [
            _Known.apply(list(islice(found, len(of_level))), student, *trained)
            for of_level, (student, _), trained in zip(parts, sides, parameters, strict=True)
        ]

    def _parts(self, maps: Tensor) -> list[slice]:
        some = max(1, PART_ELEMENTS[maps.device.type] // maps[0].numel())
        at_once = len(maps) if self.normalize else some  # standardized over all images
        return [slice(i, i + at_once) for i in range(0, len(maps), at_once)]

    def pairs(self, features: Sequence[Tensor], pyramid: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the maps of student and teacher [N, C, H, W] that are compared, for every distilled level.

        Args:
            features: The student's pyramid, one map for each input of its head.
            pyramid: The teacher's.
        """
        for i, level in enumerate(self.levels):
            yield self._compared(i, features[level.student_index], pyramid[level.teacher_index])

    def _compared(self, i: int, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        student = self.adapters[i](student)
        return (standardize(student), standardize(teacher)) if self.normalize else (student, teacher)

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
        return self.criterion.__reduce_ex__(
            min(protocol, 1)
        )  # those above 1 insist on the class of what they are given
