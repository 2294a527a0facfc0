"""What is deployed: the exported distilled model is the graph of the plain one, so it runs at the same speed."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SHORT, narrow, short_trainings
from ultralytics import YOLO

Graph = tuple[list[Any], dict[str, list[int]]]  # operators in order, with what leaves them; shapes of the weights
MODELS = {"model": narrow("yolov8n.yaml"), "teacher": narrow("yolov8s.yaml")}


@pytest.fixture(scope="module")
def students(data: str, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Checkpoints of a student that Ultralytics alone has trained, and of one that a teacher has taught."""
    folder = tmp_path_factory.mktemp("students")
    plain = YOLO(MODELS["model"])
    plain.train(**{**SHORT, "model": MODELS["model"], "data": data, "project": str(folder)})
    return [Path(plain.trainer.best), Path(short_trainings(data, folder)(**MODELS, final=True).best)]


def torchscript(weights: Path) -> Graph:
    model = torch.jit.load(YOLO(weights).export(format="torchscript", imgsz=64))
    shown = [str(node) for node in model.inlined_graph.nodes()]
    nodes = [re.sub(r"\.___torch_mangle_\d+|#.*", "", node) for node in shown]  # without numbers that count exports
    return nodes, {name: list(weight.shape) for name, weight in model.state_dict().items()}


def onnx(weights: Path) -> Graph:
    import onnx

    graph = onnx.load(YOLO(weights).export(format="onnx", imgsz=64, simplify=False)).graph
    shapes = {weight.name: list(weight.dims) for weight in graph.initializer}
    nodes = []
    for node in graph.node:
        if node.op_type == "Identity" and node.input[0] in shapes:  # equal weights are stored once
            shapes[node.output[0]] = shapes[node.input[0]]
        else:
            nodes.append((node.op_type, list(node.input), list(node.output)))
    return nodes, shapes


@pytest.mark.parametrize("exported", [torchscript, onnx])
def test_the_distilled_student_is_the_graph_of_the_plain_one(
    students: list[Path], exported: Callable[[Path], Graph]
) -> None:
    if exported is onnx:
        pytest.importorskip("onnx", reason="onnx is not installed: pip install -e '.[dev]'")
    plain, distilled = (exported(weights) for weights in students)
    assert plain == distilled
    assert len(plain[0]) > 100  # operators
    assert len(plain[1]) > 50  # weights
    first, second = (YOLO(weights).model.model[0].conv.weight for weights in students)
    assert not torch.equal(first, second)  # of the same shape, trained otherwise
