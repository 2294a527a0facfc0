# SPDX-License-Identifier: AGPL-3.0-or-later
"""What happens between the set-up and the first step: the teacher's precision, fitted adapters, a first measurement."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from ultralytics.utils import RANK

from yolo_cwd.method.balance import squared_norms
from yolo_cwd.method.fpn import modes_untouched
from yolo_cwd.method.loss import CWDLoss
from yolo_cwd.method.parts import divergences
from yolo_cwd.method.teacher import Teacher
from yolo_cwd.method.terms import StudentMaps
from yolo_cwd.run import distributed
from yolo_cwd.run.random_state import random_numbers_untouched

OUT_OF_MEMORY = ("out of memory", "alloc_failed", "cudnn_status_internal_error", "unable to find an engine")
FITTED = 8  # batches for the regression
MEASURED = 2  # batches for the first measurement of the gradients
MOST_IMAGES = 16  # in one of these: more take time before the first step, and change little
OF_OBJECTS = ("batch_idx", "cls", "bboxes", "keypoints")  # what a batch has by object; by image otherwise

Batches = Callable[[int], Iterator[dict[str, Any]]]


def choose_precision(teacher: Teacher, wanted: str, dataset: Any, device: torch.device) -> None:
    """Let a teacher choose its precision on the first image of a data set; the first process chooses for all.

    Args:
        teacher: The teacher.
        wanted: The option `teacher_dtype`.
        dataset: A data set of Ultralytics.
        device: The device of the training.
    """
    first = RANK in {-1, 0}
    pixels, *_ = dataset.load_image(0)  # [H, W, C], 0 to 255
    image = torch.from_numpy(pixels).to(device).permute(2, 0, 1)[None] / 255
    if first or wanted != "auto":
        teacher.calibrate(wanted, image)
    if wanted == "auto":
        chosen = distributed.broadcast_object(teacher.precision.name)
        if not first:
            teacher.calibrate(chosen, image)


def fit_and_measure(
    criterion: CWDLoss,
    student: nn.Module,
    teacher: Teacher,
    batches: Batches,
    size: int,
    autocast: Callable[[], AbstractContextManager[Any]],
    scale: float,
) -> None:
    """Fit the terms, and measure the first gradients, on some batches of training images.

    It uses up no random numbers, so the training sees the same images as it would without it.

    Args:
        criterion: The criterion, with its terms.
        student: The student, not compiled.
        teacher: The teacher.
        batches: Yields batches of so many training images, on the device, endlessly.
        size: Images in a batch of the training; at most `MOST_IMAGES` are taken, halved until they fit into the memory.
        autocast: Returns the mixed precision of the training's steps, as a context manager.
        scale: The loss scale of the training.
    """
    size = min(size, MOST_IMAGES)
    while True:
        try:
            with random_numbers_untouched(), autocast():
                some = batches(size)
                fit(criterion, student, teacher, islice(some, FITTED))
                for batch in islice(some, MEASURED if criterion.is_balanced else 0):
                    measure(criterion, student, teacher, batch, scale)
            return
        except RuntimeError as error:
            if RANK != -1 or size < 2 or not any(sign in str(error).lower() for sign in OUT_OF_MEMORY):
                raise
        size //= 2  # few images do as well here; if the training needs less too, Ultralytics will find out
        torch.cuda.empty_cache()


@torch.no_grad()
def fit(criterion: CWDLoss, student: nn.Module, teacher: Teacher, batches: Iterable[dict[str, Any]]) -> None:
    """Let every term of a criterion start from the best fit to some batches.

    Args:
        criterion: Holds the terms.
        student: The student, not compiled.
        teacher: The teacher.
        batches: Batches on the device, with images [N, 3, H, W] in 0 to 1.

    Raises:
        ConfigError: If there is no fit, since maps are not finite.
    """
    with statistics_untouched(student):
        for batch in batches:
            seen, taught = _maps(criterion, student(batch["img"])), teacher.maps(batch["img"])
            for term in criterion.terms:
                term.observe(seen, taught)  # type: ignore[operator]
    for term in criterion.terms:
        term.fit()  # type: ignore[operator]


def measure(
    criterion: CWDLoss, student: nn.Module, teacher: Teacher, batch: dict[str, Any], scale: float = 1.0
) -> None:
    """Record the gradients of one batch in a criterion's meter, without a step.

    This is needed before the first step, and where the gradients of a step cannot be watched: inside a compiled graph.

    Args:
        criterion: The criterion.
        student: The student, not compiled.
        teacher: The teacher.
        batch: A batch on the device, with images [N, 3, H, W] in 0 to 1 and their labels.
        scale: The loss scale of the training; a smaller one is taken if gradients overflow.
    """
    images, taught = batch["img"], teacher.maps(batch["img"])
    with torch.enable_grad(), statistics_untouched(student):
        preds = student(images)
        loss, _ = criterion.criterion(preds, batch)
        pairs = criterion.pairs(_maps(criterion, preds), taught)
        losses = loss.sum(), [divergence * len(images) for divergence in divergences(pairs)]
        maps = [pair.student for pair in pairs]
        while not (squares := _squares(*losses, maps, scale)).isfinite().all() and scale > 1:
            scale = max(1.0, scale / 16)
    criterion.meter.sample(squares, lambda: criterion.weights)


def some_images(batch: dict[str, Any]) -> dict[str, Any]:
    """Return half of a batch, at least 2 and at most `MOST_IMAGES`, for a measurement that must fit as a step does.

    A measurement keeps the whole graph of a student that is not compiled, and that may need more memory than a step.

    Args:
        batch: Ultralytics' batch, with images [N, 3, H, W] and their labels.
    """
    images, index = len(batch["img"]), batch.get("batch_idx")
    count = min(max((images + 1) // 2, 2), MOST_IMAGES)  # batch normalization needs two where a map has one position
    masks = batch.get("masks")
    if masks is not None and index is not None and len(masks) == len(index) == images:
        return batch  # a mask each for images, or for objects

    def part(name: str, value: Any) -> Any:
        if index is not None and (name in OF_OBJECTS or (name == "masks" and len(value) != images)):
            return value[index < count]
        return value[:count] if isinstance(value, Tensor | list | tuple) and len(value) == images else value

    return {name: part(name, value) for name, value in batch.items()}


def _squares(task: Tensor, divergences: Sequence[Tensor], maps: Sequence[Tensor], scale: float) -> Tensor:
    """Return the squared norms [K, 2] of the gradients that the task's loss and each divergence send to its maps."""
    known = [(i, m) for i, m in enumerate(maps) if m.requires_grad]
    options: dict[str, Any] = {"retain_graph": True, "materialize_grads": True}
    squares = torch.zeros(len(maps), 2, device=task.device)
    if not known:
        return squares
    of_task = torch.autograd.grad(task * scale, [m for _, m in known], **options)
    for (i, m), of_map in zip(known, of_task, strict=True):
        (of_ours,) = torch.autograd.grad(divergences[i] * scale, m, **options)
        squares[i] = squared_norms(of_map, of_ours) / scale**2
    return squares


def _maps(criterion: CWDLoss, preds: Any) -> StudentMaps:
    maps = criterion.student_maps(preds)
    assert maps is not None  # the student is in training mode
    return maps


@contextmanager
def statistics_untouched(model: nn.Module) -> Iterator[None]:
    """Let a model run in training mode without changing its normalization statistics, then restore its mode."""
    layers = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    kept = [(m, m.momentum, m.num_batches_tracked) for m in layers]
    for m in layers:
        m.momentum = 0.0
        if m.num_batches_tracked is not None:
            m.num_batches_tracked = m.num_batches_tracked.clone()
    try:
        with modes_untouched(model):
            model.train()
            yield
    finally:
        for m, momentum, count in kept:
            m.momentum, m.num_batches_tracked = momentum, count
