"""Options one by one: what is taken, in which form it arrives, and what is refused with which words."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from yolo_cwd import config
from yolo_cwd.config import (
    OPTIONS,
    ConfigError,
    Option,
    Settings,
    at_home,
    exists,
    level_name,
    merge,
    model_path,
    path_or_value,
    split_options,
    with_suffix,
)

DEFAULTS = {
    "teacher": "t.pt",
    "teacher_epochs": None,
    "cwd": "balanced",
    "share": 1.0,
    "class_share": 1.0,
    "tau": 1.0,
    "levels": None,
    "level_weights": (1.0,),
    "schedule": "cosine",
    "cwd_final": 0.0,
    "adapter": "fitted",
    "teacher_dtype": "auto",
    "trust_teacher": False,
    "unlabeled": (),
    "pool_conf": 0.3,
    "pool_ratio": None,
    "pool_classes": "all",
    "complete_labels": False,
}
GIVEN = {
    "teacher": "a/b.yaml",
    "teacher_epochs": 7,
    "cwd": 2,
    "share": 3,
    "class_share": 4,
    "tau": 5,
    "levels": "P4",
    "level_weights": [6, 7],
    "schedule": "linear",
    "cwd_final": 0.5,
    "adapter": "conv",
    "teacher_dtype": "bf16",
    "trust_teacher": True,
    "unlabeled": "/a",
    "pool_conf": 0.6,
    "pool_ratio": 8,
    "pool_classes": "known",
    "complete_labels": True,
}


def settings(**options: Any) -> Settings:
    return Settings.parse({"teacher": "t", **options})


def refusal(**options: Any) -> str:
    with pytest.raises(ConfigError) as error:
        settings(**options)
    return str(error.value)


def test_defaults() -> None:
    assert vars(settings()) == DEFAULTS
    assert OPTIONS.keys() == {*DEFAULTS, "student"}
    assert OPTIONS["tau"].meaning.startswith("softmax temperature; larger values ")


@pytest.mark.parametrize("shipped", ["beside the package", "in the package"])
def test_options_are_read_where_they_are_shipped(
    shipped: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ascii_locale: None
) -> None:
    """A checkout has the folder beside the package, a wheel inside it; neither depends on the locale."""
    folder = tmp_path / "yolo_cwd" / "cfg" if shipped == "in the package" else tmp_path / "cfg"
    folder.mkdir(parents=True)
    (folder / "default.yaml").write_bytes("# größer\na: null # first # of two\nb: [1] # größer\n".encode())
    monkeypatch.setattr(config, "__file__", str(tmp_path / "yolo_cwd" / "config.py"))
    first, second = Option(None, "first # of two"), Option([1], "größer")
    assert config._read_options() == {"a": first, "b": second}


def test_every_option_arrives() -> None:
    other = {"levels": (16,), "level_weights": (6, 7), "unlabeled": ("/a",)}
    assert vars(settings(**GIVEN)) == {**GIVEN, **other}
    numbers = ("cwd", "share", "class_share", "tau", "cwd_final", "pool_conf", "pool_ratio")
    assert {type(getattr(settings(**GIVEN), name)) for name in numbers} == {float}


@pytest.mark.parametrize(
    ("options", "share", "class_share"),
    [
        ({"share": "auto", "class_share": "auto"}, 1, 1),
        ({"share": 0.5}, 0.5, 0.5),
        ({"share": 0.5, "class_share": 2}, 0.5, 2),
        ({"cwd": 3}, 1, 0),
        ({"cwd": 3, "class_share": 2}, 1, 2),
        ({"cwd": 0, "share": 0}, 0, 0),
    ],
)
def test_the_share_of_the_classes_follows_the_levels(options: dict[str, Any], share: float, class_share: float) -> None:
    found = settings(**options)
    assert (found.share, found.class_share) == (share, class_share)


@pytest.mark.parametrize(
    ("options", "share", "class_share"),
    [
        ({}, 0.03, 0.03),
        ({"share": "auto", "class_share": "auto"}, 0.03, 0.03),
        ({"share": 0.5}, 0.5, 0.5),
        ({"class_share": 0.5}, 0.03, 0.5),
        ({"cwd": 3}, 1, 0),
        ({"cwd": 3, "class_share": 2}, 1, 2),
    ],
)
def test_shares_under_a_teacher_that_does_not_know_the_data(
    options: dict[str, Any], share: float, class_share: float
) -> None:
    found = settings(**options, tau=2).for_unknowing_teacher(options)
    assert (found.share, found.class_share, found.tau) == (share, class_share, 2)


ENDS = {  # of the line that refuses a number
    "cwd": "must be balanced or a number at least 0, such as cwd=100.0",
    "share": "must be auto or a number at least 0, such as share=1.0",
    "class_share": "must be auto or a number at least 0, such as class_share=1.0",
    "tau": "must be a number above 0, such as tau=1.0",
    "cwd_final": "must be a number at least 0 and at most 1, such as cwd_final=0.0",
    "pool_conf": "must be a number at least 0 and at most 1, such as pool_conf=0.3",
    "pool_ratio": "must be a number above 0, such as pool_ratio=4.0",
    "level_weights": "must be a number at least 0, such as level_weights=1.0",
}


@pytest.mark.parametrize("name", ENDS)
def test_numbers_that_are_none_or_out_of_range(name: str) -> None:
    bad: list[Any] = [-1e-9, -1, math.nan, math.inf, "1", True, False, {}]
    bad += [1 + 1e-9, 2] if "at most 1" in ENDS[name] else []
    bad += [0, 0.0] if "above 0" in ENDS[name] else []
    bad += [None] if name != "pool_ratio" else []
    for value in bad:
        assert refusal(**{name: value}) == f"{name}={value}: {ENDS[name]}"


@pytest.mark.parametrize("name", ENDS)
@given(share=st.floats(0, 1), larger=st.floats(0, exclude_min=True, allow_infinity=False) | st.integers(1, 10**9))
def test_numbers_in_range_are_taken(name: str, share: float, larger: float) -> None:
    for value in (share, 0, 1, larger):
        if not (value > 1 and "at most 1" in ENDS[name]) and not (value == 0 and "above 0" in ENDS[name]):
            found = getattr(settings(**{name: value}), name)
            assert found == ((value,) if name == "level_weights" else value)


def test_epochs_of_the_teacher() -> None:
    assert [settings(teacher_epochs=value).teacher_epochs for value in (None, "auto", 0, 1)] == [None, None, 0, 1]
    for value in (-1, 1.0, True, False, "2"):
        assert refusal(teacher_epochs=value) == (
            f"teacher_epochs={value}: must be auto or a whole number of at least 0, such as teacher_epochs=100"
        )


CHOICES = {
    "schedule": ("constant", "linear", "cosine"),
    "adapter": ("fitted", "conv"),
    "teacher_dtype": ("auto", "fp32", "bf16", "fp16"),
    "trust_teacher": (True, False),
    "pool_classes": ("all", "known"),
    "complete_labels": (True, False),
}


@pytest.mark.parametrize("name", CHOICES)
def test_choices(name: str) -> None:
    """1 and 0 are not True and False, since they may be a slip."""
    for value in CHOICES[name]:
        assert getattr(settings(**{name: value}), name) is value or value == getattr(settings(**{name: value}), name)
    for value in ("other", "", None, 1, 0, "True", [], "Auto"):
        assert refusal(**{name: value}) == f"{name}={value}: must be one of {', '.join(map(str, CHOICES[name]))}"
    equal = "".join(["fit", "ted"])  # the same text, not the same object
    assert settings(adapter=equal).adapter == "fitted"


def test_the_weight_falls_with_the_epochs() -> None:
    words = {"cwd": 8, "cwd_final": 0.5}
    assert [settings(**words, schedule="linear").weight(i, 3) for i in range(5)] == [8, 6, 4, 4, 4], "and then stays"
    assert [settings(**words, schedule="cosine").weight(i, 3) for i in range(3)] == pytest.approx([8, 6, 4])
    assert settings(**words, schedule="cosine").weight(1, 5) == pytest.approx(8 - 4 * (1 - math.sqrt(0.5)) / 2)
    assert [settings(schedule="linear").weight(i, 2) for i in range(2)] == [1, 0], "of what each level has"
    assert [settings(schedule="linear").weight(i, 1) for i in range(2)] == [1, 0]
    assert settings(**words, schedule="linear").weight(0, 0) == 8
    assert [settings(**words, schedule="constant").weight(i, 3) for i in range(3)] == [8, 8, 8]
    assert (settings(cwd=3).strength, settings().strength) == (3, 1)
    assert (settings(cwd=3).balanced, settings().balanced) == (False, True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "gradient share 1 falling to 0 (cosine)"),
        ({"share": 0.25, "cwd_final": 0.5, "schedule": "linear"}, "gradient share 0.25 falling to 0.125 (linear)"),
        ({"cwd": 3, "cwd_final": 0.5, "share": 7}, "weight 3 falling to 1.5 (cosine)"),
        ({"cwd": 3, "schedule": "constant"}, "weight 3"),
    ],
)
def test_the_schedule_in_words(options: dict[str, Any], words: str) -> None:
    assert settings(**options).describe_schedule() == words


def test_what_asks_for_labels() -> None:
    assert settings().labeling == []
    assert settings(unlabeled="a", complete_labels=True).labeling == ["unlabeled", "complete_labels"]
    assert settings(complete_labels=True).labeling == ["complete_labels"]


def test_every_level_has_a_weight() -> None:
    names = ["P3", "P4"]
    assert settings(share=3, level_weights=[2]).weights_of(names) == [6, 6]
    assert settings(share=3, level_weights=(2, 1)).weights_of(names) == [6, 3]
    assert settings(share=3, cwd=5, level_weights=(2, 1)).weights_of(names) == [2, 1], "of the fixed weight"
    with pytest.raises(ConfigError) as error:
        settings(level_weights=(1, 2, 3), share=0.03).weights_of(names)
    assert str(error.value) == (
        "level_weights=1.0,2.0,3.0: 3 weights for the 2 distilled levels P3, P4; give one number, or one for each level"
    )
    example = "give one number, or one for each level, such as level_weights=1,1,0.5"
    assert refusal(level_weights=()) == f"level_weights=[]: {example}"


def test_every_level_by_name_or_stride() -> None:
    assert settings(levels="P2,p3,P4,P5,P6,P7").levels == (4, 8, 16, 32, 64, 128)
    assert settings(levels=[128, 64, 32, 16, 8, 4, 4]).levels == (4, 8, 16, 32, 64, 128)
    assert settings(levels=" P3 , 16").levels == (8, 16)
    assert [level_name(stride) for stride in (4, 8, 128)] == ["P2", "P3", "P7"]
    for value in ("P3x", "xP3", "P33", "-8", "8.0", 2, 256, 8.0, "all,P3", (), ["all"]):
        end = "must be all, names or strides, such as levels=P3,P4 or levels=8,16"
        assert refusal(levels=value) == f"levels={value}: {end}"


def test_the_teacher_is_a_path_or_a_model(tmp_path: Path) -> None:
    model = SimpleNamespace()
    assert settings(teacher=model).teacher is model
    assert settings(teacher=Path("a/b")).teacher == "a/b.pt"
    missing = "teacher: missing; name the stronger model to learn from, such as teacher=yolov8l.pt"
    end = f"is a folder; name the model in it, such as {tmp_path}/weights/best.pt"
    assert refusal(teacher=tmp_path) == f"teacher={tmp_path}: {end}"
    assert refusal(teacher=None) == refusal(teacher="") == missing
    end = "not a model; give a name, a .pt or .yaml path, or a YOLO model"
    for value, shown in ((0, 0), (8, 8), (True, True), (1.5, 1.5), (["a"], "list"), (("a",), "tuple"), ({}, "dict")):
        assert refusal(teacher=value) == f"teacher={shown}: {end}"


def test_a_model_may_have_the_name_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    with pytest.raises(ConfigError) as error:
        model_path("student", "run")
    assert str(error.value) == "student=run: is a folder; name the model in it, such as run/weights/best.pt"
    Path("run.pt").touch()
    assert model_path("student", "run") == "run.pt"
    assert model_path("student", "other.yaml") == with_suffix("other.yaml") == "other.yaml"
    monkeypatch.setenv("HOME", "/home/a")
    assert model_path("student", "~/b") == "/home/a/b.pt"


def test_the_home_folder_is_filled_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/a")
    unchanged = ["~b", "b/~", "", 3, None, True]
    assert [at_home(x) for x in ("~", "~/b", *unchanged)] == ["/home/a", "/home/a/b", *unchanged]
    assert at_home(Path("~/b")) == Path("/home/a/b")
    assert at_home(["~", ("~/b", 1)]) == ["/home/a", ("/home/a/b", 1)]


def test_a_number_may_be_the_name_of_a_folder() -> None:
    for name in ("source", "unlabeled"):
        assert [path_or_value(name, "1_0", value) for value in (10, 1.0)] == ["1_0", "1_0"]
        assert [path_or_value(name, "a", value) for value in (True, None, ["a"])] == [True, None, ["a"]]
    assert path_or_value("epochs", "1_0", 10) == 10


def test_paths_of_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/a")
    here = str(tmp_path)
    assert settings(unlabeled="a, b/*.jpg,~/c").unlabeled == (f"{here}/a", f"{here}/b/*.jpg", "/home/a/c")
    assert settings(unlabeled=2024).unlabeled == (f"{here}/2024",)
    assert settings(unlabeled=Path("/a")).unlabeled == ("/a",)
    assert settings(unlabeled=["/a,b", Path("c"), 7]).unlabeled == ("/a,b", f"{here}/c", f"{here}/7")
    assert settings(unlabeled=[]).unlabeled == settings(unlabeled=()).unlabeled == ()
    (tmp_path / "a,b").mkdir()
    assert settings(unlabeled="a,b").unlabeled == (f"{here}/a,b",), "one folder whose name has a comma"
    assert not exists("x" * 999)
    for value in ("", "a,", ["a", ""], [None], True, 1.5, {"a": 1}, [["a"]]):
        end = "not a path; give a folder, a glob, a .txt list, or several with commas"
        assert refusal(unlabeled=value) == f"unlabeled={value}: {end}", "as it was given"


def test_layers_of_arguments() -> None:
    """The upper one wins, whichever of its two names the student has."""
    assert merge({"a": 1, "b": 2}, {"b": 3, "c": 4}) == {"a": 1, "b": 3, "c": 4}
    assert merge({"model": "a", "b": 2}, {"student": "c"}) == {"student": "c", "b": 2}
    assert merge({"student": "a"}, {"model": "c"}) == {"model": "c"}
    assert merge({"student": "a"}, {"model": None}) == {"student": "a", "model": None}
    assert split_options({"tau": 2, "epochs": 3, "student": "a"}) == ({"tau": 2, "student": "a"}, {"epochs": 3})
