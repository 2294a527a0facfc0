# SPDX-License-Identifier: AGPL-3.0-or-later
"""What a distilled run needs to resume after an interruption.

The file `cwd.pt`, beside Ultralytics' `last.pt`, holds the options, and the adapters with their optimizer state for the
last two epochs. It is written before `last.pt`, so the adapters for the epoch of `last.pt` are always there. It holds
only tensors, numbers and strings, and is read by torch's restricted loader.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from yolo_cwd.config import ConfigError
from yolo_cwd.run.files import remove_leftovers, write_atomic

FILE = "cwd.pt"
KEPT_EPOCHS = 2


class RunState:
    """Options, and adapters with their optimizer state by epoch.

    Attributes:
        options: The run's options as plain values; `teacher` is None if it was given as an object.
        epochs: For each epoch (counted from 0), the adapters' parameters and their optimizer state, on the CPU.
        measured: What the gradient meter had measured at the end of the restored epoch.
        start: For each level, the divergence of every channel on a few images before training [N, C]; empty without
            `plots`.
        teacher: What tells the run's teacher from another network; empty if that is not known.
        score: The teacher's score on the validation images; None if it has none.
    """

    def __init__(
        self,
        options: Mapping[str, Any],
        epochs: Mapping[int, Any] | None = None,
        start: Mapping[str, Tensor] | None = None,
        teacher: str = "",
        score: float | None = None,
    ) -> None:
        """Start with what is known so far."""
        self.measured: dict[str, list[float]] = {}
        self.options = dict(options)
        self.epochs: dict[int, Any] = dict(epochs or {})
        self.start: dict[str, Tensor] = dict(start or {})
        self.teacher = teacher
        self.score = score

    def remember(
        self, epoch: int, adapters: nn.Module, optimizer: torch.optim.Optimizer, measured: Mapping[str, Any]
    ) -> None:
        """Keep the state at the end of an epoch, and forget all but the last few."""
        moments = [_to_cpu(optimizer.state.get(p, {})) for p in adapters.parameters()]
        self.epochs[epoch] = {
            "adapters": _to_cpu(adapters.state_dict()),
            "optimizer": moments,
            "measured": dict(measured),
        }
        self.epochs = {e: self.epochs[e] for e in sorted(self.epochs) if epoch - KEPT_EPOCHS < e <= epoch}

    def restore(self, epoch: int, adapters: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Restore the adapters and their optimizer state as they were at the end of an epoch.

        Raises:
            ConfigError: If the epoch is not kept, or if the adapters have other shapes.
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
        self.measured = saved["measured"]
        on_device = _counts_on_device(optimizer, adapters)
        for parameter, moments in zip(adapters.parameters(), saved["optimizer"], strict=True):
            optimizer.state[parameter] = {n: _placed(parameter, value, on_device) for n, value in moments.items()}

    def save(self, folder: Path) -> None:
        """Write the file into the folder of the checkpoints."""
        buffer = io.BytesIO()
        content = {"options": self.options, "epochs": self.epochs, "start": self.start, "teacher": self.teacher}
        content["score"] = self.score
        torch.save(content, buffer)
        write_atomic(folder / FILE, buffer.getvalue())


@contextmanager
def set_aside(optimizer: torch.optim.Optimizer, adapters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Leave in an optimizer what plain Ultralytics would have there, so that it can resume our checkpoints.

    Args:
        optimizer: The optimizer.
        adapters: The parameters of ours, which have a group of their own.
    """
    if not adapters:
        yield
        return
    groups = enumerate(optimizer.param_groups)
    place = next(i for i, group in groups if any(p is adapters[0] for p in group["params"]))
    group = optimizer.param_groups.pop(place)
    state: dict[Tensor, Any] = {p: optimizer.state.pop(p) for p in adapters if p in optimizer.state}
    try:
        yield
    finally:
        optimizer.param_groups.insert(place, group)  # another list if a state has been loaded
        optimizer.state.update(state)


def _counts_on_device(optimizer: torch.optim.Optimizer, adapters: nn.Module) -> bool:
    """Return whether an optimizer keeps the step counters of the adapters on their device, as a fused one does."""
    ours = set(adapters.parameters())
    return any(
        g.get("fused") or g.get("capturable") for g in optimizer.param_groups if not ours.isdisjoint(g["params"])
    )


def _placed(parameter: Tensor, value: Any, on_device: bool) -> Any:
    """Return a saved value of an optimizer's state for a parameter; a step counter is the one without dimensions."""
    if not isinstance(value, Tensor):
        return value
    return value.to(parameter.device if value.ndim or on_device else value.device, copy=True)


def _to_cpu(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v.detach().to("cpu", copy=True) if isinstance(v, Tensor) else v for k, v in values.items()}


def load_state(checkpoint: Path) -> RunState:
    """Return the state saved beside a checkpoint.

    Raises:
        ConfigError: If there is none, or if it cannot be read.
    """
    file = checkpoint.parent / FILE
    if not file.is_file():
        raise ConfigError(
            f"resume={checkpoint}: has no {FILE} beside it: the training is finished, or it had no teacher; "
            f"'yolo train resume' continues without one"
        )
    remove_leftovers(checkpoint.parent)
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
        rest = content.get("start"), content.get("teacher", ""), content.get("score")
        return RunState(content["options"], content["epochs"], *rest)
    except Exception as error:
        raise ConfigError(
            f"resume={checkpoint}: {FILE} cannot be read, it is torn or no state of a run; 'yolo train resume' "
            "continues without a teacher"
        ) from error
