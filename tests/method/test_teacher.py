"""The frozen teacher: without its head, faithful in every precision, and refused where it cannot be used."""

import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import STUDENT, Payload, narrow, settled_on
from torch import nn
from torch.nn.utils import prune
from ultralytics import YOLO
from ultralytics.nn import tasks
from ultralytics.nn.modules.head import Detect
from ultralytics.nn.tasks import DetectionModel

from yolo_cwd.config import ConfigError
from yolo_cwd.method import parallel
from yolo_cwd.method import teacher as teacher_module
from yolo_cwd.method.teacher import Precision, Teacher, load_teacher
from yolo_cwd.trainer import CWDTrainer

IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
Train = Callable[..., CWDTrainer]


def head_inputs(model: nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    """What reaches the head of a whole detector, by a hook: the independent reference for the headless teacher."""
    seen: list[torch.Tensor] = []
    hook = model.model[-1].register_forward_pre_hook(lambda module, inputs: seen.extend(inputs[0]))
    with torch.no_grad():
        model(images)
    hook.remove()
    return seen


def assert_same_maps(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    """Batch normalization is folded in, so the last digits may differ."""
    for a, b in zip(ours, theirs, strict=True):
        assert b.std() > 0.1
        assert (a - b).norm() < 1e-3 * b.norm()


@pytest.mark.parametrize("name", ["yolov8n.yaml", "yolov10n.yaml", "yolo26n.yaml"])
def test_teacher_returns_what_its_head_would_receive(name: str) -> None:
    torch.manual_seed(0)
    model = settled_on(DetectionModel(name, verbose=False), torch.rand(16, 3, 64, 64)).eval()
    maps = load_teacher(model)(IMAGES)
    assert_same_maps(maps, head_inputs(model, IMAGES))
    assert not any(m.requires_grad for m in maps)


def test_teacher_leaves_the_given_model_alone_and_stays_frozen() -> None:
    model = DetectionModel("yolov8n.yaml", verbose=False).train()
    head = model.model[-1]
    teacher = load_teacher(model).train()
    assert not any(isinstance(m, Detect | nn.BatchNorm2d) for m in teacher.modules())
    assert any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
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


def test_images_that_do_not_fit_the_coarsest_stride_are_padded_in_gray() -> None:
    images = torch.rand(2, 3, 64, 160, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    model = settled_on(DetectionModel(narrow("yolov8n-p6.yaml"), verbose=False), torch.rand(16, 3, 64, 64)).eval()
    padded = torch.full((2, 3, 64, 192), 114 / 255)  # multiples of 64
    padded[..., :160] = images
    expected = [m[..., : 64 // s, : 160 // s] for m, s in zip(head_inputs(model, padded), (8, 16, 32, 64), strict=True)]
    assert_same_maps(load_teacher(model)(images), expected)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("pixels", [1, 2 * 64 * 64, 10**9], ids=["one image", "two images", "as many as there are"])
def test_images_that_go_through_in_parts(count: int, pixels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    images = torch.rand(5, 3, 64, 64)
    teacher = load_teacher(settled_on(DetectionModel("yolov8n.yaml", verbose=False), images))
    expected = teacher.body(images)
    monkeypatch.setattr(teacher_module, "PART_PIXELS", pixels)
    for module in (parallel, teacher_module):
        monkeypatch.setattr(module, "cores", lambda device: count)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    with torch.autocast("cpu", torch.bfloat16):
        maps = teacher(images)
    assert_same_maps(maps, expected)
    assert not any(m.requires_grad for m in maps)


def calibrated(wanted: str, monkeypatch: pytest.MonkeyPatch, fast: list[str]) -> Teacher:
    """A teacher after its calibration, on a device that is fast in the named precisions."""
    monkeypatch.setattr(teacher_module, "_fast_precisions", lambda device: fast)
    torch.manual_seed(0)
    model = DetectionModel("yolov8n.yaml", verbose=False)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 1.5, 2.5)  # as large as a trained model's maps
    teacher = Teacher(model)
    teacher.calibrate(wanted, IMAGES)
    return teacher


@pytest.mark.parametrize(
    ("wanted", "fast", "chosen"),
    [
        pytest.param("auto", ["bf16"], "bf16", id="what the device is fast in"),
        pytest.param("auto", ["fp16", "bf16"], "fp16", id="the first of them"),
        pytest.param("auto", [], "fp32", id="nothing is faster"),
        pytest.param("bf16", [], "bf16", id="as told"),
        pytest.param("fp32", ["bf16", "fp16"], "fp32", id="as told, though slower"),
    ],
)
def test_calibration(monkeypatch: pytest.MonkeyPatch, wanted: str, fast: list[str], chosen: str) -> None:
    teacher = calibrated(wanted, monkeypatch, fast)
    exact = calibrated("fp32", monkeypatch, [])(IMAGES)
    errors = [((a.float() - b).norm() / b.norm()).item() for a, b in zip(teacher(IMAGES), exact, strict=True)]
    assert teacher.precision.name == chosen
    assert teacher.precision.error == pytest.approx(max(errors), rel=1e-3)
    assert max(errors) < 0.02
    assert {m.dtype for m in teacher(IMAGES)} == {teacher_module.DTYPES[chosen]}
    assert not any(p.requires_grad for p in teacher.parameters())


def test_calibration_keeps_to_what_is_faithful(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_module, "MAX_ERROR", 1e-4)  # between the error of bfloat16 and none
    assert calibrated("auto", monkeypatch, ["bf16"]).precision == Precision("fp32")


def test_no_clock_decides_on_the_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    def clock() -> float:
        pytest.fail("the choice must be the same on a busy machine")

    for name in ("time", "perf_counter", "monotonic", "process_time"):
        monkeypatch.setattr(f"time.{name}", clock)
    assert calibrated("auto", monkeypatch, ["bf16"]).precision.name == "bf16"


@pytest.mark.parametrize("wanted", ["auto", "fp32", "bf16"])
def test_a_teacher_of_broken_weights_is_refused(wanted: str) -> None:
    model = DetectionModel("yolov8n.yaml", verbose=False)
    next(model.parameters()).data[0, 0, 0, 0] = math.nan
    with pytest.raises(ConfigError, match=r"teacher: its features are not finite, even in float32"):
        Teacher(model).calibrate(wanted, IMAGES)


@pytest.mark.parametrize(
    ("device", "given", "tried"),
    [
        pytest.param("cpu", (1, 3, 640, 480), (1, 3, 192, 144), id="small on a CPU"),
        pytest.param("cpu", (2, 3, 64, 64), (2, 3, 64, 64), id="small as it is"),
        pytest.param("meta", (1, 3, 640, 480), (1, 3, 640, 480), id="as they are on a GPU"),
    ],
)
def test_images_that_precisions_are_tried_on(device: str, given: tuple[int, ...], tried: tuple[int, ...]) -> None:
    assert teacher_module._trial_images(torch.empty(given, device=device)).shape == tried


def test_float16_that_overflows() -> None:
    model = DetectionModel("yolov8n.yaml", verbose=False)
    with torch.no_grad():
        model.model[0].bn.weight.fill_(1e6)
    teacher = Teacher(model)
    with pytest.raises(ConfigError, match=r"teacher_dtype=fp16: .*overflows.*use auto or fp32"):
        teacher.calibrate("fp16", IMAGES)


def test_autocast_around_it_does_not_change_the_teacher() -> None:
    teacher = load_teacher("yolov8n.yaml")
    expected = teacher(IMAGES)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(teacher(IMAGES), expected, rtol=0, atol=0)


def test_load_teacher_from_file_and_objects(checkpoints: Path) -> None:
    path = checkpoints / "small.pt"
    model = YOLO(path)
    expected = load_teacher(str(path))(IMAGES)
    for source in (path, model, model.model):
        torch.testing.assert_close(load_teacher(source)(IMAGES), expected, rtol=0, atol=0)


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
        pytest.param("classify.pt", "it has no pyramid", id="classification"),
        pytest.param("absent.pt", "absent.pt", id="no such file"),
        pytest.param("absent.yaml", "absent.yaml", id="no such model file"),
        pytest.param("small.onnx", "suffix .onnx", id="other format"),
        pytest.param("truncated.pt", "truncated", id="truncated"),
        pytest.param("empty.pt", "empty", id="empty"),
        pytest.param("picture.pt", "existing .pt checkpoint", id="no checkpoint at all"),
        pytest.param("numbers.pt", "holds weights only, no model; load them", id="a pickle without a model"),
        pytest.param("state.pt", "holds weights only, no model; load them", id="a state dict"),
        pytest.param("nothing.pt", "holds weights only, no model; load them", id="an empty dict"),
        pytest.param("script.pt", "is a TorchScript archive", id="TorchScript"),
        pytest.param("page.pt", "outside the supported Ultralytics checkpoint format; give", id="a web page"),
        pytest.param(
            "pointer.pt",
            "outside the supported Ultralytics checkpoint format; give",
            id="a pointer of Git LFS",
        ),
        pytest.param("bare.pt", "holds the layers of a model without the model", id="a bare module"),
    ],
)
def test_teachers_that_are_refused(checkpoints: Path, tmp_path: Path, source: str, message: str) -> None:
    whole = (checkpoints / "small.pt").read_bytes()
    (tmp_path / "truncated.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "picture.pt").write_bytes(b"\x89PNG\r\n" + bytes(100))
    torch.save({"model": torch.zeros(3)}, tmp_path / "numbers.pt")
    torch.save(YOLO(STUDENT).model.state_dict(), tmp_path / "state.pt")
    torch.save({}, tmp_path / "nothing.pt")
    torch.jit.script(nn.Conv2d(3, 3, 1)).save(tmp_path / "script.pt")
    (tmp_path / "page.pt").write_text("\n<!DOCTYPE html><html>Not found</html>")
    (tmp_path / "pointer.pt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    torch.save(YOLO(STUDENT).model, tmp_path / "bare.pt")
    folder = checkpoints if (checkpoints / source).exists() else tmp_path
    path = str(folder / source)
    with pytest.raises(ConfigError) as error:
        load_teacher(path)
    assert str(error.value).startswith(f"teacher={path}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert "trust_teacher" not in str(error.value), "it would change nothing"


def test_a_masked_teacher_is_what_it_calculates() -> None:
    model = YOLO(STUDENT).model.eval()
    expected = [m.clone() for m in head_inputs(model, IMAGES)]
    for layer in (model.model[0].conv, model.model[3].conv):
        prune.l1_unstructured(layer, "weight", 0.5)
    masked = head_inputs(model, IMAGES)
    teacher = load_teacher(model)
    teacher.place(torch.device("cpu"))
    teacher.calibrate("bf16", IMAGES)
    for ours, theirs, before in zip(teacher(IMAGES), masked, expected, strict=True):
        assert (ours.float() - theirs).norm() < 0.05 * theirs.norm() < (theirs - before).norm() + theirs.norm()


@pytest.mark.parametrize(
    ("name", "strides"),
    [
        ("yolov8n-seg.yaml", {8, 16, 32}),
        ("yolo11n-pose.yaml", {8, 16, 32}),
        ("yolov8n-obb.yaml", {8, 16, 32}),
        ("yolo26n-sem.yaml", {8, 16}),
        ("yolo26n-depth.yaml", {8, 16, 32}),
        ("yolov8n-rtdetr.yaml", {8, 16, 32}),
        ("yolov8s-worldv2.yaml", {8, 16, 32}),
        ("yoloe-11s-seg.yaml", {8, 16, 32}),
    ],
)
def test_every_network_with_a_pyramid_teaches(name: str, strides: set[int]) -> None:
    teacher = load_teacher(name)
    assert teacher.taps.keys() == strides
    sizes = {stride: tuple(m.shape[-2:]) for stride, m in zip(teacher.taps, teacher(IMAGES), strict=True)}
    height, width = IMAGES.shape[-2:]
    assert sizes == {stride: (height // stride, width // stride) for stride in strides}


class Backbone(nn.Module):
    """A network of somebody's own: images in, maps of strides 16 and 8 out."""

    def __init__(self, size: int = 16) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 6, size, stride=size)
        self.finer = nn.Upsample(scale_factor=2)

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        maps = self.patches(images)
        return [maps, self.finer(maps)]


@pytest.mark.parametrize("wrap", [lambda m: m, nn.DataParallel, torch.compile], ids=["module", "parallel", "compiled"])
def test_a_module_of_ones_own_teaches(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = Backbone()
    teacher = load_teacher(wrap(model))
    assert teacher.taps == {16: (0, 6), 8: (1, 6)}
    assert teacher.argument == "teacher=Backbone"
    assert teacher.names == {}
    torch.testing.assert_close(teacher(IMAGES), model(IMAGES))
    assert all(p.requires_grad for p in model.parameters()), "the user's own stays as it is"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Conv2d(3, 4, 8, stride=8), "teacher=Conv2d: it has no pyramid"),
        (Backbone(14), "teacher=Backbone: makes a map of 18x18 of an image of 256x256, which is no whole stride"),
        (nn.Linear(3, 3), "teacher=Linear: mat1 and mat2"),
    ],
    ids=["one map", "stride of 14", "no images"],
)
def test_modules_without_a_usable_pyramid_are_refused(model: nn.Module, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_teacher(model)
    assert str(error.value).startswith(message)
    assert len(str(error.value)) < 300


def test_two_maps_of_one_stride_are_refused() -> None:
    model = Backbone()
    model.finer = nn.Identity()
    with pytest.raises(ConfigError, match="teacher=Backbone: has two maps of stride 16; give a model with one map a"):
        load_teacher(model)


class CustomDetector(DetectionModel):
    """A class that Ultralytics does not know."""


@pytest.mark.parametrize("place", ["model", "ema", "train_args", "custom class"])
def test_a_hostile_teacher_is_refused_and_nothing_in_it_runs(checkpoints: Path, tmp_path: Path, place: str) -> None:
    marker, file = tmp_path / "ran", tmp_path / "hostile.pt"
    content = torch.load(checkpoints / "small.pt", weights_only=False)
    if place == "custom class":
        content["model"].__class__ = CustomDetector
    elif place == "train_args":
        content["train_args"] = {"epochs": Payload(marker)}
    else:
        content[place] = Payload(marker)
    torch.save(content, file)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ConfigError, match=r"teacher=.*hostile.pt: holds \S+, which .*trust_teacher=True") as error:
        load_teacher(file)
    assert sorted(tmp_path.iterdir()) == before
    assert "\n" not in str(error.value)


def test_trust_is_the_way_round(checkpoints: Path, tmp_path: Path) -> None:
    content = torch.load(checkpoints / "small.pt", weights_only=False)
    content["model"].__class__ = CustomDetector
    torch.save(content, tmp_path / "custom.pt")
    assert load_teacher(tmp_path / "custom.pt", trust=True).taps.keys() == {8, 16, 32}
    with pytest.raises(ConfigError):
        load_teacher(tmp_path / "custom.pt")  # the trust was for one file alone


def test_other_threads_load_what_they_like_meanwhile(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = torch.load(checkpoints / "small.pt", weights_only=False)
    content["model"].__class__ = CustomDetector
    torch.save(content, tmp_path / "custom.pt")
    begun, may_end = threading.Event(), threading.Event()
    read = tasks.torch_load

    def slow(*args: Any, **kwargs: Any) -> Any:
        if threading.current_thread() is not threading.main_thread():
            begun.set()
            may_end.wait(1)  # some releases of Ultralytics load one file at a time: then the other waits
        return read(*args, **kwargs)

    monkeypatch.setattr(tasks, "torch_load", slow)
    other = threading.Thread(target=load_teacher, args=(checkpoints / "small.pt",))
    other.start()
    begun.wait(60)
    try:
        assert type(YOLO(tmp_path / "custom.pt").model) is CustomDetector
    finally:
        may_end.set()  # restricted loading is one at a time
        other.join(60)
    with pytest.raises(ConfigError):
        load_teacher(tmp_path / "custom.pt")
    assert not tasks.SAFE_LOAD
