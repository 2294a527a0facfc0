# SPDX-License-Identifier: AGPL-3.0-or-later
"""Guards a training against a teacher that teaches nothing: the first batches decide."""

from __future__ import annotations

from typing import Any

from ultralytics.utils.torch_utils import unwrap_model

from yolo_cwd.config import ConfigError, listed
from yolo_cwd.log import warn
from yolo_cwd.method.loss import CWDLoss
from yolo_cwd.method.terms import LevelTerm

GUARDED_BATCHES = 3  # after as many, a training that is not taught stops
FROZEN = "freeze={freeze}: {teacher} cannot reach the student; freeze fewer layers"
UNREACHED = "cannot reach the student so far, whose layers are frozen, and teaches nothing until a callback thaws them"


def require_reachable(trainer: Any) -> None:
    """Refuse a training of which frozen layers keep out the teacher from the start, before it takes a step.

    Raises:
        ConfigError: If all that is compared is frozen, and nobody else's code takes part, which might thaw it.
    """
    distillation, body = trainer.distillation, unwrap_model(trainer.model).model[:-1]
    compared = all(isinstance(term, LevelTerm) for term in distillation.terms)
    if compared and not any(p.requires_grad for p in body.parameters()) and not _may_thaw(trainer):
        raise ConfigError(FROZEN.format(freeze=trainer.args.freeze, teacher=distillation.teacher.argument))


class DistillationGuard:
    """Watches the first batches that are distilled, and the terms of every epoch that cannot be used."""

    def __init__(self, criterion: CWDLoss, teacher: str) -> None:
        """Begin to watch.

        Args:
            criterion: The student's criterion.
            teacher: The teacher's argument, for messages.
        """
        self._criterion, self._teacher = criterion, teacher
        self._batches = 0
        self._judged = False
        self._skipped = 0  # terms, in complete epochs

    def require(self, trainer: Any) -> None:
        """Stop a training that is not taught, after a few batches.

        Raises:
            ConfigError: If no divergence was computed, reached the student, or was finite and above 0 with a weight.
        """
        criterion, teacher, tau = self._criterion, self._teacher, trainer.settings.tau
        self._batches += 1
        if not criterion.weight or self._judged or self._batches < GUARDED_BATCHES:
            return
        if not trainer.loss.isfinite():  # Ultralytics recovers from that; the next finite one tells
            return
        self._judged = True
        if not criterion.batches_distilled:
            raise ConfigError(
                f"{teacher}: teaches nothing, its loss was never computed; a callback or a subclass replaces the "
                "student's criterion, its loss() or preprocess_batch(): let it call ours"
            )
        if not criterion.has_gradient:
            if _may_thaw(trainer):
                warn(f"{teacher} {UNREACHED}")
                return
            raise ConfigError(FROZEN.format(freeze=trainer.args.freeze, teacher=teacher))
        if unmeasured := criterion.unmeasured:
            warn(f"{listed(unmeasured)}: nothing is taught so far, no gradient arrives there")
        skipped = self._skipped + int(criterion.skipped_terms)
        if skipped == criterion.batches_distilled * len(criterion.terms):
            given, remedy = (teacher, "amp=False") if trainer.amp or tau == 1 else (f"tau={tau:g}", "tau=1")
            raise ConfigError(f"{given}: teaches nothing, since no divergence so far is finite; give {remedy}")
        if not skipped and not any(criterion.columns["nats"].values()):
            size = trainer.args.imgsz
            given, remedy = (f"tau={tau:g}", "tau=1") if tau > 1 else (f"imgsz={size}", "a larger one, or finer levels")
            raise ConfigError(f"{given}: {teacher} teaches nothing, every divergence is 0; use {remedy}")

    def report_skipped_terms(self, trainer: Any) -> None:
        """Warn of terms that were not finite in this epoch."""
        if skipped := int(self._criterion.skipped_terms):
            warn(f"{skipped} terms of this epoch were not finite and have been left out")
            self._criterion.skipped_terms = 0
            self._skipped += skipped


def _may_thaw(trainer: Any) -> bool:
    """Return whether somebody else's code takes part in a training: it may thaw frozen layers later."""
    classes = [cls for cls in type(trainer).__mro__ if cls is not object]
    callbacks = [callback for of_event in trainer.callbacks.values() for callback in of_event]
    return not all(getattr(x, "__module__", "").startswith(("yolo_cwd", "ultralytics")) for x in classes + callbacks)
