# SPDX-License-Identifier: AGPL-3.0-or-later
"""Work on a CPU that is shared out to the cores which the training leaves idle.

Ultralytics calculates with one thread fewer than there are cores, and with eight at most. The images of a batch do not
depend on each other in the teacher, nor do the levels in the loss: as many parts are worked on at once as there are
idle cores for. Each has its threads to itself, so that a core which is busy after all holds up one part, where threads
that share every layer would all wait for the last at each.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import joblib
import torch

Part = TypeVar("Part")
Result = TypeVar("Result")


def workers(device: torch.device) -> int:
    """Return how many parts can be worked on at once, each with as many threads as torch is set to use."""
    if device.type != "cpu":
        return 1
    processes = int(os.getenv("LOCAL_WORLD_SIZE", "1"))  # of this training on this machine
    return max(1, int(joblib.cpu_count()) // (processes * torch.get_num_threads()))


def in_parts(work: Callable[[Part], Result], parts: Sequence[Part], device: torch.device) -> list[Result]:
    """Return `work(part)` of every part, in their order; the calling thread takes its share.

    Modes of torch that hold for a thread alone, such as `no_grad` and `autocast`, are up to `work`.
    """
    waiting = deque(enumerate(parts))

    def take() -> dict[int, Result]:
        done: dict[int, Result] = {}
        while True:
            try:
                number, part = waiting.popleft()
            except IndexError:  # all are taken
                return done
            done[number] = work(part)

    helpers = min(len(parts), workers(device)) - 1
    others = [_threads(helpers).submit(take) for _ in range(helpers)]
    done = take()
    for other in others:
        done |= other.result()
    return [done[number] for number in range(len(parts))]


@cache
def _threads(count: int) -> ThreadPoolExecutor:
    """Return threads that are kept: the memory of a new one is cold."""
    return ThreadPoolExecutor(count)
