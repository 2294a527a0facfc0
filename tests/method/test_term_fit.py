"""Terms: the fit of their adapters, what of them is saved, and heads with fewer class maps than levels."""

import math

import pytest
import torch
from conftest import bare
from test_divergence import maps, reference
from test_terms import LEVELS, built
from ultralytics import YOLO

from yolo_cwd.config import ConfigError, Settings
from yolo_cwd.method.divergence import ChannelWiseDivergence
from yolo_cwd.method.fpn import Level
from yolo_cwd.method.regression import Regression
from yolo_cwd.method.teacher import Teacher, TeacherMaps
from yolo_cwd.method.terms import CLASS_MAPS, ClassTerm, LevelTerm, StudentMaps, build_terms

P4 = LEVELS[1]  # the second map of both, from 4 to 6 channels


def both(seed: int) -> tuple[StudentMaps, TeacherMaps]:
    """Maps of P3 and P4 of two images, as both sides make them."""
    sizes = ((3, 8), (4, 4)), ((5, 8), (6, 4))
    student, teacher = ([maps(2, c, s, s, seed=seed + c) for c, s in side] for side in sizes)
    return StudentMaps(student, None), TeacherMaps(teacher, {})


def test_an_adapter_starts_as_the_fit_to_all_batches() -> None:
    term, expected = LevelTerm(P4, 1.0, True, 1.0, fitted=True), Regression()
    for seed in (0, 50):
        term.observe(*both(seed))
        expected.add(both(seed)[0].pyramid[1], both(seed)[1].pyramid[1])
    term.fit()
    weights, explained = expected.solve()
    assert term.adapter.weight.shape == (6, 4, 1, 1)
    assert torch.equal(term.adapter.weight[:, :, 0, 0], weights)
    assert term.explained == explained
    student, teacher = both(7)
    found = term(term.of_student(student), term.of_teacher(teacher)).item()
    adapted = torch.einsum("dc,nchw->ndhw", weights, student.pyramid[1])
    assert found == pytest.approx(reference(adapted, teacher.pyramid[1], 1.0), rel=1e-5)
    again = Regression()
    term.observe(*both(99))  # a training that recovers fits anew
    again.add(both(99)[0].pyramid[1], both(99)[1].pyramid[1])
    term.fit()
    assert torch.equal(term.adapter.weight[:, :, 0, 0], again.solve()[0])


def test_a_random_adapter_is_not_fitted() -> None:
    term = LevelTerm(P4, 1.0, True, 1.0, fitted=False)
    before = term.adapter.weight.clone()
    term.observe(*both(0))
    term.fit()
    assert torch.equal(term.adapter.weight, before)
    assert term.explained is None
    assert [name for name, _ in term.named_parameters()] == ["adapter.weight"], "a bias would do nothing"


def test_maps_that_are_not_finite_have_no_fit() -> None:
    term, (student, teacher) = LevelTerm(P4, 1.0, True, 1.0, fitted=True), both(0)
    student.pyramid[1][0, 0, 0, 0] = math.nan
    term.observe(student, teacher)
    with pytest.raises(
        ConfigError, match="adapter=fitted: the maps of student or teacher at P4 are not finite"
    ) as error:
        term.fit()
    assert str(error.value).endswith("give amp=False, or another student")


def test_adapters_alone_are_saved() -> None:
    terms, _ = built(["0", "1"], ["1", "0"])
    assert [term.name for term in terms] == ["P3", "P4", "P5", CLASS_MAPS]
    assert list(terms.state_dict()) == [f"{i}.adapter.weight" for i in range(3)]


def test_every_level_has_class_maps_in_the_order_of_the_students_classes() -> None:
    names = ["cat", "dog", "cow"]
    _, alone = built(names, names)
    _, turned = built(names, names[::-1])
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for teacher in (alone, turned):
        assert [tuple(m.shape) for m in teacher.maps(images).branches[CLASS_MAPS]] == [
            (1, 3, 8, 8),
            (1, 3, 4, 4),
            (1, 3, 2, 2),
        ]


def test_levels_without_class_maps_on_either_side_are_left_out() -> None:
    """A semantic head has class maps of its finest level alone."""
    ours, theirs = [maps(2, 3, 8, 8, seed=1), maps(2, 3, 4, 4, seed=2)], [maps(2, 3, 8, 8, seed=3)]
    scores = torch.cat([m.flatten(2) for m in ours], -1)
    term = ClassTerm(LEVELS, [8, 16], [0, 1, 2], 1.0, tau=1.0)
    expected = pytest.approx(reference(ours[0], theirs[0], 1.0), rel=1e-5)
    assert term(scores, theirs).item() == expected
    assert term(ours[0], [theirs[0], maps(2, 3, 4, 4, seed=4)]).item() == expected


