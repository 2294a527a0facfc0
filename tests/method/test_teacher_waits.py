"""What a teacher may not do on a GPU: wait for the host. Its tensors are fake ones on a GPU that need not be there."""

from typing import Any

import pytest
import torch
from conftest import settled_on
from test_teacher import assert_same_maps
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from ultralytics import RTDETR

from yolo_cwd.method.teacher import Precision, Teacher, load_teacher

FAMILIES = ["yolov8n", "yolo12n", "yolo26n", "rtdetr-l", "yolov8n-rtdetr", "yolov8s-world", "yolov8s-worldv2"]
FAMILIES += ["yoloe-11s-seg", "yolo26n-sem", "yolo26n-depth"]


class FromHost(TorchDispatchMode):
    """Notes the operators that take tensors of the host and make tensors on the GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        of, to = ({x.device.type for x in tree_leaves(tree) if isinstance(x, torch.Tensor)} for tree in (args, made))
        if "cpu" in of and "cuda" in to:
            self.found.append(str(func))
        return made


def on_paper(teacher: Teacher) -> FakeTensorMode:
    """Move a teacher to a GPU that is not there, as a training does; in the mode that is returned it can be used."""
    mode, device = FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda")

    def fake(x: torch.Tensor) -> torch.Tensor:
        return torch.empty(x.shape, dtype=torch.float16 if x.is_floating_point() else x.dtype, device=device)

    with mode:
        teacher._apply(fake)  # parameters and buffers; what is neither is up to the teacher
        teacher.to = lambda *args, **kwargs: teacher
        teacher.place(device)
    teacher.precision = Precision("fp16")
    return mode


@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_is_copied_from_the_host(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    teacher = load_teacher(f"{name}.yaml")
    with on_paper(teacher), FromHost() as host:
        images = torch.empty(2, 3, 96, 64, device="cuda")
        teacher(images)  # the first pass may make what is kept
        host.found.clear()
        maps = teacher(images)
    assert {(m.device.type, m.dtype) for m in maps} == {("cuda", torch.float16)}
    assert host.found == []


def test_copies_from_the_host_are_noted() -> None:
    with FakeTensorMode(), FromHost() as host:
        torch.ones(2).to("cuda")
    assert host.found == ["aten._to_copy.default"]


def test_positions_are_those_of_each_size() -> None:
    """Made once for a size of the map, whatever sizes come between, and in every precision."""
    model = settled_on(RTDETR("yolov8n-rtdetr.yaml").model, torch.rand(4, 3, 64, 64))
    teacher, placed = (load_teacher(model) for _ in range(2))
    placed.place(torch.device("cpu"))
    for size in ((64, 64), (64, 96), (96, 64), (64, 64)):
        images = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0))
        assert_same_maps(placed(images), teacher(images))
    placed.calibrate("bf16", images)
    assert {m.dtype for m in placed(images)} == {torch.bfloat16}
