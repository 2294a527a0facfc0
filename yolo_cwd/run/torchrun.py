# SPDX-License-Identifier: AGPL-3.0-or-later
"""Trainings in the processes that `torchrun` starts: what Ultralytics does not do for them.

Ultralytics itself starts one process for each GPU of one machine (`device=0,1`). Processes that `torchrun` starts, on
one machine or many, find their rank and the world size in the environment. Here they join one process group before
anything else, so that they can agree on folder and precision. The group uses gloo on CPUs and NCCL on GPUs.
"""

from __future__ import annotations

import inspect
import time
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
from yolo_cwd.run.distributed import TIMEOUT, WORLD_SIZE, WORLD_SIZE_HERE, broadcast_module, broadcast_object


class JointEvaluation(BaseTrainer):
    """What Ultralytics' trainers do last, for several processes; that of a task may add to it."""

    def final_eval(self) -> None:
        """Strip the checkpoints and score the best one, if there is one; perhaps only the first process sees them."""
        if RANK == 0:
            last = ultralytics_trainer.strip_optimizer(self.last) if self.last.exists() else {}
            if self.best.exists():
                ultralytics_trainer.strip_optimizer(self.best, updates={"train_results": last.get("train_results")})
                self.ema.ema.load_state_dict(load_checkpoint(self.best)[0].state_dict())
        if not broadcast_object(self.best.exists()):
            return
        broadcast_module(self.ema.ema)
        LOGGER.info(f"\nValidating {self.best}...")
        self.validator.args.plots = self.args.plots
        self.metrics, _ = self.validate()
        self.epoch += 1  # as Ultralytics numbers the best checkpoint for loggers
        self.run_callbacks("on_fit_epoch_end")
        self.epoch -= 1


class ProcessTrainer(DetectionTrainer):
    """What a trainer of Ultralytics overrides in one of the processes of `torchrun`, on GPUs or CPUs."""

    device: torch.device
    model: Any
    epochs: int
    world_size: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Set up as Ultralytics does, but for the processes of all machines: Ultralytics counts the devices of one."""
        super().__init__(*args, **kwargs)
        self.world_size = WORLD_SIZE
        self.args.amp = self.args.amp if self.device.type == "cuda" else False

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
        self.add_callback("on_fit_epoch_end", ProcessTrainer._agree_on_epochs)

    def _agree_on_epochs(self) -> None:
        """Make all processes of a training limited by `time` end with the same epoch, on the same schedule."""
        if self.args.time and (epochs := broadcast_object(self.epochs)) != self.epochs:
            self.epochs = self.args.epochs = epochs
            self._setup_scheduler()
            self.scheduler.last_epoch = self.epoch

    def _build_train_pipeline(self) -> None:
        if self.world_size != WORLD_SIZE:
            self.world_size, self.model = WORLD_SIZE, _wrap(self.model)
        super()._build_train_pipeline()


def join(device: Any) -> str:
    """Join the process group of this training, if there are several processes.

    Args:
        device: The argument `device`. By default, the GPUs of the machine, one for each of its processes, or the CPU
            if there are none. A process that sees one GPU alone takes that one.

    Returns:
        The argument `device` with its default filled in.

    Raises:
        ConfigError: If the machine has fewer GPUs than processes.
    """
    chosen: str = parse_device(device)
    if RANK == -1 or chosen.startswith(("npu", "xpu")):  # Ultralytics joins the processes of those itself
        return chosen
    has = torch.cuda.device_count()  # a scheduler may let each process see its own GPU alone
    if not chosen:
        chosen = ",".join(map(str, range(1 if has == 1 else WORLD_SIZE_HERE))) if torch.cuda.is_available() else "cpu"
    if chosen != "cpu":
        gpus = chosen.split(",")
        each_its_own = has == len(gpus) == 1
        enough = len(gpus) >= WORLD_SIZE_HERE or each_its_own
        if not enough or not all(gpu.isdecimal() and int(gpu) < has for gpu in gpus):
            raise _too_few(chosen, has)
        torch.cuda.set_device(int(gpus[0 if each_its_own else LOCAL_RANK]))
    if not dist.is_initialized():
        backend = "nccl" if chosen != "cpu" and dist.is_nccl_available() else "gloo"
        store, _, _ = next(rendezvous("env://", RANK, WORLD_SIZE, timeout=TIMEOUT))
        store = _unused(store)
        if chosen != "cpu" and not all_different(store, _gpu()):
            raise _too_few(chosen, has)
        dist.init_process_group(backend, store=store, timeout=TIMEOUT, rank=RANK, world_size=WORLD_SIZE)
    return chosen


def _too_few(device: str, has: int) -> ConfigError:
    return ConfigError(
        f"device={device}: the {WORLD_SIZE_HERE} processes on this machine need a GPU each, and it has {has}; "
        f"start fewer processes, or give device=cpu"
    )


def _gpu() -> str:
    """Return what tells the GPU of this process from all others; its rank where PyTorch does not say."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return str(getattr(properties, "uuid", RANK))


def all_different(store: Any, value: str) -> bool:
    """Return whether each process has given another value: NCCL would fail later, and less clearly, on a shared GPU.

    Args:
        store: A store of all processes.
        value: What this one gives.
    """
    store.set(f"value/{RANK}", value)
    values = [store.get(f"value/{rank}") for rank in range(WORLD_SIZE)]
    return len(set(values)) == len(values)


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


def leave() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _wrap(student: nn.Module) -> nn.Module:
    """Wrap a student on the CPU as Ultralytics wraps one on a GPU."""
    ddp: Any = nn.parallel.DistributedDataParallel
    renamed = "forward_sync_buffers" in inspect.signature(ddp.__init__).parameters  # since torch 2.13
    buffers = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
    wrapped: nn.Module = ddp(student, find_unused_parameters=True, **buffers)
    return wrapped
