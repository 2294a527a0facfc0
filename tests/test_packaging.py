"""The wheel, in an environment of its own; a drill of crashes."""

import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from yolo_cwd import __version__
from yolo_cwd.config import OPTIONS

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source distribution, and the wheel built from it."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "build", "--outdir", folder, ROOT], check=True, capture_output=True)
    return folder


def test_the_wheel_carries_the_options(tmp_path: Path, dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    venv.create(tmp_path / "venv")
    pip = [sys.executable, "-m", "pip", "--python", tmp_path / "venv" / "bin" / "python"]
    install = [*pip, "install", "--quiet", "--no-deps", wheel, "pyyaml"]
    subprocess.run(install, check=True, capture_output=True, cwd=tmp_path)
    command = [tmp_path / "venv" / "bin" / "yolo_cwd"]
    settings = subprocess.run([*command, "settings"], check=True, capture_output=True, text=True, cwd=tmp_path)
    assert [line.split()[0] for line in settings.stdout.splitlines()] == list(OPTIONS)
    version = subprocess.run([*command, "version"], check=True, capture_output=True, text=True, cwd=tmp_path)
    assert version.stdout.strip() == __version__


def test_what_is_published_is_complete(dist: Path) -> None:
    files = sorted(dist.iterdir())
    result = subprocess.run(
        [sys.executable, "-m", "twine", "check", "--strict", *files], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    wheel, sdist = files
    with zipfile.ZipFile(wheel) as opened:
        packed = set(opened.namelist())
    recipes = {f"yolo_cwd/cfg/recipes/{file.name}" for file in (ROOT / "cfg" / "recipes").iterdir()}
    embedded = {f"yolo_cwd/bccd/{name}" for name in ("data.zip", "teacher.pt", "student.pt", "README.md", "LICENSE")}
    assert {"yolo_cwd/py.typed", "yolo_cwd/cfg/default.yaml", *recipes, *embedded} <= packed
    assert {name.split("/")[0] for name in packed} == {"yolo_cwd", f"yolo_cwd-{__version__}.dist-info"}
    with tarfile.open(sdist) as opened:
        packed = {name.partition("/")[2] for name in opened.getnames()}
    assert {"mkdocs.yml", "docs/index.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "tests/conftest.py"} <= packed


def test_one_version_in_every_place() -> None:
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_no_dependency_is_pinned_from_above() -> None:
    assert "torch>=2.4" in (ROOT / "pyproject.toml").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("task", "kills"), [("detect", 2), ("semantic", 1)])
def test_crash_drill(tmp_path: Path, task: str, kills: int) -> None:
    command = [sys.executable, ROOT / "scripts" / "crash_drill.py", f"kills={kills}", f"task={task}"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    end = f"{kills} kills; the last resume ended with exit code 0; results.csv has every epoch once; 0 faults"
    assert end in result.stdout
