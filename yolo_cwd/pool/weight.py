# SPDX-License-Identifier: AGPL-3.0-or-later
"""Makes the images of a pool count less in the task's own loss than those with labels of their own.

The losses of Ultralytics are means over a batch, times its size. So the criterion is called for the images of each kind
on their own, and the pool's part is weighted. Mosaic and the like would make one image out of both kinds. Here they mix
images of one kind.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from ultralytics.data.augment import BaseMixTransform, Compose

OBJECTS = {"batch_idx", "cls", "bboxes", "keypoints", "segments", "obb"}  # of a batch: a row for each object
ENOUGH = 4  # one in so many of Ultralytics' buffer: with fewer images of a kind there, mates come from the disk


class PoolWeight:
    """Calls a task's criterion so that the images of a pool count by a weight.

    Attributes:
        weight: How much they count, 0 to 1.
        images: The folder that they are in.
        overlap: Whether the masks of an image's objects are one map.
    """

    def __init__(self, weight: float, folder: Path, overlap: bool) -> None:
        """Set the weight.

        Args:
            weight: How much the images of the pool count.
            folder: The pool's folder.
            overlap: The argument `overlap_mask` of the training.
        """
        self.weight = weight
        self.images = folder / "images"
        self.overlap = overlap

    def holds(self, file: str) -> bool:
        """Return whether an image is one of the pool."""
        return Path(file).parent == self.images

    def __call__(self, criterion: Any, preds: Any, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a batch as a vector, multiplied by the batch size, and its items, which are per image.

        Args:
            criterion: Takes predictions and a batch, and returns the same.
            preds: What the student's head returned: tensors [N, ...] in dictionaries, lists and tuples.
            batch: Ultralytics' batch of N images.
        """
        of_pool = [self.holds(file) for file in batch.get("im_file", ())]
        if not any(of_pool):
            result: tuple[Tensor, dict[str, Tensor]] = criterion(preds, batch)
            return result
        if all(of_pool):
            loss, items = criterion(preds, batch)
            return self.weight * loss, {name: self.weight * item for name, item in items.items()}
        own = [i for i, pooled in enumerate(of_pool) if not pooled]
        loss, items = self._part(criterion, preds, batch, own, 1.0)
        if self.weight:
            pool = [i for i, pooled in enumerate(of_pool) if pooled]
            more, further = self._part(criterion, preds, batch, pool, self.weight)
            loss, items = loss + more, {name: item + further[name] for name, item in items.items()}
        return loss, items

    def _part(
        self, criterion: Any, preds: Any, batch: dict[str, Any], images: list[int], weight: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return what some images of a batch contribute to its loss and its items."""
        whole = len(batch["im_file"])
        part = Part(images, torch.tensor(images, device=batch["img"].device), whole)
        loss, items = criterion(tree_map_only(Tensor, part.of, preds), self.batch_of(batch, part))
        share = weight * len(images) / whole
        return weight * loss, {name: share * item for name, item in items.items()}

    def batch_of(self, batch: dict[str, Any], images: Part) -> dict[str, Any]:
        """Return a batch of some of the images, as Ultralytics would have collated them."""
        index = batch.get("batch_idx")
        part = {name: images.of(value) for name, value in batch.items()}
        if index is None:
            return part
        number = torch.full((images.whole,), -1, device=index.device)
        number[images.where.to(index.device)] = torch.arange(len(images.numbers), device=index.device)
        theirs = number[index.flatten().long()] >= 0
        for name in OBJECTS | (set() if self.overlap else {"masks"}):
            if isinstance(batch.get(name), Tensor):
                part[name] = batch[name][theirs.to(batch[name].device)]
        part["batch_idx"] = number[part["batch_idx"].long()].to(index.dtype)
        return part

    def keep_apart(self, dataset: Any) -> None:
        """Let the transforms of a dataset mix an image only with images of its kind, until they are built anew."""
        mates = Mates(dataset, self)
        for transform in _mixing(dataset.transforms):
            transform.dataset = mates
        dataset.transforms.insert(0, mates)


class Part(NamedTuple):
    """Some images of a batch.

    Attributes:
        numbers: Their numbers.
        where: The same on the device of the batch, copied there once.
        whole: The number of all images.
    """

    numbers: Sequence[int]
    where: Tensor
    whole: int

    def of(self, value: Any) -> Any:
        """Return the part of a value that belongs to the images; a value that is not one for each image as it is."""
        if isinstance(value, Tensor) and value.ndim and len(value) == self.whole:
            return value[self.where.to(value.device)]
        if type(value) in {list, tuple} and len(value) == self.whole:
            return type(value)(value[i] for i in self.numbers)
        return value


def _mixing(transform: Any) -> Iterator[BaseMixTransform]:
    """Yield the transforms that take further images from a dataset, at whatever depth."""
    if isinstance(transform, Compose):
        for part in transform.transforms:
            yield from _mixing(part)
    elif isinstance(transform, BaseMixTransform):
        yield transform
        yield from _mixing(transform.pre_transform)


class Mates:
    """The images of a dataset that may be mixed with the present one: those of its kind.

    It is a transform that comes before the others and notes the present image, and the dataset from which the others
    draw further images.
    """

    def __init__(self, dataset: Any, weight: PoolWeight) -> None:
        """Sort the images of a dataset by whether a pool holds them."""
        self._dataset, self._weight = dataset, weight
        kinds = [weight.holds(file) for file in dataset.im_files]
        self._images = {kind: [i for i, k in enumerate(kinds) if k == kind] for kind in (False, True)}
        self._positions = {image: n for images in self._images.values() for n, image in enumerate(images)}
        self._kind = False

    def __call__(self, labels: dict[str, Any]) -> dict[str, Any]:
        """Note which kind the present image is of."""
        self._kind = self._weight.holds(labels["im_file"])
        return labels

    def __len__(self) -> int:
        """Return the number of images of the present kind."""
        return len(self._images[self._kind])

    @property
    def buffer(self) -> list[int]:
        """Those in memory, or all if these are too few to choose from."""
        held = [i for i in self._dataset.buffer if self._weight.holds(self._dataset.im_files[i]) == self._kind]
        few = len(held) < min(len(self), self._dataset.max_buffer_length // ENOUGH)
        return list(range(len(self))) if few or not held else [self._positions[i] for i in held]

    def get_image_and_label(self, position: int) -> dict[str, Any]:
        """Return an image of the present kind with its label."""
        found: dict[str, Any] = self._dataset.get_image_and_label(self._images[self._kind][position])
        return found
