"""What a step may not do, whatever the clock says; and the benchmark itself, in its smallest form."""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from ultralytics.nn.modules.head import Detect

from yolo_cwd.trainer import CWDTrainer

BENCHMARK = Path(__file__).parent.parent / "scripts" / "bench_step.py"


def test_a_step_runs_one_head_and_no_graph_through_the_teacher(train: Callable[..., CWDTrainer]) -> None:
    calls: Counter[str] = Counter()
    ours: set[int] = set()

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        calls["heads"] += isinstance(module, Detect)
        if id(module) in ours:
            calls["teacher's convolutions"] += 1
            calls["with a graph"] += output.requires_grad

    def begin(trainer: CWDTrainer) -> None:
        ours.update(id(m) for m in trainer.teacher.modules() if isinstance(m, nn.Conv2d))
        hooks.append(torch.nn.modules.module.register_module_forward_hook(note))

    def end(trainer: CWDTrainer) -> None:
        calls["steps"] += 1
        if calls["steps"] == 2:
            hooks.pop().remove()

    hooks: list[Any] = []
    try:
        train(callbacks={"on_train_start": begin, "on_train_batch_end": end})
    finally:
        for hook in hooks:
            hook.remove()
    assert calls["heads"] == calls["steps"] == 2
    assert calls["teacher's convolutions"] == 2 * len(ours) > 50
    assert calls["with a graph"] == 0


@pytest.mark.parametrize(
    "part", ["step", *(pytest.param(p, marks=pytest.mark.slow) for p in ("scaling", "memory", "start"))]
)
def test_benchmark(part: str, tmp_path: Path) -> None:
    command = [sys.executable, BENCHMARK, "smoke=True", f"part={part}", f"json={tmp_path / 'table.json'}"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    table = json.loads((tmp_path / "table.json").read_text())["table"]
    if part == "step":
        rows = table["rows"]
        assert {"step: plain", "step: builtin", "step: cwd", "teacher: whole, fp32", "loss alone"} <= rows.keys()
        assert rows["step: builtin"]["of builtin"] == 1
    elif part == "scaling":
        assert len(table["seconds"]) == 4
    else:
        assert "cwd" in table
    assert not list(tmp_path.glob("runs"))


def test_benchmark_refuses_what_it_does_not_know() -> None:
    result = subprocess.run([sys.executable, BENCHMARK, "imagesize=3"], capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.startswith("imagesize: unknown; known are part, teacher")
