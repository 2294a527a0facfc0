# SPDX-License-Identifier: AGPL-3.0-or-later
"""What a student is compared with its teacher in. A term is one object; the criterion (loss.py) weights and sums them.

A term says which of the student's maps it looks at, which of the teacher's, and how far they differ. A new kind of
term is a class here and a line in `build_terms`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from yolo_cwd.config import ConfigError, Settings
from yolo_cwd.method import fused
from yolo_cwd.method.divergence import channel_wise_divergence
from yolo_cwd.method.fpn import Level, class_branches, class_maps_agree, student_scores
from yolo_cwd.method.fused import Compared
from yolo_cwd.method.regression import Regression
from yolo_cwd.method.teacher import Teacher, TeacherMaps

CLASS_MAPS = "classmap"  # the name of their term


class StudentMaps(NamedTuple):
    """What a student makes of some images.

    Attributes:
        pyramid: One map [N, C, H/stride, W/stride] for each input of its head.
        preds: What its head returned in training mode.
    """

    pyramid: Sequence[Tensor]
    preds: Any


class Term(nn.Module):
    """One weighted divergence from the teacher.

    Attributes:
        name: What its columns in `results.csv` are called.
        share: Its weight beside the other terms, before the overall weight.
        balanced: Whether the weight is a share of the task's gradient (balance.py) instead of a factor.
        explained: The share of the teacher's variance that the fit explains, at most 1; None without a fit.
        has_kernel: Whether it has a closed form for maps on a GPU, `with_gradients`; autograd derives it otherwise.
    """

    explained: float | None = None
    has_kernel = False

    def __init__(self, name: str, share: float, balanced: bool = True) -> None:
        """Name the term and weight it."""
        super().__init__()
        self.name, self.share, self.balanced = name, share, balanced

    def of_student(self, maps: StudentMaps) -> Tensor:
        """Return the student's map [N, ...], where the gradients of the task and of this term are compared."""
        raise NotImplementedError

    def of_teacher(self, maps: TeacherMaps) -> list[Tensor]:
        """Return the teacher's maps [N, ...] for it."""
        raise NotImplementedError

    def forward(self, student: Tensor, teacher: Sequence[Tensor]) -> Tensor:
        """Return the divergence of some images, averaged over them; both sides as the two methods above return them."""
        raise NotImplementedError

    def with_gradients(self, student: Tensor, teacher: Sequence[Tensor]) -> Compared:
        """Return the same with its gradients, by the kernel (fused.py), if it has one."""
        raise NotImplementedError

    def observe(self, student: StudentMaps, teacher: TeacherMaps) -> None:
        """Gather a batch for `fit`."""

    def fit(self) -> None:
        """Start from the best fit to what was observed; terms without parameters have nothing to fit."""


class LevelTerm(Term):
    """The maps of one level of the pyramid, through a 1x1 convolution from student to teacher channels.

    The convolution (the adapter) needs no bias: a softmax over positions ignores a constant per channel.
    """

    has_kernel = True

    def __init__(self, level: Level, share: float, balanced: bool, tau: float, fitted: bool) -> None:
        """Make the adapter, with random weights.

        Args:
            level: The level.
            share: Its weight.
            balanced: Whether the weight is a share of the task's gradient.
            tau: Temperature of the softmax.
            fitted: Whether the adapter starts as a regression from the student's maps to the teacher's.
        """
        super().__init__(level.name, share, balanced)
        self.level, self.tau = level, tau
        self.adapter = nn.Conv2d(level.student_channels, level.teacher_channels, 1, bias=False)
        self._regression = Regression() if fitted else None

    def of_student(self, maps: StudentMaps) -> Tensor:
        """Return the student's map [N, C, H, W] of the level."""
        return maps.pyramid[self.level.student_index]

    def of_teacher(self, maps: TeacherMaps) -> list[Tensor]:
        """Return the teacher's map [N, D, H, W] of the level."""
        return [maps.pyramid[self.level.teacher_index]]

    def forward(self, student: Tensor, teacher: Sequence[Tensor]) -> Tensor:
        """Return the channel-wise divergence of the adapted map."""
        return channel_wise_divergence(self.adapter(student), teacher[0], self.tau)

    def with_gradients(self, student: Tensor, teacher: Sequence[Tensor]) -> Compared:
        """Return the same with its gradients for the map and the adapter."""
        return fused.compare_adapted(student, teacher[0], self.adapter.weight, self.tau)

    def observe(self, student: StudentMaps, teacher: TeacherMaps) -> None:
        """Gather the maps of a batch."""
        if self._regression is not None:
            self._regression.add(self.of_student(student), *self.of_teacher(teacher))

    def fit(self) -> None:
        """Set the adapter to the ridge regression over the batches observed in all processes.

        Raises:
            ConfigError: If there is no fit, since maps are not finite.
        """
        if self._regression is None:
            return
        weights, self.explained = self._regression.solve()
        if not weights.isfinite().all():
            raise ConfigError(
                f"adapter=fitted: the maps of student or teacher at {self.name} are not finite, so there is no fit; "
                "give amp=False, or another student"
            )
        self.adapter.weight.data.copy_(weights[:, :, None, None])
        self._regression = Regression()  # for a fit of its own, if the adapters must begin anew


