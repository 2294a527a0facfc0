"""Run a training and write down its first step and its end: `step_recorder.py FILE key=value ...`, also by torchrun.

BatchNorm stays in evaluation mode and gradients are not clipped, so that the parts of a batch do not depend on each
other. With `SHARDS=4`, a single process takes the images in the order in which four processes share them.
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data.distributed import DistributedSampler

from yolo_cwd.cli import parse
from yolo_cwd.trainer import CWDTrainer


class Recorder(CWDTrainer):
    """Keeps the loss of every batch, and the gradients of the first step of the optimizer."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.losses: list[torch.Tensor] = []
        self.gradients: dict[str, torch.Tensor] = {}
        self.add_callback("on_train_batch_end", Recorder.keep_loss)

    def _model_train(self) -> None:
        super()._model_train()
        for module in self.model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()

    def _setup_train(self) -> None:
        super()._setup_train()
        if shards := int(os.getenv("SHARDS", "0")):
            dataset = self.train_loader.dataset
            parts = [DistributedSampler(dataset, num_replicas=shards, rank=rank) for rank in range(shards)]
            self.train_loader.batch_sampler.sampler.sampler = [i for part in parts for i in part]

    def save_model(self) -> None:
        """Nobody reads the checkpoints."""

    def final_eval(self) -> None:
        """Nor are there any to be scored."""

    def keep_loss(self) -> None:
        self.losses.append(self.loss.detach().clone())

    def optimizer_step(self) -> None:
        clip = nn.utils.clip_grad_norm_
        nn.utils.clip_grad_norm_ = lambda *args, **kwargs: None
        step, recorded = self.optimizer.step, self.gradients
        named = [*self.model.named_parameters(), *self.adapters.named_parameters(prefix="adapters")]

        def recording_step(*args: Any, **kwargs: Any) -> Any:
            for name, parameter in named:
                if parameter.grad is not None:
                    recorded.setdefault(name.removeprefix("module."), parameter.grad.clone())
            return step(*args, **kwargs)

        self.optimizer.step = recording_step
        try:
            super().optimizer_step()
        finally:
            self.optimizer.step, nn.utils.clip_grad_norm_ = step, clip


def main(file: str, *words: str) -> None:
    trainer = Recorder(overrides=parse(list(words)))
    final = {}

    def keep_end(trainer: CWDTrainer) -> None:
        modules = {"student": trainer.model, "adapters": trainer.adapters}
        state = {f"{kind}.{k}": v for kind, module in modules.items() for k, v in module.named_parameters()}
        theirs: list[Any] = [None] * trainer.world_size
        if dist.is_initialized():
            dist.all_gather_object(theirs, state)
        final["differing"] = [k for other in theirs if other for k in state if not torch.equal(other[k], state[k])]
        loss = trainer.losses[0].clone()
        if dist.is_initialized():
            dist.all_reduce(loss)
            loss /= dist.get_world_size()
        final["first_loss"] = loss.item()

    trainer.add_callback("on_fit_epoch_end", keep_end)
    trainer.train()
    if int(os.getenv("RANK", "0")) == 0:
        losses = [loss.item() for loss in trainer.losses]
        torch.save({**final, "losses": losses, "gradients": trainer.gradients}, Path(file))


if __name__ == "__main__":
    main(*sys.argv[1:])
