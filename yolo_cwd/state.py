# SPDX-License-Identifier: AGPL-3.0-or-later
"""What a distilled run needs to go on after an interruption, and how it is written so that a kill tears nothing.

Beside Ultralytics' `last.pt` lies `cwd.pt`: the options, and the adapters with their optimizer state for the last two
epochs. It is written before `last.pt`, so that whichever epoch `last.pt` is of, its adapters are there. It holds
tensors, numbers and strings only, and is read by torch's restricted loader.
"""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from ultralytics.engine import trainer as ultralytics_trainer
from ultralytics.utils.files import get_latest_run

from yolo_cwd.config import ConfigError, first_line

FILE = "cwd.pt"
KEPT_EPOCHS = 2


class RunState:
    """Options, and adapters with their optimizer state by epoch.

    Attributes:
        options: The run's options as plain values; `teacher` is None where it was given as an object.
        epochs: By epoch (counted from 0) the adapters' parameters and their optimizer state, on the CPU.
        start: By level the divergence of every channel on a few images before training [N, C]; empty without `plots`.
    """

    def __init__(
        self,
        options: Mapping[str, Any],
        epochs: Mapping[int, Any] | None = None,
        start: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Start with what is known."""
        self.options = dict(options)
        self.epochs: dict[int, Any] = dict(epochs or {})
        self.start: dict[str, Tensor] = dict(start or {})

    def remember(self, epoch: int, adapters: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Keep the state at the end of an epoch, and forget all but the last few."""
        moments = [_to_cpu(optimizer.state.get(p, {})) for p in adapters.parameters()]
        self.epochs[epoch] = {"adapters": _to_cpu(adapters.state_dict()), "optimizer": moments}
        self.epochs = {e: self.epochs[e] for e in sorted(self.epochs) if epoch - KEPT_EPOCHS < e <= epoch}

    def restore(self, epoch: int, adapters: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Put the adapters and their optimizer state back to the end of an epoch.

        Raises:
            ConfigError: If the epoch is not kept, or if the adapters are of other shapes.
        """
        if epoch not in self.epochs:
            kept = " and ".join(str(e + 1) for e in self.epochs)
            raise ConfigError(f"resume: {FILE} is of epoch {kept}, the checkpoint of {epoch + 1}; resume from last.pt")
        saved = self.epochs[epoch]
        ours, theirs = ({k: tuple(v.shape) for k, v in x.items()} for x in (adapters.state_dict(), saved["adapters"]))
        if ours != theirs:
            raise ConfigError(
                f"teacher={self.options['teacher']}: asks for adapters of {list(ours.values())}, the run has "
                f"{list(theirs.values())}; resume with the teacher it began with"
            )
        adapters.load_state_dict(saved["adapters"])
        for parameter, moments in zip(adapters.parameters(), saved["optimizer"], strict=True):
            optimizer.state[parameter] = {name: _beside(parameter, value) for name, value in moments.items()}

    def save(self, folder: Path) -> None:
        """Write the file into the folder of the checkpoints."""
        buffer = io.BytesIO()
        torch.save({"options": self.options, "epochs": self.epochs, "start": self.start}, buffer)
        write_whole(folder / FILE, buffer.getvalue())


def _beside(parameter: Tensor, value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.to(parameter.device if value.ndim else value.device, copy=True)  # step counters live on the CPU


def _to_cpu(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v.detach().to("cpu", copy=True) if isinstance(v, Tensor) else v for k, v in values.items()}


def checkpoint_to_resume(resume: Any, model: Any) -> Path | None:
    """Return the checkpoint that the arguments `resume` and `model` ask to go on from, or None for a new run.

    `resume` alone means the latest run below the working directory, as in Ultralytics.

    Raises:
        ConfigError: If there is none.
    """
    if not resume:
        return None
    named = resume if isinstance(resume, str | Path) else model or get_latest_run()
    if not named or not Path(named).is_file():
        raise ConfigError(f"resume={named or resume}: no such checkpoint; name one: resume model=runs/.../last.pt")
    return Path(named)


def load_state(checkpoint: Path) -> RunState:
    """Return the state that lies beside a checkpoint.

    Raises:
        ConfigError: If there is none, or if it cannot be read.
    """
    file = checkpoint.parent / FILE
    if not file.is_file():
        raise ConfigError(
            f"resume={checkpoint}: has no {FILE} beside it: the training is finished, or it had no teacher; "
            f"'yolo train resume' goes on without one"
        )
    for leftover in checkpoint.parent.glob(".*"):  # of a kill while something was written
        shutil.rmtree(leftover, ignore_errors=True) if leftover.is_dir() else leftover.unlink(missing_ok=True)
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
        return RunState(content["options"], content["epochs"], content.get("start"))
    except Exception as error:
        raise ConfigError(f"resume={checkpoint}: {file} cannot be read ({first_line(error)})") from error


def write_whole(file: Path, content: str | bytes) -> None:
    """Write a file so that nobody, not even after a kill, sees a part of it."""
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    unfinished.write_bytes(content.encode() if isinstance(content, str) else content)
    put(unfinished, file)


def put(unfinished: Path, file: Path) -> None:
    """Move a complete file to its name, after its content has reached the disk."""
    with unfinished.open("rb") as opened:
        os.fsync(opened.fileno())
    unfinished.replace(file)


@contextmanager
def checkpoints_written_whole(trainer: Any) -> Iterator[None]:
    """Let a trainer of Ultralytics, which writes its checkpoints in place, write them elsewhere, and move them then.

    `last.pt` is moved last.
    """
    folder, last, best = trainer.wdir, trainer.last, trainer.best
    unfinished = folder / ".unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)  # what a kill has left
    unfinished.mkdir(parents=True)
    trainer.wdir, trainer.last, trainer.best = unfinished, unfinished / last.name, unfinished / best.name
    try:
        yield
        for file in sorted(unfinished.iterdir(), key=lambda f: f.name == last.name):
            put(file, folder / file.name)
    finally:
        trainer.wdir, trainer.last, trainer.best = folder, last, best
        shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def optimizers_stripped_whole() -> Iterator[None]:
    """Let Ultralytics strip the finished checkpoints, which it does in place, without a moment at which one is torn."""
    strip = ultralytics_trainer.strip_optimizer

    def strip_whole(file: Path, s: str = "", updates: dict[str, Any] | None = None) -> Any:
        unfinished = file.with_name(f".{file.name}")
        shutil.copyfile(file, unfinished)
        stripped = strip(unfinished, s, updates)
        put(unfinished, file)
        return stripped

    ultralytics_trainer.strip_optimizer = strip_whole
    try:
        yield
    finally:
        ultralytics_trainer.strip_optimizer = strip


def drop_rows_after(table: Path, epoch: int) -> None:
    """Drop the rows of a `results.csv` that are of a later epoch (counted from 1), or that a kill has cut off."""
    if not table.exists():
        return
    header, *rows = table.read_text(encoding="utf-8").splitlines()
    epochs = [row.split(",")[0].strip() if row.count(",") == header.count(",") else "" for row in rows]
    kept = [row for row, e in zip(rows, epochs, strict=True) if e.isdecimal() and int(e) <= epoch]
    write_whole(table, "\n".join([header, *kept]) + "\n")
