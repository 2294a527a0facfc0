# SPDX-License-Identifier: AGPL-3.0-or-later
"""Random numbers: what a training has beside it must not draw from those that it draws from."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def random_numbers_untouched() -> Iterator[None]:
    """Restore the state of every random number generator of Python, NumPy and torch, on all devices."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    of_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if of_gpus:
            torch.cuda.set_rng_state_all(of_gpus)
