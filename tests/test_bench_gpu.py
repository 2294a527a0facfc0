"""The parts of the benchmark that are meant for a GPU, in their smallest form on a CPU, and its two reports."""

import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from test_bench import Run, bench, run

__all__ = ["bench", "run"]  # fixtures


@pytest.fixture
def gpu(bench: Any) -> Any:
    """The module of these parts."""
    bench.known_parts()
    return sys.modules["bench_gpu"]


def test_a_report_ends_in_time(gpu: Any) -> None:
    for limits in gpu.REPORTS.values():
        assert sum(limits.values()) + gpu.BEGIN <= gpu.WHOLE == 270


def test_the_reports_hold_every_part_once(gpu: Any, bench: Any) -> None:
    parts = [part for limits in gpu.REPORTS.values() for parts in limits for part in parts.split(",")]
    assert sorted(parts) == sorted(bench.known_parts().keys() - {"count"})


def test_a_report_keeps_what_was_found_before_the_limit(
    gpu: Any, bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A part says something, starts a process, and sleeps; both are ended, and the next part begins."""
    script = tmp_path / "stands_for_bench.py"
    script.write_text(
        "import subprocess, sys, time\n"
        "words = dict(word.split('=', 1) for word in sys.argv[1:])\n"
        "with open(words['out'], 'a') as file:\n"
        '    print(\'{"part": "\' + words[\'part\'] + \'", "name": "begun"}\', file=file)\n'
        "if words['part'] == 'slow':\n"
        "    child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True)\n"
        "    open(words['out'] + '.pid', 'w').write(str(child.pid))\n"
        "    time.sleep(600)\n"
        "sys.exit(words['part'] == 'broken')\n"
    )
    monkeypatch.setattr(bench, "__file__", str(script))
    monkeypatch.setattr(gpu, "REPORTS", {"1": {"quick": 60, "slow": 4, "broken": 60}, "2": {"quick": 60}})
    out, begin = tmp_path / "found.jsonl", time.monotonic()
    assert gpu.report("1", [f"out={out}"], out) == 1
    assert time.monotonic() - begin < 60
    found = [(row["part"], row["name"]) for row in map(json.loads, out.read_text().splitlines())]
    assert found == [("quick", "begun"), ("slow", "begun"), ("slow", "cut off"), ("broken", "begun")]
    child = int(Path(f"{out}.pid").read_text())
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE
    assert gpu.report("2", [f"out={out}"], out) == 0


def test_a_report_is_asked_for_by_its_number(
    run: Run, gpu: Any, bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(gpu, "report", lambda *words: asked.append(words) or 1)
    (tmp_path / "found.jsonl").touch()
    run("report=2", "part=step", code=1)
    ((number, words, out),) = asked
    assert (number, out) == ("2", tmp_path / "found.jsonl")
    assert "imgsz=64" in words
    assert not [word for word in words if word.startswith(("report", "part"))]
    with pytest.raises(SystemExit, match="report=3: must be 1 or 2"):
        bench.parse(["report=3"])


def span(name: str, category: str, begin: float, duration: float, correlation: int | None = None) -> dict[str, Any]:
    args = {} if correlation is None else {"correlation": correlation}
    return {"ph": "X", "name": name, "cat": category, "ts": begin, "dur": duration, "args": args}


def test_launches_belong_to_the_innermost_part_of_a_trace(gpu: Any) -> None:
    backward = "autograd::engine::evaluate_function: _DivergenceBackward"
    events = [
        {"ph": "M", "name": "process_name"},
        span("part: student", "user_annotation", 0, 100),
        span("part: ours, loss", "user_annotation", 50, 40),
        span("part: ours, loss", "gpu_user_annotation", 500, 40),
        span("part: backward", "user_annotation", 200, 100),
        span(backward, "cpu_op", 220, 10),
        span("aten::mul", "cpu_op", 221, 2),
        *[span("cudaLaunchKernel", "cuda_runtime", at, 1, i) for i, at in enumerate((10, 60, 70, 225, 250, 400))],
        span("cudaStreamSynchronize", "cuda_runtime", 410, 1),
        *[span("k", "kernel", 1000 + 20 * i, 10, i) for i in range(5)],
        span("copy", "gpu_memcpy", 1100, 30, 5),
    ]
    found, idle = gpu.by_part(events, 1)
    launches = {part: row["launches"] for part, row in found.items()}
    ours = {"ours, loss": 2, "ours, divergence backward": 1}
    assert launches == {"student": 1, "backward": 1, "rest": 1, **ours}
    assert found["ours, loss"]["gpu_ms"] == pytest.approx(0.02)
    assert found["student"]["host_ms"] == pytest.approx(0.1)
    assert idle == pytest.approx(1 - (5 * 10 + 30) / 130)
    assert gpu.by_part(events, 2)[0]["ours, loss"]["gpu_ms"] == pytest.approx(0.01)


def test_a_gpu_that_works_on_two_things_at_once_is_not_busy_twice(gpu: Any) -> None:
    assert gpu.idle_share([(0, 10), (5, 10), (5, 8), (20, 30)]) == pytest.approx(1 / 3)
    assert gpu.idle_share([]) == 0


def test_waits_are_counted_by_their_place(gpu: Any) -> None:
    def step() -> None:
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation (Triggered internally at c10)", stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    ((place, count),) = gpu.waits(step, torch.device("cpu")).items()
    assert "tests/test_bench_gpu.py:" in place
    assert count == 2


def test_where_the_time_goes(run: Run) -> None:
    found = run("part=profile,syncs,memory")
    ours = [name.removeprefix("ours, batch 2, ") for name in found if name.startswith("ours, batch 2, ")]
    marked = {"backward", "images", "optimizer", "student", "task's loss", "teacher"}
    marked |= {"ours, loss", "ours, hooks", "ours, meter", "ours, divergence backward"}
    assert set(ours) == marked
    assert all(found[f"ours, batch 2, {part}"]["host_ms"] > 0 for part in marked)
    assert found["plain, batch 2, backward"]["host_ms"] > 0
    assert found["added, batch 2"]["syncs"] == 0
    assert found["built-in, batch 2"]["resident_MiB"] > 0


def test_many_steps_and_a_training_that_is_resumed(run: Run) -> None:
    found = run("part=amp,resume", "steps=6")
    assert found["step 6"]["scale"] == 1  # mixed precision has none on a CPU
    assert found["step 6"]["left_out"] == 0
    assert found["step 6"]["share of P3"] > 0
    assert found["in the end"]["finite"]
    assert found["resumed"]["means_kept"]
    assert found["ended"]["begun_at"] == 1
    assert found["ended"]["epochs"] == [1, 2, 3]


@pytest.mark.slow
def test_processes_of_torchrun_and_the_tests_for_a_gpu(run: Run) -> None:
    found = run("part=processes,tests")
    assert found["2 by gloo"]["code"] == 0
    assert found["2 by gloo"]["epochs"] == 2
    assert float(found["2 by gloo"]["last"]["train/P3_nats"]) > 0
    assert found["pytest -m gpu"]["code"] == 0
    assert "skipped" in found["pytest -m gpu"]["last"] or "passed" in found["pytest -m gpu"]["last"]
