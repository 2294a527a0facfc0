"""The statistics of a comparison, by hand: what is paired, which way is better, and what the files say."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from yolo_cwd.study.summary import as_text, paired_interval, summarize, table, write_summary
from yolo_cwd.tasks import TASKS


def result(arm: str, seed: int, score: float, seconds: float = 10.0, **classes: float) -> dict[str, Any]:
    return {
        "arm": arm,
        "seed": seed,
        "seconds": seconds,
        "score": score,
        "second": score + 0.2,
        "classes": classes,
        "curve": [],
    }


PLAIN = [
    result("plain", 0, 0.30, 10.0, cat=0.2, dog=0.1, owl=0.5),
    result("plain", 1, 0.32, 20.0, cat=0.3, dog=0.2, owl=0.5),
    result("plain", 2, 0.36, 40.0, cat=0.5, dog=0.3, owl=0.5),
]
TEACHER = {"score": 0.44, "second": 0.6, "classes": {}}


def written(folder: Path, arms: dict[str, Any], results: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """Write results as a comparison does, and return their summary."""
    (folder / "results").mkdir()
    for r in results:
        (folder / "results" / f"{r['arm']}-{r['seed']}.json").write_text(json.dumps(r))
    if teacher := more.pop("teacher", None):
        (folder / "results" / "teacher.json").write_text(json.dumps(teacher))
    (folder / "comparison.yaml").write_text(yaml.safe_dump({"task": "detect", "arms": arms, **more}, sort_keys=False))
    return write_summary(folder)


@pytest.mark.parametrize("lacking", [0, 1, 2])
def test_a_seed_that_an_arm_lacks_is_in_no_pair(lacking: int) -> None:
    """Gains of 1, 2 and 6 points by seed; by position, each of these would be another."""
    taught = [
        result("cwd", seed, plain["score"] + gain, 2 * plain["seconds"] + seed)
        for seed, (plain, gain) in enumerate(zip(PLAIN, (0.01, 0.02, 0.06), strict=True))
    ]
    del taught[lacking]
    arm = summarize(["plain", "cwd"], TEACHER, [*PLAIN, *reversed(taught)])["arms"]["cwd"]
    gains = [gain for seed, gain in enumerate((0.01, 0.02, 0.06)) if seed != lacking]
    base = [r["score"] for r in PLAIN if r["seed"] != lacking]
    mean = sum(gains) / 2
    half = 12.70620 * abs(gains[0] - gains[1]) / 2  # t(0.975, 1) in printed tables, and sd / sqrt(2)
    assert arm["seeds"] == [seed for seed in range(3) if seed != lacking]
    assert (arm["runs"], arm["gain"]) == (2, pytest.approx(mean))
    assert arm["interval"] == pytest.approx((mean - half, mean + half), abs=1e-6)
    assert arm["gap_closed"] == pytest.approx(mean / (0.44 - sum(base) / 2))
    seconds = [r["seconds"] for r in PLAIN if r["seed"] != lacking]
    assert arm["time_ratio"] == pytest.approx((2 * sum(seconds) + sum(arm["seeds"])) / sum(seconds))


def test_gains_by_class_are_paired_too() -> None:
    """A class without a score in a run counts as 0 there; one that only one arm has ever had is not shown."""
    taught = [result("cwd", 2, 0.4, cat=0.6, fox=0.9), result("cwd", 1, 0.4, cat=0.5, dog=0.5)]
    arm = summarize(["plain", "cwd"], None, [*PLAIN, *taught])["arms"]["cwd"]
    assert arm["class_gains"] == pytest.approx({"cat": (0.1 + 0.2) / 2, "dog": (0.3 - 0.3) / 2})
    assert list(arm["class_gains"]) == ["cat", "dog"]


def test_a_class_that_the_plain_run_of_a_seed_lacks_counts_as_0_there() -> None:
    base = [result("plain", 0, 0.3, cat=0.2), result("plain", 1, 0.3)]
    taught = [result("cwd", 0, 0.4, cat=0.3), result("cwd", 1, 0.5, cat=0.5)]
    summary = summarize(["plain", "cwd"], None, [*base, *taught])
    arm = summary["arms"]["cwd"]
    assert arm["class_gains"] == pytest.approx({"cat": (0.1 + 0.5) / 2})
    assert arm["sd"] == pytest.approx(0.1 / 2**0.5)
    assert arm["gap_closed"] is None, "there is no teacher"
    assert list(summary["versions"]) == ["yolo_cwd", "ultralytics", "torch"]


def test_one_pair_has_a_gain_and_no_interval() -> None:
    arm = summarize(["plain", "cwd"], TEACHER, [*PLAIN, result("cwd", 1, 0.33)])["arms"]["cwd"]
    assert (arm["gain"], arm["interval"], arm["sd"]) == (pytest.approx(0.01), None, None)
    assert paired_interval([]) is None
    low, high = paired_interval([0.1, 0.3])  # two are enough
    assert (low, high) == pytest.approx((0.2 - 12.7062 * 0.1, 0.2 + 12.7062 * 0.1), abs=1e-5)


def test_without_a_common_seed_there_is_no_gain() -> None:
    arm = summarize(["plain", "cwd"], TEACHER, [*PLAIN, result("cwd", 9, 0.33)])["arms"]["cwd"]
    unknown = {"gain", "interval", "gap_closed", "time_ratio"}
    assert {name for name, value in arm.items() if value is None} == {*unknown, "sd"}
    assert arm["class_gains"] == {}
    assert summarize(["cwd"], TEACHER, [result("cwd", 9, 0.33)])["verdict"].startswith("Without an arm named plain")


def test_an_arm_without_runs_is_left_out() -> None:
    assert list(summarize(["cwd", "plain", "late"], TEACHER, [*PLAIN, result("cwd", 0, 0.4)])["arms"]) == [
        "cwd",
        "plain",
    ]


def test_where_lower_is_better_gains_are_still_above_0() -> None:
    """The absolute relative error of a depth model."""
    task = TASKS["depth"]
    assert task.score.sign == -1
    taught = [result("cwd", r["seed"], r["score"] - 0.02, cat=0.1) for r in PLAIN]
    summary = summarize(["plain", "cwd"], {**TEACHER, "score": 0.2}, [*PLAIN, *taught], task=task)
    arm = summary["arms"]["cwd"]
    assert arm["gain"] == pytest.approx(0.02)
    assert arm["gap_closed"] == pytest.approx(0.02 / (0.98 / 3 - 0.2))
    assert arm["class_gains"] == pytest.approx({"cat": 1 / 3 - 0.1})
    assert summary["verdict"] == f"The teacher leads the plain student by 12.7 points of {task.score.label}."
    assert summary["scores"] == [task.score.label, task.second.label]
    weak = summarize(["plain"], {**TEACHER, "score": 0.4}, PLAIN, task=task)
    assert "not better than the plain student (-7.3 points): it has nothing to teach" in weak["verdict"]


@pytest.mark.parametrize(
    ("score", "verdict"),
    [
        pytest.param(0.98 / 3, "The teacher is not better than the plain student", id="a teacher as good as it"),
        pytest.param(0.337, "The teacher leads the plain student by 1.0 points of mAP50-95.", id="a bit better"),
    ],
)
def test_a_teacher_must_be_better(score: float, verdict: str) -> None:
    assert summarize(["plain"], {**TEACHER, "score": score}, PLAIN)["verdict"].startswith(verdict)
    assert "has no score here" in summarize(["plain"], None, PLAIN)["verdict"]


def test_a_teacher_no_better_than_the_paired_runs_has_no_gap_to_close() -> None:
    arms = summarize(["plain", "cwd"], {**TEACHER, "score": 0.30}, [*PLAIN, result("cwd", 0, 0.4)])["arms"]
    assert arms["cwd"]["gap_closed"] is None


def test_the_time_of_a_teacher_trained_here_is_beside_that_of_a_plain_run() -> None:
    mean = (10 + 20 + 40) / 3
    assert summarize(["plain"], {**TEACHER, "seconds": 2 * mean}, PLAIN)["teacher_time"] == pytest.approx(2)
    assert summarize(["plain"], TEACHER, PLAIN)["teacher_time"] is None
    assert summarize(["plain"], None, PLAIN)["teacher_time"] is None
    assert summarize(["cwd"], {**TEACHER, "seconds": 5}, [result("cwd", 0, 0.4)])["teacher_time"] is None


def test_every_cell_of_the_table(tmp_path: Path) -> None:
    arms = {"plain": {}, "cwd": {}, "more": {"against": "cwd"}, "one": {}, "far": {}}
    taught = [result("cwd", r["seed"], r["score"] + 0.04, 1.5 * r["seconds"]) for r in PLAIN]
    more = [result("more", r["seed"], r["score"] + 0.03 + 0.01 * r["seed"], 3 * r["seconds"]) for r in PLAIN]
    others = [result("one", 2, 0.31, 20), result("far", 7, 0.5)]
    summary = written(tmp_path, arms, [*PLAIN, *taught, *more, *others], teacher={**TEACHER, "seconds": 70})
    lines = table(summary)
    assert lines[0] == [
        "arm",
        "runs",
        "mAP50-95",
        "sd",
        "mAP50",
        "vs plain",
        "pairs",
        "95 % interval",
        "gap closed",
        "time",
    ]
    assert lines[1:] == [
        ["teacher", "", "44.0", "", "60.0", "", "", "", "", "3.00x"],
        ["plain", "3", "32.7", "3.1", "52.7", "", "", "", "", "1.00x"],
        ["cwd", "3", "36.7", "3.1", "56.7", "+4.0", "3", "+4.0 to +4.0", "35%", "1.50x"],
        ["more", "3", "36.7", "4.0", "56.7", "+0.0 (cwd)", "3", "-2.5 to +2.5", "0%", "2.00x"],
        ["one", "1", "31.0", "", "51.0", "-5.0", "1", "", "-62%", "0.50x"],
        ["far", "1", "50.0", "", "70.0", "", "", "", "", ""],
    ]
    shown = as_text(lines).splitlines()
    assert len({len(line) for line in shown}) == 1
    assert shown[0].startswith("arm      runs  mAP50-95")
    assert shown[4].startswith("more        3      36.7")


def test_the_files_say_what_was_measured(tmp_path: Path) -> None:
    taught = [result("cwd", r["seed"], r["score"] + 0.04, 15, cat=0.9) for r in PLAIN]
    teacher = {**TEACHER, "classes": {"cat": 0.4, "emu": 0.5}}
    summary = written(tmp_path, {"plain": {}, "cwd": {"tau": 2.0}}, [*PLAIN, *taught], teacher=teacher)
    found = json.loads((tmp_path / "summary.json").read_text())
    assert found["comparison"]["arms"]["cwd"] == {"tau": 2.0}
    assert found["runs"] == [*taught, *PLAIN]
    assert found["arms"]["cwd"]["gain"] == pytest.approx(0.04)
    rows = list(csv.DictReader((tmp_path / "summary.csv").read_text().splitlines()))
    of_classes = [f"mAP50-95 {name}" for name in ("cat", "dog", "emu", "owl")]
    assert list(rows[0]) == ["arm", "seed", "mAP50-95", "mAP50", "seconds", *of_classes]
    assert list(rows[0].values()) == ["cwd", "0", "0.34000", "0.54000", "15.0", "0.90000", "", "", ""]
    assert list(rows[3].values()) == ["plain", "0", "0.30000", "0.50000", "10.0", "0.20000", "0.10000", "", "0.50000"]
    assert list(rows[6].values()) == ["teacher", "", "0.44000", "0.60000", "", "0.40000", "", "0.50000", ""]
    assert [(row["arm"], row["seed"]) for row in rows[:6]] == [(a, seed) for a in ("cwd", "plain") for seed in "012"]
    text = (tmp_path / "summary.md").read_text()
    assert text.splitlines()[:2] == ["| " + " | ".join(table(summary)[0]) + " |", "|---" * 10 + "|"]
    assert text.splitlines()[4] == "| " + " | ".join(table(summary)[3]) + " |"
    paragraphs = text.split("\n\n")
    assert paragraphs[1] == summary["verdict"]
    assert paragraphs[2:4] == ["Gain by class in points of mAP50-95:", "- cwd: cat +56.7"]
    assert paragraphs[-1].startswith("Measured with yolo_cwd ")
    assert f"torch {summary['versions']['torch']}." in paragraphs[-1]


def test_a_summary_is_of_the_task_that_was_compared(tmp_path: Path) -> None:
    taught = [result("cwd", r["seed"], r["score"] - 0.04) for r in PLAIN]
    summary = written(tmp_path, {"plain": {}, "cwd": {}}, [*PLAIN, *taught], task="depth")
    assert summary["arms"]["cwd"]["gain"] == pytest.approx(0.04)
    assert "Gain by class" not in (tmp_path / "summary.md").read_text()
