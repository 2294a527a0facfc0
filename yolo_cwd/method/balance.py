# SPDX-License-Identifier: AGPL-3.0-or-later
"""How strongly distillation pulls at a map compared with the task's own loss, measured where both arrive: at the map.

Two gradients arrive at a map: from its divergence, and from everything else. An alias tells them apart: the divergence
sees the alias, the rest of the network sees the map itself. Both norms are known after the backward pass, at no cost
beyond computing them. Under the balanced rule their ratio sets the weight of the next step. So the divergence has a
given share of the gradient, whatever the loss, the temperature, the image size and the loss scale.

A step without any gradient of the task leaves the means as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from yolo_cwd.method.divergence import wide_dtype
from yolo_cwd.run import distributed

MOMENTUM = 0.9  # of the running means: one step is noisy, but a few are as good as many


class GradientMeter:
    """The norms of the gradients at the compared maps.

    Attributes:
        names: The terms, in the order of the rows of all tensors here.
        means: Running means over the steps of two squared norms [K, 2]: of the task's gradient, and of the gradient of
            a divergence with weight 1. 0 until known. They change only as a whole: by another tensor.
        recorded: Squared norms [K, 2] since the last optimizer step: the task's, and ours as weighted. Processes add
            theirs before `step` and `count`.
    """

    def __init__(self, names: Sequence[str], device: torch.device | None = None) -> None:
        """Start with nothing known."""
        self.names = list(names)
        self.means = torch.zeros(len(self.names), 2, device=device)
        self.recorded = torch.zeros_like(self.means)
        self._due = torch.zeros_like(self.means)  # for the next step, of weight 1
        self._epoch = torch.zeros_like(self.means)

    @property
    def ratios(self) -> Tensor:
        """The norm of the task's gradient, divided by that of a divergence with weight 1 [K]; nan until known."""
        return (self.means[:, 0] / self.means[:, 1]).sqrt()

    def watch(self, i: int, maps: Tensor) -> Tensor:
        """Return an alias of maps, from which a divergence is to be computed.

        Args:
            i: Which of the names they are.
            maps: The student's maps, of any shape.
        """
        if not maps.requires_grad:
            return maps
        ours: list[Tensor] = []
        alias: Any = maps.view_as(maps)
        alias.register_hook(ours.append)

        def whole_has_come(whole: Tensor) -> None:
            if ours:
                self.note(i, whole - ours[0], ours.pop())

        maps.register_hook(whole_has_come)  # type: ignore[no-untyped-call]
        aliased: Tensor = alias
        return aliased

    def note(self, i: int, task: Tensor, ours: Tensor) -> None:
        """Record the gradients that the task's loss and a weighted divergence send to the same maps."""
        with torch.no_grad():
            self.recorded[i].add_(squared_norms(task, ours))

    def step(self, weights: Tensor, scale: Tensor | float = 1.0) -> None:
        """Update the means from what was recorded since the last optimizer step.

        Args:
            weights: The weights [K] that the divergences had in that time.
            scale: The loss scale that the gradients carry.
        """
        self.count(weights, scale)
        self._move(self._due)
        self._due.zero_()

    def count(self, weights: Tensor, scale: Tensor | float = 1.0) -> None:
        """Count what was recorded so far among this epoch's; the optimizer may step only in a later one.

        Args:
            weights: The weights [K] that the divergences had in that time.
            scale: The loss scale that the gradients carry.
        """
        squares = self.recorded / scale**2
        self.recorded.zero_()
        self._epoch += squares.masked_fill(~_usable(squares), 0)
        of_weight_1 = torch.stack([squares[:, 0], squares[:, 1] / weights.square()], 1)
        self._due += of_weight_1.masked_fill((squares == 0).all(1, keepdim=True), 0)

    def sample(self, squares: Tensor, weights: Callable[[], Tensor]) -> None:
        """Update the means from gradients that were taken outside a step, which may be due with some batches recorded.

        Args:
            squares: Their squared norms [K, 2]: the task's, and those of divergences with weight 1.
            weights: Returns the weights [K] that result.
        """
        squares = distributed.all_reduce_sum(squares)
        self._move(squares)
        weighted = torch.stack([squares[:, 0], squares[:, 1] * weights().square()], 1)
        self._epoch += torch.where(_usable(squares), weighted, 0)

    def _move(self, squares: Tensor) -> None:
        before = torch.where(self.means > 0, self.means, squares)
        self.means = torch.where(_usable(squares), MOMENTUM * before + (1 - MOMENTUM) * squares, self.means)

    def state(self) -> dict[str, list[float]]:
        """Return the means by the terms' names, as plain numbers."""
        return dict(zip(self.names, self.means.tolist(), strict=True))

    def restore(self, state: Mapping[str, Sequence[float]]) -> None:
        """Continue from the means of an interrupted run; a term that it did not have begins with nothing known."""
        means = zip(self.means.tolist(), self.names, strict=True)
        self.means = self.means.new_tensor([state.get(name, known) for known, name in means])

    def begin_epoch(self) -> None:
        """Forget the shares of the last epoch."""
        self._epoch.zero_()

    @property
    def shares(self) -> dict[str, float]:
        """By name, the norm of the divergence's gradient divided by the task's in this epoch; 0 if unknown."""
        task, ours = self._epoch.unbind(1)
        values = (ours / task).sqrt().nan_to_num(posinf=0).tolist()
        return dict(zip(self.names, values, strict=True))


def clip_gradients(parameters: Sequence[Tensor], most: Tensor) -> None:
    """Scale the gradients of parameters such that their norm is at most a value that stays on the device."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if gradients:
        norm = torch.stack(torch._foreach_norm(gradients)).norm()
        torch._foreach_mul_(gradients, (most / (norm + 1e-6)).clamp(max=1.0))


def squared_norms(*gradients: Tensor) -> Tensor:
    """Return the squared norm of each gradient at the same maps, in float32 at least."""
    if gradients[0].dtype == torch.float32:
        return torch.stack([gradient.square().sum() for gradient in gradients])
    norms = [torch.linalg.vector_norm(g, dtype=wide_dtype(g)) for g in gradients]  # without a copy in float32
    return torch.stack(norms).square()


def _usable(squares: Tensor) -> Tensor:
    """Return which rows of squares [K, 2] are usable [K, 1]: those without overflow and with a weight other than 0."""
    return ((squares > 0) & (squares < torch.inf)).all(1, keepdim=True)
