# SPDX-License-Identifier: AGPL-3.0-or-later
"""What a comparison has shown: statistics over seeds, a table in four formats, and three pictures.

Differences to `plain` are paired: both trainings of a seed share their initial weights and the order of their images.
The remaining luck shows in the spread of the differences. The 95 % interval is Student's t over the seeds,
`mean +- t(0.975, n - 1) * sd / sqrt(n)`, which assumes normally distributed differences; one seed gives no interval.
"""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
import ultralytics
import yaml
from scipy.stats import t as student_t

from yolo_cwd import __version__
from yolo_cwd.run.files import write_atomic
from yolo_cwd.study.results import TEACHER, of_runs, of_teacher
from yolo_cwd.tasks import TASKS, Score, Task
from yolo_cwd.view.plots import COLORS

BASELINE = "plain"
RECORD = "comparison.yaml"


def paired_interval(differences: list[float]) -> tuple[float, float] | None:
    """Return the 95 % confidence interval of the mean of paired differences, or None for fewer than two.

    Args:
        differences: One difference per seed.
    """
    n = len(differences)
    if n < 2:
        return None
    half = float(student_t.ppf(0.975, n - 1)) * statistics.stdev(differences) / math.sqrt(n)
    mean = statistics.fmean(differences)
    return mean - half, mean + half


def summarize(
    arms: list[str],
    teacher: dict[str, Any] | None,
    results: list[dict[str, Any]],
    against: Mapping[str, str] | None = None,
    task: Task = TASKS["detect"],
) -> dict[str, Any]:
    """Return the statistics of a comparison.

    Args:
        arms: Names in the order to show them.
        teacher: The teacher's scores.
        results: The scores of the complete runs.
        against: For each arm that is not compared with `plain`, the arm it is compared with.
        task: The task that the scores are for.

    Returns:
        A verdict on the teacher, and for each arm: the number of runs, mean and standard deviation of the score (0 to
        1), the mean of the second score, the paired gain over the arm it is compared with, the number of its pairs, and
        its interval (above 0 if the arm is better, even where a lower score is), the share of the gap to the teacher
        that it closes, the ratio of the training times, and the gain by class.
    """
    by_arm = {arm: {r["seed"]: r for r in results if r["arm"] == arm} for arm in arms}
    lines = {}
    for arm, runs in by_arm.items():
        if runs:
            other = (against or {}).get(arm, BASELINE)
            lines[arm] = {"against": other, **_arm_statistics(runs, by_arm.get(other, {}), teacher, task.score.sign)}
    return {
        "arms": lines,
        "teacher": teacher,
        "teacher_time": _time_of_teacher(teacher, by_arm.get(BASELINE, {})),
        "scores": [task.score.label, task.second.label],
        "verdict": verdict(teacher, lines.get(BASELINE), task.score),
        "versions": {"yolo_cwd": __version__, "ultralytics": ultralytics.__version__, "torch": torch.__version__},
    }


def _arm_statistics(
    runs: dict[int, dict[str, Any]], base: dict[int, dict[str, Any]], teacher: dict[str, Any] | None, sign: int
) -> dict[str, Any]:
    scores = [r["score"] for r in runs.values()]
    shared = sorted(runs.keys() & base.keys())
    gains = [sign * (runs[s]["score"] - base[s]["score"]) for s in shared]
    gap = sign * (teacher["score"] - statistics.fmean(base[s]["score"] for s in shared)) if teacher and shared else 0.0
    classes = sorted({c for s in shared for c in runs[s]["classes"].keys() & base[s]["classes"].keys()})
    return {
        "runs": len(runs),
        "seeds": sorted(runs),
        "score": statistics.fmean(scores),
        "sd": statistics.stdev(scores) if len(scores) > 1 else None,
        "second": statistics.fmean(r["second"] for r in runs.values()),
        "gain": statistics.fmean(gains) if gains else None,
        "pairs": len(gains),
        "interval": paired_interval(gains),
        "gap_closed": statistics.fmean(gains) / gap if gains and gap > 0 else None,
        "time_ratio": _ratio([runs[s]["seconds"] for s in shared], [base[s]["seconds"] for s in shared]),
        "class_gains": {
            c: sign * statistics.fmean(runs[s]["classes"].get(c, 0.0) - base[s]["classes"].get(c, 0.0) for s in shared)
            for c in classes
        },
    }


