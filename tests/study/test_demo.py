"""The demonstration: cut short, its parts, and as it is."""

import os
import re
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import cv2
import pytest
import torch

from yolo_cwd import ConfigError, bccd
from yolo_cwd.study import demo
from yolo_cwd.study.demo import table

ANSI = re.compile(r"\x1b\[[0-9;]*m")
SCORES = {
    "teacher": {"score": 0.5659, "second": 0.8634},
    "plain": {"score": 0.4101, "second": 0.6164, "seconds": 43.2},
    "cwd": {"score": 0.4625, "second": 0.75, "seconds": 61.7},
}


def test_table() -> None:
    assert table(SCORES, 118.4).splitlines() == [
        "                   mAP50-95  mAP50  training",
        "teacher                56.6   86.3  shipped, on four times the labels",
        "plain student          41.0   61.6      43 s",
        "distilled student      46.2   75.0      62 s",
        "",
        "Distillation changed the student by +5.2 points of mAP50-95, at no cost in use.",
        "All of it took 1 min 58 s.",
    ]


def test_a_loss_is_said_as_well() -> None:
    assert "by -5.2 points" in table({**SCORES, "plain": SCORES["cwd"], "cwd": SCORES["plain"]}, 60)


@pytest.mark.parametrize("words", [{"seed": -1}, {"seed": "one"}, {"seed": True}, {"seed": 0.5}, {"epochs": 3}])
def test_bad_input(words: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ((name, value),) = words.items()
    with pytest.raises(ConfigError, match=f"^{name}={value}: .*seed="):
        demo.run(words)
    assert not list(tmp_path.iterdir())


def test_it_calculates_on_all_cores_and_then_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "cpu_count", lambda: 3)
    before = torch.get_num_threads()
    with suppress(KeyboardInterrupt), demo._all_cores():
        assert torch.get_num_threads() == 3
        raise KeyboardInterrupt
    assert torch.get_num_threads() == before == 1


@pytest.fixture
def few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demonstration with 4 images to train on, one epoch, and 8 to validate on."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = bccd.build().parent
    for split, count in {"train": 4, "val": 8}.items():
        for file in sorted((folder / "images" / split).iterdir())[count:]:
            file.unlink()
    short = {"epochs": 1, "imgsz": 64, "batch": 4, "nbs": 4}
    monkeypatch.setattr(demo, "SCHEDULE", {**demo.SCHEDULE, **short})
    monkeypatch.setattr(demo, "IMAGE_SIZE", 64)
    monkeypatch.setattr(demo, "EVERY", 2)
    monkeypatch.setattr(demo, "get_save_dir", lambda args: tmp_path / "demo")
    monkeypatch.setattr(demo, "cpu_count", lambda: 1)


@pytest.mark.usefixtures("drawn_pictures")
def test_cut_short(
    few: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("ultralytics.utils.LOGGER.propagate", True)
    results = demo.run({"seed": 3})
    said = [ANSI.sub("", record.getMessage()).strip() for record in caplog.records]
    assert "compare: run 1 of 2 (plain-3)" in said
    assert any(re.fullmatch(r"compare: run 2 of 2 \(cwd-3\), about .* left", line) for line in said)
    assert results.keys() == {"teacher", "plain", "cwd"}
    shown = capfd.readouterr().out
    assert f"{100 * (results['cwd']['score'] - results['plain']['score']):+.1f} points of mAP50-95" in shown
    assert Path(results["cwd"]["weights"]).exists()
    *_, picture, weights, last = shown.splitlines()
    assert picture == f"What they find in the same images: {tmp_path / 'demo' / 'found.png'}"
    assert weights.endswith(results["cwd"]["weights"])
    assert last.startswith("This is one seed on few images.")
    rows, columns = cv2.imread(str(tmp_path / "demo" / "found.png")).shape[:2]
    assert columns > rows > 100


def test_both_students_have_the_same_schedule_and_the_shipped_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(words: dict[str, Any]) -> None:
        assert words["arms"] == "plain,cwd"
        assert (words["teacher"], words["student"]) == (str(bccd.TEACHER), str(bccd.STUDENT))
        assert words["data"] == "bccd"
        assert words["seeds"] == 1, "a number is how many: seed 0"
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "train_missing", stop)
    monkeypatch.setattr(demo, "get_save_dir", lambda args: tmp_path / "demo")
    with pytest.raises(KeyboardInterrupt):
        demo.run({})


@pytest.mark.slow
def test_as_it_is(tmp_path: Path) -> None:
    """What a user gets: the teacher is ahead of both students, and the distilled one of the plain one."""
    words = [sys.executable, "-m", "yolo_cwd", "demo", "seed=5"]
    begin = time.perf_counter()
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
    environment |= {"YOLO_CONFIG_DIR": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    environment["LOKY_MAX_CPU_COUNT"] = "1"  # joblib's: the other cores have tests of their own
    result = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = re.findall(r"^(teacher|plain student|distilled student) +(\d+\.\d) ", result.stdout, flags=re.MULTILINE)
    scores = {name: float(score) for name, score in rows}
    assert scores["teacher"] > scores["distilled student"] > scores["plain student"] + 1
    assert time.perf_counter() - begin < 1200, "ten times the two minutes that it takes"
    picture = Path(re.findall(r"^What they find in the same images: (.*)$", result.stdout, flags=re.MULTILINE)[0])
    assert picture.stat().st_size > 100_000
