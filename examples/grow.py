# SPDX-License-Identifier: AGPL-3.0-or-later
"""Widen a YOLO to the next size by copying its channels, to have a larger teacher where no weights of one are at hand.

    python grow.py yolo11n.pt yolo11s.yaml grown.pt
    yolo_cwd train teacher=grown.pt student=yolo11n.pt data=my.yaml epochs=100

Every channel is copied as often as the larger model needs it, and whatever reads it takes the mean of its copies: the
function stays the same (Net2Net, Chen et al., ICLR 2016, arXiv 1511.05641). A little noise lets the copies become
different in training. Both models must be of one family and depth, such as n and s of YOLO11.
"""

import sys

import torch
from torch import Tensor, nn
from ultralytics import YOLO
from ultralytics.nn.modules import Attention

NOISE = 0.02  # of a weight tensor's standard deviation


def sources(size: int, larger: int) -> Tensor:
    """Return for each channel of the larger layer the one it is a copy of: copies are neighbors."""
    return torch.arange(larger) * size // larger


def head_sources(attention: Attention, larger: Attention, channels: int) -> Tensor:
    """Return the same for an attention with so many channels in each head: whole heads are copied."""
    heads = sources(attention.num_heads, larger.num_heads)
    return (heads[:, None] * channels + torch.arange(channels)).flatten()


def special_sources(model: nn.Module, larger: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the sources of the output and of the input channels that go by heads, by the names of their layers."""
    of_outputs, of_inputs = {}, {}
    for name, block in larger.named_modules():
        if isinstance(block, Attention):
            attention = model.get_submodule(name)
            values = head_sources(attention, block, block.head_dim)
            of_outputs[f"{name}.qkv"] = head_sources(attention, block, block.head_dim + 2 * block.key_dim)
            of_outputs[f"{name}.pe"] = of_inputs[f"{name}.proj"] = values
    return of_outputs, of_inputs


@torch.no_grad()
def grow(model: nn.Module, larger: nn.Module, noise: float = NOISE) -> None:
    """Give the larger model weights that make it the same function as `model`, up to the noise."""
    of_outputs, of_inputs = special_sources(model, larger)
    old, new = model.state_dict(), larger.state_dict()
    for name, target in new.items():
        source = old[name]
        if not target.dim():
            target.copy_(source)
            continue
        layer = name.rsplit(".", 2)[0]  # of `model.10.cv1.conv.weight` it is `model.10.cv1`
        source = source[of_outputs.get(layer, sources(len(source), len(target)))]
        if target.dim() > 1 and target.shape[1] != source.shape[1]:
            channels = of_inputs.get(layer, sources(source.shape[1], target.shape[1]))
            copies = channels.bincount()[channels]
            source = source[:, channels] / copies.view(1, -1, *[1] * (target.dim() - 2))
        target.copy_(source)
        if target.dim() > 1 and target.shape != old[name].shape:
            target.add_(torch.randn_like(target), alpha=noise * float(source.std()))


def main(source: str, config: str, target: str, noise: str = str(NOISE)) -> None:
    """Grow a checkpoint to the model that a YAML file describes, and save that."""
    torch.manual_seed(0)
    small, large = YOLO(source), YOLO(config)
    large.model = type(large.model)(large.model.yaml, nc=small.model.yaml["nc"], verbose=False)
    large.model.names = small.names
    grow(small.model.float(), large.model, float(noise))
    large.save(target)
    before, after = (sum(p.numel() for p in yolo.model.parameters()) for yolo in (small, large))
    print(f"{target}: {after:,} parameters instead of {before:,}")


if __name__ == "__main__":
    main(*sys.argv[1:])
