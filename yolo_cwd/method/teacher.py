# SPDX-License-Identifier: AGPL-3.0-or-later
"""The frozen teacher: a network without its head, in the cheapest form that keeps its features accurate."""

from __future__ import annotations

import gc
import hashlib
import math
from collections.abc import Iterable, Sequence
from copy import deepcopy
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune
from ultralytics.nn.modules import Conv
from ultralytics.nn.tasks import BaseModel
from ultralytics.utils.torch_utils import attempt_compile, fuse_conv_and_bn, unwrap_model

from yolo_cwd.config import ConfigError, first_line
from yolo_cwd.method.checkpoint import load_model
from yolo_cwd.method.fpn import class_branches, image_channels, pyramid_taps
from yolo_cwd.method.parallel import cores, in_parts

GRID = 32  # image sizes are multiples of this, whichever levels a head receives
LETTERBOX_GRAY = 114 / 255  # the value that Ultralytics pads images with
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
HASHED = 16  # weights of every parameter that tell one network from another
MAX_ERROR = 0.02  # the largest relative error of a feature map that still counts as accurate
TRIAL_SIZE = 192  # pixels of the longer side on a CPU: enough to measure the error, in a fraction of the time
PART_PIXELS = 2**18  # pixels that a CPU core takes through the teacher at once: 2 images of 320 x 320


class Precision(NamedTuple):
    """The number format a teacher calculates in.

    Attributes:
        name: One of `DTYPES`.
        error: Relative error of the worst map against float32, |maps - reference| / |reference|; infinite if a map is
            not finite.
    """

    name: str
    error: float = 0.0

    def __str__(self) -> str:
        """Return it in words."""
        return self.name if self.name == "fp32" else f"{self.name}, feature error {100 * self.error:.2g} %"


class Lesson(NamedTuple):
    """What a teacher shows for some images.

    Attributes:
        pyramid: Its maps [N, C, H/stride, W/stride], in the order of its taps.
        classes: The logits of the chosen classes [N, classes, H/stride, W/stride] at the first of these maps; empty if
            none have been chosen.
        stream: The CUDA stream in which the maps are made; None if it is the one in which they are used.
    """

    pyramid: list[Tensor]
    classes: list[Tensor]
    stream: torch.cuda.Stream | None = None

    def wait(self) -> Lesson:
        """Return itself, once the current stream is told to wait for the maps; the host does not."""
        if self.stream is not None:
            current = torch.cuda.current_stream(self.stream.device)
            current.wait_stream(self.stream)
            for maps in (*self.pyramid, *self.classes):
                maps.record_stream(current)  # or their memory would go back to the teacher while they are still read
        return self


