"""Options: defaults, forms of the values, and the course of the weight."""

import math

import pytest
from conftest import STUDENT, TEACHER
from ultralytics import YOLO

from yolo_cwd.config import (
    OPTIONS,
    ConfigError,
    Settings,
    check_names,
    level_name,
    split_options,
    unusable_data,
    unusable_model,
    with_suffix,
)
from yolo_cwd.run.refusal import refusal
from yolo_cwd.run.request import student_path
from yolo_cwd.trainer import CWDTrainer


def settings(**options: object) -> Settings:
    return Settings.parse({"teacher": "yolov8l", **options})


def test_every_option_has_a_meaning_and_a_valid_default() -> None:
    assert all(option.meaning for option in OPTIONS.values())
    assert settings().cwd == OPTIONS["cwd"].default


@pytest.mark.parametrize(
    ("given", "strides"),
    [
        pytest.param("all", None, id="all"),
        pytest.param("P3,P4", (8, 16), id="names"),
        pytest.param("p5", (32,), id="one name"),
        pytest.param("32,8", (8, 32), id="strides as text"),
        pytest.param(16, (16,), id="one stride"),
        pytest.param((8, 16), (8, 16), id="strides as the command line reads 8,16"),
        pytest.param(["P6", 4], (4, 64), id="list of both"),
    ],
)
def test_levels(given: object, strides: tuple[int, ...] | None) -> None:
    assert settings(levels=given).levels == strides


@pytest.mark.parametrize("given", ["P1", "P9", "", "P3;P4", 7, 3.5, True, None, [], ["P3", "x"], {"P3": 1}])
def test_levels_that_do_not_exist(given: object) -> None:
    with pytest.raises(ConfigError, match="levels="):
        settings(levels=given)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tau", 0),
        ("tau", -1),
        ("tau", math.nan),
        ("tau", math.inf),
        ("tau", "2"),
        ("tau", True),
        ("tau", None),
        ("cwd", -0.1),
        ("cwd", math.nan),
        ("cwd", [1]),
        ("cwd_final", 1.5),
        ("level_weights", (1, -1)),
        ("level_weights", []),
        ("level_weights", "high"),
        ("schedule", "cosin"),
        ("schedule", 1),
        ("adapter", None),
        ("adapter", "mlp"),
        ("teacher", None),
        ("teacher", ""),
        ("teacher", 8),
    ],
)
def test_refused_values_are_named_in_one_line(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"^{name}") as error:
        settings(**{name: value})
    assert "\n" not in str(error.value)


def test_constant_weight() -> None:
    assert [settings(cwd=4, schedule="constant").weight(epoch, 3) for epoch in range(3)] == [4, 4, 4]


def test_linear_weight() -> None:
    weights = [settings(cwd=4, schedule="linear", cwd_final=0.5).weight(epoch, 5) for epoch in range(5)]
    assert weights == pytest.approx([4, 3.5, 3, 2.5, 2])


def test_cosine_weight() -> None:
    weights = [settings(cwd=2, schedule="cosine", cwd_final=0.0).weight(epoch, 5) for epoch in range(5)]
    assert weights == pytest.approx([2, 1 + math.sqrt(0.5), 1, 1 - math.sqrt(0.5), 0], abs=1e-12)


def test_weight_of_a_single_epoch() -> None:
    assert settings(cwd=4, schedule="cosine").weight(0, 1) == 4


def test_level_weights() -> None:
    names = ["P3", "P4", "P5"]
    assert settings(level_weights=2).weights_of(names) == [2, 2, 2]
    assert settings(level_weights=(3, 2, 1)).weights_of(names) == [3, 2, 1]
    with pytest.raises(ConfigError, match=r"level_weights=1\.0,2\.0: 2 weights for the 3 distilled levels P3, P4, P5"):
        settings(level_weights=(1, 2)).weights_of(names)


def test_names() -> None:
    assert [level_name(stride) for stride in (4, 8, 16, 32, 64)] == ["P2", "P3", "P4", "P5", "P6"]
    assert with_suffix("yolov8l") == "yolov8l.pt"
    assert with_suffix("my/yolo11n.yaml") == "my/yolo11n.yaml"
    assert split_options({"tau": 2, "epochs": 3}) == ({"tau": 2}, {"epochs": 3})


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"^tua=2: unknown argument; did you mean tau\?"):
        check_names({"tua": 2}, {"epochs"})
    with pytest.raises(ConfigError, match=r"^epoch=2: unknown argument; did you mean epochs\?"):
        check_names({"epoch": 2}, {"epochs"})
    with pytest.raises(ConfigError, match="yolo_cwd settings"):
        check_names({"qqqq": 2}, {"epochs"})


REFUSALS = {
    "teacher": lambda value: settings(teacher=value if isinstance(value, dict | list) else [value]),
    "tau": lambda value: settings(tau=value),
    "levels": lambda value: settings(levels=value),
    "schedule": lambda value: settings(schedule=value),
    "student": lambda value: student_path(value, "other.pt", None),
    "unheard": lambda value: check_names({"unheard": value}, {"epochs"}),
}


@pytest.mark.parametrize(
    "value",
    [{"epoch": "x" * 60_000}, "a\nb\n" * 900, ["x"] * 5000, object(), "short", "ä" * 400],
    ids=["mapping", "lines", "list", "object", "short", "umlauts"],
)
@pytest.mark.parametrize("name", REFUSALS)
def test_a_message_is_one_short_line_whatever_the_value(name: str, value: object) -> None:
    with pytest.raises(ConfigError) as error:
        REFUSALS[name](value)
    message = str(error.value)
    assert message.startswith(f"{name}=")
    assert len(message) < 300
    assert message == " ".join(message.split())
    assert "; " in message or ": must be " in message, "the remedy is kept"


def test_a_long_path_leaves_the_reason_and_the_remedy() -> None:
    error = unusable_model(f"teacher={'folder/' * 90}t.pt", FileNotFoundError(), "give an existing .pt checkpoint")
    assert str(error).endswith("folder/t.pt: no such file; give an existing .pt checkpoint")
    assert len(str(error)) < 300


def test_a_model_object_as_student_is_told_its_own_way() -> None:
    with pytest.raises(
        ConfigError, match=r"^model=YOLO: takes the path of a model; to train a YOLO object call its train"
    ):
        CWDTrainer(overrides={"model": YOLO(STUDENT), "teacher": TEACHER, "data": "bccd"})


@pytest.mark.parametrize("key", ["backbone", "MyAtt"])
def test_a_key_that_a_model_file_lacks_is_said_in_words(key: str) -> None:
    error = unusable_model("student=x.yaml", KeyError(key), "give an existing .yaml model")
    assert str(error) == f"student=x.yaml: '{key}' is missing in it, or unknown; give an existing .yaml model"


def test_a_sentence_of_ultralytics_is_left_alone() -> None:
    error = KeyError("No `kpt_shape` in the a.yaml. See https://docs.ultralytics.com/datasets/pose")
    assert str(unusable_data("a.yaml", error)) == (
        "data=a.yaml: No `kpt_shape` in the a.yaml; correct the data set, see https://docs.ultralytics.com/datasets"
    )


def test_a_missing_package_is_named_as_pip_knows_it() -> None:
    missing = ModuleNotFoundError("No module named 'modelopt'", name="modelopt")
    said = str(refusal(missing, {"quantize": 8}))
    assert said == (
        "quantize=8: needs the package nvidia-modelopt, which is not installed; pip install nvidia-modelopt"
    )
    assert str(refusal(ModuleNotFoundError(name="comet"), {})).startswith("comet: needs the package comet, ")
