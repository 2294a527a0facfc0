# SPDX-License-Identifier: AGPL-3.0-or-later
"""A training on images that the teacher has labelled: those of a pool, and those of `data` beside their own labels."""

from __future__ import annotations

import gc
from typing import Any

import torch

from yolo_cwd.config import Settings, unusable_data
from yolo_cwd.pool import complete, confidence, store
from yolo_cwd.pool.plan import as_begun
from yolo_cwd.pool.weight import PoolWeight
from yolo_cwd.run import distributed
from yolo_cwd.run.resumable import ResumableTrainer
from yolo_cwd.tasks import Task


class PooledTrainer(ResumableTrainer):
    """Ultralytics' trainer whose training images may be labelled by the teacher.

    Attributes:
        task: The task it trains for.
        cwd: The checked options.
        pool: Images that the teacher has labelled; None if there are none.
    """

    task: Task
    cwd: Settings
    pool: store.Pool | None = None

    def label_pool(self, args: Any) -> store.Pool | None:
        """Let the teacher label the images of `unlabeled`, and complete the labels of the others."""
        args = as_begun(args)
        settings = confidence.chosen(self.cwd, self.task.name, args)
        pool = complete.prepare(settings, self.task.name, args)
        gc.collect()  # the teacher with its head
        torch.cuda.empty_cache()
        return pool

    def get_dataset(self) -> Any:
        """Resolve `data` as Ultralytics does, with the training images as the teacher has labelled them."""
        try:
            data = super().get_dataset()
            return {**data, "train": self.pool.train} if self.pool else data
        except RuntimeError as error:
            distributed.let_others_follow()  # to the same error, instead of waiting for an end that never comes
            raise unusable_data(self.args.data, error.__cause__ or error) from error

    def build_dataset(self, img_path: Any, mode: str = "train", batch: int | None = None) -> Any:
        """Build a dataset as Ultralytics does; with a pool, `fraction` has already been applied."""
        whole = self.pool is not None and mode == "train"
        fraction = self.args.fraction
        self.args.fraction = 1.0 if whole else fraction
        try:
            dataset = super().build_dataset(img_path, mode, batch)
        finally:
            self.args.fraction = fraction
        if whole and (weighing := self.weighing()):
            weighing.keep_apart(dataset)
        return dataset

    def weighing(self) -> PoolWeight | None:
        """Return what makes the labels of the pool count less; None if they count like all others."""
        if not self.pool or not self.cwd.unlabeled or self.cwd.pool_weight == 1:
            return None
        return PoolWeight(self.cwd.pool_weight, self.pool.folder, bool(self.args.overlap_mask))
