"""Shares of the gradient: what is measured, and the weights that follow."""

import math
from collections.abc import Callable

import pytest
import torch
from test_trainer import rows
from torch import nn

from yolo_cwd import CWDLoss, CWDTrainer
from yolo_cwd.method.balance import GradientMeter, clip_gradients, squared_norms
from yolo_cwd.method.terms import Term


def norms(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Maps that require a gradient, and what the task and a divergence multiply them with: their gradients."""
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(2, 3, 4, 4, generator=generator, requires_grad=True)
    task, ours = (torch.randn(2, 3, 4, 4, generator=generator) for _ in range(2))
    return maps * 1, task, ours


def test_the_gradients_at_a_map_are_told_apart() -> None:
    meter = GradientMeter(["P3", "P4"])
    for i in range(2):
        maps, task, ours = norms(i)
        alias = meter.watch(i, maps)
        ((maps * task).sum() + 0.25 * (alias * ours).sum()).backward()
        expected = task.norm() / ours.norm()
        meter.step(torch.tensor([0.25, 0.25]))
        assert meter.ratios[i].item() == pytest.approx(expected.item(), rel=1e-5)
        assert meter.shares[meter.names[i]] == pytest.approx(0.25 / expected.item(), rel=1e-5)


def test_the_watched_gradient_is_the_one_without_a_meter() -> None:
    leaf = torch.randn(2, 3, 4, 4, requires_grad=True)
    maps = leaf * 2
    (maps.sin().sum() + 3 * GradientMeter(["P3"]).watch(0, maps).square().sum()).backward()
    expected = torch.autograd.grad(((leaf * 2).sin() + 3 * (leaf * 2).square()).sum(), leaf)[0]
    assert torch.allclose(leaf.grad, expected)


def test_batches_that_are_gathered_for_one_step_count_together() -> None:
    meter, weights = GradientMeter(["P3"]), torch.ones(1)
    squares = torch.zeros(2)
    for seed in range(3):
        maps, task, ours = norms(seed)
        ((maps * task).sum() + (meter.watch(0, maps) * ours).sum()).backward()
        squares += torch.stack([task.square().sum(), ours.square().sum()])
    meter.step(weights)
    assert meter.ratios.item() == pytest.approx((squares[0] / squares[1]).sqrt().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("task", "ours", "weight"),
    [
        pytest.param(math.inf, 1.0, 1.0, id="loss scale overflows"),
        pytest.param(math.nan, 1.0, 1.0, id="not a number"),
        pytest.param(0.0, 1.0, 1.0, id="no gradient of the task"),
        pytest.param(1.0, 0.0, 0.0, id="weight 0"),
    ],
)
def test_a_step_that_tells_nothing_changes_nothing(task: float, ours: float, weight: float) -> None:
    meter = GradientMeter(["P3"])
    meter.note(0, torch.tensor([3.0]), torch.tensor([1.0]))
    meter.step(torch.ones(1))
    meter.note(0, torch.tensor([task]), torch.tensor([ours]))
    meter.step(torch.tensor([weight]))
    assert meter.ratios.item() == pytest.approx(3.0)


def test_an_epoch_counts_what_was_measured_in_it_whenever_the_optimizer_steps() -> None:
    """One batch an epoch, a step after the second, and another weight and loss scale in each."""
    meter, shares = GradientMeter(["P3"]), []
    for weight, scale in ((0.5, 1024.0), (0.25, 512.0)):
        meter.begin_epoch()
        meter.note(0, scale * torch.tensor([3.0, 4.0]), scale * weight * torch.tensor([2.0]))
        meter.count(torch.tensor([weight]), scale)
        shares.append(meter.shares["P3"])
    assert shares == pytest.approx([0.5 * 2 / 5, 0.25 * 2 / 5])
    assert meter.ratios.isnan().all(), "known with the step"
    meter.step(torch.tensor([0.25]), 512.0)
    assert meter.shares["P3"] == pytest.approx(0.25 * 2 / 5), "counted once"
    assert meter.ratios.item() == pytest.approx(5 / 2)


def test_epochs_without_a_step_have_their_share(train: Callable[..., CWDTrainer]) -> None:
    """Two batches an epoch, and a step after every eight."""
    options = {"cwd": "balanced", "class_share": 0.0, "adapter": "fitted", "schedule": "constant"}
    table = rows(train(epochs=4, nbs=32, lr0=1e-7, **options))
    for level in ("P3", "P4", "P5"):
        first, *others = (row[f"train/{level}_share"] for row in table)
        assert first > 0
        assert all(first / 3 < share < 3 * first for share in others), level


def test_the_loss_scale_does_not_matter() -> None:
    ratios = []
    for scale in (1.0, 1024.0):
        meter = GradientMeter(["P3"])
        meter.note(0, torch.tensor([5.0]), torch.tensor([0.1]))
        meter.step(torch.tensor([0.1]))
        meter.note(0, scale * torch.tensor([3.0, 4.0]), scale * torch.tensor([0.5]))
        meter.step(torch.tensor([0.1]), torch.tensor(scale))
        ratios.append(meter.ratios.item())
    assert ratios[0] == pytest.approx(ratios[1])
    assert ratios[0] == pytest.approx(math.sqrt(25 / (0.9 * 1 + 0.1 * 25)))


def test_what_was_measured_survives_an_interruption() -> None:
    meter = GradientMeter(["P3", "P4"])
    meter.restore({"P4": [18.0, 2.0], "P3": [4.0, 1.0], "P5": [1.0, 1.0]})  # by name: the levels may have changed
    assert meter.ratios.tolist() == pytest.approx([2.0, 3.0])
    assert meter.state() == {"P3": [4.0, 1.0], "P4": [18.0, 2.0]}
    meter.restore({})
    assert meter.ratios.tolist() == pytest.approx([2.0, 3.0])


def test_a_sample_counts_with_the_weight_that_follows_from_it() -> None:
    meter = GradientMeter(["P3"])
    meter.sample(torch.tensor([[36.0, 4.0]]), lambda: 0.5 * meter.ratios)
    assert meter.ratios.item() == pytest.approx(3.0)
    assert meter.shares["P3"] == pytest.approx(0.5)


def test_a_sample_leaves_a_step_that_is_due_alone() -> None:
    """An epoch may end between two optimizer steps, with gradients of another weight and loss scale recorded."""
    meter = GradientMeter(["P3"])
    meter.note(0, torch.tensor([0.0]), torch.tensor([1e6]))
    meter.sample(torch.tensor([[9.0, 1.0]]), lambda: meter.ratios)
    assert meter.ratios.item() == pytest.approx(3.0)
    meter.note(0, torch.tensor([3e6]), torch.tensor([0.0]))
    meter.step(torch.ones(1), 1e6)
    assert meter.means.tolist() == [[pytest.approx(9.0), pytest.approx(1.0)]]


@pytest.mark.parametrize("most", [1.0, 100.0])
def test_gradients_are_clipped_as_by_torch(most: float) -> None:
    sides = [[torch.nn.Parameter(torch.zeros(3, 4)), torch.nn.Parameter(torch.zeros(2))] for _ in range(2)]
    for parameters in sides:
        for i, p in enumerate(parameters):
            p.grad = torch.arange(float(p.numel())).view_as(p) + i
    clip_gradients([*sides[0], torch.nn.Parameter(torch.zeros(1))], torch.tensor(most))
    torch.nn.utils.clip_grad_norm_(sides[1], most)
    for ours, theirs in zip(*sides, strict=True):
        assert torch.allclose(ours.grad, theirs.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_squared_norms_are_beyond_the_range_of_half_precision(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = [(factor * torch.randn(2, 3, 40, 40, generator=generator)).to(dtype) for factor in (1e3, 1e-3)]
    expected = [gradient.double().square().sum().item() for gradient in gradients]
    assert squared_norms(*gradients).tolist() == pytest.approx(expected, rel=1e-3)
    gradients[0][0, 0, 0, 0] = math.inf
    assert squared_norms(*gradients)[0] == math.inf


def test_the_weights_follow_what_is_measured_at_once() -> None:
    criterion = CWDLoss(None, nn.ModuleList([Term("P3", 0.5)]), weight=2.0)
    criterion.meter.sample(torch.tensor([[9.0, 1.0]]), lambda: criterion.weights)
    assert criterion.weights.item() == pytest.approx(3.0)
    assert criterion.weights is criterion.weights  # computed once
    criterion.weight = 4.0
    assert criterion.weights.item() == pytest.approx(6.0)
    criterion.meter.restore({"P3": [4.0, 1.0]})
    assert criterion.weights.item() == pytest.approx(4.0)
