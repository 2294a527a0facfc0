"""Work shared out to the idle cores: in order, at once, and no more than there are cores for."""

import threading

import joblib
import pytest
import torch

from yolo_cwd import parallel
from yolo_cwd.parallel import in_parts, workers

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("cores", "threads", "processes", "expected"),
    [
        pytest.param(2, 1, 1, 2, id="Ultralytics leaves one of two cores"),
        pytest.param(4, 3, 1, 1, id="one idle core is not enough for three threads more"),
        pytest.param(64, 8, 1, 8, id="Ultralytics takes eight threads at most"),
        pytest.param(8, 1, 4, 2, id="four processes share the cores"),
        pytest.param(1, 2, 1, 1, id="more threads than cores"),
    ],
)
def test_workers(cores: int, threads: int, processes: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joblib, "cpu_count", lambda: cores)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert workers(CPU) == expected
    assert workers(torch.device("cuda")) == 1


@pytest.mark.parametrize("count", [1, 2, 3])
def test_parts_are_worked_on_at_once_and_come_back_in_order(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "workers", lambda device: count)
    together = threading.Barrier(count)  # passed only by as many threads as there are workers

    def work(part: int) -> tuple[int, int]:
        together.wait(timeout=30)
        return 10 * part, threading.get_ident()

    results = in_parts(work, range(2 * count), CPU)
    assert [value for value, _ in results] == [10 * part for part in range(2 * count)]
    assert len({thread for _, thread in results}) == count
    assert threading.get_ident() in {thread for _, thread in results}


@pytest.mark.parametrize("error", [ValueError, IndexError])
def test_an_error_of_any_part_is_raised(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "workers", lambda device: 2)

    def work(part: int) -> int:
        if part == 3:
            raise error("of part 3")
        return part

    with pytest.raises(error, match="of part 3"):
        in_parts(work, range(4), CPU)


def test_no_parts() -> None:
    assert in_parts(abs, [], CPU) == []
