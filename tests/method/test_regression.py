"""The best linear map from student to teacher, against an independent reference."""

import pytest
import torch

from yolo_cwd.method.regression import Regression


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


def test_maps_that_do_not_vary_are_not_explained() -> None:
    regression = Regression()
    regression.add(maps(2, 3, 1, 1, seed=1), maps(2, 4, 1, 1, seed=2))
    weights, explained = regression.solve()
    assert not weights.any()
    assert explained == 0
