"""The network: asked for nothing that is there already, or that may not exist anywhere."""

import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
import requests
from conftest import STUDENT
from ultralytics.utils import USER_CONFIG_DIR

from yolo_cwd.cli import main

SHORT = ["imgsz=64", "batch=4", "epochs=1", "device=cpu", "amp=False", "verbose=False"]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What has been asked for; nothing is answered."""
    found: list[str] = []

    def refuse(_: Any, method: str, url: str, **__: Any) -> None:
        found.append(url)
        raise requests.ConnectionError(url)

    def unknown(host: str, *_: Any, **__: Any) -> None:
        found.append(str(host))
        raise socket.gaierror(host)

    monkeypatch.setattr(requests.Session, "request", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    return found


@pytest.fixture(autouse=True)
def font() -> Iterator[None]:
    """The font that Ultralytics draws with and otherwise downloads, which exists."""
    file = USER_CONFIG_DIR / "Arial.ttf"
    shutil.copy(Path(mpl.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", file)
    yield
    file.unlink()


@pytest.mark.parametrize(
    ("command", "words"),
    [
        pytest.param("train", ["teacher_epochs=0"], id="train"),
        pytest.param(
            "compare", ["seeds=1", "arms=plain,cwd,builtin", "teacher_epochs=0"], id="compare", marks=pytest.mark.slow
        ),
        pytest.param("compare", ["seeds=1", "arms=plain,cwd"], id="compare that trains its teacher"),
        pytest.param("check", [], id="check"),
        pytest.param("label", ["source={images}"], id="label"),
    ],
)
def test_a_command_that_has_its_files_asks_for_nothing(
    command: str,
    words: list[str],
    data: str,
    checkpoints: Path,
    tmp_path: Path,
    asked: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    given = [f"teacher={checkpoints / 'small.pt'}"]
    given += ["imgsz=64", "device=cpu"] if command == "label" else [f"data={data}", f"student={STUDENT}", *SHORT]
    given += [word.format(images=Path(data).parent / "images") for word in words]
    given += {"train": [f"project={tmp_path / 'runs'}"], "compare": [f"folder={tmp_path / 'c'}"]}.get(command, [])
    assert main([command, *given]) == 0
    assert asked == []


@pytest.mark.parametrize("command", ["train", "check", "compare", "label"])
@pytest.mark.parametrize("absent", ["teacher=absent.pt", "teacher=last", "student=absent.pt", "pretrained=absent.pt"])
def test_a_model_that_is_not_there_is_not_searched_for(
    command: str,
    absent: str,
    data: str,
    checkpoints: Path,
    tmp_path: Path,
    asked: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if command == "label" and not absent.startswith("teacher"):
        pytest.skip("label has no student")
    monkeypatch.chdir(tmp_path)
    given = {"teacher": str(checkpoints / "small.pt"), "data": data}
    if command == "label":
        given |= {"source": str(Path(data).parent / "images")}
    else:
        given |= {"student": STUDENT, **dict(word.split("=") for word in SHORT)}
    given |= {"folder": "c"} if command == "compare" else {}
    given |= dict([absent.split("=")])
    assert main([command, *(f"{name}={value}" for name, value in given.items())]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("yolo_cwd: ")]
    assert ": no such file; give" in line
    assert line.startswith(f"yolo_cwd: {absent}")
    assert asked == []
    assert not list(tmp_path.iterdir())
