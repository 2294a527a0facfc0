# SPDX-License-Identifier: AGPL-3.0-or-later
"""The columns that distillation adds to `results.csv`: the term, the share and the divergence of every level."""

from __future__ import annotations

from itertools import chain
from typing import Any

from yolo_cwd.config import WEIGHT_COLUMN
from yolo_cwd.method.loss import CWDLoss

TOTAL = "cwd_loss"


def names(criterion: CWDLoss | None) -> set[str]:
    """Return the names of our columns."""
    kinds = _by_kind(criterion, "train").values() if criterion is not None else ()
    return {f"train/{TOTAL}", WEIGHT_COLUMN, *chain.from_iterable(kinds)}


def label(labels: Any, prefix: str, criterion: CWDLoss | None) -> Any:
    """Return the loss items of Ultralytics with ours, in training the term of every level before their sum.

    The progress bar shows the sum alone. The divergences exist in training only, so validation gets no column of
    zeros.

    Args:
        labels: What Ultralytics makes of the items: values by name, or the names alone.
        prefix: `train` or `val`.
        criterion: The student's criterion; None before the training has begun.
    """
    total = f"{prefix}/{TOTAL}"
    if not isinstance(labels, dict):
        return [name for name in labels if name != total]
    ours = {total: labels.pop(total, 0.0)}
    if prefix == "val" or criterion is None:
        return labels
    kinds = _by_kind(criterion, prefix)
    return {**labels, **kinds["loss"], **ours, WEIGHT_COLUMN: criterion.weight, **kinds["share"], **kinds["nats"]}


def _by_kind(criterion: CWDLoss, prefix: str) -> dict[str, dict[str, float]]:
    """Return the values of a criterion by kind and by the name of their column."""
    return {
        kind: {f"{prefix}/{name}_{kind}": value for name, value in values.items()}
        for kind, values in criterion.columns.items()
    }