class Teacher(nn.Module):
    """A frozen network without its head: images in, feature pyramid out.

    Its batch normalization is folded into the convolutions, it calculates in channels-last order, and on a CPU it uses
    the idle cores. All of these save time and leave the features unchanged.

    Attributes:
        taps: The maps of its pyramid by stride.
        image_channels: Channels of the images it takes.
        names: Its classes by index.
        content: A hash of its weights, to tell it from another network.
        head: The head that was cut off; None if the network is not one of Ultralytics', and after `settle`.
        parameter_count: Parameters of the whole model, including the head.
        precision: The precision it calculates in.
    """

    def __init__(self, model: nn.Module, argument: str = "teacher") -> None:
        """Take over a model, freeze it and cut off its head.

        Args:
            model: A YOLO of any task but classify, an RT-DETR, a YOLO-World, a YOLOE, or any module that takes images
                [N, C, H, W] in 0 to 1 and returns a list of maps. Pass a copy if you still need the model.
            argument: The argument as the user gave it, for messages.

        Raises:
            ConfigError: If the model has no pyramid.
        """
        super().__init__()
        self.argument = argument
        body: Any = _without_masks(model).float().eval().requires_grad_(False)
        body.__dict__.pop("criterion", None)
        self.taps = pyramid_taps(body, argument)
        self.content = _content_of(body)
        self.parameter_count = sum(p.numel() for p in body.parameters())
        self.image_channels = image_channels(body)
        self.names: dict[int, str] = dict(getattr(body, "names", {}))
        self.precision = Precision("fp32")
        self._head: tuple[nn.Module | None] = (None,)  # in a tuple, so that it is not part of this module
        self._compiled: tuple[nn.Module, ...] = ()  # nor is this, the same weights once more
        self._stream: torch.cuda.Stream | None = None
        if isinstance(body, BaseModel):
            self._head = (body.model[-1],)
            body.model[-1] = _HeadInputs(body.model[-1])
            body = body.fuse(verbose=False).requires_grad_(False)
        self.body = body
        self._grid = max(*self.taps, GRID)

    @property
    def head(self) -> nn.Module | None:
        """The head that was cut off."""
        return self._head[0]

    @property
    def label(self) -> str:
        """The teacher as the user named it, without the argument's name."""
        return self.argument.removeprefix("teacher=")

    def train(self, mode: bool = True) -> Teacher:
        """Stay in evaluation mode, whatever the mode of the surrounding training."""
        return super().train(False)

    def require_channels(self, channels: int, data: Any) -> None:
        """Refuse images that it cannot take.

        Args:
            channels: Channels of the images of the data.
            data: What the user named the data by.

        Raises:
            ConfigError: If it takes images of other channels.
        """
        if self.image_channels != channels:
            raise ConfigError(
                f"{self.argument}: takes images of {self.image_channels} channels, data={data} has {channels}; "
                "choose a teacher trained on such images"
            )

    def show_classes(self, names: Sequence[str]) -> list[int]:
        """From now on, also return the class maps of those of the named classes that it knows.

        Args:
            names: The classes of the data.

        Returns:
            The positions in `names` of the classes that it knows, in the order of their maps.
        """
        ours = {name: i for i, name in self.names.items()}
        known = [i for i, name in enumerate(names) if name in ours]
        branches = class_branches(self.head) if self.head is not None else []
        if not known or not branches:
            return []
        shown = nn.ModuleList(branches).requires_grad_(False)
        _fuse(shown)
        self.body.model[-1].show(shown, [ours[names[i]] for i in known])
        return known

    def settle(self, device: torch.device, beside: bool = False) -> None:
        """Move to the device of the training, with the weights in the memory order that is fastest there.

        Images are channels-last everywhere, but convolutions on a CPU reorder the weights themselves.

        Args:
            device: The device.
            beside: Whether lessons have a CUDA stream of their own from now on, beside the student's forward pass.
        """
        self._head = (None,)
        self._stream = torch.cuda.Stream(device) if beside else None  # type: ignore[no-untyped-call]
        self.to(device)
        if device.type == "cuda":
            self.to(memory_format=torch.channels_last)

    def speed_up(self, device: torch.device) -> None:
        """Compile, once the precision is chosen, as Ultralytics' `compile=True` does: it warns where that cannot be."""
        self._compiled = (attempt_compile(self.body, device),)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the maps [N, C, H/stride, W/stride] of images [N, C, H, W], in its precision.

        The maps of the pyramid come first. If classes have been chosen, their logits follow.

        Images whose size is not a multiple of the coarsest stride are padded as Ultralytics pads them, and the maps are
        cropped again: a student without a P6 may train at sizes that a teacher with one does not accept.
        """
        height, width = images.shape[-2:]
        padding = (0, -width % self._grid, 0, -height % self._grid)
        if any(padding):
            images = F.pad(images, padding, value=LETTERBOX_GRAY)
        split = _parts(images)
        one_by_one = bool(self._compiled)  # not every release of PyTorch compiles while another thread calculates
        parts = [*map(self._maps, split)] if one_by_one else in_parts(self._maps, split, images.device)
        maps = parts[0] if len(parts) == 1 else [torch.cat(level) for level in zip(*parts, strict=True)]
        if any(padding):
            maps = [m[..., : height // s, : width // s] for m, s in zip(maps, cycle(self.taps))]
        return maps

    def lesson(self, images: Tensor) -> Lesson:
        """Return its pyramid and its class maps, separately, for images [N, C, H, W] in 0 to 1.

        In a stream of its own, if it has one: `wait` for the lesson before its maps are used.
        """
        maps = self(images) if self._stream is None else self._beside(self._stream, images)
        return Lesson(maps[: len(self.taps)], maps[len(self.taps) :], self._stream)

    def _beside(self, stream: torch.cuda.Stream, images: Tensor) -> list[Tensor]:
        stream.wait_stream(torch.cuda.current_stream(images.device))  # which is still to bring the images
        images.record_stream(stream)
        with torch.cuda.stream(stream):
            maps: list[Tensor] = self(images)
        return maps

    @torch.no_grad()
    def _maps(self, images: Tensor) -> list[Tensor]:
        images = images.to(DTYPES[self.precision.name], memory_format=torch.channels_last)
        with torch.autocast(images.device.type, enabled=False):  # the student's AMP is not the teacher's
            (network,) = self._compiled or (self.body,)
            maps = network(images)
        return list(maps.values()) if isinstance(maps, dict) else list(maps)

    def calibrate(self, wanted: str, images: Tensor) -> None:
        """Choose the precision to calculate in, by the error it causes on the teacher's device.

        Args:
            wanted: One of `DTYPES`, or `auto` for the first precision that the device is fast in and that keeps the
                relative error of every map within `MAX_ERROR`. Time is not measured: the choice is the same every time.
            images: One or more images [N, 3, H, W] in 0 to 1, on that device.

        Raises:
            ConfigError: If the features are not finite in float32, if the wanted precision overflows, or if the device
                does not support it.
        """
        images = _trial_images(images)
        exact, reference = self.body, self(images)
        if not all(maps.isfinite().all() for maps in reference):
            raise ConfigError(
                f"{self.argument}: its features are not finite, even in float32; its weights hold NaN or are too "
                "large: give another checkpoint"
            )
        for name in _fast_precisions(images.device) if wanted == "auto" else [wanted] * (wanted != "fp32"):
            self.body, self.precision = _converted(exact, DTYPES[name]), Precision(name)
            try:
                error = max(_relative_error(m, r) for m, r in zip(self(images), reference, strict=True))
            except RuntimeError as problem:
                if wanted != "auto":
                    raise ConfigError(f"teacher_dtype={name}: {first_line(problem)}; use auto or fp32") from problem
                continue
            if wanted != "auto" and error == math.inf:
                raise ConfigError(f"teacher_dtype={wanted}: {self.argument} overflows in it; use auto or fp32")
            if wanted != "auto" or error <= MAX_ERROR:
                self.precision = Precision(name, error)
                break
        else:
            self.body, self.precision = exact, Precision("fp32")
        del exact
        gc.collect()  # fused layers refer to themselves, so only this frees the copies


def _converted(body: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a copy of a frozen network in another precision, without first copying the weights unconverted."""
    weights = {id(p): nn.Parameter(p.to(dtype), requires_grad=False) for p in body.parameters()}
    return deepcopy(body, weights).to(dtype)