def _time_of_teacher(teacher: dict[str, Any] | None, plain: dict[int, dict[str, Any]]) -> float | None:
    """Return the time of the teacher's own training beside that of a plain run; None if it was not trained here."""
    seconds = teacher.get("seconds") if teacher else None
    return _ratio([seconds], [statistics.fmean(r["seconds"] for r in plain.values())]) if seconds and plain else None


def _ratio(ours: list[float], theirs: list[float]) -> float | None:
    return sum(ours) / sum(theirs) if theirs else None


def verdict(teacher: dict[str, Any] | None, plain: dict[str, Any] | None, score: Score) -> str:
    """Say whether this teacher has anything to teach."""
    if plain is None:
        return "Without an arm named plain there is nothing to compare with."
    if teacher is None:
        return "The teacher has no score here: it is of another task, or of other classes."
    lead = 100 * score.sign * (teacher["score"] - plain["score"])
    if lead <= 0:
        return f"The teacher is not better than the plain student ({lead:+.1f} points): it has nothing to teach here."
    return f"The teacher leads the plain student by {lead:.1f} points of {score.label}."


def summary_of(folder: Path) -> dict[str, Any]:
    """Return the summary of a comparison's complete runs.

    Args:
        folder: The comparison's folder; its `comparison.yaml` says what is compared.
    """
    record = yaml.safe_load((folder / RECORD).read_text(encoding="utf-8"))
    against = {name: options["against"] for name, options in record["arms"].items() if "against" in options}
    task = TASKS[record["task"]]
    _, teacher = of_teacher(folder)
    return {"comparison": record, **summarize(list(record["arms"]), teacher, of_runs(folder), against, task)}


def write_summary(folder: Path) -> dict[str, Any]:
    """Write the summary of a comparison's complete runs in all formats, and return it."""
    summary, results = summary_of(folder), of_runs(folder)
    write_atomic(folder / "summary.json", json.dumps({**summary, "runs": results}, indent=1))
    write_atomic(folder / "summary.csv", _csv(results, summary["teacher"], summary["scores"]))
    write_atomic(folder / "summary.md", _markdown(table(summary), summary))
    _draw(folder, summary, results)
    return summary


def _points(value: float | None, form: str = "+.1f") -> str:
    return "" if value is None else format(100 * value, form)


def _ratio_text(ratio: float | None) -> str:
    return f"{ratio:.2f}x" if ratio else ""


def table(summary: dict[str, Any]) -> list[list[str]]:
    """Return the table of a summary, header first: scores in points (0 to 100), times relative to `plain`."""
    first, second = summary["scores"]
    header = ["arm", "runs", first, "sd", second, f"vs {BASELINE}", "pairs", "95 % interval", "gap closed", "time"]
    lines = [header]
    if teacher := summary["teacher"]:
        points, second = (_points(teacher[name], ".1f") for name in ("score", "second"))
        lines.append(["teacher", "", points, "", second, *[""] * 4, _ratio_text(summary.get("teacher_time"))])
    for name, arm in summary["arms"].items():
        compared = name != arm["against"] and arm["gain"] is not None
        against = "" if arm["against"] == BASELINE else f" ({arm['against']})"
        interval = arm["interval"] if compared else None
        lines.append(
            [
                name,
                str(arm["runs"]),
                _points(arm["score"], ".1f"),
                _points(arm["sd"], ".1f"),
                _points(arm["second"], ".1f"),
                _points(arm["gain"]) + against if compared else "",
                str(arm["pairs"]) if compared else "",
                f"{_points(interval[0])} to {_points(interval[1])}" if interval else "",
                f"{arm['gap_closed']:.0%}" if compared and arm["gap_closed"] is not None else "",
                _ratio_text(arm["time_ratio"]),
            ]
        )
    return lines


