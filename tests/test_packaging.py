"""The sources as a whole; the wheel, in an environment of its own; a drill of crashes."""

import ast
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from yolo_cwd import __version__
from yolo_cwd.config import OPTIONS

ROOT = Path(__file__).parent.parent
SOURCES = [file for folder in ("yolo_cwd", "scripts", "examples") for file in sorted((ROOT / folder).rglob("*.py"))]


def _opened_without_encoding(tree: ast.AST) -> Iterator[int]:
    """Lines of the calls that open a text file in whatever encoding is the system's."""
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call) or any(keyword.arg == "encoding" for keyword in call.keywords):
            continue
        name = getattr(call.func, "attr", getattr(call.func, "id", ""))
        words = [a.value for a in call.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        needed = {"read_text": 1, "write_text": 2}.get(name, 0)  # arguments, if the encoding is one without a name
        image = getattr(getattr(call.func, "value", None), "id", "") == "Image"  # Pillow's, which is no text
        if len(call.args) < needed or (name in {"open", "fdopen"} and not image and not any("b" in w for w in words)):
            yield call.lineno


def test_every_text_file_is_opened_as_utf8() -> None:
    found = {str(f): [*_opened_without_encoding(ast.parse(f.read_text(encoding="utf-8")))] for f in SOURCES}
    assert len(found) > 20
    assert {file: lines for file, lines in found.items() if lines} == {}


def test_imports_point_down_the_list_of_places() -> None:
    rows = re.findall(r"^\| (`[^|]+`) \|", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    place = {name.strip("`/").removesuffix(".py"): row for row, names in enumerate(rows) for name in names.split(", ")}
    up = []
    for file in (ROOT / "yolo_cwd").rglob("*.py"):
        here = file.relative_to(ROOT / "yolo_cwd").parts[0].removesuffix(".py")
        text = file.read_text(encoding="utf-8")
        for names in re.findall(r"^ *from yolo_cwd(?:\.(\w+)\S*)? import (.+)$", text, flags=re.MULTILINE):
            there = [names[0]] if names[0] else names[1].split(", ")
            up += [(str(file), name) for name in there if place.get(name, len(rows)) < place.get(here, -1)]
    assert up == []


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
def test_crash_drill(tmp_path: Path) -> None:
    """Of a task with maps; detectors are killed by the tests of `run`."""
    command = [sys.executable, ROOT / "scripts" / "crash_drill.py", "kills=2", "task=semantic"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    end = "2 kills; the last resume ended with exit code 0; results.csv has every epoch once; 0 faults"
    assert end in result.stdout
