"""The contract with Ultralytics: each seam we rely on, so that an upgrade fails here first."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from conftest import STUDENT, TEACHER
from ultralytics import YOLO
from ultralytics.data.utils import verify_image_label
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn.modules.head import Detect, v10Detect
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils import DEFAULT_CFG

from yolo_cwd.config import OPTIONS
from yolo_cwd.method.fpn import pyramid_taps, student_features
from yolo_cwd.trainer import CWDTrainer


@pytest.mark.parametrize("name", ["yolov5n.yaml", "yolov8n.yaml", "yolov9t.yaml", "yolov10n.yaml", "yolo26n.yaml"])
def test_predictions_in_training_carry_the_heads_inputs(name: str) -> None:
    model = DetectionModel(name, verbose=False).train()
    seen: list[torch.Tensor] = []
    model.model[-1].register_forward_pre_hook(lambda module, inputs: seen.extend(inputs[0]))
    features = student_features(model(torch.rand(2, 3, 64, 64)))
    assert len(features) == len(seen) == 3
    for ours, input_ in zip(features, seen, strict=True):
        assert torch.equal(ours, input_)
        assert ours.requires_grad
    channels = [tap.channels for tap in pyramid_taps(model, "student").values()]
    assert [f.shape[1] for f in features] == channels


@pytest.mark.parametrize("name", ["yolov8n.yaml", "yolo26n.yaml"])
def test_criterion_returns_a_vector_scaled_by_the_batch_and_items_by_name(name: str) -> None:
    model = DetectionModel(name, nc=3, verbose=False).train()
    model.args = DEFAULT_CFG
    images = torch.rand(2, 3, 64, 64)
    labels = {"batch_idx": torch.tensor([0.0, 1.0]), "cls": torch.zeros(2, 1), "bboxes": torch.full((2, 4), 0.4)}
    calls = []
    criterion = model.init_criterion()

    def wrapped(preds: Any, batch: Any) -> Any:
        calls.append(type(preds))
        return criterion(preds, batch)

    model.criterion = wrapped
    loss, items = model({"img": images, **labels})
    assert calls == [dict]
    assert loss.shape == (3,)
    assert all(v.ndim == 0 and not v.requires_grad for v in items.values())
    if name == "yolov8n.yaml":
        assert loss.tolist() == pytest.approx([2 * v.item() for v in items.values()])
    model.eval()
    model.loss({"img": images, **labels})
    assert calls[1] is tuple, "predictions of the evaluation mode are told apart by their type"


def test_seams_have_the_signatures_we_override() -> None:
    for name in ("setup_model", "_setup_train", "optimizer_step", "save_model", "get_dataset"):
        assert list(inspect.signature(getattr(BaseTrainer, name)).parameters) == ["self"]
    assert list(inspect.signature(BaseTrainer.__init__).parameters) == ["self", "cfg", "overrides", "_callbacks"]
    assert list(inspect.signature(BaseTrainer._load_checkpoint_state).parameters) == ["self", "ckpt"]
    assert list(inspect.signature(BaseTrainer.label_loss_items).parameters) == ["self", "loss_items", "prefix"]
    assert list(inspect.signature(DetectionTrainer.preprocess_batch).parameters) == ["self", "batch"]
    assert list(inspect.signature(DetectionTrainer.auto_batch).parameters) == ["self"]
    assert issubclass(v10Detect, Detect)


@pytest.mark.parametrize(
    ("rows", "outlines"),
    [("1 0.5 0.5 0.2 0.4\n", 0), ("1 0.4 0.3 0.6 0.3 0.6 0.7 0.4 0.7\n", 1), ("", 0), ("one", None)],
    ids=["box", "outline", "empty", "corrupt"],
)
def test_labels_are_read_by_its_rules(rows: str, outlines: int | None, tmp_path: Path) -> None:
    image, label = tmp_path / "a.png", tmp_path / "a.txt"
    cv2.imwrite(str(image), np.zeros((20, 20, 3), np.uint8))
    label.write_text(rows)
    usable, objects, shape, segments, *_, message = verify_image_label(
        (str(image), str(label), "", False, 2, 0, 0, False)
    )
    assert bool(usable) == (outlines is not None) == (not message)
    if usable:
        assert objects == pytest.approx(np.array([[1, 0.5, 0.5, 0.2, 0.4]] if rows else []).reshape(-1, 5))
        assert (shape, len(segments)) == ((20, 20), outlines)


def test_our_options_do_not_shadow_ultralytics_arguments() -> None:
    assert not OPTIONS.keys() & vars(DEFAULT_CFG).keys()


def test_the_ema_is_built_before_the_criterion_is_wrapped(train: Callable[..., CWDTrainer]) -> None:
    seen = []

    def look(trainer: CWDTrainer) -> None:
        seen.append(getattr(trainer.ema.ema, "criterion", None))
        assert trainer.model.criterion is trainer.distillation.criterion
        assert all(group["initial_lr"] for group in trainer.optimizer.param_groups)  # the scheduler came after us
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in trainer.model.modules())

    train(callbacks={"on_train_start": look})
    assert seen == [None]


def test_end_to_end_criteria_are_updated_once_an_epoch(train: Callable[..., CWDTrainer]) -> None:
    assert train(model="yolo26n.yaml", epochs=2).distillation.criterion.updates == 2


def test_its_own_search_takes_no_trainer() -> None:
    """Docs/limits.md says so, and that Ray Tune does."""
    with pytest.raises(SyntaxError, match=r"teacher.* is not a valid YOLO argument"):
        YOLO(STUDENT).tune(trainer=CWDTrainer, teacher=TEACHER, iterations=1, epochs=1)
