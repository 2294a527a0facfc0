# SPDX-License-Identifier: AGPL-3.0-or-later
"""What happens between the set-up and the first step: the teacher's precision, fitted adapters, a first measurement.

An adapter starts as the ridge regression from the student's maps to the teacher's, over some batches of training
images. Every map is centred per image and channel first, since a softmax over positions ignores a constant. An adapter
that starts at random takes epochs to fit, and pushes the student in random directions until then.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from ultralytics.utils import LOCAL_RANK, RANK
from ultralytics.utils.torch_utils import autocast, unwrap_model

from yolo_cwd.config import ConfigError
from yolo_cwd.method.balance import squared_norms
from yolo_cwd.method.fpn import modes_untouched, student_scores
from yolo_cwd.method.loss import CWDLoss
from yolo_cwd.method.teacher import Teacher
from yolo_cwd.run import distributed

OUT_OF_MEMORY = ("out of memory", "alloc_failed", "cudnn_status_internal_error", "unable to find an engine")
RIDGE = 1e-2  # as a share of the mean variance of the student's channels
FITTED = 8  # batches for the regression
MEASURED = 2  # batches for the first measurement of the gradients


def choose_precision(trainer: Any) -> None:
    """Let the teacher choose its precision on a validation image; the first process chooses for all."""
    wanted, first = trainer.cwd.teacher_dtype, RANK in {-1, 0}
    pixels, *_ = trainer.test_loader.dataset.load_image(0)  # [H, W, C], 0 to 255
    image = torch.from_numpy(pixels).to(trainer.device).permute(2, 0, 1)[None] / 255
    if first or wanted != "auto":
        trainer.teacher.calibrate(wanted, image)
    if wanted == "auto":
        chosen = distributed.agree(trainer.teacher.precision.name)
        if not first:
            trainer.teacher.calibrate(chosen, image)


def prepare(trainer: Any, criterion: CWDLoss) -> list[float]:
    """Fit the adapters, and measure the first gradients, on some batches of training images.

    It uses up no random numbers, so the training sees the same images as it would without it.

    Args:
        trainer: The `DistillingTrainer`, set up.
        criterion: Its criterion.

    Returns:
        What `fit` returns; nothing if the adapters are not fitted.
    """
    size = trainer.batch_size // max(trainer.world_size, 1)
    while True:
        try:
            return _prepare(trainer, criterion, size)
        except RuntimeError as error:
            if RANK != -1 or size < 2 or not any(sign in str(error).lower() for sign in OUT_OF_MEMORY):
                raise
        size //= 2  # few images do as well here; if the training needs less too, Ultralytics will find out
        trainer._clear_memory()


def _prepare(trainer: Any, criterion: CWDLoss, size: int) -> list[float]:
    parts = criterion, unwrap_model(trainer.model), trainer.teacher
    explained: list[float] = []
    with random_numbers_untouched(), autocast_of(trainer):
        batches = _training_batches(trainer, size)
        if trainer.cwd.adapter == "fitted":
            explained = fit(*parts, islice(batches, FITTED))
        if criterion.balanced.any():
            for batch in islice(batches, MEASURED):
                measure(*parts, batch, trainer.scaler.get_scale())
    return explained


def autocast_of(trainer: Any) -> Any:
    """Return the mixed precision that Ultralytics has a trainer's steps run in, as a context manager."""
    return autocast(torch.bfloat16 if trainer.args.amp == "bf16" else trainer.amp, device=trainer.device.type)


def _training_batches(trainer: Any, size: int) -> Iterator[dict[str, Any]]:
    """Yield batches of so many training images endlessly, from a separate loader in this process."""
    args = trainer.args
    kept = args.cache, args.workers
    args.cache, args.workers = False, 0
    loader = trainer.get_dataloader(trainer.data["train"], batch_size=size, rank=LOCAL_RANK, mode="train")
    args.cache, args.workers = kept
    while True:
        yield from map(trainer.preprocess_batch, loader)