def _trial_images(images: Tensor) -> Tensor:
    """Return the images to try precisions on: unchanged on a GPU, shrunk on a CPU."""
    if not images.is_cpu:
        return images
    shrunk = TRIAL_SIZE / max(images.shape[-2:])
    return F.interpolate(images, scale_factor=shrunk, mode="bilinear") if shrunk < 1 else images


def _parts(images: Tensor) -> Sequence[Tensor]:
    """Split a batch on a CPU, to occupy the cores and to limit the temporary memory of each part."""
    if not images.is_cpu:
        return [images]
    threads, at_once = torch.get_num_threads(), max(1, PART_PIXELS // images[0, 0].numel())
    shares = torch.split(images, min(at_once, math.ceil(len(images) / cores(images.device))))
    return shares if len(shares) > threads else torch.split(images, threads * at_once)


def _fast_precisions(device: torch.device) -> list[str]:
    """Return the lower precisions that a device has instructions for, the most accurate first."""
    if device.type == "cuda":
        return ["fp16", "bf16"] if torch.cuda.is_bf16_supported(including_emulation=False) else ["fp16"]
    if device.type == "cpu":
        instructions = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return ["bf16"] if any(getattr(torch.cpu, name, bool)() for name in instructions) else []
    return []


def _content_of(model: nn.Module) -> str:
    """Return a hash of the first weights of every layer."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().flatten()[:HASHED].cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _relative_error(maps: Tensor, reference: Tensor) -> float:
    error = float((maps.float() - reference).norm() / reference.norm())
    return error if error < float("inf") else float("inf")  # covers not-a-number too


def wait_for(device: torch.device) -> None:
    """Wait until a device has finished its work, before the clock is read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _HeadInputs(nn.Module):
    """Stands in for a head: returns what the head would have received, followed by its class maps."""

    export = False  # YOLO-World reads this from its head

    def __init__(self, head: Any) -> None:
        super().__init__()
        self.__dict__.update(f=head.f, i=head.i, type=head.type)  # how a YOLO model routes its layers
        self.branches = nn.ModuleList()
        self.register_buffer("classes", None, persistent=False)  # on the device: a list would wait to be copied there

    def show(self, branches: nn.ModuleList, classes: list[int]) -> None:
        self.branches, self.classes = branches, torch.tensor(classes)

    def forward(self, maps: Iterable[Tensor], *_: Any) -> list[Tensor]:  # RT-DETR's also receives the batch
        maps = list(maps)
        shown = [branch(m).index_select(1, self.classes) for branch, m in zip(self.branches, maps, strict=False)]
        return [*maps, *shown]


def _without_masks(model: nn.Module) -> nn.Module:
    """Make the pruning of a model permanent; otherwise its masks multiply the weights anew in every pass."""
    for module in model.modules():
        for name, _ in list(module.named_parameters(recurse=False)):
            if name.endswith("_orig") and prune.is_pruned(module):
                prune.remove(module, name.removesuffix("_orig"))  # type: ignore[no-untyped-call]
    return model


def _fuse(module: nn.Module) -> None:
    """Fold batch normalization into the convolutions of a part of a model, as Ultralytics does for a whole one."""
    for layer in module.modules():
        if isinstance(layer, Conv) and hasattr(layer, "bn"):
            layer.conv = fuse_conv_and_bn(layer.conv, layer.bn)
            delattr(layer, "bn")
            layer.forward = layer.forward_fuse


def load_teacher(source: Any, trust: bool = False) -> Teacher:
    """Return the frozen teacher named by the option `teacher`.

    Args:
        source: Path or known name of a .pt checkpoint (downloaded by Ultralytics where it knows it), path of a .yaml
            model (untrained: for tests), a `YOLO` or similar object, or a module.
        trust: Whether the checkpoint may hold classes other than those of Ultralytics and torch. A .pt file is a
            pickle: loading it unrestricted may run any code that its author has put in.

    Raises:
        ConfigError: If there is no such file, if it cannot be read, or if it holds no model with a pyramid.
    """
    if isinstance(source, str | Path):
        argument = f"teacher={source}"
        return Teacher(load_model(str(source), argument, trust), argument)
    module = unwrap_model(source) if isinstance(source, nn.Module) else source
    argument = f"teacher={type(module).__name__}"
    inner = getattr(module, "model", None)
    model = inner if isinstance(inner, BaseModel) else module  # of a YOLO
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{argument}: not a model; give a name, a .pt or .yaml path, or a YOLO model")
    return Teacher(deepcopy(model), argument)
