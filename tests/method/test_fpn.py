"""Levels."""

import pytest
from ultralytics.nn.tasks import DetectionModel

from yolo_cwd.config import ConfigError
from yolo_cwd.method.fpn import Level, Tap, match_levels, pyramid_taps


def test_taps() -> None:
    taps = pyramid_taps(DetectionModel("yolov8n-p2.yaml", verbose=False), "student")
    assert taps == {4: Tap(0, 32), 8: Tap(1, 64), 16: Tap(2, 128), 32: Tap(3, 256)}


def test_levels_are_matched_by_stride_not_by_position() -> None:
    student = {4: Tap(0, 32), 8: Tap(1, 64), 16: Tap(2, 128)}
    teacher = {8: Tap(0, 128), 16: Tap(1, 256), 32: Tap(2, 512)}
    assert match_levels(student, teacher, None) == [Level("P3", 8, 1, 0, 64, 128), Level("P4", 16, 2, 1, 128, 256)]
    assert [level.name for level in match_levels(student, teacher, (16,))] == ["P4"]


@pytest.mark.parametrize(
    ("student", "wanted", "message"),
    [
        ((8, 16, 32), (4,), "levels=P2: the student has P3, P4, P5 and the teacher P3, P4, P5; choose among"),
        ((4,), None, "levels=all: the student has P2 and the teacher P3, P4, P5; choose a teacher that shares"),
    ],
)
def test_levels_that_do_not_match(student: tuple[int, ...], wanted: tuple[int, ...] | None, message: str) -> None:
    taps = [{stride: Tap(i, 8) for i, stride in enumerate(strides)} for strides in (student, (8, 16, 32))]
    with pytest.raises(ConfigError, match=message):
        match_levels(*taps, wanted)
