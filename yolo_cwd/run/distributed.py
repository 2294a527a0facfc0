# SPDX-License-Identifier: AGPL-3.0-or-later
"""Training in several processes: what Ultralytics does not do for those that `torchrun` starts.

Ultralytics itself starts one process for each GPU of one machine (`device=0,1`). Processes that `torchrun` starts, on
one machine or many, find their rank and the world size in the environment. Here they join one process group before
anything else, so that they can agree on folder and precision. The group uses gloo on CPUs and NCCL on GPUs.
"""

from __future__ import annotations

import inspect
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from subprocess import CalledProcessError
from typing import Any
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.rendezvous import rendezvous
from ultralytics.engine import trainer as ultralytics_trainer
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn.tasks import load_checkpoint
from ultralytics.utils import LOCAL_RANK, LOGGER, RANK
from ultralytics.utils.torch_utils import get_torch_device_backend, parse_device

from yolo_cwd.config import ConfigError

WORLD_SIZE = int(os.getenv("WORLD_SIZE", "1"))
WORLD_SIZE_HERE = int(os.getenv("LOCAL_WORLD_SIZE", "1"))  # on this machine
TIMEOUT = timedelta(hours=3)  # how long the others wait for a process that is silent, as in Ultralytics
LOST = ("connection closed by peer", "connection reset by peer", "broken pipe", "timed out", "socket", "nccl")


class JointEvaluation(BaseTrainer):
    """What Ultralytics' trainers do last, for several processes; that of a task may add to it."""

    def final_eval(self) -> None:
        """Strip the checkpoints and score the best one, if there is one; perhaps only the first process sees them."""
        if RANK == -1:
            super().final_eval()
            return
        if RANK == 0:
            last = ultralytics_trainer.strip_optimizer(self.last) if self.last.exists() else {}
            if self.best.exists():
                ultralytics_trainer.strip_optimizer(self.best, updates={"train_results": last.get("train_results")})
                self.ema.ema.load_state_dict(load_checkpoint(self.best)[0].state_dict())
        if not agree(self.best.exists()):
            return
        spread(self.ema.ema)
        LOGGER.info(f"\nValidating {self.best}...")
        self.validator.args.plots = self.args.plots
        self.metrics, _ = self.validate()
        self.epoch += 1  # as Ultralytics numbers the best checkpoint for loggers
        self.run_callbacks("on_fit_epoch_end")
        self.epoch -= 1


class ProcessTrainer(DetectionTrainer, JointEvaluation):
    """Ultralytics' `DetectionTrainer`, able to run as one of the processes of `torchrun`, on GPUs or CPUs."""

    device: torch.device
    model: Any
    epochs: int
    world_size: int

    def __init__(self, cfg: Any, overrides: dict[str, Any], _callbacks: dict[str, Any] | None = None) -> None:
        """Set up as Ultralytics does, but for the processes of all machines: Ultralytics counts the devices of one."""
        super().__init__(cfg, overrides, _callbacks)
        if RANK != -1:
            self.world_size = WORLD_SIZE
            self.args.amp = self.args.amp if self.device.type == "cuda" else False

    def train(self) -> None:
        """Train; if `device` names several GPUs, in processes that Ultralytics starts.

        Raises:
            ChildProcessError: If one of them fails.
        """
        try:
            super().train()
        except CalledProcessError as error:
            raise ChildProcessError(f"device={self.args.device}: a process ended with {error.returncode}") from error
        if dist.is_initialized():
            dist.destroy_process_group()

    def _setup_ddp(self) -> None:
        if not dist.is_initialized():
            super()._setup_ddp()
        elif self.device.type == "cuda":
            self.device = torch.device("cuda", torch.cuda.current_device())
            self.accelerator = get_torch_device_backend(self.device)
        else:
            self.world_size = 1  # Ultralytics can wrap the student on a GPU only; see _build_train_pipeline

    def _setup_train(self) -> None:
        super()._setup_train()
        if RANK != -1:
            self.add_callback("on_fit_epoch_end", ProcessTrainer._agree_on_epochs)

    def _agree_on_epochs(self) -> None:
        """Make all processes of a training limited by `time` end with the same epoch, on the same schedule."""
        if self.args.time and (epochs := agree(self.epochs)) != self.epochs:
            self.epochs = self.args.epochs = epochs
            self._setup_scheduler()
            self.scheduler.last_epoch = self.epoch

    def _build_train_pipeline(self) -> None:
        if RANK != -1 and self.world_size != WORLD_SIZE:
            self.world_size, self.model = WORLD_SIZE, _wrap(self.model)
        super()._build_train_pipeline()


