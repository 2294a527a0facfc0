"""Processes of their own that do not import torch once more: they are forked from one that has done nothing else.

For tests of what several processes do together. What a shell or `torchrun` starts is tested with those.
"""

import gc
import importlib
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

CONTEXT = multiprocessing.get_context("forkserver")
PRELOADED = ["torch", "torchvision", "cv2", "polars", "scipy.stats", "matplotlib.pyplot"]
CONTEXT.set_forkserver_preload(PRELOADED)  # not Ultralytics, which reads RANK when imported
OUTPUTS = ("stdout", "stderr")
TIMEOUT = 240.0


class Ended(NamedTuple):
    """How a process has ended."""

    code: int
    stdout: str
    stderr: str


class Started:
    """A process that calls a function with strings, its output kept in files."""

    def __init__(self, function: str, *words: str, cwd: Path, env: Mapping[str, str] | None = None) -> None:
        """Begin: `function` is its module, a colon, and its name."""
        self.folder = Path(tempfile.mkdtemp(prefix="output-", dir=os.environ["YOLO_CONFIG_DIR"]))
        environment = {**os.environ, **(env or {})}
        self.process = CONTEXT.Process(target=_call, args=(function, words, cwd, environment, self.folder), daemon=True)
        self.process.start()

    def send_signal(self, number: int) -> None:
        """Send a signal."""
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def wait(self, timeout: float = TIMEOUT) -> Ended:
        """Wait for the end."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            raise TimeoutError((self.folder / "stderr").read_text(encoding="utf-8"))
        return Ended(self.process.exitcode, *((self.folder / name).read_text(encoding="utf-8") for name in OUTPUTS))


def _call(function: str, words: tuple[str, ...], cwd: Path, environment: Mapping[str, str], folder: Path) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for descriptor, name in enumerate(OUTPUTS, start=1):
        with (folder / name).open("wb") as file:
            os.dup2(file.fileno(), descriptor)
    module, _, name = function.partition(":")
    called = getattr(importlib.import_module(module), name)
    gc.freeze()  # what has been imported is not searched in every training
    raise SystemExit(called(*words))


def main(*words: str) -> int:
    """Be the command `yolo_cwd`."""
    from yolo_cwd.cli import main

    return main(list(words))


def draw(*words: str) -> int:
    """Be the command, with none but our pictures, and those with few pixels."""
    import pictures
    import pytest

    patch = pytest.MonkeyPatch()
    pictures.coarse(patch)
    pictures.only_ours(patch)
    return main(*words)


def recover(arguments: str) -> None:
    """Train through a loss that is NaN once, in the second epoch."""
    import torch

    from yolo_cwd import CWDTrainer

    def poison(trainer: CWDTrainer) -> None:
        if trainer.epoch == 1 and not trainer.nan_recovery_attempts:
            trainer.loss = torch.tensor(float("nan"))

    trainer = CWDTrainer(overrides=json.loads(arguments))
    trainer.add_callback("on_train_epoch_end", poison)
    trainer.train()
    print("recovered, up to epoch", trainer.epoch + 1)


def use_without_us(best: str, data: str, images: str) -> None:
    """Score, predict and export, as where yolo_cwd is not installed."""
    sys.modules["yolo_cwd"] = None  # type: ignore[assignment]
    from ultralytics import YOLO

    model = YOLO(best)
    model.val(data=data, imgsz=64, plots=False, project=".")
    model.predict(images, imgsz=64, verbose=False)
    model.export(format="onnx", imgsz=64)


def predict_without_us(*files: str) -> None:
    """Load models, predict, and print the task of each, as where yolo_cwd is not installed."""
    sys.modules["yolo_cwd"] = None  # type: ignore[assignment]
    import torch
    from ultralytics import YOLO

    for file in files:
        model = YOLO(file)
        model.predict(torch.rand(1, 3, 64, 64), verbose=False)
        print(model.task)


def load_without_us(file: str) -> None:
    """Load a model and take a loss of it, as where yolo_cwd is not installed."""
    sys.modules["yolo_cwd"] = None  # type: ignore[assignment]
    import torch

    model = torch.load(file, weights_only=False)["model"].train()
    batch = {"img": torch.rand(2, 3, 64, 64), "batch_idx": torch.tensor([0.0, 1.0])}
    loss, items = model({**batch, "cls": torch.zeros(2, 1), "bboxes": torch.full((2, 4), 0.4)})
    loss.sum().backward()
    print(type(model.criterion).__module__, *items)


def write_alone(folder: str) -> None:
    """Join the other processes, hold the lock of a folder for longer than another one tries to, and note it."""
    from yolo_cwd.pool.store import writing_alone
    from yolo_cwd.run import torchrun

    torchrun.join("cpu")
    with writing_alone(Path(folder), "unlabeled=x"):
        time.sleep(1.3)
        with Path(folder).with_name("said").open("a") as file:
            file.write(f"{os.environ['RANK']} ")


def receive(name: str) -> None:
    """Receive a file of the first process, as the only one of a machine, whose folder the others do not see."""
    os.environ["LOCAL_RANK"] = "0"
    from yolo_cwd.run import torchrun
    from yolo_cwd.run.teacher_stage import _deliver

    torchrun.join("cpu")
    _deliver(Path(os.environ["RANK"]) / "weights" / name)


def together(processes: int, function: str, *words: str, cwd: Path) -> list[Ended]:
    """Let so many processes join, as `torchrun` does: once one of them fails, it ends the others."""
    from ultralytics.utils.dist import find_free_network_port

    shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(find_free_network_port())}
    shared |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    ranks = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    started = [Started(function, *words, cwd=cwd, env=rank) for rank in ranks]
    deadline = time.monotonic() + TIMEOUT
    while any(s.process.is_alive() for s in started) and not any(s.process.exitcode for s in started):
        if time.monotonic() > deadline:
            break
        time.sleep(0.02)
    for one in started:
        one.process.terminate()
    return [one.wait(60) for one in started]
