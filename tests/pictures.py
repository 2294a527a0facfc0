"""Pictures in a fraction of the time, in this process or in another one."""

from typing import Any

import pytest
from matplotlib.figure import Figure
from PIL import Image
from ultralytics.models.yolo.detect import DetectionTrainer

SAVE = Figure.savefig


def blank(patch: pytest.MonkeyPatch) -> None:
    """Save an image of one color for each figure, which is not drawn."""

    def save_nothing(figure: Figure, file: Any, *, format: str | None = None, **_: Any) -> None:
        Image.new("RGB", (8, 8)).save(file, format)

    patch.setattr(Figure, "savefig", save_nothing)


def coarse(patch: pytest.MonkeyPatch) -> None:
    """Save figures with few pixels; everything is drawn as it is otherwise."""

    def save_coarsely(figure: Figure, *args: Any, **kwargs: Any) -> None:
        SAVE(figure, *args, **{**kwargs, "dpi": 40})

    patch.setattr(Figure, "savefig", save_coarsely)


def only_ours(patch: pytest.MonkeyPatch) -> None:
    """Leave out the pictures that Ultralytics draws by matplotlib, of which there are more than of ours."""
    for function in ("plot_mc_curve", "plot_pr_curve", "ConfusionMatrix.plot"):
        patch.setattr(f"ultralytics.utils.metrics.{function}", lambda *args, **kwargs: None)
    for name in ("plot_training_labels", "plot_metrics"):
        patch.setattr(DetectionTrainer, name, lambda trainer: None)
