# SPDX-License-Identifier: AGPL-3.0-or-later
"""The divergence of a term and its gradients on a GPU: one kernel, and matrix products in the precision of the maps.

The plain divergence (divergence.py) makes a dozen passes over float32 maps of the teacher's channels. Here the adapted
map is written once, in half precision, and a kernel overwrites it by the derivative. Half precision does not hold
gradients as small as those of a mean over all positions. So they stay larger, and a factor goes with them.

The plain divergence is the reference, and takes over where the kernel cannot run: without Triton, or with
`YOLO_CWD_KERNEL=0` in the environment. No GPU has run the kernel so far. So its first use on a device is a trial
against the plain divergence.
"""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from yolo_cwd.config import first_line
from yolo_cwd.log import warn
from yolo_cwd.method.divergence import log_distribution, require_equal_shapes

SWITCH = "YOLO_CWD_KERNEL"  # an environment variable
DTYPES = {torch.float16, torch.bfloat16, torch.float32}
MAX_SCALE = 2.0**15  # of differences of probabilities, at most 1 each: float16 ends at 65504
HEADROOM = 8.0  # of a mean over the teacher's channels: with weights of an adapter up to 16, it stays in float16
MAX_ERROR = 1e-2  # of a trial in float16, relative
TRIALS = ((2, 20, 9, 7), (2, 32, 16, 20))  # maps of odd sizes, and of multiples of 16


class Compared(NamedTuple):
    """A divergence with its gradients.

    Attributes:
        value: The divergence, a scalar.
        gradients: For the student's map, then for the parameters of the term.
        factor: What the gradients are still to be multiplied by.
    """

    value: Tensor
    gradients: list[Tensor]
    factor: float


def suits(*maps: Tensor) -> bool:
    """Return whether the kernel can compare maps: on a GPU that has passed the trial, in float32 at most."""
    return usable(maps[0].device) and all(m.dtype in DTYPES for m in maps)


@cache
def usable(device: torch.device) -> bool:
    """Return whether the kernel runs on a device and agrees with the plain divergence; one warning if it does not."""
    if device.type != "cuda" or os.environ.get(SWITCH) == "0" or find_spec("triton") is None:
        return False
    try:
        error = trial(device)
    except Exception as problem:  # whatever a compiler or a driver raises
        reason = first_line(problem)
    else:
        if error <= MAX_ERROR:
            return True
        reason = f"differs by {error:.2g} from the plain one"
    warn(f"the divergence's kernel is not used on {device}: {reason[:150]}")
    return False


@torch.no_grad()
def trial(device: torch.device) -> float:
    """Return the largest relative error of the kernel on a device, for small maps in both memory orders."""
    errors = []
    for shape in TRIALS:
        wave = torch.arange(2 * 2 * 20 * 63 * 9, device=device)[: 2 * torch.Size(shape).numel()]
        student, teacher = (3 * (wave * wave).sin()).half().view(2, *shape)
        log_q, log_p = (log_distribution(maps, 2.0) for maps in (student, teacher))
        value = 4 * (log_p.exp() * (log_p - log_q)).sum(-1).mean()
        for order in (torch.contiguous_format, torch.channels_last):
            s, t = (maps.contiguous(memory_format=order).flatten(2) for maps in (student, teacher))
            found = divergence_(s, t, derivative := torch.empty_like(s), 2.0, 64.0)
            pairs = (found, value), (derivative, 64.0 * (log_q.exp() - log_p.exp()))
            errors += [(a - b).norm() / b.norm() for a, b in pairs]
    return float(torch.stack(errors).nan_to_num(torch.inf).max())


def divergence_(student: Tensor, teacher: Tensor, derivative: Tensor, tau: float, scale: float) -> Tensor:
    """Return the channel-wise divergence of maps [N, C, P], a scalar, and write its derivative.

    Args:
        student: Student maps.
        teacher: Teacher maps.
        derivative: Receives `scale * (q - p)` [N, C, P]; may be the student's maps.
        tau: Temperature.
        scale: Factor of what is written.

    Raises:
        ValueError: If the shapes differ.
    """
    require_equal_shapes(student, teacher)
    by_channel: Tensor = _kernel(student, teacher, derivative, tau, scale)  # [N, C]
    return by_channel.mean()


@torch.library.custom_op("yolo_cwd::divergence", mutates_args=("derivative",))
def _kernel(student: Tensor, teacher: Tensor, derivative: Tensor, tau: float, scale: float) -> Tensor:
    from yolo_cwd.method.kernel import launch  # here, since not every PyTorch has Triton

    return launch(student, teacher, derivative, tau, scale)


@_kernel.register_fake
def _(student: Tensor, teacher: Tensor, derivative: Tensor, tau: float, scale: float) -> Tensor:
    return student.new_empty(student.shape[:2], dtype=torch.float32)


def compare_adapted(student: Tensor, teacher: Tensor, weight: Tensor, tau: float) -> Compared:
    """Compare an adapted map with the teacher's.

    Args:
        student: Student map [N, C, H, W].
        teacher: Teacher map [N, D, H, W].
        weight: Weights of the adapter [D, C, 1, 1].
        tau: Temperature.

    Returns:
        The divergence with its gradients for the student's map, and for the weights if they are trained.
    """
    s, t = student.flatten(2), teacher.flatten(2)
    images, channels, positions = t.shape
    scale = scale_of(positions)
    matrix = weight.flatten(1).to(s.dtype)
    adapted = _product(matrix, s, like=t)
    value = divergence_(adapted, t, adapted, tau, scale)  # from here on, adapted is scale * (q - p)
    shrink = 1 / (HEADROOM * channels)
    gradients = [_product(matrix.T, adapted, like=s, alpha=shrink).view_as(student)]
    if weight.requires_grad:
        by_image = torch.baddbmm(s.new_empty(1), adapted, s.mT, beta=0, alpha=shrink)  # [N, D, C]
        gradients.append(by_image.sum(0, dtype=torch.float32).view_as(weight))
    return Compared(value, gradients, tau / (images * channels * scale * shrink))


def scale_of(positions: int) -> float:
    """Return the factor of a derivative over so many positions, where its elements are about 1 / positions."""
    return min(float(positions), MAX_SCALE)


def _product(matrix: Tensor, maps: Tensor, like: Tensor, alpha: float = 1.0) -> Tensor:
    """Return `alpha * matrix @ maps`, of [K, C] and [N, C, P], in the memory order of others: no layout is copied."""
    matrices, nothing = matrix.expand(len(maps), -1, -1), maps.new_empty(1)
    if like.stride(1) == 1:
        by_position = torch.baddbmm(nothing, maps.mT, matrices.mT, beta=0, alpha=alpha)
        return by_position.mT
    return torch.baddbmm(nothing, matrices, maps, beta=0, alpha=alpha)
