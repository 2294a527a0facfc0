# SPDX-License-Identifier: AGPL-3.0-or-later
"""The frozen teacher: a network without its head, in the cheapest form that keeps its features accurate."""

from __future__ import annotations

import gc
import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune
from ultralytics.nn.modules import AIFI, Conv
from ultralytics.nn.tasks import BaseModel
from ultralytics.utils.torch_utils import fuse_conv_and_bn, unwrap_model

from yolo_cwd.config import ConfigError, first_line
from yolo_cwd.method.checkpoint import load_model
from yolo_cwd.method.fpn import image_channels, pyramid_taps
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


class TeacherMaps(NamedTuple):
    """What a teacher makes of some images.

    Attributes:
        pyramid: Its maps [N, C, H/stride, W/stride], in the order of its taps.
        branches: By name, the maps [N, D, H/stride, W/stride] that the tapped branches of its head make of the first
            of these maps.
    """

    pyramid: list[Tensor]
    branches: dict[str, list[Tensor]]


class HandedOver:
    """Maps on their way to the criterion, which takes them once; nobody else then keeps their memory.

    In several processes, PyTorch may give the student a copy of the batch and of the containers in it. Maps in one of
    those would stay in the original until the next batch. Any other object is passed as it is.
    """

    def __init__(self, maps: TeacherMaps) -> None:
        """Hold maps until they are taken."""
        self._maps = [maps]

    def take(self) -> TeacherMaps:
        """Return the maps, and hold them no longer."""
        return self._maps.pop()


class Teacher(nn.Module):
    """A frozen network without its head: images in, feature pyramid out.

    Its batch normalization is folded into the convolutions, it calculates in channels-last order, and on a CPU it uses
    the idle cores. All of these save time and leave the features unchanged.

    Attributes:
        taps: The maps of its pyramid by stride.
        image_channels: Channels of the images it takes.
        names: Its classes by index.
        content: A hash of its weights, to tell it from another network.
        head: The head that was cut off; None if the network is not one of Ultralytics', and after `place`.
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
        self._tapped: dict[str, int] = {}  # how many maps each tapped part of the head makes, in order
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

    def tap(self, name: str, branches: Sequence[nn.Module], channels: Sequence[int] | None = None) -> None:
        """From now on, also run branches of the head that was cut off.

        Args:
            name: The name of what they make.
            branches: One for each of the first maps of the pyramid.
            channels: Which of their channels to return, in this order; all by default.
        """
        tapped = nn.ModuleList(branches).requires_grad_(False)
        _fuse(tapped)
        self.body.model[-1].add(name, tapped, channels)
        self._tapped[name] = len(tapped)

    def place(self, device: torch.device) -> None:
        """Move to the device of the training, with the weights in the memory order that is fastest there.

        Images are channels-last everywhere, but convolutions on a CPU reorder the weights themselves.
        """
        self._head = (None,)
        self.to(device)
        _hold_on(self.body, device)
        if device.type == "cuda":
            self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the maps [N, C, H/stride, W/stride] of images [N, C, H, W], in its precision.

        The maps of the pyramid come first, then those of the tapped branches.

        Images whose size is not a multiple of the coarsest stride are padded as Ultralytics pads them, and the maps are
        cropped again: a student without a P6 may train at sizes that a teacher with one does not accept.
        """
        height, width = images.shape[-2:]
        padding = (0, -width % self._grid, 0, -height % self._grid)
        if any(padding):
            images = F.pad(images, padding, value=LETTERBOX_GRAY)
        parts = in_parts(self._maps, _parts(images), images.device)
        maps = parts[0] if len(parts) == 1 else [torch.cat(level) for level in zip(*parts, strict=True)]
        if any(padding):
            maps = [m[..., : height // s, : width // s] for m, s in zip(maps, self._strides(), strict=True)]
        return maps

    def _strides(self) -> list[int]:
        """Return the stride of every map that `forward` returns."""
        strides = list(self.taps)
        return strides + [s for count in self._tapped.values() for s in strides[:count]]

    def maps(self, images: Tensor) -> TeacherMaps:
        """Return the maps of images [N, C, H, W] in 0 to 1, by what they are."""
        maps = iter(self(images))
        pyramid = [next(maps) for _ in self.taps]
        return TeacherMaps(pyramid, {name: [next(maps) for _ in range(n)] for name, n in self._tapped.items()})

    @torch.no_grad()
    def _maps(self, images: Tensor) -> list[Tensor]:
        images = images.to(DTYPES[self.precision.name], memory_format=torch.channels_last)
        with torch.autocast(images.device.type, enabled=False):  # the student's AMP is not the teacher's
            maps = self.body(images)
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


def _hold_on(body: nn.Module, device: torch.device) -> None:
    """Keep on a device what is neither parameter nor buffer; every pass would wait for its copy from the host.

    These are plain tensors, such as the texts of YOLO-World, and the positions that RT-DETR's attention makes anew.
    """
    for module in body.modules():
        module.__dict__.update({k: v.to(device) for k, v in vars(module).items() if isinstance(v, Tensor)})
        if isinstance(module, AIFI):
            module.build_2d_sincos_position_embedding = _made_once(module.build_2d_sincos_position_embedding, device)


def _made_once(make: Callable[..., Tensor], device: torch.device) -> Callable[..., Tensor]:
    """Return a function that keeps on a device what another one makes of its positional arguments."""
    made: dict[Any, Tensor] = {}

    def kept(*size: Any, **like: Any) -> Tensor:
        if size not in made:
            made[size] = make(*size, **like).to(device)
        return made[size]

    return kept


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
    """Stands in for a head: returns what the head would have received, followed by what tapped branches make of it."""

    export = False  # YOLO-World reads this from its head

    def __init__(self, head: Any) -> None:
        super().__init__()
        self.__dict__.update(f=head.f, i=head.i, type=head.type)  # how a YOLO model routes its layers
        self.taps = nn.ModuleDict()

    def add(self, name: str, branches: nn.ModuleList, channels: Sequence[int] | None) -> None:
        # the channels on the device: a list would wait to be copied there
        index = None if channels is None else torch.tensor(channels)
        branches.register_buffer("channels", index, persistent=False)
        self.taps[name] = branches

    def forward(self, maps: Iterable[Tensor], *_: Any) -> list[Tensor]:  # RT-DETR's also receives the batch
        maps = list(maps)
        made = [_run(tap, maps) for tap in self.taps.values()]
        return [*maps, *(m for of_tap in made for m in of_tap)]


def _run(branches: Any, maps: Sequence[Tensor]) -> list[Tensor]:
    made = [branch(m) for branch, m in zip(branches, maps, strict=False)]
    return made if branches.channels is None else [m.index_select(1, branches.channels) for m in made]


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
