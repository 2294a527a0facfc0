"""Whatever is typed: a training that starts, or one clear line, exit code 2, and nothing left behind."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import STUDENT, bare
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from yolo_cwd.cli import main
from yolo_cwd.config import ADAPTERS, OPTIONS, SCHEDULES, TEACHER_DTYPES
from yolo_cwd.trainer import CWDTrainer

TEACHER = bare("yolov8s.yaml")  # the usual one cannot normalize a map of one position, as images of 32 pixels have
NUMBERS = st.sampled_from(
    ["0", "1", "0.5", "-1", "10", "1e3", "nan", "inf", "-inf", "1e400", "0x10", "1,2", "[]", "[1,2,3]"]
)
ODD = st.sampled_from(
    ["None", "True", "False", "abc", "'", '"', "{}", "()", "[", "1e", "é", "a b", "..", "/", "*", "\\n"]
)
FREE = st.text(st.characters(blacklist_categories=("Cs", "Cc")), max_size=6)
LEVELS = st.lists(st.sampled_from(["P2", "P3", "P4", "P5", "P6", "8", "16", "7", "p3", ""]), max_size=4).map(",".join)

OURS = {
    "schedule": st.sampled_from(SCHEDULES),
    "adapter": st.sampled_from(ADAPTERS),
    "teacher_dtype": st.sampled_from(TEACHER_DTYPES),
    "teacher_forward": st.sampled_from(["eager", "stream"]),  # compiling takes half a minute
    "levels": LEVELS,
    "normalize": st.sampled_from(["True", "False", "1"]),
    "teacher": st.sampled_from([TEACHER, "yolov8n-p2.yaml", "yolov8n-seg.yaml", "absent.pt", "absent.yaml", "a.onnx"]),
    "student": st.sampled_from([STUDENT, "yolo11n.yaml", "yolov8n-cls.yaml", "absent.pt", "absent.yaml"]),
}
THEIRS = {
    "epochs": NUMBERS,
    "batch": st.sampled_from(["1", "2", "4", "0", "-1", "0.5", "abc"]),
    "imgsz": st.sampled_from(["32", "64", "96", "33", "0", "-64", "abc", "64,96"]),
    "optimizer": st.sampled_from(["SGD", "AdamW", "adam", "auto", "MuSGD", "Lion", "1"]),
    "lr0": NUMBERS,
    "device": st.sampled_from(["cpu", "0", "0,1", "cuda", "mps", "abc", "-1"]),
    "amp": st.sampled_from(["True", "False", "bf16", "abc"]),
    "freeze": NUMBERS,
    "resume": st.sampled_from(["True", "False", "absent.pt"]),
    "distill_model": st.sampled_from(["None", "yolov8n.yaml"]),
    "data": st.sampled_from(["absent.yaml", "", "None", "bcc"]),
    "fraction": NUMBERS,
    "multi_scale": st.sampled_from(["0.5", "-1", "abc"]),
    "task": st.sampled_from(["detect", "segment", "abc"]),
    "no_such_argument": FREE,
}


@st.composite
def words(draw: st.DrawFn) -> list[str]:
    """A few arguments of the command, most of them of the right kind."""
    names = draw(st.lists(st.sampled_from([*OPTIONS, *THEIRS]), min_size=1, max_size=3, unique=True))
    typed = []
    for name in names:
        sensible = {**OURS, **THEIRS}.get(name, NUMBERS)
        value = draw(st.one_of(sensible, sensible, ODD, FREE) if name not in {"device", "imgsz", "batch"} else sensible)
        typed.append(f"{name}={value}")
    return typed


@pytest.fixture
def try_out(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[list[str]], None]:
    """Run the command up to its first step, and check how it ends."""
    monkeypatch.setattr(CWDTrainer, "_do_train", lambda trainer: trainer._setup_train())  # preparations, and no step
    monkeypatch.chdir(tmp_path)
    return lambda typed: check(typed, data, tmp_path / "place", capsys)


def check(typed: list[str], data: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    given_names = {word.partition("=")[0] for word in typed}
    usual = {
        "teacher": TEACHER,
        "student": STUDENT,
        "data": data,
        "imgsz": "64",
        "batch": "4",
        "device": "cpu",
        "amp": "False",
        "plots": "False",
        "epochs": "1",
    }
    kept = [f"{name}={value}" for name, value in usual.items() if name not in given_names]
    capsys.readouterr()
    code = main(["train", *kept, *typed, f"project={folder / 'runs'}"])
    errors = capsys.readouterr().err
    assert code in {0, 2}, errors
    if code == 2:
        assert errors.startswith("yolo_cwd: ")
        assert len(errors.strip().splitlines()) == 1, errors
        assert not any(folder.iterdir()), "something was left behind"


RELAXED = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=RELAXED)
@given(typed=words())
def test_any_input(typed: list[str], try_out: Callable[[list[str]], None]) -> None:
    try_out(typed)


@pytest.mark.slow
@settings(max_examples=100, deadline=None, suppress_health_check=RELAXED)
@given(typed=words())
def test_much_more_input(typed: list[str], try_out: Callable[[list[str]], None]) -> None:
    try_out(typed)
