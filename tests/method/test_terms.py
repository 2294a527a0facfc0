"""Terms: what each compares, what it takes up of the random numbers, and which classes are compared."""

from typing import Any

import pytest
import torch
from conftest import STUDENT, TEACHER
from test_divergence import maps, reference
from ultralytics import YOLO

from yolo_cwd.config import Settings
from yolo_cwd.method.fpn import Level, match_levels, pyramid_taps
from yolo_cwd.method.teacher import Teacher, TeacherMaps
from yolo_cwd.method.terms import CLASS_MAPS, ClassTerm, StudentMaps, build_terms

LEVELS = [Level("P3", 8, 0, 0, 3, 5), Level("P4", 16, 1, 1, 4, 6)]


def built(names: list[str], teacher_names: list[str], **options: Any) -> Any:
    """Return the terms of two tiny detectors."""
    student, model = YOLO(STUDENT).model, YOLO(TEACHER).model
    model.names = dict(enumerate(teacher_names))
    teacher = Teacher(model)
    taps = pyramid_taps(student, "student")
    levels = match_levels(taps, teacher.taps, None)
    settings = Settings.parse({"teacher": "a.pt", **options})
    return build_terms(settings, levels, list(taps), student, teacher, names), teacher


def test_adapters_draw_no_random_number_of_the_students() -> None:
    torch.manual_seed(1)
    student, teacher = YOLO(STUDENT).model, Teacher(YOLO(TEACHER).model)
    taps = pyramid_taps(student, "student")
    levels = match_levels(taps, teacher.taps, None)
    state = torch.get_rng_state()
    terms = build_terms(Settings.parse({"teacher": "a.pt"}), levels, list(taps), student, teacher, ["0"])
    assert torch.equal(torch.get_rng_state(), state)
    channels = [(x.name, (x.teacher_channels, x.student_channels, 1, 1)) for x in levels]
    shapes = dict(channels)
    assert {t.name: tuple(t.adapter.weight.shape) for t in terms if t.name != CLASS_MAPS} == shapes


@pytest.mark.parametrize(
    ("options", "shares"),
    [
        pytest.param({}, {"P3": 1.0, "P4": 1.0, "P5": 1.0, CLASS_MAPS: 1.0}, id="defaults"),
        pytest.param({"share": 0.5, "level_weights": "1,2,0"}, None, id="level weights"),
        pytest.param({"cwd": 50.0, "class_share": 2.0}, {"P3": 1, "P4": 1, "P5": 1, CLASS_MAPS: 0.04}, id="fixed"),
        pytest.param({"class_share": 0}, {"P3": 1.0, "P4": 1.0, "P5": 1.0}, id="no class maps"),
    ],
)
def test_shares(options: dict[str, Any], shares: dict[str, float] | None) -> None:
    if "level_weights" in options:
        options = {**options, "level_weights": [1, 2, 0]}
        shares = {"P3": 0.5, "P4": 1.0, "P5": 0.0, CLASS_MAPS: 0.5}
    terms, _ = built(["0", "1"], ["0", "1"], **options)
    assert {term.name: term.share for term in terms} == pytest.approx(shares)
    assert [term.balanced for term in terms] == ["cwd" not in options or t.name == CLASS_MAPS for t in terms]


@pytest.mark.parametrize(
    ("names", "teacher", "known"),
    [
        pytest.param(["cat", "dog"], ["dog", "cat", "cow"], [0, 1], id="another order"),
        pytest.param(["cat", "", "cow"], ["cow", "dog", "cat"], [0, 2], id="a class that is not trained"),
        pytest.param(["cat", "cat", "dog"], ["cat", "dog"], [2], id="a name twice in the data"),
        pytest.param(["cat", "dog"], ["cat", "cat", "dog"], [1], id="a name twice in the teacher"),
        pytest.param(["cat"], ["dog"], [], id="none"),
    ],
)
def test_classes_are_matched_by_name_where_that_is_unique(
    names: list[str], teacher: list[str], known: list[int]
) -> None:
    terms, frozen = built(names, teacher)
    found = [term.classes for term in terms if isinstance(term, ClassTerm)]
    assert found == ([known] if known else [])
    images = torch.zeros(1, 3, 64, 64)
    branches = frozen.maps(images).branches
    assert set(branches) == ({CLASS_MAPS} if known else set())
    assert all(m.shape[1] == len(known) for m in branches.get(CLASS_MAPS, []))


def test_class_maps_against_the_definition() -> None:
    """The teacher knows the last and the first of 3 classes; of P3 to P5, P4 is left out."""
    levels = [LEVELS[0], Level("P5", 32, 2, 1, 4, 6)]
    ours = [maps(2, 3, 8, 8, seed=1), maps(2, 3, 4, 4, seed=2), maps(2, 3, 2, 2, seed=3)]
    theirs = [maps(2, 2, 8, 8, seed=4), maps(2, 2, 2, 2, seed=5)]
    term = ClassTerm(levels, [8, 16, 32], [2, 0], 1.0, tau=2.0)
    scores = torch.cat([m.flatten(2) for m in ours], -1)
    found = term(
        term.of_student(StudentMaps([], {"scores": scores})), term.of_teacher(TeacherMaps([], {CLASS_MAPS: theirs}))
    )
    expected = sum(reference(s[:, [2, 0]], t, 2.0) for s, t in ((ours[0], theirs[0]), (ours[2], theirs[1])))
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_class_maps_of_a_semantic_head_are_those_of_the_finest_level() -> None:
    ours, theirs = maps(2, 3, 8, 8, seed=1), [maps(2, 3, 8, 8, seed=2)]
    term = ClassTerm(LEVELS, [8, 16], [0, 1, 2], 1.0, tau=1.0)
    assert term(term.of_student(StudentMaps([], (ours, None))), theirs).item() == pytest.approx(
        reference(ours, theirs[0], 1.0), rel=1e-5
    )


def test_a_teacher_without_a_head_shows_no_classes() -> None:
    teacher = Teacher(YOLO(TEACHER).model)
    teacher._head = (None,)
    student = YOLO(STUDENT).model
    terms = build_terms(Settings.parse({"teacher": "a.pt"}), [], [], student, teacher, ["0"])
    assert list(terms) == []
