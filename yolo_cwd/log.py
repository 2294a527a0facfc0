# SPDX-License-Identifier: AGPL-3.0-or-later
"""What we tell the user, by Ultralytics' logger, which is silent in all processes of a training but the first."""

from __future__ import annotations

from ultralytics.utils import LOGGER, colorstr

PREFIX = colorstr("CWD:")


def say(sentence: str) -> None:
    """Tell the user something."""
    LOGGER.info(f"{PREFIX} {sentence}")


def warn(sentence: str) -> None:
    """Warn the user."""
    LOGGER.warning(f"{PREFIX} {sentence}")
