"""Adapters that begin as the best linear map, and what fitting leaves untouched."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from yolo_cwd.method.prepare import Regression, _squares, random_numbers_untouched, statistics_untouched


def maps(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_linear_teacher_is_found_whatever_the_mean_of_its_channels() -> None:
    weights = maps(5, 3, seed=0)  # from 3 channels to 5
    regression = Regression()
    for seed in range(1, 5):
        student = maps(4, 3, 8, 8, seed=seed)
        teacher = torch.einsum("dc,nchw->ndhw", weights, student) + maps(4, 5, 1, 1, seed=10 + seed)
        regression.add(student, teacher)
    found, explained = regression.solve()
    assert torch.allclose(found, weights, atol=0.05)  # the ridge shrinks by a hundredth
    assert explained == pytest.approx(1, abs=1e-3)


def test_equals_ridge_regression_of_scikit_learn() -> None:
    from sklearn.linear_model import Ridge

    student, teacher = maps(2, 4, 6, 6, seed=1), maps(2, 3, 6, 6, seed=2)
    regression = Regression()
    regression.add(student, teacher)
    x, y = (m.sub(m.mean((2, 3), keepdim=True)).permute(0, 2, 3, 1).reshape(-1, m.shape[1]) for m in (student, teacher))
    penalty = 1e-2 * float((x.T @ x).diagonal().mean())
    expected = Ridge(alpha=penalty, fit_intercept=False).fit(x.numpy(), y.numpy())
    found, explained = regression.solve()
    assert found.numpy() == pytest.approx(expected.coef_, abs=1e-5)
    assert explained == pytest.approx(1 - ((expected.predict(x.numpy()) - y.numpy()) ** 2).sum() / (y**2).sum().item())


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_sums_over_many_positions_do_not_overflow_in_mixed_precision(half: torch.dtype) -> None:
    student, teacher = maps(1, 3, 300, 300, seed=1), maps(1, 3, 300, 300, seed=2)  # 90,000 positions of variance 1
    found = []
    for mixed in (False, True):
        regression = Regression()
        with torch.autocast("cpu", half, enabled=mixed):
            regression.add(student, teacher)
        found.append(regression.solve())
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


@pytest.mark.parametrize("gradient", [1e-9, 1e3])
def test_half_precision_gradients_are_measured_under_the_loss_scale(gradient: float) -> None:
    """Too small for float16 without a scale, or too large with it; a smaller one is then taken."""
    leaf = torch.ones(1, 2, 3, 3, requires_grad=True)
    maps = leaf.half()
    parts: list[Any] = [(maps.float() * factor).sum() for factor in (1e3 * gradient, gradient)]
    squares = _squares(parts[0], parts[1:], [maps], 1.0)
    assert squares.isfinite().all() == (gradient < 1)
    scale = 65536.0
    while not (squares := _squares(parts[0], parts[1:], [maps], scale)).isfinite().all():
        scale /= 16
    assert squares.sqrt().tolist() == [pytest.approx([1e3 * gradient * 18**0.5, gradient * 18**0.5], rel=0.01)]


def test_fitting_leaves_no_trace_in_the_student() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    model[1].train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    with statistics_untouched(model):
        assert model.training
        model(maps(2, 3, 4, 4, seed=0))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model[1].momentum == 0.1
    assert [m.training for m in model.modules()] == modes


def test_fitting_uses_up_no_random_number() -> None:
    def draw() -> list[Any]:
        return [random.random(), np.random.rand(), torch.rand(1).item()]

    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    expected = draw()
    random.setstate(states[0]), np.random.set_state(states[1]), torch.set_rng_state(states[2])
    with random_numbers_untouched():
        draw()
    assert draw() == expected
