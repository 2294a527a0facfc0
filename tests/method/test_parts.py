"""Divergences and their gradients, some images at a time, against the whole in float64."""

import pytest
import torch
from test_divergence import maps

from yolo_cwd.method import parallel, parts
from yolo_cwd.method.fpn import Level
from yolo_cwd.method.parts import Pair, divergences
from yolo_cwd.method.terms import LevelTerm, Term


def term_of(teacher_channels: int, tau: float = 1.0) -> LevelTerm:
    return LevelTerm(Level("P3", 8, 0, 0, 3, teacher_channels), 1.0, False, tau, False)


@pytest.mark.parametrize("cores", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradient_in_parts_is_that_of_the_whole(
    cores: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "cores", lambda device: cores)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setitem(parts.PART_ELEMENTS, "cpu", 2 * 6 * 8 * 8)  # two of the five images
    feature, teacher, term = maps(5, 3, 8, 8, seed=30, dtype=dtype), maps(5, 6, 8, 8, seed=31), term_of(6, tau=2.0)

    leaf, weight = feature.double().requires_grad_(), term.adapter.weight.detach().double().requires_grad_()
    sides = [torch.einsum("tc,nchw->nthw", weight[..., 0, 0], leaf), teacher.double()]
    q, p = ((x.flatten(2) / 2).softmax(-1) for x in sides)
    expected = 4 * (p * (p / q).log()).sum() / (5 * 6)
    (7 * expected).backward()

    feature.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):  # of the training around it, not of the comparison
        (value,) = divergences([Pair(term, feature, [teacher])])
    (7 * value).backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(term.adapter.weight.grad, weight.grad.float(), rtol=1e-4, atol=1e-6)
    coarse = {"rtol": 1e-4, "atol": 1e-7} if dtype is torch.float32 else {"rtol": 1e-2, "atol": 1e-4}
    torch.testing.assert_close(feature.grad.float(), leaf.grad.float(), **coarse)
    assert feature.grad.dtype is dtype


def test_backward_of_a_level_needs_a_map_of_the_students_channels() -> None:
    feature, term = maps(2, 3, 8, 8, seed=32).requires_grad_(), term_of(12)
    (value,) = divergences([Pair(term, feature, [maps(2, 12, 8, 8, seed=33)])])
    assert [x.shape for x in value.grad_fn.saved_tensors] == [feature.shape, term.adapter.weight.shape]
    inputs = [node for node, _ in value.grad_fn.next_functions if node is not None]
    assert {type(node).__name__ for node in inputs} == {"AccumulateGrad"}  # nothing of the adapter's graph is kept


def test_adapters_that_are_not_trained() -> None:
    feature, term = maps(2, 3, 8, 8, seed=34).requires_grad_(), term_of(12).requires_grad_(False)
    (value,) = divergences([Pair(term, feature, [maps(2, 12, 8, 8, seed=35)])])
    value.backward()
    assert feature.grad is not None
    assert feature.grad.abs().sum() > 0
    assert term.adapter.weight.grad is None


class Squares(Term):
    """Stands for a term of another kind: the mean square of the difference, of two maps of the teacher together."""

    def forward(self, student: torch.Tensor, teacher: list[torch.Tensor]) -> torch.Tensor:
        return sum((student - maps).square().flatten(1).sum(1).mean() for maps in teacher)


def test_a_term_of_any_kind_is_compared_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(parts.PART_ELEMENTS, "cpu", 1)  # one image at a time
    student, teacher = maps(3, 2, 4, 4, seed=1).requires_grad_(), [maps(3, 2, 4, 4, seed=s) for s in (2, 3)]
    (value,) = divergences([Pair(Squares("squares", 1.0), student, teacher)])
    value.backward()
    expected = Squares("squares", 1.0)(student.detach(), teacher)
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(student.grad, sum(2 * (student.detach() - maps) for maps in teacher) / 3)
