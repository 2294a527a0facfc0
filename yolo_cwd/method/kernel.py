# SPDX-License-Identifier: AGPL-3.0-or-later
"""The Triton kernel of the divergence and its derivative. Importing it needs Triton; fused.py says when it runs."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096  # elements that a program holds at once of each map


def launch(student: Tensor, teacher: Tensor, gradient: Tensor, tau: float, scale: float) -> Tensor:
    """Return tau^2 * sum_i p * log(p / q) of every channel [N, C], in float32, and write the scaled derivative.

    A program takes the channels of one image that lie side by side in memory, and walks over the positions twice: to
    find maximum and sum of both softmaxes, and to write what follows from them. The second walk mostly reads what the
    first has left in the cache.

    Args:
        student: Student maps [N, C, P], in any memory order.
        teacher: Teacher maps of the same shape.
        gradient: Receives `scale * (q - p)` [N, C, P]; may be the student's maps.
        tau: Temperature.
        scale: Factor of the derivative, for half precision.
    """
    images, channels, positions = student.shape
    found = torch.empty(images, channels, dtype=torch.float32, device=student.device)
    together = 16 if student.stride(1) == 1 and channels > 1 else 1  # channels of a program: 32 bytes of float16
    strides = [stride for maps in (student, teacher, gradient) for stride in maps.stride()]
    grid = (images, triton.cdiv(channels, together))
    sizes = {"TOGETHER": together, "AT_ONCE": TILE // together, "num_warps": 8}
    with torch.cuda.device_of(student):  # type: ignore[no-untyped-call]
        _divergence[grid](student, teacher, gradient, found, channels, positions, tau, scale, *strides, **sizes)
    return found


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _divergence(  # type: ignore[no-untyped-def] # Triton does not compile annotations of types that it does not know
    student,
    teacher,
    gradient,
    found,
    channels,
    positions,
    tau,
    scale,
    student_n,
    student_c,
    student_p,
    teacher_n,
    teacher_c,
    teacher_p,
    gradient_n,
    gradient_c,
    gradient_p,
    TOGETHER: tl.constexpr,  # noqa: N803
    AT_ONCE: tl.constexpr,  # noqa: N803
):
    n = tl.program_id(0).to(tl.int64)  # offsets of a large batch leave 32 bits
    c = (tl.program_id(1) * TOGETHER + tl.arange(0, TOGETHER)).to(tl.int64)
    first = tl.arange(0, AT_ONCE).to(tl.int64)
    s_channel = student + n * student_n + c[None, :] * student_c
    t_channel = teacher + n * teacher_n + c[None, :] * teacher_c
    g_channel = gradient + n * gradient_n + c[None, :] * gradient_c

    s_max = tl.full([TOGETHER], float("-inf"), tl.float32)
    t_max = tl.full([TOGETHER], float("-inf"), tl.float32)
    s_sum = tl.zeros([TOGETHER], tl.float32)
    t_sum = tl.zeros([TOGETHER], tl.float32)
    for begin in range(0, positions, AT_ONCE):
        i = begin + first[:, None]
        there = (i < positions) & (c[None, :] < channels)
        s = tl.load(s_channel + i * student_p, there, float("-inf")).to(tl.float32) / tau
        t = tl.load(t_channel + i * teacher_p, there, float("-inf")).to(tl.float32) / tau
        s_new = tl.maximum(s_max, tl.max(s, 0))
        t_new = tl.maximum(t_max, tl.max(t, 0))
        s_sum = s_sum * tl.exp(s_max - s_new) + tl.sum(tl.exp(s - s_new[None, :]), 0)
        t_sum = t_sum * tl.exp(t_max - t_new) + tl.sum(tl.exp(t - t_new[None, :]), 0)
        s_max, t_max = s_new, t_new

    s_log, t_log = tl.log(s_sum), tl.log(t_sum)
    total = tl.zeros([TOGETHER], tl.float32)
    for begin in range(0, positions, AT_ONCE):
        i = begin + first[:, None]
        there = (i < positions) & (c[None, :] < channels)
        s = tl.load(s_channel + i * student_p, there, 0.0).to(tl.float32) / tau
        t = tl.load(t_channel + i * teacher_p, there, 0.0).to(tl.float32) / tau
        log_q = s - s_max[None, :] - s_log[None, :]
        log_p = t - t_max[None, :] - t_log[None, :]
        p = tl.exp(log_p)
        total += tl.sum(tl.where(there, p * (log_p - log_q), 0.0), 0)
        difference = scale * (tl.exp(log_q) - p)
        tl.store(g_channel + i * gradient_p, difference.to(gradient.dtype.element_ty), there)
    total = tl.where(total < 0, 0.0, total)  # rounding can leave -1e-9
    tl.store(found + n * channels + c, tau * tau * total, c < channels)