def as_text(lines: list[list[str]]) -> str:
    """Return a table's lines as aligned text."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            f"{cell:<{w}}" if i == 0 else f"{cell:>{w}}" for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def _csv(results: list[dict[str, Any]], teacher: dict[str, Any] | None, labels: list[str]) -> str:
    """Return a row for each run and, without a seed, for a teacher that has a score; classes have columns."""
    rows = [*results, *([{"arm": TEACHER, "seed": "", **teacher}] if teacher else [])]
    classes = sorted({name for row in rows for name in row["classes"]})
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["arm", "seed", *labels, "seconds", *(f"{labels[0]} {name}" for name in classes)])
    for row in rows:
        seconds = f"{row['seconds']:.1f}" if "seconds" in row else ""
        of_classes = [f"{row['classes'][name]:.5f}" if name in row["classes"] else "" for name in classes]
        writer.writerow([row["arm"], row["seed"], f"{row['score']:.5f}", f"{row['second']:.5f}", seconds, *of_classes])
    return stream.getvalue()


def _markdown(lines: list[list[str]], summary: dict[str, Any]) -> str:
    header, *body = ["| " + " | ".join(line) + " |" for line in lines]
    gains = [
        f"- {name}: " + ", ".join(f"{c} {_points(g)}" for c, g in arm["class_gains"].items())
        for name, arm in summary["arms"].items()
        if name != BASELINE and arm["class_gains"]
    ]
    versions = ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
    parts = [
        "\n".join([header, "|---" * len(lines[0]) + "|", *body]),
        summary["verdict"],
        f"Gain by class in points of {summary['scores'][0]}:\n\n" + "\n".join(gains) if gains else "",
        "Differences are paired over the seeds that both arms have; the interval is Student's t over these pairs. Time "
        "is relative to plain, or to the arm in brackets.",
        f"Measured with {versions}.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _draw(folder: Path, summary: dict[str, Any], results: list[dict[str, Any]]) -> None:
    """Draw the curves, the final scores, and the gains by class."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    colors = dict(zip(summary["arms"], COLORS * len(summary["arms"]), strict=False))
    for name, draw in {"curves": _draw_curves, "scores": _draw_scores, "classes": _draw_classes}.items():
        figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
        draw(axes, summary, results, colors)
        axes.grid(alpha=0.3)
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=120)
        write_atomic(folder / f"{name}.png", picture.getvalue())
        plt.close(figure)


def _draw_curves(axes: Any, summary: dict[str, Any], results: list[dict[str, Any]], colors: dict[str, str]) -> None:
    for name in summary["arms"]:
        curves = [r["curve"] for r in results if r["arm"] == name and r["curve"]]
        if not curves:  # trained with val=False
            continue
        epochs = range(1, min(map(len, curves)) + 1)
        at = [[100 * curve[e - 1] for curve in curves] for e in epochs]
        axes.plot(epochs, [statistics.fmean(x) for x in at], color=colors[name], label=name)
        axes.fill_between(epochs, [min(x) for x in at], [max(x) for x in at], color=colors[name], alpha=0.15, lw=0)
    axes.set(
        xlabel="epoch",
        ylabel=f"{summary['scores'][0]} on the val split (points)",
        title="Mean over seeds; band: least to most",
    )
    if axes.lines:
        axes.legend()


def _draw_scores(axes: Any, summary: dict[str, Any], results: list[dict[str, Any]], colors: dict[str, str]) -> None:
    for position, (name, arm) in enumerate(summary["arms"].items()):
        scores = [100 * r["score"] for r in results if r["arm"] == name]
        axes.plot([position] * len(scores), scores, "o", color=colors[name], alpha=0.6)
        axes.plot([position - 0.25, position + 0.25], [100 * arm["score"]] * 2, color=colors[name], lw=2)
    axes.set_xticks(range(len(summary["arms"])), list(summary["arms"]))
    if teacher := summary["teacher"]:
        axes.axhline(100 * teacher["score"], color="0.4", ls="--", label="teacher")
        axes.legend()
    axes.set(ylabel=f"{summary['scores'][0]} (points)", title="One dot a seed; line: mean")


def _draw_classes(axes: Any, summary: dict[str, Any], results: list[dict[str, Any]], colors: dict[str, str]) -> None:
    shown = {
        name: arm["class_gains"] for name, arm in summary["arms"].items() if name != BASELINE and arm["class_gains"]
    }
    classes = sorted({c for gains in shown.values() for c in gains})
    width = 0.8 / max(len(shown), 1)
    for number, (name, gains) in enumerate(shown.items()):
        places = [i + (number - (len(shown) - 1) / 2) * width for i in range(len(classes))]
        axes.bar(places, [100 * gains.get(c, 0.0) for c in classes], width, color=colors[name], label=name)
    axes.axhline(0, color="0.4", lw=1)
    axes.set_xticks(range(len(classes)), classes, rotation=45, ha="right")
    axes.set(ylabel=f"gain over plain (points of {summary['scores'][0]})", title="Gain by class, mean over seeds")
    if shown:
        axes.legend()
