# SPDX-License-Identifier: AGPL-3.0-or-later
"""Channel-wise distillation for Ultralytics YOLO: a small model learns from a stronger one while it trains."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from yolo_cwd.config import ConfigError
    from yolo_cwd.method.divergence import ChannelWiseDivergence, channel_wise_divergence
    from yolo_cwd.method.loss import CWDLoss
    from yolo_cwd.trainer import CWDTrainer

__version__ = "0.2.0"
__all__ = ["CWDLoss", "CWDTrainer", "ChannelWiseDivergence", "ConfigError", "__version__", "channel_wise_divergence"]

_HOMES = {
    "CWDLoss": "yolo_cwd.method.loss",
    "CWDTrainer": "yolo_cwd.trainer",
    "ChannelWiseDivergence": "yolo_cwd.method.divergence",
    "ConfigError": "yolo_cwd.config",
    "channel_wise_divergence": "yolo_cwd.method.divergence",
}


def __getattr__(name: str) -> Any:
    """Import the public names on first use: `yolo_cwd help` must not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'yolo_cwd' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)
