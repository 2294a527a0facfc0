"""The criterion: named terms, weighted in one place, beside the task's own loss."""

import math

import pytest
import torch
from test_divergence import maps, reference
from torch import nn

from yolo_cwd import CWDLoss
from yolo_cwd.method.fpn import Level
from yolo_cwd.method.teacher import TeacherMaps
from yolo_cwd.method.terms import LevelTerm


def level_terms(*shares: float, balanced: bool = False) -> nn.ModuleList:
    """Terms of P3 with 3 channels and P4 with 4, whose adapters change nothing."""
    levels = [Level("P3", 8, 0, 0, 3, 3), Level("P4", 16, 1, 1, 4, 4)]
    terms = [LevelTerm(level, share, balanced, 2.0, False) for level, share in zip(levels, shares, strict=True)]
    for term in terms:
        nn.init.dirac_(term.adapter.weight)
    return nn.ModuleList(terms)


class Detection:
    """Stands for a detection criterion: constant loss, and an `update` as end-to-end criteria have."""

    updates = 0

    def __call__(self, preds: object, batch: object) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return torch.tensor([1.0, 2.0, 3.0]), {"box_loss": torch.tensor(0.5)}

    def update(self) -> None:
        self.updates += 1


@pytest.fixture
def criterion() -> CWDLoss:
    return CWDLoss(Detection(), level_terms(1.0, 0.5), weight=10.0)


FEATURES = [maps(2, 3, 8, 8, seed=22), maps(2, 4, 4, 4, seed=23)]
PYRAMID = [maps(2, 3, 8, 8, seed=20), maps(2, 4, 4, 4, seed=21)]


def batch(**more: object) -> dict[str, object]:
    return {"img": torch.zeros(2, 3, 64, 64), **more}


@pytest.mark.parametrize(
    "preds",
    [
        pytest.param({"feats": FEATURES}, id="one head"),
        pytest.param({"one2many": {"feats": FEATURES}, "one2one": {"feats": []}}, id="end-to-end head"),
    ],
)
def test_criterion_adds_the_weighted_terms(criterion: CWDLoss, preds: dict[str, object]) -> None:
    given = batch(teacher=TeacherMaps(PYRAMID, {}))
    loss, items = criterion(preds, given)
    assert list(given) == ["img"], "the teacher's maps must not outlive the step"
    pairs = list(zip(FEATURES, PYRAMID, strict=True))
    expected = [w * reference(s, t, 2.0) for (s, t), w in zip(pairs, (10.0, 5.0), strict=True)]
    assert loss.tolist() == pytest.approx([1, 2, 3, *(2 * x for x in expected)], rel=1e-5)  # batch of 2
    assert list(items) == ["box_loss", "cwd_loss"]
    assert criterion.columns["loss"] == pytest.approx(dict(zip(["P3", "P4"], expected, strict=True)), rel=1e-5)
    assert items["cwd_loss"].item() == pytest.approx(sum(expected), rel=1e-5)


def test_means_of_the_levels_begin_anew_with_the_epoch(criterion: CWDLoss) -> None:
    criterion({"feats": FEATURES}, batch(teacher=TeacherMaps(PYRAMID, {})))
    once = criterion.columns["loss"]
    criterion({"feats": FEATURES}, batch())  # a batch that is not distilled counts
    assert criterion.columns["loss"] == pytest.approx({name: value / 2 for name, value in once.items()})
    criterion.begin_epoch(3 * criterion.weight)
    assert set(criterion.columns["loss"].values()) == {0.0}
    criterion({"feats": FEATURES}, batch(teacher=TeacherMaps(PYRAMID, {})))
    assert criterion.columns["loss"] == pytest.approx({name: 3 * value for name, value in once.items()})


def test_a_balanced_weight_is_bounded_where_the_maps_agree() -> None:
    criterion = CWDLoss(Detection(), level_terms(1.0, 0.5, balanced=True), weight=2.0)
    criterion.meter.means = torch.tensor([[9.0, 1e-30], [9.0, 4.0]])
    assert criterion.weights.tolist() == pytest.approx([2e4, 1.5])


def test_criterion_without_a_teachers_maps_leaves_the_detection_loss_alone(criterion: CWDLoss) -> None:
    loss, items = criterion({"feats": FEATURES}, batch())
    assert loss.tolist() == [1, 2, 3]
    assert items["cwd_loss"].item() == 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_term_that_is_not_finite_is_left_out_and_counted(value: float) -> None:
    criterion = CWDLoss(Detection(), level_terms(1.0, 1.0))
    features = [f.clone().requires_grad_() for f in FEATURES]
    broken = PYRAMID[0].clone()
    broken[0, 0, 0, 0] = value
    for times in (1, 2):
        criterion.begin_epoch(1.0)
        loss, _ = criterion({"feats": features}, batch(teacher=TeacherMaps([broken, PYRAMID[1]], {})))
        loss.sum().backward()
        assert int(criterion.skipped_terms) == times
        assert criterion.columns["loss"]["P3"] == 0 < criterion.columns["loss"]["P4"]
    first, second = (term.adapter.weight.grad for term in criterion.terms)
    assert first.abs().sum() == features[0].grad.abs().sum() == 0
    assert second.isfinite().all()
    assert second.abs().sum() > 0


def test_criterion_in_evaluation_is_the_wrapped_one(criterion: CWDLoss) -> None:
    loss, items = criterion((torch.zeros(1), {"feats": FEATURES}), batch())
    assert loss.tolist() == [1, 2, 3]
    assert list(items) == ["box_loss"]


def test_criterion_passes_on_what_it_does_not_define(criterion: CWDLoss) -> None:
    criterion.update()
    assert criterion.updates == 1
    with pytest.raises(AttributeError):
        _ = criterion.no_such_attribute


def test_a_copied_student_takes_the_plain_criterion_along(criterion: CWDLoss) -> None:
    from copy import deepcopy

    student = nn.Linear(1, 1)
    student.criterion = criterion
    assert type(deepcopy(student).criterion) is Detection
