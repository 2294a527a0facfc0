# SPDX-License-Identifier: AGPL-3.0-or-later
"""The divergence of a term with its gradient, some images at a time, before the backward pass comes.

What is kept for backward is then of the student's channels, fewer than the teacher's, and what is needed in passing
stays small. On a CPU, idle cores take parts of their own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from yolo_cwd.method.divergence import softmax_dtype
from yolo_cwd.method.parallel import in_parts
from yolo_cwd.method.terms import Term

PART_ELEMENTS = defaultdict(lambda: 2**24, cpu=2**19)  # of the teacher's maps that are compared at once, by device


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
    at_once = max(1, PART_ELEMENTS[pair.student.device.type] // of_image)
    return [slice(i, i + at_once) for i in range(0, images, at_once)]


def _parameters(term: Term) -> list[Tensor]:
    return [p for p in term.parameters() if p.requires_grad]


def _compare(part: _Part) -> tuple[Tensor, Sequence[Tensor]]:
    """Return the divergence of some images and its gradients to the student's map and to the term's parameters.

    In float32 whatever the autocast around it: the gradient has no loss scale yet that would keep it in the range of
    float16.
    """
    term, student, teacher = part.pair
    maps = student.detach()[part.images]
    leaf = maps.to(softmax_dtype(maps)).requires_grad_()
    with torch.enable_grad(), torch.autocast(maps.device.type, enabled=False):
        value = term(leaf, [maps[part.images] for maps in teacher]) * (len(maps) / len(student))
    return value.detach(), torch.autograd.grad(value, (leaf, *_parameters(term)))


class _PrecomputedGradient(torch.autograd.Function):
    """A value in parts, each with its gradient, for all images together."""

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
