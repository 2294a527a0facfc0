# SPDX-License-Identifier: AGPL-3.0-or-later
"""The ridge regression from a student's maps to its teacher's, as which an adapter starts.

An adapter that starts at random takes epochs to fit, and pushes the student in random directions until then. Every map
is centered per image and channel first, since a softmax over positions ignores a constant.
"""

from __future__ import annotations

import torch
from torch import Tensor

from yolo_cwd.run import distributed

RIDGE = 1e-2  # as a share of the mean variance of the student's channels


class Regression:
    """Ridge regression from student maps to teacher maps, gathered batch by batch."""

    def __init__(self) -> None:
        """Start with no data."""
        self._sums: list[Tensor] = []

    def add(self, student: Tensor, teacher: Tensor) -> None:
        """Add maps of the same images: [N, C, H, W] from the student and [N, D, H, W] from the teacher.

        In float32 whatever the autocast around it: sums over all positions are too large for float16.
        """
        s, t = _centered(student), _centered(teacher)  # [NHW, C], [NHW, D]
        with torch.autocast(s.device.type, enabled=False):
            new = [s.T @ s, s.T @ t, t.square().sum()]
        self._sums = [a + b for a, b in zip(self._sums, new, strict=True)] if self._sums else new

    def solve(self) -> tuple[Tensor, float]:
        """Return the weights [D, C] for the data of all processes, and the share of the variance that they explain.

        It is 0 if there is none, as in maps of one position.
        """
        sums = map(distributed.all_reduce_sum, self._sums)
        gram, cross, total = (value.cpu().double() for value in sums)  # small, and not every device has float64
        ridge = RIDGE * gram.diagonal().mean() + torch.finfo(torch.float32).tiny
        weights = torch.linalg.solve(gram + ridge * torch.eye(len(gram), dtype=gram.dtype), cross)
        left = total - 2 * (weights * cross).sum() + (weights * (gram @ weights)).sum()
        return weights.T.float(), float(1 - left / total) if total else 0.0


def _centered(maps: Tensor) -> Tensor:
    maps = maps.float()
    return (maps - maps.mean((2, 3), keepdim=True)).permute(0, 2, 3, 1).flatten(0, 2)  # [NHW, C]
