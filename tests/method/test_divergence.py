"""The divergence against an independent reference in float64, hand-worked values, and finite differences."""

import math

import numpy as np
import pytest
import torch

from yolo_cwd import ChannelWiseDivergence, channel_wise_divergence


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