class Regression:
    """Ridge regression from student maps to teacher maps, gathered batch by batch."""

    def __init__(self) -> None:
        """Start with no data."""
        self._sums: list[Tensor] = []

    def add(self, student: Tensor, teacher: Tensor) -> None:
        """Add maps of the same images: [N, C, H, W] from the student and [N, D, H, W] from the teacher.

        In float32 whatever the autocast around it: sums over all positions are too large for float16.
        """
        s, t = _centred(student), _centred(teacher)  # [NHW, C], [NHW, D]
        with torch.autocast(s.device.type, enabled=False):
            new = [s.T @ s, s.T @ t, t.square().sum()]
        self._sums = [a + b for a, b in zip(self._sums, new, strict=True)] if self._sums else new

    def solve(self) -> tuple[Tensor, float]:
        """Return the weights [D, C] for the data of all processes, and the share of the variance that they explain."""
        sums = map(distributed.summed, self._sums)
        gram, cross, total = (value.cpu().double() for value in sums)  # small, and not every device has float64
        ridge = RIDGE * gram.diagonal().mean() + torch.finfo(torch.float32).tiny
        weights = torch.linalg.solve(gram + ridge * torch.eye(len(gram), dtype=gram.dtype), cross)
        left = total - 2 * (weights * cross).sum() + (weights * (gram @ weights)).sum()
        return weights.T.float(), float(1 - left / total)


def _centred(maps: Tensor) -> Tensor:
    maps = maps.float()
    return (maps - maps.mean((2, 3), keepdim=True)).permute(0, 2, 3, 1).flatten(0, 2)  # [NHW, C]


@torch.no_grad()
def fit(criterion: CWDLoss, student: nn.Module, teacher: Teacher, batches: Iterable[dict[str, Any]]) -> list[float]:
    """Set the adapters of a criterion to ridge regressions.

    Args:
        criterion: Holds the adapters, 1x1 convolutions without bias, and the levels.
        student: The student, not compiled.
        teacher: The teacher.
        batches: Batches on the device, with images [N, 3, H, W] in 0 to 1.

    Returns:
        The share of the teacher's variance, at most 1, that the adapter of each level explains.

    Raises:
        ConfigError: If there is no fit, since maps are not finite.
    """
    regressions = [Regression() for _ in criterion.levels]
    with statistics_untouched(student):
        for batch in batches:
            features, pyramid = _pyramid(criterion, student(batch["img"])), teacher(batch["img"])
            for regression, level in zip(regressions, criterion.levels, strict=True):
                regression.add(features[level.student_index], pyramid[level.teacher_index])
    explained = []
    for adapter, regression, level in zip(criterion.adapters, regressions, criterion.levels, strict=True):
        weights, share = regression.solve()
        if not weights.isfinite().all():
            raise ConfigError(
                f"adapter=fitted: the maps of student or teacher at {level.name} are not finite, so there is no fit; "
                "give amp=False, or another student"
            )
        adapter.get_parameter("weight").copy_(weights[:, :, None, None])
        explained.append(share)
    return explained


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
    images, lesson = batch["img"], teacher.lesson(batch["img"])
    with torch.enable_grad(), statistics_untouched(student):
        preds = student(images)
        loss, _ = criterion.criterion(preds, batch)
        features, scores = _pyramid(criterion, preds), student_scores(preds) if criterion.classes else None
        maps = [features[level.student_index] for level in criterion.levels] + ([] if scores is None else [scores])
        divergences = criterion.compare(features, scores, lesson)
        losses = loss.sum(), [divergence * len(images) for divergence in divergences]
        while not (squares := _squares(*losses, maps, scale)).isfinite().all() and scale > 1:
            scale = max(1.0, scale / 16)
    criterion.meter.sample(squares, lambda: criterion.weights)


def _squares(task: Tensor, divergences: Sequence[Tensor], maps: Sequence[Tensor], scale: float) -> Tensor:
    """Return the squared norms [K, 2] of the gradients that the task's loss and each divergence send to its maps."""
    known = [(i, m) for i, m in enumerate(maps) if m.requires_grad]
    options: dict[str, Any] = {"retain_graph": True, "materialize_grads": True}
    of_task = torch.autograd.grad(task * scale, [m for _, m in known], **options)
    squares = torch.zeros(len(maps), 2, device=task.device)
    for (i, m), of_map in zip(known, of_task, strict=True):
        (of_ours,) = torch.autograd.grad(divergences[i] * scale, m, **options)
        squares[i] = squared_norms(of_map, of_ours) / scale**2
    return squares


def _pyramid(criterion: CWDLoss, preds: Any) -> list[Tensor]:
    features = criterion.features(preds)
    assert features is not None  # the student is in training mode
    return features


@contextmanager
def random_numbers_untouched() -> Iterator[None]:
    """Restore the state of every random number generator that augmentation draws from."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


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
