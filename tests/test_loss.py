"""The loss against an independent reference in float64, hand-worked values, and finite differences."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from yolo_cwd import ChannelWiseDivergence, CWDLoss, channel_wise_divergence
from yolo_cwd.method import loss as loss_module
from yolo_cwd.method import parallel
from yolo_cwd.method.fpn import Level
from yolo_cwd.method.loss import standardize
from yolo_cwd.method.teacher import Lesson


def reference(student: torch.Tensor, teacher: torch.Tensor, tau: float) -> float:
    """Equation 4 of the paper, written out: softmax, then logarithm, image by image and channel by channel."""
    total = 0.0
    for s_image, t_image in zip(student.double().numpy(), teacher.double().numpy(), strict=True):
        for s, t in zip(s_image, t_image, strict=True):
            q, p = (np.exp(x.ravel() / tau) / np.exp(x.ravel() / tau).sum() for x in (s, t))
            total += (p * np.log(p / q)).sum()
    return tau**2 * total / (student.shape[0] * student.shape[1])


def maps(*shape: int, seed: int = 0, scale: float = 2.0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("tau", [0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((2, 3, 4, 5), id="oblong map"),
        pytest.param((1, 1, 1, 2), id="smallest map that can differ"),
        pytest.param((3, 16, 12, 12), id="ordinary map"),
    ],
)
def test_equals_the_published_definition(shape: tuple[int, ...], tau: float) -> None:
    student, teacher = maps(*shape, seed=1), maps(*shape, seed=2)
    expected = reference(student, teacher, tau)
    in_float64 = channel_wise_divergence(student.double(), teacher.double(), tau).item()
    assert in_float64 == pytest.approx(expected, rel=1e-9)
    # rounding of the log-probabilities in float32 is magnified by tau squared
    assert channel_wise_divergence(student, teacher, tau).item() == pytest.approx(expected, rel=1e-6, abs=1e-6 * tau**2)


def test_hand_worked_value() -> None:
    student = torch.tensor([0.0, 0.0]).view(1, 1, 1, 2)  # q = 1/2, 1/2
    teacher = torch.tensor([0.0, math.log(3.0)]).view(1, 1, 1, 2)  # p = 1/4, 3/4
    expected = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert channel_wise_divergence(student, teacher).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("tau", [0.7, 1.0, 3.0])
def test_gradient_by_finite_differences(tau: float) -> None:
    student = maps(2, 3, 3, 4, seed=3, dtype=torch.float64).requires_grad_()
    teacher = maps(2, 3, 3, 4, seed=4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s: channel_wise_divergence(s, teacher, tau), (student,))


def test_gradient_is_the_difference_of_the_distributions() -> None:
    tau, student, teacher = 2.0, maps(2, 3, 4, 4, seed=5), maps(2, 3, 4, 4, seed=6)
    student.requires_grad_()
    channel_wise_divergence(student, teacher, tau).backward()
    q, p = ((x.detach().flatten(2) / tau).softmax(-1).view_as(x) for x in (student, teacher))
    torch.testing.assert_close(student.grad, tau * (q - p) / (2 * 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_needs_one_tensor_of_the_size_of_the_maps(dtype: torch.dtype) -> None:
    student, teacher = maps(2, 3, 8, 8, seed=5, dtype=dtype), maps(2, 3, 8, 8, seed=6, dtype=dtype)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        loss = channel_wise_divergence(student.requires_grad_(), teacher)
    assert [x.numel() for x in saved] == [student.numel()]
    loss.backward()
    assert student.grad is not None
    assert student.grad.dtype is dtype


def test_zero_at_equality_and_never_negative() -> None:
    for seed in range(20):
        x = maps(2, 4, 6, 6, seed=seed, scale=10.0 ** (seed % 5 - 2))
        assert channel_wise_divergence(x, x).item() == 0
        assert 0 <= channel_wise_divergence(x, x + 1e-6 * maps(2, 4, 6, 6, seed=seed + 100)).item() < 1e-6


def test_a_constant_per_channel_changes_nothing() -> None:
    student, teacher = maps(2, 3, 5, 5, seed=7), maps(2, 3, 5, 5, seed=8)
    shift = maps(2, 3, 1, 1, seed=9)
    expected = channel_wise_divergence(student, teacher)
    torch.testing.assert_close(channel_wise_divergence(student + shift, teacher), expected)
    torch.testing.assert_close(channel_wise_divergence(student, teacher - shift), expected)


def test_finite_for_large_activations() -> None:
    student = maps(2, 3, 8, 8, seed=10, scale=1e4).requires_grad_()
    loss = channel_wise_divergence(student, maps(2, 3, 8, 8, seed=11, scale=1e4))
    loss.backward()
    assert loss.isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_maps_are_compared_in_float32(dtype: torch.dtype) -> None:
    student, teacher = maps(2, 3, 8, 8, seed=12, dtype=dtype), maps(2, 3, 8, 8, seed=13, dtype=dtype)
    with torch.autocast("cpu", dtype):
        loss = channel_wise_divergence(student, teacher)
    assert loss.dtype is torch.float32
    assert loss.item() == pytest.approx(reference(student, teacher, 1.0), rel=1e-6)


def test_no_gradient_reaches_the_teacher() -> None:
    student, teacher = maps(1, 2, 3, 3, seed=14).requires_grad_(), maps(1, 2, 3, 3, seed=15).requires_grad_()
    channel_wise_divergence(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert student.grad.abs().sum() > 0


def test_the_module_is_the_function() -> None:
    student, teacher = maps(2, 3, 4, 4, seed=40).requires_grad_(), maps(2, 3, 4, 4, seed=41)
    module = ChannelWiseDivergence(tau=2.0)
    assert torch.equal(module(student, teacher), channel_wise_divergence(student, teacher, 2.0))
    assert str(module) == "ChannelWiseDivergence(tau=2)"
    assert not list(module.parameters())
    with pytest.raises(ValueError, match="tau=0: must be above 0"):
        ChannelWiseDivergence(tau=0)


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match=r"\(1, 2, 3, 3\).*\(1, 2, 4, 4\)"):
        channel_wise_divergence(torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 4, 4))


def test_standardize() -> None:
    x = standardize(3 + 5 * maps(4, 3, 6, 6, seed=16))
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.var((0, 2, 3), unbiased=False), torch.ones(3), atol=1e-3, rtol=0)


class Detection:
    """Stands for a detection criterion: constant loss, and an `update` as end-to-end criteria have."""

    updates = 0

    def __call__(self, preds: object, batch: object) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return torch.tensor([1.0, 2.0, 3.0]), {"box_loss": torch.tensor(0.5)}

    def update(self) -> None:
        self.updates += 1


@pytest.fixture
def criterion() -> CWDLoss:
    levels = [Level("P3", 8, 0, 0, 3, 3), Level("P4", 16, 1, 1, 4, 4)]
    adapters = nn.ModuleList([nn.Identity(), nn.Identity()])
    return CWDLoss(Detection(), adapters, levels, [1.0, 0.5], tau=2.0, weight=10.0)


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
    given = batch(lesson=Lesson(PYRAMID, []))
    loss, items = criterion(preds, given)
    assert list(given) == ["img"], "the teacher's maps must not outlive the step"
    pairs = list(zip(FEATURES, PYRAMID, strict=True))
    expected = [w * reference(s, t, 2.0) for (s, t), w in zip(pairs, (10.0, 5.0), strict=True)]
    assert loss.tolist() == pytest.approx([1, 2, 3, *(2 * x for x in expected)], rel=1e-5)  # batch of 2
    assert list(items) == ["box_loss", "cwd_loss"]
    assert criterion.columns["loss"] == pytest.approx(dict(zip(["P3", "P4"], expected, strict=True)), rel=1e-5)
    assert items["cwd_loss"].item() == pytest.approx(sum(expected), rel=1e-5)


def test_means_of_the_levels_begin_anew_with_the_epoch(criterion: CWDLoss) -> None:
    criterion({"feats": FEATURES}, batch(lesson=Lesson(PYRAMID, [])))
    once = criterion.columns["loss"]
    criterion({"feats": FEATURES}, batch())  # a batch that is not distilled counts
    assert criterion.columns["loss"] == pytest.approx({name: value / 2 for name, value in once.items()})
    criterion.begin_epoch(3 * criterion.weight)
    assert set(criterion.columns["loss"].values()) == {0.0}
    criterion({"feats": FEATURES}, batch(lesson=Lesson(PYRAMID, [])))
    assert criterion.columns["loss"] == pytest.approx({name: 3 * value for name, value in once.items()})


def test_criterion_without_a_teachers_maps_leaves_the_detection_loss_alone(criterion: CWDLoss) -> None:
    loss, items = criterion({"feats": FEATURES}, batch())
    assert loss.tolist() == [1, 2, 3]
    assert items["cwd_loss"].item() == 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_term_that_is_not_finite_is_left_out_and_counted(value: float) -> None:
    levels = [Level("P3", 8, 0, 0, 3, 3), Level("P4", 16, 1, 1, 4, 4)]
    adapters = nn.ModuleList(nn.Conv2d(c, c, 1, bias=False) for c in (3, 4))
    criterion = CWDLoss(Detection(), adapters, levels)
    features = [f.clone().requires_grad_() for f in FEATURES]
    broken = PYRAMID[0].clone()
    broken[0, 0, 0, 0] = value
    for times in (1, 2):
        criterion.begin_epoch(1.0)
        loss, _ = criterion({"feats": features}, batch(lesson=Lesson([broken, PYRAMID[1]], [])))
        loss.sum().backward()
        assert int(criterion.dropped) == times
        assert criterion.columns["loss"]["P3"] == 0 < criterion.columns["loss"]["P4"]
    first, second = (adapter.weight.grad for adapter in adapters)
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


@pytest.mark.parametrize("cores", [1, 2])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradient_in_parts_is_that_of_the_whole(
    cores: int, normalize: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "cores", lambda device: cores)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setitem(loss_module.PART_ELEMENTS, "cpu", 2 * 6 * 8 * 8)  # two of the five images
    feature, teacher = maps(5, 3, 8, 8, seed=30, dtype=dtype), maps(5, 6, 8, 8, seed=31)
    adapter = nn.Conv2d(3, 6, 1, bias=False)
    criterion = CWDLoss(
        Detection(), nn.ModuleList([adapter]), [Level("P3", 8, 0, 0, 3, 6)], tau=2.0, normalize=normalize
    )

    leaf, weight = feature.double().requires_grad_(), adapter.weight.detach().double().requires_grad_()
    sides = [torch.einsum("tc,nchw->nthw", weight[..., 0, 0], leaf), teacher.double()]
    if normalize:
        sides = [(x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), False, True) + 1e-5).sqrt() for x in sides]
    q, p = ((x.flatten(2) / 2).softmax(-1) for x in sides)
    expected = 4 * (p * (p / q).log()).sum() / (5 * 6)
    (7 * expected).backward()

    feature.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):  # of the training around it, not of the comparison
        (term,) = criterion.divergences([feature], [teacher])
    (7 * term).backward()
    assert term.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(adapter.weight.grad, weight.grad.float(), rtol=1e-4, atol=1e-6)
    coarse = {"rtol": 1e-4, "atol": 1e-7} if dtype is torch.float32 else {"rtol": 1e-2, "atol": 1e-4}
    torch.testing.assert_close(feature.grad.float(), leaf.grad.float(), **coarse)
    assert feature.grad.dtype is dtype


def test_backward_of_a_level_needs_a_map_of_the_students_channels() -> None:
    features = [maps(2, 3, 8, 8, seed=32).requires_grad_()]
    adapters = nn.ModuleList([nn.Conv2d(3, 12, 1, bias=False)])
    criterion = CWDLoss(Detection(), adapters, [Level("P3", 8, 0, 0, 3, 12)])
    (term,) = criterion.divergences(features, [maps(2, 12, 8, 8, seed=33)])
    assert [x.shape for x in term.grad_fn.saved_tensors] == [features[0].shape, adapters[0].weight.shape]
    inputs = [node for node, _ in term.grad_fn.next_functions if node is not None]
    assert {type(node).__name__ for node in inputs} == {"AccumulateGrad"}  # nothing of the adapters' graph is kept


def test_adapters_that_are_not_trained() -> None:
    feature = maps(2, 3, 8, 8, seed=34).requires_grad_()
    adapters = nn.ModuleList([nn.Conv2d(3, 12, 1, bias=False).requires_grad_(False)])
    (term,) = CWDLoss(Detection(), adapters, [Level("P3", 8, 0, 0, 3, 12)]).divergences(
        [feature], [maps(2, 12, 8, 8, seed=35)]
    )
    term.backward()
    assert feature.grad is not None
    assert feature.grad.abs().sum() > 0
    assert adapters[0].weight.grad is None
