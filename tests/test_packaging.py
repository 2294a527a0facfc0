"""The wheel, in an environment of its own; the demonstration, cut short."""

import subprocess
import sys
import venv
from pathlib import Path

import pytest

from yolo_cwd import __version__, demo
from yolo_cwd.config import OPTIONS

ROOT = Path(__file__).parent.parent


def test_the_wheel_carries_the_options(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "build", "--outdir", tmp_path / "dist", ROOT], check=True, capture_output=True
    )
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--no-deps", wheel], check=True, capture_output=True, cwd=tmp_path
    )
    subprocess.run([python, "-m", "pip", "install", "--quiet", "pyyaml"], check=True, capture_output=True)
    command = [tmp_path / "venv" / "bin" / "yolo_cwd"]
    settings = subprocess.run([*command, "settings"], check=True, capture_output=True, text=True, cwd=tmp_path)
    assert [line.split()[0] for line in settings.stdout.splitlines()] == list(OPTIONS)
    version = subprocess.run([*command, "version"], check=True, capture_output=True, text=True, cwd=tmp_path)
    assert version.stdout.strip() == __version__


def test_no_dependency_is_pinned_from_above() -> None:
    assert "torch>=2.4" in (ROOT / "pyproject.toml").read_text()


def test_demo(tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(demo, "TEACHER_SHARE", {"epochs": 1})
    monkeypatch.setattr(demo, "STUDENT_SHARE", {"epochs": 1, "fraction": 0.5})
    monkeypatch.setattr(demo.digits, "build", lambda: data)
    monkeypatch.setattr(demo, "get_save_dir", lambda args: tmp_path / "demo")
    teacher, plain, distilled = demo.run()
    assert teacher.parameters > 3 * plain.parameters
    assert plain.parameters == distilled.parameters
    assert plain.gflops == distilled.gflops
    assert distilled.weights.exists()
    shown = capsys.readouterr().out
    assert f"The distilled student's weights: {distilled.weights}" in shown
    gain = 100 * (distilled.map50_95 - plain.map50_95)
    assert f"{gain:+.1f} points of mAP50-95" in shown


@pytest.mark.slow
def test_crash_drill(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, ROOT / "scripts" / "crash_drill.py", "kills=6"], capture_output=True, text=True, cwd=tmp_path
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert (
        "6 kills; the last resume ended with exit code 0; results.csv has every epoch once; 0 faults" in result.stdout
    )
