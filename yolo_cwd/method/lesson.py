# SPDX-License-Identifier: AGPL-3.0-or-later
"""Whether the student is taught: a training that was promised a teacher and is not taught is never silent."""

from __future__ import annotations

from typing import Any

from ultralytics.utils import LOGGER, colorstr

from yolo_cwd.config import ConfigError, listed

UNTAUGHT_BATCHES = 3  # after as many, a training that is not taught stops


class LessonWatch:
    """Watches over the first lessons of a training, and over those that cannot be used, by Ultralytics' callbacks."""

    def __init__(self, trainer: Any) -> None:
        """Begin to watch over a `DistillingTrainer`."""
        self._batches = 0
        self._dropped = 0  # terms, in complete epochs
        trainer.add_callback("on_train_batch_end", self.require)
        trainer.add_callback("on_train_epoch_end", self.report_dropped_terms)

    def require(self, trainer: Any) -> None:
        """Stop a training that is not taught, after a few batches.

        Raises:
            ConfigError: If no divergence was computed, reached the student, or was finite and above 0 with a weight.
        """
        criterion, teacher = trainer.criterion, trainer.teacher.argument
        self._batches += bool(criterion.weight)
        if not criterion.weight or self._batches != UNTAUGHT_BATCHES * trainer.cwd.cwd_every:
            return
        if not criterion.taught:
            raise ConfigError(
                f"{teacher}: teaches nothing, its loss was never computed; a callback or a subclass replaces the "
                "student's criterion, its loss() or preprocess_batch(): let it call ours"
            )
        if not criterion.reaches:
            raise ConfigError(f"freeze={trainer.args.freeze}: {teacher} cannot reach the student; freeze fewer layers")
        if unknown := criterion.unknown:
            LOGGER.warning(f"{colorstr('CWD:')} {listed(unknown)}: nothing is taught so far, no gradient arrives there")
        if (dropped := self._dropped + int(criterion.dropped)) == criterion.taught * len(criterion.meter.names):
            raise ConfigError(f"{teacher}: teaches nothing, since no divergence so far is finite; give amp=False")
        if not dropped and not any(criterion.columns["nats"].values()):
            raise ConfigError(f"tau={trainer.cwd.tau:g}: {teacher} teaches nothing, every divergence is 0; use tau=1")

    def report_dropped_terms(self, trainer: Any) -> None:
        """Warn of terms that were not finite in this epoch."""
        if dropped := int(trainer.criterion.dropped):
            LOGGER.warning(f"{colorstr('CWD:')} {dropped} terms of this epoch were not finite and have been left out")
            trainer.criterion.dropped = 0
            self._dropped += dropped
