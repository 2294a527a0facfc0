"""What a head receives and returns, and that looking at it leaves no trace."""

import pickle
from typing import Any

import pytest
import torch
from conftest import bare
from torch import nn
from ultralytics import YOLO
from ultralytics.nn.tasks import DetectionModel

from yolo_cwd.config import ConfigError
from yolo_cwd.method.fpn import (
    HeadTap,
    Tap,
    class_branches,
    class_maps_agree,
    head_inputs,
    hooks_set_aside,
    image_channels,
    match_levels,
    modes_untouched,
    pyramid_taps,
    student_features,
    student_scores,
)


@pytest.fixture(scope="module")
def detector() -> Any:
    return DetectionModel(bare("yolov8n.yaml"), verbose=False)


class Maps(nn.Module):
    """A network whose maps have the given sizes."""

    def __init__(self, *sizes: tuple[int, int], channels: int = 4) -> None:
        super().__init__()
        self.sizes, self.first = sizes, nn.Conv2d(channels, 2, 1)

    def forward(self, images: torch.Tensor) -> Any:
        return [torch.zeros(len(images), 2 + i, *size) for i, size in enumerate(self.sizes)]


def test_a_head_receives_its_maps_and_is_not_run(detector: Any) -> None:
    head, ran = detector.model[-1], []
    handle = head.register_forward_hook(lambda *_: ran.append(1))
    found = head_inputs(detector, torch.zeros(2, 3, 64, 96))
    handle.remove()
    assert [tuple(m.shape) for m in found] == [(2, 16, 8, 12), (2, 32, 4, 6), (2, 64, 2, 3)]
    assert ran == []
    assert not head._forward_pre_hooks


def test_a_pyramid_is_found_without_a_trace(detector: Any) -> None:
    detector.train().model[0].eval()
    modes = [m.training for m in detector.modules()]
    before = {name: value.clone() for name, value in detector.state_dict().items()}
    assert pyramid_taps(detector, "x") == {8: Tap(0, 16), 16: Tap(1, 32), 32: Tap(2, 64)}
    assert [m.training for m in detector.modules()] == modes
    assert all(torch.equal(before[name], value) for name, value in detector.state_dict().items())
    with modes_untouched(detector):
        detector.eval()
    assert [m.training for m in detector.modules()] == modes


def test_a_module_of_ones_own_has_taps_by_its_strides() -> None:
    assert pyramid_taps(Maps((8, 8), (32, 32), channels=1), "x") == {32: Tap(0, 2), 8: Tap(1, 3)}
    assert (image_channels(Maps(channels=1)), image_channels(nn.Linear(1, 1))) == (1, 3)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        pytest.param([(8, 4)], "^x: makes a map of 8x4 of an image of 256x256, which is no whole stride", id="oblong"),
        pytest.param([(9, 9)], "^x: makes a map of 9x9 of an image", id="no whole stride"),
        pytest.param([(8, 8), (8, 8)], "^x: has two maps of stride 32; give", id="two of one stride"),
        pytest.param([], "^x: it has no pyramid, a list of maps .*; give a YOLO model", id="none"),
    ],
)
def test_what_is_no_pyramid_is_refused(sizes: list[tuple[int, int]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pyramid_taps(Maps(*sizes), "x")


class Returns(nn.Module):
    """A network that returns a given value."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value

    def forward(self, _: torch.Tensor) -> Any:
        return self.value


def test_a_module_may_name_its_maps() -> None:
    assert pyramid_taps(Returns({"fine": torch.zeros(1, 4, 32, 32)}), "x") == {8: Tap(0, 4)}


@pytest.mark.parametrize("value", [torch.zeros(1, 4, 8, 8), [torch.zeros(1, 4)], ["map"], None])
def test_what_is_no_list_of_maps_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"^x: it has no pyramid, a list of maps"):
        pyramid_taps(Returns(value), "x")


def test_levels_that_are_wanted_and_missing_are_named_together() -> None:
    taps = {8: Tap(0, 1), 16: Tap(1, 1)}
    with pytest.raises(
        ConfigError, match=r"^levels=P2,P3: the student has P3, P4 and the teacher P3, P4; choose among P3"
    ):
        match_levels(taps, taps, (4, 8))
    with pytest.raises(ConfigError, match=r"^levels=P3: the student has none and the teacher P3, P4; choose a teacher"):
        match_levels({}, taps, (8,))


def test_features_and_scores_are_those_that_carry_the_graph() -> None:
    one, many = {"feats": ["one"], "scores": "one"}, {"feats": ["many"], "scores": "many"}
    assert student_features(many) == student_features({"one2one": one, "one2many": many}) == ["many"]
    assert student_features((torch.zeros(1), many)) is None
    assert student_scores(many) == student_scores({"one2one": one, "one2many": many}) == "many"
    assert student_scores(("logits", "auxiliary")) == student_scores("logits") == "logits"


def test_a_tap_keeps_the_maps_of_a_training_pass_once() -> None:
    head, tap = nn.Identity(), HeadTap()
    head.register_forward_pre_hook(tap)
    head(["a", "b"])
    assert tap.take(None) == ["a", "b"]
    assert tap.take(None) is None
    head.eval()(["c"])
    assert tap.take(None) is None
    assert pickle.loads(pickle.dumps(tap))(head, ("anything",)) == ("anything",)


def test_hooks_are_set_aside_and_come_back() -> None:
    head, tap = nn.Identity(), HeadTap()
    head.register_forward_pre_hook(tap)
    with hooks_set_aside(head):
        assert not head._forward_pre_hooks
    assert list(head._forward_pre_hooks.values()) == [tap]


def test_class_branches_by_head(detector: Any) -> None:
    """A World head compares with words: it has no logits of classes."""
    semantic = YOLO(bare("yolo26n-sem.yaml")).model.model[-1]
    end_to_end = DetectionModel(bare("yolo26n.yaml"), verbose=False).model[-1]
    world = YOLO("yolov8s-world.yaml").model.model[-1]
    head = detector.model[-1]
    assert class_branches(head) == list(head.cv3)
    assert len(class_branches(end_to_end)) == 3
    assert class_branches(semantic) == [semantic.classifier]
    assert class_branches(world) == class_branches(nn.Identity()) == []
    assert class_maps_agree(head, end_to_end)
    assert class_maps_agree(semantic, semantic)
    assert not class_maps_agree(head, semantic)
    assert not class_maps_agree(head, world)
    assert not class_maps_agree(world, world)
    end_to_end.cv3 = None  # as a fused one
    assert class_branches(end_to_end) == list(end_to_end.one2one_cv3)
