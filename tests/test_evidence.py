"""The tables of docs/evidence.md are those of its raw files, and README shows nothing that they do not."""

import csv
import re
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

import pytest

from yolo_cwd.study.summary import paired_interval

ROOT = Path(__file__).parent.parent
EVIDENCE = ROOT / "docs" / "evidence.md"
RAW = ROOT / "docs" / "evidence"
ARMS = {"plain": "plain", "built-in": "builtin", "yolo_cwd": "cwd", "and `unlabeled=`": "pool"}
Row = dict[str, str]  # cells by the heading of their column, without bold marks
Scores = dict[str, dict[int, float]]  # in points, by arm and seed


def tables(page: Path) -> Iterator[list[Row]]:
    for table in re.findall(r"(?:^\|.*\n)+", page.read_text(encoding="utf-8"), flags=re.MULTILINE):
        heads, rule, *rows = (
            [cell.strip().strip("*") for cell in line[1:-1].split("|")] for line in table.splitlines()
        )
        assert set(rule) == {"---"}, "a second heading"
        yield [dict(zip(heads, row, strict=True)) for row in rows]


def raw(name: str, data: str = "") -> Scores:
    """Read a raw file: the first score of each run, of one data set where it has several. A teacher has seed 0."""
    scores: Scores = {}
    for row in rows_of(name):
        if row.pop("set", "") == data:
            arm, seed, score, *_ = row.values()
            scores.setdefault(arm, {})[int(seed or 0)] = 100 * float(score)
    return scores


