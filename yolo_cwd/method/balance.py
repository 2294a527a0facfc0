# SPDX-License-Identifier: AGPL-3.0-or-later
"""How strongly distillation pulls at a map beside the task's own loss, measured where both arrive: at the map.

The gradient that a divergence sends to a map and the one that everything else sends there are told apart by an alias:
the divergence sees the alias, the rest of the network the map itself. Their norms are known once backward has passed,
at no cost but that of the norms. Under the balanced rule the ratio sets the weight of the next step, so that the
divergence has a given share of the gradient, whatever the loss, the temperature, the image size and the loss scale.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

MOMENTUM = 0.9  # of the running means: one step is noisy, and a few are as good as many


class GradientMeter:
    """Norms of gradients at the maps that are compared.

    Attributes:
        names: What is measured: levels, and class maps.
        means: Running means over the steps of two squared norms [K, 2]: of the task's gradient, and of that of a
            divergence of weight 1. 0 until they are known.
    """

    def __init__(self, names: Sequence[str], device: torch.device | None = None) -> None:
        """Start with nothing known."""
        self.names = list(names)
        self.means = torch.zeros(len(self.names), 2, device=device)
        self._step = torch.zeros_like(self.means)  # squared norms: of the task, of ours as weighted
        self._epoch = torch.zeros_like(self.means)

    @property
    def ratios(self) -> Tensor:
        """The norm of the task's gradient over that of a divergence of weight 1 [K]; nan until it is known."""
        return (self.means[:, 0] / self.means[:, 1]).sqrt()

    def watch(self, i: int, maps: Tensor) -> Tensor:
        """Return an alias of maps for a divergence to be taken of.

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
                self.note(i, whole.float() - ours[0].float(), ours.pop())

        maps.register_hook(whole_has_come)  # type: ignore[no-untyped-call]
        aliased: Tensor = alias
        return aliased

    def note(self, i: int, task: Tensor, ours: Tensor) -> None:
        """Take in the gradients that the task's loss and a divergence, as weighted, send to the same maps."""
        with torch.no_grad():
            self._step[i] += torch.stack([g.float().square().sum() for g in (task, ours)])

    def step(self, weights: Tensor) -> None:
        """Take in what has been watched since the last step of the optimizer, in all processes together.

        Args:
            weights: The weights [K] of the divergences in that time.
        """
        squares = self._gathered()
        self._epoch += torch.where(_usable(squares), squares, 0)
        self._move(torch.stack([squares[:, 0], squares[:, 1] / weights.square()], 1))

    def sample(self, weights: Callable[[], Tensor]) -> None:
        """Take in gradients of weight 1 that were noted apart from a step.

        Args:
            weights: Returns the weights [K] that follow.
        """
        squares = self._gathered()
        self._move(squares)
        weighted = torch.stack([squares[:, 0], squares[:, 1] * weights().square()], 1)
        self._epoch += torch.where(_usable(squares), weighted, 0)

    def _gathered(self) -> Tensor:
        """Return the squares [K, 2] of all processes since the last call."""
        if dist.is_initialized():
            dist.all_reduce(self._step)
        squares = self._step.clone()
        self._step.zero_()
        return squares

    def _move(self, squares: Tensor) -> None:
        before = torch.where(self.means > 0, self.means, squares)
        self.means = torch.where(_usable(squares), MOMENTUM * before + (1 - MOMENTUM) * squares, self.means)

    def restore(self, means: Sequence[Sequence[float]]) -> None:
        """Go on from the means of an interrupted run; one that had none begins anew."""
        if len(means) == len(self.names):
            self.means = torch.tensor(means, device=self.means.device)

    def begin_epoch(self) -> None:
        """Forget the shares of the last epoch."""
        self._epoch.zero_()

    @property
    def shares(self) -> dict[str, float]:
        """By name the norm of the divergence's gradient over the task's in this epoch; 0 where nothing is known."""
        task, ours = self._epoch.unbind(1)
        values = (ours / task).sqrt().nan_to_num(posinf=0).tolist()
        return dict(zip(self.names, values, strict=True))


def _usable(squares: Tensor) -> Tensor:
    """Return which squares [K, 2] tell anything [K, 1]: those without overflow and of no weight of 0."""
    return (squares.isfinite() & (squares > 0)).all(1, keepdim=True)
