# SPDX-License-Identifier: AGPL-3.0-or-later
"""Students that are not stock models: a pruned checkpoint keeps its shape.

Ultralytics builds a student from the YAML in its checkpoint and copies the weights that fit. A network with pruned
channels would come back at full width, with most of its weights at random.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from torch import nn

from yolo_cwd.config import ConfigError
from yolo_cwd.tasks import count_classes


class KeepsShape:
    """What is combined with a trainer of Ultralytics, so that a pruned student keeps its shape.

    Attributes:
        reshaped: Whether the student keeps the shape of its checkpoint, which its YAML no longer describes.
    """

    args: Any
    reshaped = False

    def get_model(self, cfg: Any = None, weights: nn.Module | None = None, verbose: bool = True) -> nn.Module:
        """Build the student as Ultralytics does, unless its checkpoint is of another shape than its YAML."""
        rebuilt: nn.Module = super().get_model(cfg=cfg, weights=weights, verbose=verbose)  # type: ignore[misc]
        self.reshaped = weights is not None and cfg is weights.yaml and is_pruned(weights, rebuilt)
        if weights is None or not self.reshaped:
            return rebuilt
        return keep_pruned_shape(weights, rebuilt, self.args.model, self.args.data)


def keeping_shape(trainer: type[Any]) -> type[Any]:
    """Return a trainer of Ultralytics under which a pruned student keeps its shape."""
    return type(trainer.__name__, (KeepsShape, trainer), {})


def is_pruned(weights: nn.Module, rebuilt: nn.Module) -> bool:
    """Return whether the tensors of a checkpoint differ in shape from those of the model that its YAML describes.

    Args:
        weights: The checkpoint's own module.
        rebuilt: The model built from its YAML for the classes of the data, which shape the last layers of a head.
    """
    theirs = {name: value.shape for name, value in rebuilt.state_dict().items()}
    head = f"model.{len(rebuilt.model) - 1}."  # type: ignore[arg-type]
    return any(
        theirs.get(name, value.shape) != value.shape
        for name, value in weights.state_dict().items()
        if not name.startswith(head) or count_classes(weights) == count_classes(rebuilt)
    )


def keep_pruned_shape(weights: nn.Module, rebuilt: nn.Module, student: Any, data: Any) -> nn.Module:
    """Return the checkpoint's own module, ready to train.

    Args:
        weights: The checkpoint's module.
        rebuilt: The model built from its YAML for the classes of the data.
        student: The student as the user named it.
        data: The data set, for the message.

    Raises:
        ConfigError: If its number of classes is not the data's: without a description, no new head can be built.
    """
    own, needed = count_classes(weights), count_classes(rebuilt)
    if own != needed:
        raise ConfigError(
            f"student={student}: a pruned checkpoint keeps its shape and its {own} classes, data={data} has {needed}; "
            "fine-tune it to the data's classes before you prune it"
        )
    return deepcopy(weights).float().requires_grad_(True).train()
