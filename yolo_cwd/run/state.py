# SPDX-License-Identifier: AGPL-3.0-or-later
"""What a distilled run needs to resume after an interruption.

The file `cwd.pt`, beside Ultralytics' `last.pt`, holds the options, and the adapters with their optimizer state for the
last two epochs, each with a digest of its checkpoint. It gets its name before `last.pt` does, so the adapters for
`last.pt` are always there. It holds only tensors, numbers and strings, and is read by torch's restricted loader.

A checkpoint that plain Ultralytics has written since, in the same run, has no adapters: they begin anew. One of another
run in the same folder is refused.
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
from yolo_cwd.run.files import content_of, remove_leftovers, write_atomic
from yolo_cwd.run.interrupted import is_finished, read_checkpoint

FILE = "cwd.pt"
KEPT_EPOCHS = 2


class RunState:
    """Options, and adapters with their optimizer state by epoch.

    Attributes:
        options: The run's options as plain values; `teacher` is None if it was given as an object.
        epochs: For each epoch (counted from 0), the adapters' parameters and their optimizer state, on the CPU, with
            what the gradient meter had measured and the digest of the checkpoint.
        measured: What the gradient meter had measured at the end of the restored epoch; nothing if none is restored,
            so that the adapters begin anew.
        start: For each level, the divergence of every channel on a few images before training [N, C]; empty without
            `plots`.
        teacher: What tells the run's teacher from another network; empty if that is not known.
        score: The teacher's score on the validation images; None if it has none.
        first_time: The time of the first epoch in `results.csv`. Every checkpoint of the run holds it, whoever has
            written it, so that it tells them from those of another run; None if it is not known.
    """

    def __init__(
        self,
        options: Mapping[str, Any],
        epochs: Mapping[int, Any] | None = None,
        start: Mapping[str, Tensor] | None = None,
        teacher: str = "",
        score: float | None = None,
        first_time: float | None = None,
    ) -> None:
        """Start with what is known so far."""
        self.measured: dict[str, list[float]] = {}
        self.options = dict(options)
        self.epochs: dict[int, Any] = dict(epochs or {})
        self.start: dict[str, Tensor] = dict(start or {})
        self.teacher = teacher
        self.score = score
        self.first_time = first_time

    def remember(
        self,
        epoch: int,
        adapters: nn.Module,
        optimizer: torch.optim.Optimizer,
        measured: Mapping[str, Any],
        checkpoint: str,
    ) -> None:
        """Keep the state at the end of an epoch, and forget all but the last few.

        Args:
            epoch: The epoch.
            adapters: The adapters.
            optimizer: Their optimizer.
            measured: What the gradient meter has measured.
            checkpoint: The digest of the epoch's checkpoint.
        """
        moments = [_to_cpu(optimizer.state.get(p, {})) for p in adapters.parameters()]
        self.epochs[epoch] = {
            "adapters": _to_cpu(adapters.state_dict()),
            "optimizer": moments,
            "measured": dict(measured),
            "checkpoint": checkpoint,
        }
        self.epochs = {e: self.epochs[e] for e in sorted(self.epochs) if epoch - KEPT_EPOCHS < e <= epoch}

    def restore(self, epoch: int, adapters: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Restore the adapters and their optimizer state as they were at the end of an epoch.

        Nothing is restored if the epoch is not kept, or if its adapters were not finite.

        Raises:
            ConfigError: If the adapters have other shapes.
        """
        self.measured = {}
        saved = self.epochs.get(epoch)
        if saved is None or not all(value.isfinite().all() for value in saved["adapters"].values()):
            return
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
        content |= {"score": self.score, "first_time": self.first_time}
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
    """Return the state saved beside a checkpoint, with the adapters of this very checkpoint if there are any.

    Raises:
        ConfigError: If there is none, if one of both cannot be read, or if the checkpoint is finished or of another
            run.
    """
    file, content = checkpoint.parent / FILE, read_checkpoint(checkpoint)
    if is_finished(content):
        file.unlink(missing_ok=True)  # left by a kill in the last validation
        raise ConfigError(
            f"resume={checkpoint}: the training is finished; for more epochs, begin a new run from best.pt beside it"
        )
    if not file.is_file():
        raise ConfigError(
            f"resume={checkpoint}: has no {FILE} beside it, so it had no teacher; 'yolo train resume' continues it "
            "without one"
        )
    remove_leftovers(checkpoint.parent)
    state = _read(file, checkpoint)
    state.epochs = _adapters_of(checkpoint, content, state)
    return state


def _read(file: Path, checkpoint: Path) -> RunState:
    try:
        return RunState(**torch.load(file, map_location="cpu", weights_only=True))
    except Exception as error:
        raise ConfigError(
            f"resume={checkpoint}: {FILE} cannot be read, it is torn or no state of a run; 'yolo train resume' "
            "continues without a teacher"
        ) from error


def _adapters_of(checkpoint: Path, content: Mapping[str, Any], state: RunState) -> dict[int, Any]:
    """Return the epoch of the state that a checkpoint is of; none if it has been written without us since.

    Raises:
        ConfigError: If the checkpoint is of another run.
    """
    digest, times = content_of(checkpoint), (content.get("train_results") or {}).get("time")
    own = {epoch: saved for epoch, saved in state.epochs.items() if saved["checkpoint"] == digest}
    if not own and not (times and times[0] == state.first_time):
        raise ConfigError(
            f"resume={checkpoint}: is of another run than {FILE} beside it, which an earlier one has left; "
            "'yolo train resume' continues it as it began, without a teacher"
        )
    return own
