# SPDX-License-Identifier: AGPL-3.0-or-later
"""Work on a CPU in parts, one core for each, including the cores that the training leaves idle.

Ultralytics uses one thread fewer than there are cores, and at most eight. All of them share every layer, and each layer
waits for its slowest thread. In the teacher and in the loss, the images of a batch do not depend on each other. So each
core can take images of its own, and a core that is busy with something else delays only its own part.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import joblib
import torch

from yolo_cwd.run.distributed import WORLD_SIZE_HERE

Part = TypeVar("Part")
Result = TypeVar("Result")


def cores(device: torch.device) -> int:
    """Return how many parts can be worked on at once; 1 on anything but a CPU."""
    return max(1, int(joblib.cpu_count()) // WORLD_SIZE_HERE) if device.type == "cpu" else 1


def in_parts(work: Callable[[Part], Result], parts: Sequence[Part], device: torch.device) -> list[Result]:
    """Return `work(part)` for every part, in order.

    The parts run one after the other with all of torch's threads, unless more cores than threads can each take a part.
    Modes that apply to one thread only, such as `no_grad` and `autocast`, are up to `work`.
    """
    at_once, threads = min(len(parts), available := cores(device)), torch.get_num_threads()
    if at_once <= threads:
        return [work(part) for part in parts]
    waiting = deque(enumerate(parts))

    def take() -> dict[int, Result]:
        done: dict[int, Result] = {}
        while True:
            try:
                number, part = waiting.popleft()
            except IndexError:  # all parts are taken
                return done
            done[number] = work(part)

    torch.set_num_threads(1)  # for the calling thread, which takes parts too
    try:
        others = [_helpers(available - 1).submit(take) for _ in range(at_once - 1)]
        done = take()
        for other in others:
            done |= other.result()
    finally:
        torch.set_num_threads(threads)
    return [done[number] for number in range(len(parts))]


@cache
def _helpers(count: int) -> ThreadPoolExecutor:
    """Return threads that are kept for reuse, since a new one starts with cold memory."""
    return ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))
