# SPDX-License-Identifier: AGPL-3.0-or-later
"""The trainer that users name: the method (method/trainer.py) with its sentences and pictures (view/) attached."""

from __future__ import annotations

from typing import Any

from ultralytics.utils import DEFAULT_CFG_DICT

from yolo_cwd.method.trainer import DistillingTrainer
from yolo_cwd.view.attach import attach


class CWDTrainer(DistillingTrainer):
    """Train a detector with channel-wise distillation (Shu et al., ICCV 2021, arXiv 2011.13256).

    Takes every argument of Ultralytics' `DetectionTrainer`, and the options of `cfg/default.yaml` beside them.

    Examples:
        >>> YOLO("yolov8n.pt").train(trainer=CWDTrainer, teacher="yolov8l.pt", data="coco8.yaml", epochs=10)
        >>> CWDTrainer(overrides={"model": "yolov8n.pt", "teacher": "yolov8l.pt", "data": "coco8.yaml"}).train()
    """

    def __init__(
        self,
        cfg: Any = DEFAULT_CFG_DICT,
        overrides: dict[str, Any] | None = None,
        _callbacks: dict[str, Any] | None = None,
    ) -> None:
        """Set the training up; see `DistillingTrainer` for the arguments and errors."""
        super().__init__(cfg, overrides, _callbacks)
        attach(self)
