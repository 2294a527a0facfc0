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
from conftest import STUDENT, TEACHER, narrow
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
        models = {"model": narrow("yolov8n.yaml"), "teacher": narrow("yolov8s.yaml")}
        train(**models, callbacks={"on_train_start": begin, "on_train_batch_end": end})
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


REPORT = BENCHMARK.with_name("gpu_report.py")


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The script of the report on a GPU, in a folder of its own."""
    spec = importlib.util.spec_from_file_location("gpu_report", REPORT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.chdir(tmp_path)
    return module


def write_report(module: Any, monkeypatch: pytest.MonkeyPatch, *words: str) -> tuple[Any, dict[str, Any]]:
    """Return what its main function exits with, and the sections that it has written."""
    monkeypatch.setattr(sys, "argv", [str(REPORT), "smoke=True", f"student={STUDENT}", f"teachers={TEACHER}", *words])
    with pytest.raises(SystemExit) as ended:
        module.main()
    sections = json.loads(Path("gpu_report.json").read_text(encoding="utf-8"))["sections"]
    return ended.value.code, sections


def test_a_report_has_every_section(report: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    code, sections = write_report(report, monkeypatch)
    assert code == 0
    assert list(sections) == list(report.SECTIONS)
    assert all(found["rows"] for found in sections.values())
    exact = sections["loss"]["rows"]["float32, tau=1"]
    assert exact["error of the value"] < 1e-5
    assert exact["error of the gradient"] < 1e-5
    assert sections["teacher"]["rows"]["yolov8s, fp32"]["error"] < 1e-4
    assert 1e-3 < sections["teacher"]["rows"]["yolov8s, bf16"]["error"] < 0.5
    assert sections["step"]["rows"]["yolov8s, batch 2, yolo_cwd"]["of plain"] > 0
    assert [row["epochs"] for row in sections["training"]["rows"].values()] == [1, 2]
    assert sections["estimate"]["rows"]["yolo_cwd"]["batch"] == 16
    text = Path("gpu_report.md").read_text(encoding="utf-8")
    assert [line[3:] for line in text.splitlines() if line.startswith("## ")] == list(sections)
    assert "| yolov8s, batch 2, built-in |" in text


def test_a_section_that_fails_is_reported_and_the_next_goes_on(report: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def break_off(words: Any, folder: Path) -> Any:
        """Break off."""
        yield "the first row", {"ms": 1.0}
        raise RuntimeError("CUDA error: an illegal memory access\nwas encountered")

    monkeypatch.setitem(report.SECTIONS, "step", report.Section(break_off, 1))
    code, sections = write_report(report, monkeypatch, "only=step,machine")
    assert code == "failed: step"
    assert sections["step"]["error"] == "RuntimeError: CUDA error: an illegal memory access"
    assert sections["step"]["rows"] == {"the first row": {"ms": 1.0}}
    assert "software" in sections["machine"]["rows"]
    assert "**Failed:** RuntimeError" in Path("gpu_report.md").read_text(encoding="utf-8")


def test_a_section_of_its_own_process_that_takes_too_long_is_ended(
    report: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As the whole report runs them; without a GPU the process says so."""
    words = {**report.DEFAULTS, "device": "7"}
    monkeypatch.setitem(report.SECTIONS, "loss", report.SECTIONS["loss"]._replace(seconds=0.1))
    assert report.apart("loss", words, tmp_path) == {"rows": {}, "error": "stopped after 0.1 s"}
    found = report.apart("machine", words, tmp_path)
    assert found["error"].startswith("RuntimeError: device=7: PyTorch sees no GPU") or torch.cuda.is_available()
    assert found["rows"]["software"]["name"].startswith("Python 3.")
