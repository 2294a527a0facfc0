"""The arms of a comparison: how they are written, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from yolo_cwd.config import ConfigError, Settings
from yolo_cwd.study.arms import parse_arms


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("plain,warm:tau=4,cwd=0", [("plain", "plain", {}), ("warm", "cwd", {"tau": 4, "cwd": 0})]),
        ("plain,cwd,builtin", [("plain", "plain", {}), ("cwd", "cwd", {}), ("builtin", "builtin", {})]),
        (
            "plain,cwd:tau=2,cwd=20,builtin",
            [("plain", "plain", {}), ("cwd_tau=2_cwd=20", "cwd", {"tau": 2, "cwd": 20}), ("builtin", "builtin", {})],
        ),
        ("cwd:levels=P3", [("cwd_levels=P3", "cwd", {"levels": "P3"})]),
        ("cwd20:cwd=20,main:tau=2", [("cwd20", "cwd", {"cwd": 20}), ("main", "cwd", {"tau": 2})]),
        ("plain2:nbs=16,cdw:nbs=8", [("plain2", "plain", {"nbs": 16}), ("cdw", "cwd", {"nbs": 8})]),
        ("plain,cwd:student=a.yaml", [("plain", "plain", {}), ("cwd_student=a.yaml", "cwd", {"model": "a.yaml"})]),
        ("builtin-3:dis=3", [("builtin-3", "builtin", {"dis": 3})]),
        ("plain-ish:method=cwd,tau=2", [("plain-ish", "cwd", {"tau": 2})]),
        (
            "two:unlabeled=[a,2024_06_15],cwd=0,builtin",
            [("two", "cwd", {"unlabeled": ["a", "2024_06_15"], "cwd": 0}), ("builtin", "builtin", {})],
        ),
        (
            "one:unlabeled=2024_06,other:levels=[P3,P4],level_weights=[1,0.5]",
            [
                ("one", "cwd", {"unlabeled": "2024_06"}),
                ("other", "cwd", {"levels": ["P3", "P4"], "level_weights": [1, 0.5]}),
            ],
        ),
        (["plain", "cwd:tau=2,cwd=20"], [("plain", "plain", {}), ("cwd_tau=2_cwd=20", "cwd", {"tau": 2, "cwd": 20})]),
    ],
)
def test_arms(given: Any, expected: list[tuple[str, str, dict[str, Any]]]) -> None:
    assert [arm[:3] for arm in parse_arms(given)] == expected


def test_arms_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "arms.yaml"
    file.write_text(yaml.safe_dump({"plain": None, "warm": {"method": "cwd", "tau": 4.0}, "cwd": {}}))
    assert {arm.name: (arm.method, arm.arguments) for arm in parse_arms(str(file))} == {
        "plain": ("plain", {}),
        "warm": ("cwd", {"tau": 4.0}),
        "cwd": ("cwd", {}),
    }


def test_arms_with_models_of_their_own(tmp_path: Path) -> None:
    file = tmp_path / "arms.yaml"
    slim = {"method": "plain", "student": "slim.yaml"}
    taught = {"method": "cwd", "student": "slim.yaml", "teacher": "other", "against": "slim"}
    file.write_text(yaml.safe_dump({"plain": {}, "slim": slim, "taught": taught}, sort_keys=False))
    arms = parse_arms(str(file))
    assert [(arm.name, arm.arguments, arm.against) for arm in arms] == [
        ("plain", {}, "plain"),
        ("slim", {"model": "slim.yaml"}, "plain"),
        ("taught", {"teacher": "other", "model": "slim.yaml"}, "slim"),
    ]
    file.write_text(yaml.safe_dump({"cwd": {"against": "nothing"}}))
    with pytest.raises(ConfigError, match="against=nothing: arm cwd"):
        parse_arms(str(file))


@pytest.mark.parametrize("given", ["", "plain,plain", "plain,Plain", "magic", "cwd:", "cwd:tua=2", "absent.yaml"])
def test_refused_arms(given: str) -> None:
    with pytest.raises(ConfigError):
        parse_arms(given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("plian", "arms=plian: is none of plain, cwd, builtin, and has no options; did you mean plain?"),
        ("cwd:levels=P3,P4", "arms=P4: is none of .*; give P4:option=value; a list stands in brackets"),
        ("x:method=cdw,tau=2", "arms=x: its method cdw is none of plain, cwd, builtin"),
        ("plain:tau=2", "arms=plain:tau=2: method=plain ignores tau; leave it out, or give the arm method=cwd"),
        ("plain2:unlabeled=a", "arms=plain2:unlabeled=a: method=plain ignores unlabeled; "),
        ("plain:teacher=t.pt", "arms=plain:teacher=t.pt: method=plain ignores teacher; "),
        ("builtin:share=2", "arms=builtin:share=2: method=builtin ignores share; "),
        ("cwd:dis=2", "arms=cwd:dis=2: method=cwd ignores dis; leave it out, or give the arm method=builtin"),
        ("cwd:seed=3", "arms=cwd:seed=3: no arm has a seed of its own; leave it out"),
        ("cwd:name=a", "arms=cwd:name=a: no arm has a name of its own; "),
        ("cwd:split=test", "arms=cwd:split=test: no arm has a split of its own; "),
        ("cwd:teacher_epochs=5", "arms=cwd:teacher_epochs=5: all arms share the teacher that is trained; "),
        (f"cwd:unlabeled={'a' * 200}", "too long for the name of a file; begin it with a name"),
    ],
)
def test_what_an_arm_would_ignore_is_refused(given: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_arms(given)


def test_the_home_folder_is_filled_in_wherever_an_arm_names_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "arms.yaml").write_text(yaml.safe_dump({"cwd": {"teacher": "~/t.pt"}}))
    arms = parse_arms("a:teacher=~/t.pt,b:unlabeled=[~/one,~/two],c:data=~/d.yaml,student=~/s.pt")
    assert [arm.arguments for arm in (*arms, *parse_arms("~/arms.yaml"))] == [
        {"teacher": f"{tmp_path}/t.pt"},
        {"unlabeled": [f"{tmp_path}/one", f"{tmp_path}/two"]},
        {"data": f"{tmp_path}/d.yaml", "model": f"{tmp_path}/s.pt"},
        {"teacher": f"{tmp_path}/t.pt"},
    ]
    assert Settings.parse({"teacher": "t", "unlabeled": "~/one,~/two"}).unlabeled == (
        f"{tmp_path}/one",
        f"{tmp_path}/two",
    )