def test_class_maps_of_oblong_images() -> None:
    ours, theirs = ([maps(2, 3, 4, 8, seed=i), maps(2, 3, 2, 4, seed=i + 1)] for i in (1, 3))
    scores = torch.cat([m.flatten(2) for m in ours], -1)
    found = ClassTerm(LEVELS, [8, 16], [0, 1, 2], 1.0, tau=1.0)(scores, theirs).item()
    assert found == pytest.approx(sum(map(reference, ours, theirs, (1.0, 1.0))), rel=1e-5)


@pytest.mark.parametrize(("student_index", "teacher_index", "compared"), [(0, 0, True), (1, 0, False), (0, 1, False)])
def test_class_maps_need_a_level_that_both_have_them_for(
    student_index: int, teacher_index: int, compared: bool
) -> None:
    student, teacher = (YOLO(bare("yolo26n-sem.yaml", width)).model for width in (0.25, 0.5))
    teacher.names = {0: "cat"}
    level = Level("P3", 8, student_index, teacher_index, 3, 5)
    settings = Settings.parse({"teacher": "a.pt"})
    terms = build_terms(settings, [level], [8, 16], student, Teacher(teacher), ["cat"])
    assert [term.name for term in terms] == ["P3", *[CLASS_MAPS] * compared]


def test_a_teacher_without_a_head_shows_no_classes() -> None:
    student, model = YOLO(bare("yolov8n.yaml")).model, YOLO(bare("yolov8s.yaml")).model
    model.names = {0: "cat"}
    teacher = Teacher(model)
    teacher._head = (None,)
    terms = build_terms(Settings.parse({"teacher": "a.pt"}), LEVELS, [8, 16, 32], student, teacher, ["cat"])
    assert [term.name for term in terms] == ["P3", "P4"]


def test_the_module_has_the_temperature_of_the_paper_unless_it_is_told() -> None:
    assert ChannelWiseDivergence().tau == 1
    assert ChannelWiseDivergence(0.5).tau == 0.5


@pytest.mark.parametrize("adapter", ["fitted", "conv"])
def test_options_reach_the_terms(adapter: str) -> None:
    """The temperature that divides both maps, and whether adapters are fitted."""
    terms, _ = built(["0"], ["0"], tau=2.0, adapter=adapter, class_share=0)
    term = terms[1]
    student = StudentMaps([maps(2, 16, 8, 8, seed=1), maps(2, 32, 4, 4, seed=2)], None)
    teacher = TeacherMaps([maps(2, 32, 8, 8, seed=3), maps(2, 64, 4, 4, seed=4)], {})
    adapted = term.adapter(student.pyramid[1]).detach()
    found = term(term.of_student(student), term.of_teacher(teacher)).item()
    assert found == pytest.approx(reference(adapted, teacher.pyramid[1], 2.0), rel=1e-4)
    before = term.adapter.weight.clone()
    term.observe(student, teacher)
    term.fit()
    assert torch.equal(term.adapter.weight, before) == (adapter == "conv")


def test_the_temperature_reaches_the_class_maps() -> None:
    terms, _ = built(["", "cat"], ["cat"], tau=2.0)
    ours, theirs = ([maps(2, c, s, s, seed=s + c) for s in (8, 4, 2)] for c in (3, 1))
    scores = torch.cat([m.flatten(2) for m in ours], -1)
    expected = sum(reference(s[:, 1:2], t, 2.0) for s, t in zip(ours, theirs, strict=True))
    assert terms[-1](scores, theirs).item() == pytest.approx(expected, rel=1e-5)


def test_without_weight_no_class_maps_are_compared() -> None:
    terms, _ = built(["0"], ["0"], cwd=0.0, class_share=1.0)
    assert [term.name for term in terms] == ["P3", "P4", "P5"]


def test_class_maps_of_pixels_and_of_objects_are_not_compared() -> None:
    student, teacher = YOLO(bare("yolov8n.yaml")).model, YOLO(bare("yolo26n-sem.yaml", 0.5)).model
    teacher.names = {0: "cat"}
    terms = build_terms(Settings.parse({"teacher": "a.pt"}), LEVELS, [8, 16], student, Teacher(teacher), ["cat"])
    assert [term.name for term in terms] == ["P3", "P4"]
