# SPDX-License-Identifier: AGPL-3.0-or-later
"""The paper: channel-wise divergence between two feature maps (Shu et al., ICCV 2021, arXiv 2011.13256)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


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
    require_equal_shapes(student, teacher)
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


def require_equal_shapes(student: Tensor, teacher: Tensor) -> None:
    """Refuse maps of different shapes."""
    if student.shape != teacher.shape:
        raise ValueError(f"student maps {tuple(student.shape)} and teacher maps {tuple(teacher.shape)} differ in shape")


def log_distribution(maps: Tensor, tau: float) -> Tensor:
    """Return the logarithm of every channel's distribution over the positions, [N, C, HW], of maps [N, C, H, W]."""
    flat = maps.to(wide_dtype(maps), memory_format=torch.contiguous_format).flatten(2)
    return F.log_softmax(flat if tau == 1 else flat / tau, dim=-1)


def wide_dtype(maps: Tensor) -> torch.dtype:
    """Return the dtype for exponentials and sums over maps: half precision overflows in them."""
    return torch.promote_types(maps.dtype, torch.float32)
