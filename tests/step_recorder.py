"""Run trainings one after the other, and write down the first step and the end of each.

BatchNorm stays in evaluation mode and gradients are not clipped, so that the parts of a batch do not depend on each
other. With 4 shards, a single process takes the images in the order in which four processes share them.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data.distributed import DistributedSampler

from yolo_cwd.trainer import CWDTrainer


class Recorder(CWDTrainer):
    """Keeps the loss of every batch, and the gradients of the first step of the optimizer."""

    shards = 1

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.losses: list[torch.Tensor] = []
        self.gradients: dict[str, torch.Tensor] = {}
        self.final: dict[str, Any] = {}
        self.add_callback("on_train_batch_end", Recorder.keep_loss)
        self.add_callback("on_fit_epoch_end", Recorder.keep_end)

    def _model_train(self) -> None:
        super()._model_train()
        for module in self.model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()

    def _setup_train(self) -> None:
        super()._setup_train()
        if self.shards > 1:
            dataset, ranks = self.train_loader.dataset, range(self.shards)
            parts = [DistributedSampler(dataset, num_replicas=self.shards, rank=rank) for rank in ranks]
            self.train_loader.batch_sampler.sampler.sampler = [i for part in parts for i in part]

    def save_model(self) -> None:
        """Nobody reads the checkpoints."""

    def final_eval(self) -> None:
        """Nor are there any to be scored."""

    def keep_loss(self) -> None:
        self.losses.append(self.loss.detach().clone())

    def keep_end(self) -> None:
        """Compare the models and the measured gradients of the processes, while they are still joined."""
        if self.epoch + 1 < self.epochs:
            return
        parameters = [p.detach() for module in (self.model, self.distillation.terms) for p in module.parameters()]
        means = self.distillation.criterion.meter.means  # from which the weights of the next step follow
        ours = torch.cat([value.flatten() for value in (*parameters, means)])
        theirs, loss = [ours], self.losses[0].clone()
        if dist.is_initialized():
            theirs = [torch.empty_like(ours) for _ in range(dist.get_world_size())]
            dist.all_gather(theirs, ours)
            dist.all_reduce(loss)
            loss /= dist.get_world_size()
        differing = sum(int((other != ours).sum()) for other in theirs)
        self.final = {"differing": differing, "first_loss": loss.item(), "means": means.tolist()}

    def optimizer_step(self) -> None:
        clip = nn.utils.clip_grad_norm_
        nn.utils.clip_grad_norm_ = lambda *args, **kwargs: None
        step, recorded = self.optimizer.step, self.gradients
        named = [*self.model.named_parameters(), *self.distillation.terms.named_parameters(prefix="adapters")]

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


def main(*trainings: str) -> None:
    """Run trainings, each given as JSON: the file to write, the number of shards, and the arguments."""
    for training in trainings:
        record(**json.loads(training))


def record(file: str, shards: int, **arguments: Any) -> None:
    trainer = Recorder(overrides=arguments)
    trainer.shards = shards
    trainer.train()
    if int(os.getenv("RANK", "0")) == 0:
        losses = [loss.item() for loss in trainer.losses]
        torch.save({**trainer.final, "losses": losses, "gradients": trainer.gradients}, Path(file))
