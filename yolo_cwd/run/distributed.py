# SPDX-License-Identifier: AGPL-3.0-or-later
"""What the processes of a training exchange: collectives that do nothing where there is one process."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from subprocess import CalledProcessError
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from ultralytics.utils import LOCAL_RANK

WORLD_SIZE = int(os.getenv("WORLD_SIZE", "1"))
WORLD_SIZE_HERE = int(os.getenv("LOCAL_WORLD_SIZE", "1"))  # on this machine
TIMEOUT = timedelta(hours=3)  # how long the others wait for a process that is silent, as in Ultralytics
LOST = ("connection closed by peer", "connection reset by peer", "broken pipe", "timed out", "socket", "nccl")


@contextmanager
def local_zero_first() -> Iterator[None]:
    """Let the first process of each machine go first: one download, one writer. The others then meet its errors too."""
    if LOCAL_RANK > 0:
        barrier()
    try:
        yield
    finally:
        let_others_follow()


def let_others_follow() -> None:
    """As the first process of this machine, release the others from the barrier where they wait."""
    if LOCAL_RANK == 0:
        barrier()


def barrier() -> None:
    """Wait until all processes have come here.

    NCCL waits on a GPU. Unless it is told which, it may take that of another process, and wait forever.
    """
    if dist.is_initialized():
        dist.barrier(device_ids=[torch.cuda.current_device()] if dist.get_backend() == "nccl" else None)


def broadcast_object(value: Any) -> Any:
    """Return the value that the first process has."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def all_reduce_sum(value: torch.Tensor) -> torch.Tensor:
    """Return the sum of a tensor over all processes."""
    value = value.clone()
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def check_folder(folder: Path) -> None:
    """Warn, once per machine, if it cannot see the run folder of the first process.

    Ultralytics' logger would not: it is silent in all processes but the first.
    """
    if LOCAL_RANK == 0 and not folder.is_dir():
        reason = f"this machine does not see {folder}; 'resume' needs project= on storage that all machines share"
        print(f"yolo_cwd: {reason}", file=sys.stderr)


def broadcast_module(module: nn.Module) -> None:
    """Copy a module's parameters and buffers from the first process to all others."""
    if dist.is_initialized():
        for value in module.state_dict().values():
            dist.broadcast(value, src=0)


def average_gradients(parameters: Iterable[nn.Parameter], total: torch.Tensor) -> None:
    """Average gradients over the processes, as `DistributedDataParallel` does with the student's, and add up a tensor.

    All go in one message: they are few, and needed only once per optimizer step.
    """
    if not dist.is_initialized():
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    tensors = [total, *gradients]
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    sums = torch.split(flat, [tensor.numel() for tensor in tensors])
    for tensor, values in zip(tensors, sums, strict=True):
        tensor.copy_(values.view_as(tensor))
    if gradients:
        torch._foreach_div_(gradients, dist.get_world_size())


def lost_peer(error: BaseException) -> bool:
    """Return whether an error of a collective operation means that another process has ended or is silent."""
    return dist.is_initialized() and isinstance(error, RuntimeError) and any(s in str(error).lower() for s in LOST)


@contextmanager
def failed_children(device: Any) -> Iterator[None]:
    """Say which device it is about where one of the processes that Ultralytics starts fails.

    Args:
        device: The argument `device`.

    Raises:
        ChildProcessError: In that case.
    """
    try:
        yield
    except CalledProcessError as error:
        raise ChildProcessError(f"device={device}: a process ended with {error.returncode}") from error
