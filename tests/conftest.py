"""Fixtures: a tiny data set, tiny models, and short trainings in a folder of their own."""

import atexit
import gc
import io
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["YOLO_CONFIG_DIR"] = tempfile.mkdtemp(prefix="yolo_cwd-tests-")  # keep the user's settings out of it
os.environ["OMP_NUM_THREADS"] = "1"  # tests share the cores out, one for each

import cv2
import digits
import numpy as np
import pictures
import pytest
import torch
import yaml
from torch import nn
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn.tasks import yaml_model_load
from ultralytics.utils import LOGGER
from ultralytics.utils.ops import make_divisible

from yolo_cwd.tasks import TASKS
from yolo_cwd.trainer import CWDTrainer

pytest_plugins = ["labeling", "staging"]
FOLDER = Path(os.environ["YOLO_CONFIG_DIR"])
atexit.register(shutil.rmtree, FOLDER, ignore_errors=True)
torch.set_num_threads(1)


def written(folder: str, name: str, model: dict[str, Any]) -> str:
    """Write a model's description, and return its path."""
    file = FOLDER / folder / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(yaml.safe_dump(model), encoding="utf-8")
    return str(file)


def narrow(name: str, width: float = 0.25) -> str:
    """Path of a model of Ultralytics with a share of its channels, and with one of each repeated block.

    Its layers are the same and their numbers too, so that it stands in for the whole one wherever size does not matter.
    """
    model = yaml_model_load(name)
    if scale := model["scale"]:
        _, usual, most = model["scales"][scale]
        model["scales"] = {scale: [0.01, usual * width, most]}
    elif "width_multiple" in model:
        model |= {"depth_multiple": 0.01, "width_multiple": width**2}  # as large as an n elsewhere, then the share
    return written(f"width{width}", name, {k: v for k, v in model.items() if k != "yaml_file"})


def bare(name: str, width: float = 0.25, loud: bool = False) -> str:
    """Path of a model of Ultralytics with its own head on five strided convolutions, which stand for its pyramid.

    It has the channels of the narrow one and trains in half the time, for wherever backbone and neck do not matter. The
    maps of random weights all but vanish, and a teacher of such maps teaches next to nothing: loud ones are normalized.
    """
    model = yaml.safe_load(Path(narrow(name, width)).read_text(encoding="utf-8"))
    sources, *head = model["head"][-1]
    channels = (64, 128, 256, 512, 1024)
    model["backbone"] = [[-1, 1, "Conv", [c, 3, 2]] for c in channels]
    levels = list(range(2, 2 + len(sources)))  # P3 is the third of them
    if loud:
        ((_, share, most),) = model["scales"].values()
        made = [make_divisible(min(c, most) * share, 8) for c in channels]
        pairs = zip(model["backbone"], ([-1, 1, "nn.InstanceNorm2d", [c]] for c in made), strict=True)
        model["backbone"], levels = list(chain.from_iterable(pairs)), [2 * i + 1 for i in levels]
    model["head"] = [[levels, *head]]
    return written(f"bare{width}{'loud' if loud else ''}", name, model)


def settled(model: Any, data: str) -> Any:
    """Give a model of random weights the normalization statistics of the data, as a trained one has them."""
    images = [cv2.imread(str(file)) for file in sorted(Path(data).parent.glob("images/train/*.jpg"))]
    return settled_on(model, torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255)


def settled_on(model: Any, images: torch.Tensor) -> Any:
    """Give it those of images [N, 3, H, W]; its maps would all but vanish without, and any two be close."""
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 1.0
    with torch.no_grad():
        model.train()(images)
    return model


STUDENT, TEACHER = bare("yolov8n.yaml"), bare("yolov8s.yaml", loud=True)  # 16, 32, 64 and 32, 64, 128 channels
SHORT = {
    "model": STUDENT,
    "imgsz": 64,
    "batch": 4,
    "nbs": 4,
    "epochs": 1,
    "warmup_epochs": 0,
    "optimizer": "AdamW",
    "lr0": 1e-3,
    "amp": False,
    "plots": False,
    "val": False,
    "device": "cpu",
    "verbose": False,
}
TAUGHT = {
    "teacher": TEACHER,
    "teacher_epochs": 0,
    "cwd": 100.0,
    "adapter": "conv",
    "teacher_dtype": "fp32",
    "schedule": "constant",
}


