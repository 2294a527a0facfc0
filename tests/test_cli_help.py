"""What the command says to those who look for something: help, all that is missing, and recipes by name."""

import re
from pathlib import Path

import pytest

from yolo_cwd.cli import main, parse
from yolo_cwd.config import ConfigError
from yolo_cwd.run.request import read
from yolo_cwd.study.comparison import OWN_ARGUMENTS
from yolo_cwd.study.label import ARGUMENTS_OF_LABELS, OPTIONS_OF_LABELS


@pytest.mark.parametrize("command", ["train", "check", "compare", "label", "demo"])
def test_every_command_lists_its_own_arguments(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    shown = []
    for typed in (["help", command], [command, "--help"], [command, "teacher=t.pt", "-h"]):
        assert main(typed) == 0
        shown.append(capsys.readouterr().out)
    models = {"label": " teacher=MODEL source=IMAGES", "demo": ""}.get(command, " teacher=MODEL student=MODEL")
    assert shown[0].startswith(f"yolo_cwd {command}{models}")
    assert len(set(shown)) == 1
    own = {"check": {"format"}, "compare": OWN_ARGUMENTS}.get(command, set())
    assert {name for name in own if re.search(rf"^  {name}  ", shown[0], re.MULTILINE)} == own
    named = (*OPTIONS_OF_LABELS, *ARGUMENTS_OF_LABELS) if command == "label" else ()
    assert [name for name in named if name not in shown[0]] == []


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (
            "train",
            "teacher, student, data: missing; give them, such as teacher=yolov8l.pt student=yolov8n.pt data=coco8",
        ),
        ("train data=d.yaml", "teacher, student: missing; give them, such as teacher=yolov8l.pt student=yolov8n.pt"),
        ("train student=yolov8n.yaml", "teacher, data: missing; give them, such as teacher=yolov8l.pt data=coco8.yaml"),
        ("train cfg=finetune", "teacher, data: missing; "),
        ("check", "teacher, student: missing; "),
        ("compare", "teacher, student, data: missing; "),
        ("compare model=yolov8n.yaml", "teacher, data: missing; "),
        ("label", "teacher, source: missing; give them, such as teacher=yolov8l.pt source=path/to/images"),
        ("label complete_labels=True", "teacher, data: missing; "),
    ],
)
def test_all_missing_arguments_are_named_at_once(
    typed: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(typed.split()) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"yolo_cwd: {message}")
    assert not list(tmp_path.iterdir())


def test_a_recipe_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    expected = {"student": "yolov8n.pt", "epochs": 50, "optimizer": "AdamW", "lr0": 0.0005}
    (tmp_path / "finetune").mkdir()
    assert parse(["cfg=finetune"]) == parse(["cfg=finetune.yaml"]) == expected
    assert read("few-images", {"teacher": "t.pt", "data": "d.yaml"}).args.nbs == 16
    (tmp_path / "finetune.yaml").write_text("epochs: 3")
    assert parse(["cfg=finetune.yaml"]) == {"epochs": 3}
    with pytest.raises(
        ConfigError, match=r"cfg=finetun: cannot be read \(no such file\); .*did you mean the recipe fine"
    ):
        parse(["cfg=finetun"])
    with pytest.raises(ConfigError, match=r"or a recipe: coco, few-images, finetune, new-classes, small-objects$"):
        parse(["cfg=absent.yaml"])
