# SPDX-License-Identifier: AGPL-3.0-or-later
"""Cut a YOLOv8 detector to a share of its FLOPs, to train it again under its uncut self.

    pip install torch-pruning
    python prune.py best.pt pruned.pt 0.5
    yolo_cwd train teacher=best.pt student=pruned.pt data=my.yaml epochs=100

Torch-Pruning takes the channels of least magnitude, the same part of every layer. The result consists of Ultralytics'
own modules: validate and export it like any checkpoint.
"""

import sys
from bisect import bisect_left
from copy import deepcopy

import torch
import torch_pruning
from torch import nn
from ultralytics import YOLO
from ultralytics.nn.modules import C2f, Conv
from ultralytics.utils.torch_utils import initialize_weights


class SplitC2f(nn.Module):
    """A C2f with two first convolutions instead of one, so that both halves of its channels are cut alike."""

    def __init__(self, block: C2f) -> None:
        """Split the first convolution of `block` between its output channels."""
        super().__init__()
        self.block, self.f, self.i = block, block.f, block.i
        self.halves = nn.ModuleList(part(block.cv1, half) for half in (slice(block.c), slice(block.c, None)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the C2f returns."""
        maps = [half(x) for half in self.halves]
        for bottleneck in self.block.m:
            maps.append(bottleneck(maps[-1]))
        return self.block.cv2(torch.cat(maps, 1))

    def joined(self) -> C2f:
        """Return the C2f, with the channels that are left."""
        first, second = (half.state_dict() for half in self.halves)
        self.block.c = len(first["bn.weight"])
        self.block.cv1 = conv_of({k: torch.cat([v, second[k]]) if v.dim() else v for k, v in first.items()})
        return self.block


def part(conv: Conv, channels: slice) -> Conv:
    """Return a convolution and its normalization with some of the output channels."""
    return conv_of({name: value[channels] if value.dim() else value for name, value in conv.state_dict().items()})


def conv_of(weights: dict[str, torch.Tensor]) -> Conv:
    """Return a pointwise convolution and its normalization with these weights."""
    conv = Conv(weights["conv.weight"].shape[1], len(weights["conv.weight"]))
    initialize_weights(conv)  # the epsilon and the momentum that Ultralytics' models have
    conv.load_state_dict(weights)
    return conv


def cut(model: nn.Module, ratio: float, image: torch.Tensor) -> nn.Module:
    """Return a copy of a YOLOv8 detector without this part of the channels of every layer (0 to 1)."""
    model = deepcopy(model)
    blocks = [i for i, block in enumerate(model.model) if isinstance(block, C2f)]
    for i in blocks:
        model.model[i] = SplitC2f(model.model[i])
    head = model.model[-1]
    outputs = [branch[-1] for branch in (*head.cv2, *head.cv3)]
    importance = torch_pruning.importance.GroupMagnitudeImportance(p=2)
    torch_pruning.pruner.MagnitudePruner(
        model, image, importance, pruning_ratio=ratio, ignored_layers=[*outputs, head.dfl], round_to=4
    ).step()
    for i in blocks:
        model.model[i] = model.model[i].joined()
    return model


def flops(model: nn.Module, image: torch.Tensor) -> float:
    """Return the multiplications of one forward pass."""
    multiplications: float = torch_pruning.utils.count_ops_and_params(model, image)[0]
    return multiplications


def main(source: str, target: str, share: str) -> None:
    """Cut a checkpoint to at most this share of its FLOPs, and save what is left."""
    yolo = YOLO(source)
    whole = yolo.model.float().eval().requires_grad_(True)
    image = torch.zeros(1, 3, 160, 160)
    limit, percents = float(share) * flops(whole, image), range(1, 100)
    fits = bisect_left(percents, True, key=lambda percent: flops(cut(whole, percent / 100, image), image) <= limit)
    yolo.model = cut(whole, percents[fits] / 100, image)
    yolo.ckpt["ema"] = None
    yolo.save(target)
    left, parameters = flops(yolo.model, image) / flops(whole, image), sum(p.numel() for p in yolo.model.parameters())
    print(f"{target}: {left:.0%} of the FLOPs, {parameters:,} parameters")


if __name__ == "__main__":
    main(*sys.argv[1:])
