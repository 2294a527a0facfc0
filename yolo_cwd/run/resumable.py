# SPDX-License-Identifier: AGPL-3.0-or-later
"""A training that claims its folder, writes its files whole, and continues from them after an interruption."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from ultralytics.utils import RANK

from yolo_cwd.run import distributed
from yolo_cwd.run.files import checkpoints_written_whole, drop_rows_after, optimizers_stripped_whole, widen
from yolo_cwd.run.folder import RunFolder
from yolo_cwd.run.request import Request
from yolo_cwd.run.state import FILE as STATE_FILE


class ResumableTrainer(distributed.ProcessTrainer):
    """Ultralytics' trainer with modules beside the student, whose state lies beside the student's checkpoints.

    Attributes:
        adapters: The modules that are trained beside the student.
        state: What a resumed training needs beside the student's checkpoint.
        folder: What this run has made, to be removed if it cannot begin.
    """

    wdir: Path
    csv: Path
    save_dir: Path
    epoch: int
    start_epoch: int
    optimizer: torch.optim.Optimizer

    def __init__(self, request: Request, arguments: dict[str, Any], _callbacks: dict[str, Any] | None = None) -> None:
        """Claim a folder, and hand over to Ultralytics.

        Args:
            request: What was asked for.
            arguments: Its arguments, with devices and data resolved.
            _callbacks: Ultralytics' callbacks by event.
        """
        self.adapters = nn.ModuleList()
        self.state = request.state
        self.folder = RunFolder()
        self._given_options = request.options
        if RANK in {-1, 0} and not request.args.resume:
            arguments["save_dir"] = self.folder.claim(request.args)
        with self.folder.removed_on_failure():
            if folder := distributed.agree(arguments.get("save_dir")):
                arguments["save_dir"] = folder
            super().__init__(request.base, arguments, _callbacks)
        distributed.check_folder(self.save_dir)

    def train(self) -> None:
        """Train, or let the processes train that Ultralytics starts: each rebuilds the trainer from its arguments."""
        if self.ddp:
            for name, value in self._given_options.items():
                setattr(self.args, name, value)
        super().train()

    def measured(self) -> list[list[float]]:
        """Return what else a resumed training has to know, as plain numbers."""
        return []

    def save_model(self) -> Any:
        """Write the checkpoints, with the optimizer's state of the student alone; ours lies beside them."""
        self.state.remember(self.epoch, self.adapters, self.optimizer, self.measured())
        self.wdir.mkdir(parents=True, exist_ok=True)
        self.state.save(self.wdir)
        with self._adapters_set_aside(), checkpoints_written_whole(self):
            return super().save_model()

    def own_columns(self) -> Collection[str]:
        """Return the names of the columns that `results.csv` has more than Ultralytics' own."""
        return ()

    def save_metrics(self, metrics: dict[str, Any]) -> None:
        """Append a row to `results.csv`, our columns last: rows that plain Ultralytics adds end before them."""
        ours = self.own_columns()
        metrics = dict(sorted(metrics.items(), key=lambda item: item[0] in ours))
        if self.resume:
            _, _, *columns = widen(self.csv, ["epoch", "time", *metrics])
            metrics = {name: metrics.get(name, math.nan) for name in columns}
        super().save_metrics(metrics)

    def final_eval(self) -> None:
        """Strip and score the checkpoints as Ultralytics does; a finished run needs no state to continue from."""
        with optimizers_stripped_whole():
            super().final_eval()
        if RANK in {-1, 0}:
            (self.wdir / STATE_FILE).unlink(missing_ok=True)

    def resume_training(self, ckpt: Any) -> None:
        """Go on where the checkpoint stands; epochs that were begun after it are run again."""
        super().resume_training(ckpt)
        if self.resume and RANK in {-1, 0}:
            drop_rows_after(self.csv, self.start_epoch)

    def _load_checkpoint_state(self, ckpt: dict[str, Any]) -> None:
        with self._adapters_set_aside():
            super()._load_checkpoint_state(ckpt)
        self.state.epochs = distributed.agree(self.state.epochs)  # the first process alone remembers what it saves
        self.state.restore(ckpt["epoch"], self.adapters, self.optimizer)

    @contextmanager
    def _adapters_set_aside(self) -> Iterator[None]:
        """Leave in the optimizer what plain Ultralytics would have there, so that it can resume our checkpoints."""
        optimizer, adapters = self.optimizer, list(self.adapters.parameters())
        if not adapters:
            yield
            return
        groups = enumerate(optimizer.param_groups)
        place = next(i for i, group in groups if any(p is adapters[0] for p in group["params"]))
        group = optimizer.param_groups.pop(place)
        state: dict[torch.Tensor, Any] = {p: optimizer.state.pop(p) for p in adapters if p in optimizer.state}
        try:
            yield
        finally:
            optimizer.param_groups.insert(place, group)  # another list if a state has been loaded
            optimizer.state.update(state)
