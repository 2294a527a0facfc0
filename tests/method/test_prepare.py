"""First measurements, and what fitting leaves untouched."""

from typing import Any

import pytest
import torch
from torch import nn

from yolo_cwd.method.prepare import _squares, statistics_untouched


def maps(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


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
