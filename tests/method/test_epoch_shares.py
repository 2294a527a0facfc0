"""Shares over an epoch: what several steps and samples have measured counts together."""

import math

import pytest
import torch

from yolo_cwd.method.balance import GradientMeter, clip_gradients


def step(meter: GradientMeter, task: float, ours: float) -> None:
    meter.note(0, torch.tensor([task]), torch.tensor([ours]))
    meter.step(torch.ones(1))


def sample(meter: GradientMeter, task: float, ours: float, weight: float = 1.0) -> None:
    meter.sample(torch.tensor([[task**2, ours**2]]), lambda: torch.tensor([weight]))


def test_all_steps_and_samples_of_an_epoch_count() -> None:
    """Squares are added up: 9 + 16 + 36 of the task, and 1 + 4 + 3^2 of ours."""
    meter = GradientMeter(["P3"])
    step(meter, 3.0, 1.0)
    step(meter, 4.0, 2.0)
    sample(meter, 6.0, 1.5, weight=2.0)
    assert meter.shares["P3"] == pytest.approx(math.sqrt(14 / 61))
    sample(meter, 2.0, 1.0)
    assert meter.shares["P3"] == pytest.approx(math.sqrt(15 / 65))
    meter.begin_epoch()
    assert meter.shares == {"P3": 0}
    step(meter, 2.0, 1.0)
    assert meter.shares["P3"] == pytest.approx(0.5)


@pytest.mark.parametrize(("task", "ours"), [(math.inf, 1.0), (0.0, 1.0), (1.0, 0.0), (math.nan, 1.0)])
def test_what_tells_nothing_is_not_counted(task: float, ours: float) -> None:
    meter = GradientMeter(["P3"])
    step(meter, 4.0, 1.0)
    for measure in (step, sample):
        measure(meter, task, ours)
        assert meter.shares["P3"] == pytest.approx(0.25)
        assert meter.means.tolist() == [[16.0, 1.0]]


def test_an_epoch_of_weight_0_does_not_spoil_the_step_that_follows() -> None:
    """Its last batches are due with those of the next epoch, and nothing is recorded of them."""
    meter = GradientMeter(["P3"])
    meter.count(torch.zeros(1))
    step(meter, 4.0, 1.0)
    assert meter.means.tolist() == [[16.0, 1.0]]


def test_tiny_gradients_keep_their_direction() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    parameter.grad = torch.tensor([5e-7])
    clip_gradients([parameter], torch.tensor(1.0))
    assert parameter.grad.item() == pytest.approx(5e-7)