def join(device: Any) -> str:
    """Join the process group of this training, if there are several processes.

    Args:
        device: The argument `device`. By default, the GPUs of the machine, one for each of its processes, or the CPU
            if there are none.

    Returns:
        The argument `device` with its default filled in.

    Raises:
        ConfigError: If the machine has fewer GPUs than processes.
    """
    chosen: str = parse_device(device)
    if RANK == -1 or chosen.startswith(("npu", "xpu")):  # Ultralytics joins the processes of those itself
        return chosen
    if not chosen:
        chosen = ",".join(map(str, range(WORLD_SIZE_HERE))) if torch.cuda.is_available() else "cpu"
    if chosen != "cpu":
        gpus, has = chosen.split(","), torch.cuda.device_count()
        if len(gpus) < WORLD_SIZE_HERE or not all(gpu.isdecimal() and int(gpu) < has for gpu in gpus):
            raise ConfigError(
                f"device={chosen}: the {WORLD_SIZE_HERE} processes on this machine need a GPU each, and it has {has}; "
                f"start fewer processes, or give device=cpu"
            )
        torch.cuda.set_device(int(gpus[LOCAL_RANK]))
    if not dist.is_initialized():
        backend = "nccl" if chosen != "cpu" and dist.is_nccl_available() else "gloo"
        store, _, _ = next(rendezvous("env://", RANK, WORLD_SIZE, timeout=TIMEOUT))
        dist.init_process_group(backend, store=_unused(store), timeout=TIMEOUT, rank=RANK, world_size=WORLD_SIZE)
    return chosen


def _unused(store: Any) -> Any:
    """Return a part of the store that belongs to this start alone, agreed on by all processes.

    `torchrun` keeps its store across restarts, with the addresses of processes that no longer exist. So a process may
    trust only answers to its own questions from this start. Each one asks with a token of its own. The first process
    answers every token it finds, until all have confirmed the name of this start.
    """
    if RANK == 0:
        start, deaf = uuid4().hex, set(range(1, WORLD_SIZE))
        deadline = time.monotonic() + TIMEOUT.total_seconds()
        while deaf:
            for rank in sorted(deaf):
                if store.check([f"asks/{rank}"]):
                    store.set(f"answer/{store.get(f'asks/{rank}').decode()}", start)
            deaf = {rank for rank in deaf if not store.check([f"heard/{start}/{rank}"])}
            if time.monotonic() > deadline:
                raise RuntimeError(f"timed out: {len(deaf)} of {WORLD_SIZE} processes have not come")
            time.sleep(0.01)
    else:
        token = uuid4().hex
        store.set(f"asks/{RANK}", token)
        start = store.get(f"answer/{token}").decode()
        store.set(f"heard/{start}/{RANK}", "")
    return dist.PrefixStore(start, store)  # type: ignore[attr-defined]


@contextmanager
def first_here_first() -> Iterator[None]:
    """Let the first process of each machine go first: one download, one writer. The others then meet its errors too."""
    if dist.is_initialized() and LOCAL_RANK > 0:
        dist.barrier()
    try:
        yield
    finally:
        let_others_follow()


def let_others_follow() -> None:
    """As the first process of this machine, release the others from the barrier where they wait."""
    if dist.is_initialized() and LOCAL_RANK == 0:
        dist.barrier()


def agree(value: Any) -> Any:
    """Return the value that the first process has."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def summed(value: torch.Tensor) -> torch.Tensor:
    """Return the sum of a tensor over all processes."""
    value = value.clone()
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def check_folder(folder: Path) -> None:
    """Warn, once per machine, if it cannot see the run folder of the first process."""
    if LOCAL_RANK == 0 and not folder.is_dir():
        LOGGER.warning(
            f"this machine does not see {folder}; 'resume' needs project= on storage that all machines share"
        )


def spread(module: nn.Module) -> None:
    """Copy a module's parameters and buffers from the first process to all others."""
    if dist.is_initialized():
        for value in module.state_dict().values():
            dist.broadcast(value, src=0)


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Average gradients over the processes, as `DistributedDataParallel` does with the student's.

    All go in one message: they are few, and needed only once per optimizer step.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not dist.is_initialized() or not gradients:
        return
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    dist.all_reduce(flat)
    means = torch.split(flat / dist.get_world_size(), [gradient.numel() for gradient in gradients])
    for gradient, mean in zip(gradients, means, strict=True):
        gradient.copy_(mean.view_as(gradient))


def lost_peer(error: BaseException) -> bool:
    """Return whether an error of a collective operation means that another process has ended or is silent."""
    return dist.is_initialized() and isinstance(error, RuntimeError) and any(s in str(error).lower() for s in LOST)


def _wrap(student: nn.Module) -> nn.Module:
    """Wrap a student on the CPU as Ultralytics wraps one on a GPU."""
    ddp: Any = nn.parallel.DistributedDataParallel
    renamed = "forward_sync_buffers" in inspect.signature(ddp.__init__).parameters  # since torch 2.13
    buffers = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
    wrapped: nn.Module = ddp(student, find_unused_parameters=True, **buffers)
    return wrapped
