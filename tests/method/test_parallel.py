"""Work shared out to the idle cores: in order, at once, and no more than there are cores for."""

import threading
from collections.abc import Callable, Iterator

import joblib
import pytest
import torch

from yolo_cwd.method import parallel
from yolo_cwd.method.parallel import cores, in_parts

CPU = torch.device("cpu")


@pytest.mark.parametrize(("machine", "processes", "expected"), [(2, 1, 2), (8, 4, 2), (1, 2, 1)])
def test_cores(machine: int, processes: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joblib, "cpu_count", lambda: machine)
    monkeypatch.setattr(parallel, "WORLD_SIZE_HERE", processes)
    assert cores(CPU) == expected
    assert cores(torch.device("cuda")) == 1


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Set how many threads torch uses, and set it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("count", [2, 3])
def test_a_core_for_each_part(count: int, monkeypatch: pytest.MonkeyPatch, threads: Callable[[int], None]) -> None:
    monkeypatch.setattr(parallel, "cores", lambda device: count)
    threads(count - 1)
    together = threading.Barrier(count)  # passed only by as many threads as there are cores

    def work(part: int) -> tuple[int, int, int]:
        together.wait(timeout=30)
        return 10 * part, threading.get_ident(), torch.get_num_threads()

    results = in_parts(work, range(2 * count), CPU)
    assert [value for value, _, _ in results] == [10 * part for part in range(2 * count)]
    assert len({thread for _, thread, _ in results}) == count
    assert threading.get_ident() in {thread for _, thread, _ in results}
    assert {used for *_, used in results} == {1}
    assert torch.get_num_threads() == count - 1


@pytest.mark.parametrize(
    ("parts", "available", "used"),
    [
        pytest.param(4, 4, 4, id="all cores are in use anyway"),
        pytest.param(3, 8, 4, id="fewer parts than threads"),
        pytest.param(9, 1, 1, id="one core"),
    ],
)
def test_one_part_after_the_other(
    parts: int, available: int, used: int, monkeypatch: pytest.MonkeyPatch, threads: Callable[[int], None]
) -> None:
    monkeypatch.setattr(parallel, "cores", lambda device: available)
    threads(used)
    seen = in_parts(lambda part: (part, threading.get_ident(), torch.get_num_threads()), range(parts), CPU)
    assert seen == [(part, threading.get_ident(), used) for part in range(parts)]


@pytest.mark.parametrize("error", [ValueError, IndexError])
def test_an_error_of_any_part_is_raised(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch, threads: Callable[[int], None]
) -> None:
    monkeypatch.setattr(parallel, "cores", lambda device: 2)
    threads(1)

    def work(part: int) -> int:
        if part == 3:
            raise error("of part 3")
        return part

    with pytest.raises(error, match="of part 3"):
        in_parts(work, range(4), CPU)
    assert torch.get_num_threads() == 1


def test_no_parts() -> None:
    assert in_parts(abs, [], CPU) == []