class Payload:
    """Makes a file when it is unpickled without restriction."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist, which may not be there
def pytest_xdist_auto_num_workers() -> int:
    """One worker a core, but no more than memory is likely to be there for: each takes about 1 GB."""
    return min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the slow ones: were one of them last, the other cores would wait for it."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Keep what has been imported out of the collections that Ultralytics asks for in every training."""
    gc.collect()
    gc.freeze()
    if "MUTANT_UNDER_TEST" in os.environ:  # a test with an escape in its name is not found again: all mutants would die
        escaped = [item.nodeid for item in session.items if "\\" in item.nodeid]
        assert not escaped, f"give ids to the parameters of {escaped}"


@pytest.fixture(scope="session", autouse=True)
def short_collections() -> Iterator[None]:
    """Let each training's collections of garbage search what is young, since there is little else to collect."""
    young = SimpleNamespace(collect=lambda: gc.collect(1))
    with pytest.MonkeyPatch.context() as patch:
        for module in ("ultralytics.engine.trainer", "yolo_cwd.method.teacher"):
            patch.setattr(f"{module}.gc", young)
        yield


@pytest.fixture(autouse=True)
def ultralytics_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Ultralytics' logger speak, whatever a library that another test has used did to it."""
    monkeypatch.setattr(LOGGER, "disabled", False)
    LOGGER.setLevel(logging.INFO)


@pytest.fixture(scope="session", autouse=True)
def blank_pictures() -> Iterator[None]:
    """Draw no figures, which takes longer than a training, but where a test asks for `drawn_pictures`."""
    with pytest.MonkeyPatch.context() as patch:
        pictures.blank(patch)
        yield


@pytest.fixture
def drawn_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw figures after all, with few pixels."""
    pictures.coarse(monkeypatch)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """YAML path of a data set with 8 training and 4 validation images: two steps at batch 4."""
    return str(digits.build(tmp_path_factory.mktemp("data"), {"train": 8, "val": 4}))


@pytest.fixture(scope="session")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """YAML paths of such data sets by task."""
    root = tmp_path_factory.mktemp("sets")
    return {task: str(digits.build(root, {"train": 8, "val": 4}, task=task)) for task in TASKS}


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with small.pt (a YOLOv8n detector), segment.pt and classify.pt, none of them trained."""
    from ultralytics import YOLO

    folder = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    for name, model in {"small": "yolov8n", "segment": "yolov8n-seg", "classify": "yolov8n-cls"}.items():
        YOLO((narrow if model.endswith("cls") else bare)(f"{model}.yaml")).save(folder / f"{name}.pt")
    return folder


def short_trainings(data: str, folder: Path) -> Callable[..., CWDTrainer]:
    """Return what runs a short distilled training; keywords override its arguments.

    `final` is for Ultralytics' last validation.
    """

    def run(final: bool = False, **overrides: Any) -> CWDTrainer:
        callbacks = overrides.pop("callbacks", {})
        project = str(folder / "runs")
        words = {**TAUGHT, **SHORT, "data": data, "project": project, **overrides}
        if words["cwd"] == "balanced":
            words.setdefault("share", 1.0)  # whatever the teacher knows
        trainer = CWDTrainer(overrides=words)
        for event, callback in callbacks.items():
            trainer.add_callback(event, callback)
        if not final:
            trainer.final_eval = lambda: None
        trainer.train()
        return trainer

    return run


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The graphs that `torch.compile` has traced; no machine code is made of them, which would take minutes."""
    graphs: list[Any] = []
    compile_, backend = torch.compile, torch._dynamo.lookup_backend("aot_eager")

    def trace(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return backend(graph, inputs)

    monkeypatch.setattr(torch, "compile", lambda model, **_: compile_(model, backend=trace))
    return graphs


@pytest.fixture
def train(data: str, tmp_path: Path) -> Callable[..., CWDTrainer]:
    """Run a short distilled training in a folder of the test."""
    return short_trainings(data, tmp_path)


@pytest.fixture
def train_plain(data: str, tmp_path: Path) -> Callable[..., DetectionTrainer]:
    """Run the same short training with Ultralytics alone."""

    def run(**overrides: Any) -> DetectionTrainer:
        project = str(tmp_path / "runs")
        trainer = DetectionTrainer(overrides={**SHORT, "data": data, "project": project, **overrides})
        trainer.final_eval = lambda: None
        trainer.train()
        return trainer

    return run


@pytest.fixture
def ascii_locale(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let text be ASCII where nothing else is asked for."""
    monkeypatch.setattr(io, "text_encoding", lambda encoding, stacklevel=2: encoding or "ascii")
    with pytest.raises(UnicodeEncodeError):
        Path(os.devnull).write_text("größer")


@pytest.fixture
def whole_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no message lose its middle, however long the path of the temporary folder is."""
    monkeypatch.setattr("yolo_cwd.config.LONGEST", 10_000)