def rows_of(name: str) -> list[Row]:
    with (RAW / f"{name}.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


BY_CLASS = [file.stem for file in RAW.glob("*.csv") if "mAP50-95 " in file.read_text(encoding="utf-8")]


@pytest.mark.parametrize("name", BY_CLASS)
def test_scores_by_class_have_the_score_as_their_mean(name: str) -> None:
    for row in rows_of(name):
        classes = [float(value) for column, value in row.items() if column.startswith("mAP50-95 ") and value]
        assert fmean(classes) == pytest.approx(float(row["mAP50-95"]), abs=2e-5)


def gain(scores: Scores, arm: str, over: str, seeds: list[int]) -> str:
    differences = [scores[arm][seed] - scores[over][seed] for seed in seeds]
    low, high = paired_interval(differences) or (0, 0)
    return f"{fmean(differences):+.1f} ({low:.1f} to {high:.1f})"


MEASURED = [row for table in tables(EVIDENCE) for row in table if "](evidence/" in row.get("", "") and "plain" in row]


@pytest.mark.parametrize("row", MEASURED, ids=lambda row: row[""].split(" ([raw]")[0])
def test_rows_are_those_of_their_raw_file(row: Row) -> None:
    scores = raw(re.findall(r"evidence/([\w-]+)\.csv", row[""])[0])
    shown = {head: arm for head, arm in ARMS.items() if row.get(head)}
    seeds = sorted(set.intersection(*(set(scores[arm]) for arm in shown.values())))
    if named := re.search(r"seeds (\d+) to (\d+)", row[""]):
        seeds = list(range(int(named[1]), int(named[2]) + 1))
    assert row["seeds"] == str(len(seeds))
    means = {arm: fmean(scores[arm][seed] for seed in seeds) for arm in shown.values()}
    assert {head: row[head] for head in shown} == {head: f"{means[arm]:.1f}" for head, arm in shown.items()}
    best = "pool" if "pool" in means else "cwd"
    assert row.get("gain over plain", row.get("gain")) == gain(scores, best, "plain", seeds)
    if "gain over yolo_cwd" in row:
        assert row["gain over yolo_cwd"] == gain(scores, best, "cwd", seeds)
    if "teacher" in scores:
        assert row["teacher"] == f"{scores['teacher'][0]:.1f}"
    if "of the lead" in row:
        lead = float(row["teacher"]) - means["plain"]
        assert row["of the lead"] == f"{(means['cwd'] - means['plain']) / lead:.0%}"


BESIDE = [row for table in tables(EVIDENCE) for row in table if row.get("built-in over plain")]


@pytest.mark.parametrize("row", BESIDE, ids=lambda row: row[""].split(" ([raw]")[0])
def test_the_built_in_distillation_is_that_of_the_raw_files(row: Row) -> None:
    named = re.search(r"evidence/([\w-]+)\.csv\)(?:, `(\w+)`)?\)$", row[""])
    assert named
    name, arm = named.groups("builtin")
    scores = raw(name, row[""].split()[0].lower().rstrip(",") if name == "first-command" else "")
    seeds = sorted(scores["plain"].keys() & scores["cwd"].keys() & scores[arm].keys())
    assert row["seeds"] == str(len(seeds))
    assert row["built-in over plain"] == gain(scores, arm, "plain", seeds)
    assert row["yolo_cwd over built-in"] == gain(scores, "cwd", arm, seeds)


def test_readme_counts_the_comparisons_with_the_built_in_distillation() -> None:
    intervals = [re.findall(r"\((\S+) to (\S+)\)", row["yolo_cwd over built-in"])[0] for row in BESIDE]
    ahead = sum(float(low) > 0 for low, _ in intervals)
    assert all(float(high) >= 0 for _, high in intervals)
    said = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"clearly ahead in {ahead} of {len(BESIDE)} comparisons, and behind in none" in said


def arm_of(row: Row) -> str:
    named = re.search(r"\(`([\w-]+)`", row.get("") or row["arm"])
    return named[1] if named else "plain"


FIRST_COMMAND = [table for table in tables(EVIDENCE) if "nuclei" in table[0]]


@pytest.mark.parametrize(("epochs", "table"), list(zip((30, 100), FIRST_COMMAND, strict=True)), ids=("30", "100"))
def test_the_first_command_is_that_of_its_raw_file(epochs: int, table: list[Row]) -> None:
    for head, data in zip(list(table[0])[1:], ("bccd", "nuclei", "parking"), strict=True):
        scores, arm = raw("first-command", data) if epochs == 30 else raw(f"first-command-{epochs}-{data}"), ""
        for row in table:
            if row[""] == "over plain":
                seeds = sorted(scores.get(arm, {}).keys() & scores["plain"].keys())
                assert row[head] == (gain(scores, arm, "plain", seeds) if seeds else "")
                continue
            arm = arm_of(row)
            assert row[head].partition(" (")[0] == ", ".join(f"{score:.1f}" for score in scores.get(arm, {}).values())


def test_the_choice_of_the_defaults_is_that_of_its_raw_file() -> None:
    (table,) = (rows for rows in tables(EVIDENCE) if "by seed" in rows[0])
    scores = raw("pretrained-bccd-tuning")
    for row in table:
        gains = [scores[arm_of(row)][seed] - scores["plain"][seed] for seed in (0, 1, 2)]
        assert row["mean gain"] == f"{fmean(gains):+.1f}"
        assert row["by seed"] == ", ".join(f"{points:+.1f}" for points in gains)


def test_trials_are_those_of_their_raw_files() -> None:
    (table,) = (rows for rows in tables(EVIDENCE) if "trial" in rows[0])
    files = {"parking": raw("long-parking"), "BCCD": raw("long-bccd")}
    for row in table:
        named = re.search(r"\(`(\w+)`\)$", row["trial"])
        assert named
        for head, scores in files.items():
            seeds = sorted(scores[named[1]].keys() & scores["cwd"].keys())
            shown = gain(scores, named[1], "cwd", seeds)
            assert row["seeds"] == str(len(seeds))
            assert row[head] == (shown if len(seeds) > 1 else shown.partition(" (")[0])


CURVES = [table for table in tables(EVIDENCE) if "epoch" in table[0]]


@pytest.mark.parametrize(("name", "table"), list(zip(("slim-long-curve", "long360-curve"), CURVES, strict=True)))
def test_curves_are_those_of_their_raw_file(name: str, table: list[Row]) -> None:
    curves = rows_of(name)
    assert {run["set"] for run in curves} == {row["epoch"].partition(",")[0] for row in table}
    for row in table:
        (head, title), *points = row.items()
        assert head == "epoch"
        data, _, arm = title.partition(", ")
        for epoch, score in points:
            at = {epoch, str(int(epoch) + 1)}  # a checkpoint that is kept is of one epoch more
            runs = [run for run in curves if (run["set"], run["arm"]) == (data, ARMS[arm]) and run["epoch"] in at]
            assert len({run["seed"] for run in runs}) == len(runs) == 3
            assert score == f"{fmean(100 * float(run['mAP50-95']) for run in runs):.1f}"


def test_new_classes_are_those_of_their_raw_file() -> None:
    (table,) = (rows for rows in tables(EVIDENCE) if "platelets (new)" in rows[0])
    scores = raw("new-classes-bccd")
    for row, arm in zip(table, ("plain", "cwd", "labels", "both"), strict=False):
        assert row["mean"] == f"{fmean(scores[arm].values()):.1f}"
    for row in table:
        classes = [float(row[name]) for name in ("platelets (new)", "red cells", "white cells")]
        assert fmean(classes) == pytest.approx(float(row["mean"]), abs=0.1)


def claim(row: Row) -> tuple[str, ...]:
    """Return seeds, teacher, plain, the best that yolo_cwd reached, and its gain."""
    best = row.get("and `unlabeled=`", row["yolo_cwd"])
    return row["seeds"], row["teacher"], row["plain"], best, row.get("gain") or row["gain over plain"]


def test_readme_shows_only_what_is_measured() -> None:
    measured = {claim(row) for row in MEASURED}
    (table,) = (rows for rows in tables(ROOT / "README.md") if "gain" in rows[0])
    shown = [row for row in table if row["seeds"]]  # others are headings
    assert len(shown) >= 10
    assert [row for row in shown if claim(row) not in measured] == []


def test_the_splits_are_those_that_are_described() -> None:
    images: dict[str, dict[str, list[str]]] = {}
    for row in rows_of("splits"):
        images.setdefault(row["set"], {}).setdefault(row["split"], []).append(row["image"])
        if row["in the quarter"]:
            images[row["set"]].setdefault("quarter", []).append(row["image"])
    text = EVIDENCE.read_text(encoding="utf-8")
    (table,) = (rows for rows in tables(EVIDENCE) if "images" in rows[0])
    for name, splits in images.items():
        described = next(row["images"] for row in table if row["name"].startswith(name))
        scored = len(splits["val"]) + len(splits.get("test", []))
        assert described.startswith(f"{len(splits['train'])} training, {scored} ")
        assert splits["quarter"] == splits["train"][::4]
        assert name == "glue tubes" or f"{name} {len(splits['quarter'])}" in text
