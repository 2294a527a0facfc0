# SPDX-License-Identifier: AGPL-3.0-or-later
"""The divergence of a term with its gradient, some images at a time, before the backward pass comes.

What is kept for backward is then of the student's channels, fewer than the teacher's, and what is needed in passing
stays small. On a CPU, idle cores take parts of their own. On a GPU with the fused kernel, a batch is one part: little
is needed in passing.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from yolo_cwd.method import fused
from yolo_cwd.method.divergence import wide_dtype
from yolo_cwd.method.fused import Compared
from yolo_cwd.method.parallel import in_parts
from yolo_cwd.method.terms import Term

PART_ELEMENTS = {"cpu": 2**19}  # of the teacher's maps that are compared at once, by device
GPU_BYTES_PER_ELEMENT = 2**10  # of a GPU's memory, for one such element: a part then needs about 2 % of it


class Pair(NamedTuple):
    """What a term compares: the student's map [N, ...], and the teacher's maps [N, ...]."""

    term: Term
    student: Tensor
    teacher: Sequence[Tensor]


class _Part(NamedTuple):
    pair: Pair
    images: slice


def divergences(pairs: Sequence[Pair]) -> list[Tensor]:
    """Return the unweighted divergence of every pair, a scalar each, averaged over the images.

    Its gradient reaches the student's map and the parameters of the term.
    """
    parts = [[_Part(pair, images) for images in _slices(pair)] for pair in pairs]
    found = iter(in_parts(_compare, [part for of_pair in parts for part in of_pair], pairs[0].student.device))
    return [
        _PrecomputedGradient.apply(list(islice(found, len(of_pair))), pair.student, *_parameters(pair.term))
        for of_pair, pair in zip(parts, pairs, strict=True)
    ]


def _slices(pair: Pair) -> list[slice]:
    images, of_image = len(pair.student), sum(maps[0].numel() for maps in pair.teacher)
    whole = pair.term.has_kernel and fused.suits(pair.student, *pair.teacher)
    at_once = images if whole else max(1, _part_elements(pair.student.device) // of_image)
    return [slice(i, i + at_once) for i in range(0, images, at_once)]


def _part_elements(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory) // GPU_BYTES_PER_ELEMENT
    return PART_ELEMENTS.get(device.type, 2**24)


def _parameters(term: Term) -> list[Tensor]:
    return [p for p in term.parameters() if p.requires_grad]


def _compare(part: _Part) -> Compared:
    """Return the divergence of some images and its gradients to the student's map and to the term's parameters.

    Without the kernel in float32, whatever the autocast around it: the gradient has no loss scale yet that would keep
    it in the range of float16.
    """
    term, student, teacher = part.pair
    maps, taught = student.detach()[part.images], [maps[part.images] for maps in teacher]
    with torch.autocast(maps.device.type, enabled=False):
        if term.has_kernel and fused.suits(maps, *taught):
            with torch.no_grad():
                return term.with_gradients(maps, taught)
        leaf = maps.to(wide_dtype(maps)).requires_grad_()
        with torch.enable_grad():
            value = term(leaf, taught) * (len(maps) / len(student))
        gradients = torch.autograd.grad(value, (leaf, *_parameters(term)))
    return Compared(value.detach(), list(gradients), 1.0)


class _PrecomputedGradient(torch.autograd.Function):
    """A value in parts, each with its gradient, for all images together."""

    @staticmethod
    def forward(ctx: Any, parts: Sequence[Compared], maps: Tensor, *parameters: Tensor) -> Tensor:
        of_maps, *of_parameters = zip(*(part.gradients for part in parts), strict=True)
        ctx.save_for_backward(_joined(of_maps), *map(_summed, of_parameters))
        ctx.factor, ctx.dtype = parts[0].factor, maps.dtype
        return _summed([part.value for part in parts])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        dropped = upstream == 0  # a term that was dropped for not being finite has no gradient either
        gradients = [gradient.masked_fill(dropped, 0) for gradient in ctx.saved_tensors]
        of_maps, *of_parameters = map(partial(_multiplied, upstream * ctx.factor), gradients)
        return None, of_maps.to(ctx.dtype), *of_parameters


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts)) if len(parts) > 1 else parts[0]


def _summed(parts: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(parts)).sum(0) if len(parts) > 1 else parts[0]


def _multiplied(factor: Tensor, gradient: Tensor) -> Tensor:
    """Return a gradient times a scalar, in the gradient's dtype; that need not hold the scalar."""
    if gradient.dtype == factor.dtype:
        return gradient * factor
    return torch.mul(gradient, factor.reshape([1] * gradient.ndim), out=torch.empty_like(gradient))
