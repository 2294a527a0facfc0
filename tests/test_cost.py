"""What a step may not do, whatever the clock says; and the benchmark itself, in its smallest form."""

import importlib.util
import json
import subprocess
import sys
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
    ours: set[int] = set()
    heads: list[nn.Module] = []
    outputs: list[torch.Tensor] = []  # of the teacher's convolutions, image by image or in parts
    steps: list[int] = []

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(module, Detect):
            heads.append(module)
        if id(module) in ours:
            outputs.append(output)

    def begin(trainer: CWDTrainer) -> None:
        ours.update(id(m) for m in trainer.teacher.modules() if isinstance(m, nn.Conv2d))
        hooks.append(torch.nn.modules.module.register_module_forward_hook(note))

    def end(trainer: CWDTrainer) -> None:
        steps.append(trainer.batch_size)
        if len(steps) == 2:
            hooks.pop().remove()

    hooks: list[Any] = []
    try:
        train(callbacks={"on_train_start": begin, "on_train_batch_end": end})
    finally:
        for hook in hooks:
            hook.remove()
    assert len(heads) == len(steps) == 2
    assert len(ours) > 40
    assert sum(len(output) for output in outputs) == sum(steps) * len(ours)  # every image once
    assert not any(output.requires_grad for output in outputs)


def benchmark(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    """Run the script's main function with so many words."""
    monkeypatch.setenv("YOLO_CONFIG_DIR", "of the script's choice")  # to be set back
    monkeypatch.setattr(sys, "argv", [str(BENCHMARK), *words])
    spec = importlib.util.spec_from_file_location("bench_step", BENCHMARK)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main()


@pytest.mark.parametrize(
    "part", ["step", *(pytest.param(p, marks=pytest.mark.slow) for p in ("scaling", "memory", "start"))]
)
def test_benchmark(part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["smoke=True", f"part={part}", f"json={tmp_path / 'table.json'}"]
    if part == "step":
        monkeypatch.chdir(tmp_path)
        benchmark(monkeypatch, *words)
    else:  # of processes that are measured as wholes
        command = [sys.executable, BENCHMARK, *words]
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


def test_benchmark_refuses_what_it_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match=r"^imagesize: unknown; known are part, teacher"):
        benchmark(monkeypatch, "imagesize=3")
