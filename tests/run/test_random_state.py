"""Random numbers of a training that are left alone."""

import random
from typing import Any

import numpy as np
import torch

from yolo_cwd.run.random_state import random_numbers_untouched


def test_fitting_uses_up_no_random_number() -> None:
    def draw() -> list[Any]:
        return [random.random(), np.random.rand(), torch.rand(1).item()]

    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    expected = draw()
    random.setstate(states[0]), np.random.set_state(states[1]), torch.set_rng_state(states[2])
    with random_numbers_untouched():
        draw()
    assert draw() == expected
