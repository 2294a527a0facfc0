"""What each process takes for its GPU and its trainer, and what NCCL is told; no GPU is needed."""

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from threading import local
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ultralytics.utils import LOGGER

from yolo_cwd.config import ConfigError
from yolo_cwd.run import distributed, teacher_stage, torchrun
from yolo_cwd.tasks import TASKS

Join = Callable[..., tuple[str, list[int]]]


@pytest.fixture
def join(monkeypatch: pytest.MonkeyPatch) -> Join:
    """Join as one of two processes on a machine where a process sees so many GPUs; return `device` and the GPUs set."""

    def run(visible: int, local_rank: int, device: Any = None) -> tuple[str, list[int]]:
        taken: list[int] = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: visible > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
        monkeypatch.setattr(torch.cuda, "set_device", taken.append)
        monkeypatch.setattr(dist, "is_initialized", lambda: True)
        for name, value in {"RANK": 2 + local_rank, "LOCAL_RANK": local_rank, "WORLD_SIZE_HERE": 2}.items():
            monkeypatch.setattr(torchrun, name, value)
        return torchrun.join(device), taken

    return run


@pytest.mark.parametrize("local_rank", [0, 1])
@pytest.mark.parametrize(
    ("visible", "device", "expected", "gpus"),
    [(2, None, "0,1", [0, 1]), (4, "2,3", "2,3", [2, 3]), (1, None, "0", [0, 0]), (1, "0", "0", [0, 0])],
    ids=["all GPUs", "those given", "its own alone", "its own alone, given"],
)
def test_the_gpu_of_a_process(
    local_rank: int, visible: int, device: str | None, expected: str, gpus: list[int], join: Join
) -> None:
    assert join(visible, local_rank, device) == (expected, [gpus[local_rank]])


@pytest.mark.parametrize(("visible", "device"), [(2, "0"), (1, "0,1"), (1, "1"), (0, "0")])
def test_too_few_gpus_are_refused(visible: int, device: str, join: Join) -> None:
    with pytest.raises(ConfigError, match=f"device={device}: the 2 processes on this machine need a GPU each"):
        join(visible, 0, device)


@pytest.mark.parametrize(("gpus", "different"), [("ab", True), ("aa", False)])
def test_processes_that_see_the_same_gpu_are_noticed(
    gpus: str, different: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, this = dist.HashStore(), local()
    store.set_timeout(timedelta(seconds=10))

    class Rank:
        def __format__(self, spec: str) -> str:
            return str(this.rank)

    def ask(rank: int) -> bool:
        this.rank = rank
        return torchrun.all_different(store, gpus[rank])

    monkeypatch.setattr(torchrun, "RANK", Rank())
    monkeypatch.setattr(torchrun, "WORLD_SIZE", 2)
    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(ask, range(2))) == [different, different]


@pytest.mark.parametrize(("backend", "told"), [("nccl", [3]), ("gloo", None)])
@pytest.mark.parametrize("local_rank", [0, 1])
def test_a_barrier_is_told_its_gpu(
    backend: str, told: list[int] | None, local_rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(distributed, "LOCAL_RANK", local_rank)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_backend", lambda: backend)
    monkeypatch.setattr(dist, "barrier", lambda device_ids=None: asked.append(device_ids))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    with distributed.local_zero_first():
        assert asked == [told] * local_rank  # the first process of a machine has yet to let the others follow
    assert asked == [told]


def test_no_barrier_is_taken_around_that_one() -> None:
    folder = Path(distributed.__file__).parents[1]
    calls = [file.name for file in folder.rglob("*.py") if "dist.barrier(" in file.read_text(encoding="utf-8")]
    assert calls == ["distributed.py"]


def test_the_page_says_how_long_a_silent_process_is_waited_for() -> None:
    page = (Path(__file__).parents[2] / "docs" / "scale.md").read_text(encoding="utf-8")
    (hours,) = re.findall(r"waited for (\d+) hours", page)
    assert timedelta(hours=int(hours)) == distributed.TIMEOUT


@pytest.mark.parametrize(("local_rank", "lines"), [(0, 1), (1, 0)])
def test_a_machine_that_does_not_see_the_run_says_so_once(
    local_rank: int, lines: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(distributed, "LOCAL_RANK", local_rank)
    LOGGER.setLevel("ERROR")  # as Ultralytics has it in every process but the first
    distributed.check_folder(tmp_path)
    distributed.check_folder(tmp_path / "absent")
    said = capsys.readouterr().err.splitlines()
    assert len(said) == lines
    assert all(line.startswith(f"yolo_cwd: this machine does not see {tmp_path / 'absent'}; ") for line in said)


@pytest.mark.parametrize("task", TASKS)
def test_the_trainer_of_a_teacher_is_found_by_its_name(task: str) -> None:
    """Older releases of Ultralytics have each of their processes import it so, and make it of its arguments."""
    trainer = teacher_stage.TeacherTrainer
    made = trainer.__new__(trainer, {}, {"task": task})
    assert isinstance(made, trainer)
    assert isinstance(made, TASKS[task].trainer)
    assert getattr(teacher_stage, type(made).__name__) is trainer
