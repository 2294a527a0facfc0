# SPDX-License-Identifier: AGPL-3.0-or-later
"""Work on a CPU in parts, with a core for each: also the cores that the training leaves idle.

Ultralytics calculates with one thread fewer than there are cores, and with eight at most; all of them share every layer
and wait for the last one at each. The images of a batch do not depend on each other in the teacher, nor in the loss. So
they can have a core each, and one that is busy with something else holds up its own part only.
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
    """Return `work(part)` of every part, in their order.

    One after the other, each with all threads of torch, unless more cores than that can have a part each. Modes that
    hold for a thread alone, such as `no_grad` and `autocast`, are up to `work`.
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
            except IndexError:  # all are taken
                return done
            done[number] = work(part)

    torch.set_num_threads(1)  # of the calling thread, which is one of them
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
    """Return threads that are kept: the memory of a new one is cold."""
    return ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))