class ClassTerm(Term):
    """The maps of the classes that both heads know, from their class branches. They need no adapter."""

    has_kernel = True
    known: Tensor

    def __init__(
        self, levels: Sequence[Level], strides: Sequence[int], known: Sequence[int], share: float, tau: float
    ) -> None:
        """Say which classes are compared.

        Args:
            levels: The distilled levels.
            strides: The strides of all maps that the student's head receives, in their order.
            known: The student's classes, in the order in which the teacher has them.
            share: Its weight, a share of the task's gradient.
            tau: Temperature of the softmax.
        """
        super().__init__(CLASS_MAPS, share)
        self.levels, self.strides, self.tau = list(levels), list(strides), tau
        self.classes = list(known)
        self.register_buffer("known", torch.tensor(self.classes, dtype=torch.long), persistent=False)

    def of_student(self, maps: StudentMaps) -> Tensor:
        """Return the logits [N, classes, positions of all levels], or [N, classes, H, W] of the finest level alone."""
        return student_scores(maps.preds)

    def of_teacher(self, maps: TeacherMaps) -> list[Tensor]:
        """Return the logits [N, known classes, H, W] of each level."""
        return maps.branches[CLASS_MAPS]

    def forward(self, student: Tensor, teacher: Sequence[Tensor]) -> Tensor:
        """Return the channel-wise divergences of the levels, summed."""
        chosen = student if self._is_whole(student) else student.index_select(1, self.known)
        terms = [channel_wise_divergence(ours, theirs, self.tau) for ours, theirs in self._pairs(chosen, teacher)]
        return torch.stack(terms).sum()

    def with_gradients(self, student: Tensor, teacher: Sequence[Tensor]) -> Compared:
        """Return the same with its gradient for the logits."""
        whole = self._is_whole(student)
        chosen = student if whole else student.index_select(1, self.known)
        images, classes = chosen.shape[:2]
        made = chosen.new_zeros(images, classes + (not whole), *chosen.shape[2:])  # a last one for unknown classes
        pairs = self._pairs(chosen, teacher)
        scale = fused.scale_of(max(theirs[0, 0].numel() for _, theirs in pairs))
        terms = [
            fused.divergence_(ours, theirs, derivative, self.tau, scale)
            for (ours, theirs), (derivative, _) in zip(pairs, self._pairs(made[:, :classes], teacher), strict=True)
        ]
        gradient = made if whole else made.index_select(1, self._places(student.shape[1]))
        return Compared(torch.stack(terms).sum(), [gradient], self.tau / (images * classes * scale))

    def _is_whole(self, student: Tensor) -> bool:
        return self.classes == list(range(student.shape[1]))

    def _places(self, classes: int) -> Tensor:
        """Return where each class of the student is among the known ones; one past the last if it is not."""
        numbers = torch.arange(len(self.classes), device=self.known.device)
        return torch.full((classes,), len(numbers), device=self.known.device).scatter(0, self.known, numbers)

    def _pairs(self, student: Tensor, teacher: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Return the logits of student and teacher [N, known classes, positions] at every level that both have."""
        maps = self._by_level(student, teacher)
        shared = [x for x in self.levels if x.student_index < len(maps) and x.teacher_index < len(teacher)]
        return [(maps[x.student_index], teacher[x.teacher_index].flatten(2)) for x in shared]

    def _by_level(self, student: Tensor, teacher: Sequence[Tensor]) -> Sequence[Tensor]:
        if student.ndim == 4:
            return [student.flatten(2)]
        some = next(x for x in self.levels if x.teacher_index < len(teacher))
        height, width = (side * some.stride for side in teacher[some.teacher_index].shape[-2:])  # of the images
        return torch.split(student, [(height // s) * (width // s) for s in self.strides], dim=-1)


def build_terms(
    settings: Settings,
    levels: Sequence[Level],
    strides: Sequence[int],
    student: Any,
    teacher: Teacher,
    names: Sequence[str],
) -> nn.ModuleList:
    """Return the terms of a training: one for each distilled level, finest first, and one for the class maps.

    Args:
        settings: The checked options.
        levels: The distilled levels.
        strides: The strides of all maps that the student's head receives, in their order.
        student: The student.
        teacher: The teacher, which from now on shows what the terms compare.
        names: The data's classes by index; an empty name for a class that is not trained.
    """
    shares = settings.weights_of([level.name for level in levels])
    fitted = settings.adapter == "fitted"
    with torch.random.fork_rng(devices=[]):  # so the student draws the same random numbers as without us
        terms: list[Term] = [
            LevelTerm(level, share, settings.balanced, settings.tau, fitted)
            for level, share in zip(levels, shares, strict=True)
        ]
    class_share = settings.class_share / settings.strength if settings.strength else 0.0
    if class_share and (known := _tap_classes(student.model[-1], teacher, levels, names)):
        terms.append(ClassTerm(levels, strides, known, class_share, settings.tau))
    return nn.ModuleList(terms)


def _tap_classes(head: nn.Module, teacher: Teacher, levels: Sequence[Level], names: Sequence[str]) -> list[int]:
    """Let a teacher show the maps of the data's classes that it knows, if its class maps mean what the student's do.

    Returns:
        Their positions in `names`, in the order of the maps. A name that stands for several classes is none.
    """
    if teacher.head is None or not class_maps_agree(head, teacher.head):
        return []
    here, there = len(class_branches(head)), len(branches := class_branches(teacher.head))
    if not any(level.student_index < here and level.teacher_index < there for level in levels):
        return []
    ours, theirs = Counter(names), Counter(teacher.names.values())
    position = {name: i for i, name in teacher.names.items() if theirs[name] == 1}
    known = [i for i, name in enumerate(names) if ours[name] == 1 and name in position]
    if known:
        teacher.tap(CLASS_MAPS, branches, [position[names[i]] for i in known])
    return known
