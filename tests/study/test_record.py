"""What a comparison remembers of its files and versions, and folders that are not as it has left them."""

import errno
import io
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import STUDENT
from test_compare import SHORT, result

from yolo_cwd.cli import main
from yolo_cwd.config import ConfigError
from yolo_cwd.study import compare, record, summary
from yolo_cwd.study.comparison import Comparison

Words = dict[str, Any]


@pytest.fixture
def words(data: str, checkpoints: Path, tmp_path: Path) -> Words:
    """A comparison whose files are all the test's own."""
    own = tmp_path / "data"
    shutil.copytree(Path(data).parent, own)
    description = {**yaml.safe_load(Path(data).read_text()), "path": str(own)}
    (own / "d.yaml").write_text(yaml.safe_dump(description))
    (own / "d.yaml").with_name("digits.yaml").unlink()
    shutil.copy(checkpoints / "small.pt", tmp_path / "t.pt")
    shutil.copy(STUDENT, tmp_path / "yolov8n.yaml")
    shutil.copytree(own / "images" / "val", tmp_path / "pool")
    return {
        "teacher": str(tmp_path / "t.pt"),
        "student": str(tmp_path / "yolov8n.yaml"),
        "data": str(own / "d.yaml"),
        "arms": f"plain,cwd,pool:unlabeled={tmp_path / 'pool'}",
        "seeds": 2,
        "teacher_epochs": 0,
        "folder": str(tmp_path / "comparison"),
        **SHORT,
    }


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The runs that have been trained; none takes time."""
    found: list[str] = []

    def train_arm(comparison: Comparison, arm: compare.Arm, seed: int) -> dict[str, Any]:
        found.append(f"{arm.name}-{seed}")
        return result(arm.name, seed, 0.1 + seed / 100)

    monkeypatch.setattr(compare, "train_arm", train_arm)
    monkeypatch.setattr(compare, "rehearse", lambda comparison: None)
    monkeypatch.setattr(summary, "_draw", lambda *_: None)
    return found


def train_again(root: Path) -> None:
    content = torch.load(root / "t.pt", weights_only=False)
    next(content["model"].parameters()).data += 1
    torch.save(content, root / "t.pt")


def rename_class(root: Path) -> None:
    file = root / "data" / "d.yaml"
    content = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump({**content, "names": {**content["names"], 3: "three"}}))


def correct_label(root: Path) -> None:
    file = min((root / "data" / "labels" / "train").glob("*.txt"))
    row = file.read_text()
    file.write_text(("1" if row[0] == "0" else "0") + row[1:])  # of the same size


def name_fewer_images(root: Path) -> None:
    images = sorted((root / "data" / "images" / "train").iterdir())
    (root / "data" / "some.txt").write_text("\n".join(map(str, images[:-1])))
    content = yaml.safe_load((root / "data" / "d.yaml").read_text())
    (root / "data" / "d.yaml").write_text(yaml.safe_dump({**content, "train": "some.txt"}))


def widen_student(root: Path) -> None:
    text = (root / "yolov8n.yaml").read_text()
    (root / "yolov8n.yaml").write_text(text.replace("64, 3, 2", "80, 3, 2"))
    content = yaml.safe_load(text)
    content["nc"] = 7
    (root / "yolov8n.yaml").write_text(yaml.safe_dump(content))


def add_to_pool(root: Path) -> None:
    shutil.copy(min((root / "pool").iterdir()), root / "pool" / "another.jpg")


CHANGES: list[tuple[Callable[[Path], None], str]] = [
    (train_again, "teacher"),
    (rename_class, "data"),
    (correct_label, "labels of data"),
    (name_fewer_images, "images of data, labels of data"),
    (widen_student, "student"),
    (add_to_pool, "unlabeled images of arm pool"),
]


@pytest.mark.parametrize("runs_left", [True, False], ids=["runs left", "complete"])
@pytest.mark.parametrize(("change", "named"), CHANGES, ids=[change.__name__ for change, _ in CHANGES])
def test_a_comparison_of_other_content_is_refused(
    change: Callable[[Path], None], named: str, runs_left: bool, words: Words, trained: list[str], tmp_path: Path
) -> None:
    compare.run(words)
    before = {file: file.read_bytes() for file in Path(words["folder"]).rglob("*") if file.is_file()}
    change(tmp_path)
    with pytest.raises(ConfigError) as refused:
        compare.run({**words, "seeds": 3} if runs_left else words)
    message = str(refused.value)
    assert f": the files have changed since its comparison began: {named}; give another folder=, or put back" in message
    assert len(trained) == 6
    assert {file: file.read_bytes() for file in before} == before


def test_a_comparison_goes_on_where_its_data_have_moved(words: Words, trained: list[str], tmp_path: Path) -> None:
    compare.run(words)
    moved = shutil.move(tmp_path / "data", tmp_path / "moved")
    (tmp_path / "data").symlink_to(moved)
    (tmp_path / "moved" / "d.yaml").touch()
    content = yaml.safe_load((tmp_path / "moved" / "d.yaml").read_text())
    (tmp_path / "moved" / "d.yaml").write_text("# a comment\n" + yaml.safe_dump({**content, "path": str(moved)}))
    compare.run({**words, "seeds": 3})
    assert len(trained) == 9


def test_runs_of_other_versions_do_not_join(
    words: Words, trained: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compare.run(words)
    monkeypatch.setattr(record, "versions", lambda: {"yolo_cwd": "9", "ultralytics": "8.9"})
    with pytest.raises(ConfigError, match=r"and this is yolo_cwd 9 and ultralytics 8\.9; give another folder=, or"):
        compare.run({**words, "seeds": 3})
    capsys.readouterr()
    compare.run(words)
    assert "vs plain" in capsys.readouterr().out
    assert len(trained) == 6


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "it is empty"),
        ("notes: of mine\n", "it describes no comparison"),
        ("arms: [plain\n", "is not YAML"),
        ("- plain\n", "it describes no comparison"),
        ("\x00" * 40, "comparison.yaml cannot be used"),
    ],
)
def test_a_record_that_cannot_be_read_is_named(
    content: str, reason: str, words: Words, trained: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    compare.run(words)
    file = Path(words["folder"]) / "comparison.yaml"
    file.write_text(content)
    capsys.readouterr()
    assert main(["compare", *(f"{name}={value}" for name, value in words.items())]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("yolo_cwd: ")]
    assert re.search(rf"{reason}.*; restore that file, or give another folder=$", line)
    assert file.read_text() == content


def test_what_is_no_result_is_left_alone_and_trained(words: Words, trained: list[str]) -> None:
    compare.run(words)
    results = Path(words["folder"]) / "results"
    (results / "._plain-0.json").write_bytes(b"\x00\x05\x16\x07\xff")
    (results / "notes.json").write_text("[1, 2]")
    (results / "plain-0 (copy).json").write_bytes((results / "plain-0.json").read_bytes())
    (results / "notes.txt").write_text("mine")
    (results / "folder.json").mkdir()
    foreign = sorted(results.iterdir())
    trained.clear()
    assert compare.run(words)["arms"]["plain"]["runs"] == 2
    assert trained == []
    (results / "cwd-1.json").write_text("")
    (results / "plain-1.json").write_text('{"arm": "plain"')
    (results / "teacher.json").write_text("")
    found = compare.run(words)
    assert sorted(trained) == ["cwd-1", "plain-1"]
    assert found["arms"]["cwd"]["runs"] == 2
    assert json.loads((results / "teacher.json").read_text()) is None
    assert sorted(results.iterdir()) == foreign


@pytest.fixture
def read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Let nothing be written in the folder of the test any more, as the operating system would; root may write all."""

    def begin(number: int) -> None:
        mkdir = os.mkdir

        def refused(path: Any) -> bool:
            return not isinstance(path, int) and Path(os.fsdecode(path)).is_relative_to(tmp_path)

        def guard(call: Callable[..., Any], writes: Callable[..., bool]) -> Callable[..., Any]:
            def guarded(path: Any, *args: Any, **named: Any) -> Any:
                if refused(path) and writes(*args, **named):
                    exists = call is mkdir and Path(path).exists()
                    raise OSError(errno.EEXIST if exists else number, os.strerror(number), os.fsdecode(path))
                return call(path, *args, **named)

            return guarded

        opened = guard(io.open, lambda mode="r", *_, **__: not {*"wax+"}.isdisjoint(mode))
        monkeypatch.setattr(io, "open", opened)
        monkeypatch.setattr("builtins.open", opened)
        monkeypatch.setattr(os, "open", guard(os.open, lambda flags=0, *_, **__: flags & (os.O_WRONLY | os.O_RDWR)))
        for name in ("mkdir", "unlink", "replace", "rename", "utime"):
            monkeypatch.setattr(os, name, guard(getattr(os, name), lambda *_, **__: True))

    return begin


@pytest.mark.usefixtures("whole_messages")
@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_finished_comparison_on_read_only_storage_prints_its_table(
    number: int,
    words: Words,
    trained: list[str],
    read_only: Callable[[int], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    compare.run(words)
    (shown,) = re.findall(r"^arm .*?\n\n", capsys.readouterr().out, re.MULTILINE | re.DOTALL)
    typed = [f"{name}={value}" for name, value in words.items()]
    read_only(number)
    assert main(["compare", *typed]) == 0
    assert shown in capsys.readouterr().out
    assert main(["compare", *typed, "seeds=3"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("yolo_cwd: ")]
    assert f"folder={words['folder']}: cannot write " in line
    assert f"({os.strerror(number)})" in line


def test_a_finished_comparison_prints_its_table_without_its_models(
    words: Words, trained: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    compare.run(words)
    capsys.readouterr()
    Path(words["teacher"]).unlink()
    compare.run(words)
    assert "vs plain" in capsys.readouterr().out
