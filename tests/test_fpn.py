"""Levels, the teacher without its head, and the adapters."""

from pathlib import Path

import pytest
import torch
from torch import nn
from ultralytics import YOLO
from ultralytics.nn.tasks import DetectionModel

from yolo_cwd.config import ConfigError
from yolo_cwd.fpn import Level, Tap, Teacher, build_adapters, load_teacher, match_levels, pyramid_taps

IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def head_inputs(model: nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    """What reaches the head of a whole detector, by a hook: the independent reference for the headless teacher."""
    seen: list[torch.Tensor] = []
    hook = model.model[-1].register_forward_pre_hook(lambda module, inputs: seen.extend(inputs[0]))
    with torch.no_grad():
        model(images)
    hook.remove()
    return seen


@pytest.mark.parametrize("name", ["yolov8n.yaml", "yolov10n.yaml", "yolo26n.yaml"])
def test_teacher_returns_what_its_head_would_receive(name: str) -> None:
    torch.manual_seed(0)
    model = DetectionModel(name, verbose=False).eval()
    teacher = Teacher(model)
    for ours, reference in zip(teacher(IMAGES), head_inputs(model, IMAGES), strict=True):
        assert torch.equal(ours, reference)
        assert not ours.requires_grad


def test_teacher_leaves_the_given_model_alone_and_stays_frozen() -> None:
    model = DetectionModel("yolov8n.yaml", verbose=False).train()
    head = model.model[-1]
    teacher = Teacher(model).train()
    assert model.model[-1] is head
    assert model.training
    assert all(p.requires_grad for n, p in model.named_parameters() if "dfl" not in n)
    assert not any(m.training for m in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not {p.data_ptr() for p in teacher.parameters()} & {p.data_ptr() for p in model.parameters()}
    assert teacher.parameter_count == sum(p.numel() for p in model.parameters())


def test_teacher_with_p6_takes_images_of_a_student_without() -> None:
    teacher = Teacher(DetectionModel("yolov8n-p6.yaml", verbose=False))
    shapes = [tuple(m.shape[-2:]) for m in teacher(torch.rand(1, 3, 96, 160))]
    assert shapes == [(12, 20), (6, 10), (3, 5), (1, 2)]


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


def test_adapters() -> None:
    levels = [Level("P3", 8, 0, 0, 64, 128), Level("P4", 16, 1, 1, 128, 128)]
    state = torch.get_rng_state()
    adapters = build_adapters(levels, "conv")
    assert torch.equal(torch.get_rng_state(), state), "the student's random numbers must not depend on adapters"
    assert [tuple(p.shape) for p in adapters.parameters()] == [(128, 64, 1, 1), (128, 128, 1, 1)]
    assert isinstance(build_adapters(levels[1:], "identity")[0], nn.Identity)
    with pytest.raises(ConfigError, match="P3 has 64 channels in the student and 128 in the teacher"):
        build_adapters(levels, "identity")


def test_load_teacher_from_file_and_objects(checkpoints: Path) -> None:
    path = checkpoints / "small.pt"
    model = YOLO(path)
    expected = load_teacher(str(path))(IMAGES)
    for source in (path, model, model.model):
        torch.testing.assert_close(load_teacher(source)(IMAGES), expected)


def test_an_untrained_teacher_is_the_same_every_time() -> None:
    state = torch.get_rng_state()
    first, second = (load_teacher("yolov8n.yaml")(IMAGES) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_fused_teacher_still_has_its_levels() -> None:
    model = DetectionModel("yolo26n.yaml", verbose=False)
    assert Teacher(model.fuse(verbose=False)).taps.keys() == {8, 16, 32}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        pytest.param("segment.pt", "not a YOLO detection model (its head is Segment)", id="segmentation"),
        pytest.param("classify.pt", "not a YOLO detection model (its head is Classify)", id="classification"),
        pytest.param("absent.pt", "absent.pt", id="no such file"),
        pytest.param("absent.yaml", "absent.yaml", id="no such model file"),
        pytest.param("small.onnx", "suffix .onnx", id="other format"),
        pytest.param("truncated.pt", "truncated", id="truncated"),
        pytest.param("empty.pt", "empty", id="empty"),
        pytest.param("picture.pt", "existing .pt checkpoint", id="no checkpoint at all"),
        pytest.param("numbers.pt", "references types outside", id="a pickle without a model"),
        pytest.param("rtdetr-l.yaml", "its head is RTDETRDecoder", id="a detector without a YOLO head"),
    ],
)
def test_teachers_that_are_refused(checkpoints: Path, tmp_path: Path, source: str, message: str) -> None:
    whole = (checkpoints / "small.pt").read_bytes()
    (tmp_path / "truncated.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "picture.pt").write_bytes(b"\x89PNG\r\n" + bytes(100))
    torch.save({"model": torch.zeros(3)}, tmp_path / "numbers.pt")
    folder = checkpoints if (checkpoints / source).exists() else tmp_path
    path = source if source.startswith("rtdetr") else str(folder / source)
    with pytest.raises(ConfigError) as error:
        load_teacher(path)
    assert str(error.value).startswith(f"teacher={path}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
