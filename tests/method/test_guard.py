"""A training that was promised a teacher and is not taught stops, and says why."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SHORT, TAUGHT, bare
from test_trainer import rows

from yolo_cwd import ConfigError, CWDTrainer

Train = Callable[..., CWDTrainer]


def forget_criterion(trainer: CWDTrainer) -> None:
    trainer.model.criterion = None


def test_a_callback_that_resets_the_criterion(train: Train) -> None:
    with pytest.raises(ConfigError, match=r"teacher=.*: teaches nothing, its loss was never computed"):
        train(epochs=3, callbacks={"on_train_start": forget_criterion})


def test_a_subclass_that_prepares_batches_alone(data: str, tmp_path: Any) -> None:
    class Guest(CWDTrainer):
        def preprocess_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
            batch["img"] = batch["img"].to(self.device).float() / 255
            return batch

    with pytest.raises(ConfigError, match="teaches nothing"):
        Guest(overrides={**TAUGHT, **SHORT, "data": data, "project": str(tmp_path), "epochs": 3}).train()


@pytest.mark.parametrize("options", [{}, {"cwd": "balanced", "class_share": 0.0}], ids=["fixed", "balanced"])
def test_layers_that_are_frozen_keep_the_teacher_out(train: Train, tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"freeze=5: teacher=.* cannot reach the student; freeze fewer layers"):
        train(epochs=3, freeze=5, **options)
    assert not list(tmp_path.rglob("runs")), "bad input leaves nothing behind"


def test_layers_that_are_thawed_later_are_taught_from_then_on(train: Train, said: Callable[[], str]) -> None:
    """All but the head is frozen in the first two epochs, as for progressive unfreezing."""

    def thaw_in_the_third(trainer: CWDTrainer) -> None:
        for name, parameter in trainer.model.named_parameters():
            parameter.requires_grad = ".dfl" not in name and (name.startswith("model.5.") or trainer.epoch >= 2)

    options = {"cwd": "balanced", "class_share": 0.0, "adapter": "fitted"}
    trainer = train(epochs=4, callbacks={"on_train_epoch_start": thaw_in_the_third}, **options)
    assert [row["train/P3_share"] > 0 for row in rows(trainer)] == [False, False, True, True]
    assert said().count("cannot reach the student so far, whose layers are frozen") == 1


@pytest.mark.parametrize("tau", [1e9])
def test_a_temperature_that_levels_everything(train: Train, tau: float) -> None:
    with pytest.raises(ConfigError, match=r"tau=1e\+09: teacher=.* teaches nothing, every divergence is 0; use tau=1"):
        train(epochs=3, tau=tau)


def test_images_with_one_position_in_the_only_level(train: Train) -> None:
    with pytest.raises(ConfigError, match=r"imgsz=32: teacher=.* teaches nothing, every divergence is 0; use a larger"):
        train(epochs=3, imgsz=32, levels="P5", class_share=0.0, teacher=bare("yolov8s.yaml"))


def test_a_training_that_is_taught_goes_on(train: Train) -> None:
    trainer = train(epochs=3)
    assert trainer.epoch == 2
    assert trainer.distillation.criterion.batches_distilled == 6


def test_a_first_epoch_whose_loss_is_not_finite_does_not_end_the_training(train: Train) -> None:
    """Ultralytics goes on after it. Here the student is NaN in the first epoch, and then as it was."""
    kept: list[torch.Tensor] = []

    def poison(trainer: CWDTrainer) -> None:
        if trainer.epoch == 0:
            kept[:] = kept or [value.clone() for value in trainer.model.state_dict().values()]
            next(trainer.model.parameters()).data.fill_(torch.nan)

    def heal(trainer: CWDTrainer) -> None:
        if trainer.epoch == 0:
            for value, before in zip(trainer.model.state_dict().values(), kept, strict=True):
                value.copy_(before)
            trainer.optimizer.state.clear()

    callbacks = {"on_train_batch_start": poison, "on_train_epoch_end": heal}
    table = rows(train(epochs=2, batch=2, nbs=2, callbacks=callbacks))
    assert math.isnan(table[0]["train/box_loss"]), "every batch of it was"
    assert table[0]["train/cwd_loss"] == 0
    assert table[1]["train/cwd_loss"] > 0
    assert table[1]["train/box_loss"] > 0


def test_a_teacher_that_is_not_finite_ends_the_training(train: Train) -> None:
    def poison(trainer: CWDTrainer) -> None:
        next(trainer.distillation.teacher.parameters()).data.fill_(torch.nan)

    with pytest.raises(ConfigError, match="teaches nothing, since no divergence so far is finite"):
        train(epochs=3, callbacks={"on_train_start": poison})
