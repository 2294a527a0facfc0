"""A training that was promised a teacher and is not taught stops, and says why."""

from collections.abc import Callable
from typing import Any

import pytest
from conftest import SHORT, TAUGHT

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


def test_layers_that_are_frozen_keep_the_teacher_out(train: Train) -> None:
    with pytest.raises(ConfigError, match=r"freeze=5: teacher=.* cannot reach the student; freeze fewer layers"):
        train(epochs=3, freeze=5)


@pytest.mark.parametrize("tau", [1e9])
def test_a_temperature_that_levels_everything(train: Train, tau: float) -> None:
    with pytest.raises(ConfigError, match=r"tau=1e\+09: teacher=.* teaches nothing, every divergence is 0; use tau=1"):
        train(epochs=3, tau=tau)


def test_a_training_that_is_taught_goes_on(train: Train) -> None:
    trainer = train(epochs=3)
    assert trainer.epoch == 2
    assert trainer.distillation.criterion.batches_distilled == 6
