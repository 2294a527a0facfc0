# SPDX-License-Identifier: AGPL-3.0-or-later
"""Puts the findings of `yolo_cwd check` into words: the classes, the teacher's worth, and all of it as text."""

from __future__ import annotations

import textwrap
from typing import Any

from yolo_cwd.config import listed

WORTHWHILE = 0.05  # lead of a teacher in score: under smaller ones no more than 2 points have been gained
WIDTH = 99
DROWNED = 2.0  # above this share, distillation makes a pretrained student worse


def compare_classes(teacher: dict[int, str], other: dict[int, str], whose: str) -> str:
    """Say what differs between the classes of a teacher and those of the data or of the student.

    Args:
        teacher: The teacher's classes by index.
        other: The classes to compare with; empty if unknown.
        whose: What they belong to.
    """
    if not other:
        return f"not compared: the {whose} has none before training; give data="
    if teacher == other:
        return f"teacher and {whose} have the same {len(other)}, in the same order"
    ours, theirs = list(teacher.values()), list(other.values())
    parts = [f"the teacher has {len(ours)} and the {whose} {len(theirs)}"]
    for side, names, rest in (("teacher", ours, theirs), (whose, theirs, ours)):
        alone = [name for name in names if name not in rest]
        parts += [f"only the {side} has {listed(alone)}"] if alone else []
    parts += ["the names are the same in another order"] if sorted(ours) == sorted(theirs) else []
    return "; ".join(parts)


def verdict(
    same_classes: bool, teacher: float | None, student: float | None, sign: int = 1, trained_first: bool = False
) -> str:
    """Say in a sentence whether a teacher is worth it.

    Args:
        same_classes: Whether its task is the student's, and its classes are the data's.
        teacher: Its score on the validation images, 0 to 1; None if it has none.
        student: The student's score before this training; None if it has not been trained on such data.
        sign: 1 if a higher score is better, -1 if a lower one is.
        trained_first: Whether the teacher will be trained on the data before the student.
    """
    if trained_first:
        return (
            "the teacher will know the data once it is trained; it is worth it if it then ends well above the student "
            "alone, which 'yolo_cwd compare' tells"
        )
    if not same_classes:
        return "doubtful: the teacher does not know the task or the classes of the data; one that does teaches more"
    if teacher is None:
        return "no: the teacher has not been trained"
    if student is None:
        return (
            f"the teacher reaches {100 * teacher:.1f} points; it is worth it if the student alone ends well below, "
            "which 'yolo_cwd compare' tells"
        )
    lead = sign * (teacher - student)
    if lead <= 0:
        return f"no: the teacher is {-100 * lead:.1f} points behind the student, and has nothing to teach it here"
    if lead < WORTHWHILE:
        return (
            f"hardly: the teacher leads the student by {100 * lead:.1f} points only; under such a lead a gain of 2 "
            "points at most has been measured"
        )
    return f"yes: the teacher leads the student by {100 * lead:.1f} points; 'yolo_cwd compare' tells the gain"


def balance(levels: list[dict[str, Any]], balanced: bool) -> str:
    """Say how the gradient of distillation compares with the task's own, and with what a fixed weight would give.

    Args:
        levels: The levels, each with its `name`, its `share` and the `fixed_share` under a fixed weight.
        balanced: Whether the weights follow the gradients.
    """
    drowned = [f"{x['name']} ({_times(x['fixed_share'])})" for x in levels if (x["fixed_share"] or 0) > DROWNED]
    if balanced:
        kept = "distillation keeps to its share of the gradient at every level"
        return f"{kept}; a fixed cwd=100 would drown the task at {', '.join(drowned)}" if drowned else kept
    over = [f"{x['name']} ({_times(x['share'])})" for x in levels if x["share"] > DROWNED]
    if over:
        return f"warning: distillation drowns the task at {', '.join(over)}; cwd=balanced keeps it to a share"
    return "the fixed weights leave the task the upper hand at every level"


def as_text(found: dict[str, Any]) -> str:
    """Return the findings in words and tables, for a terminal of 100 columns."""
    lines = []
    for who, part in (("teacher", "of what is used"), ("student", "whole")):
        model = found[who]
        name = model["model"] if len(model["model"]) <= 38 else "..." + model["model"][-35:]
        size = f"{model['parameters'] / 1e6:6.2f}M parameters, {model['gflops']:6.1f} GFLOPs {part}"
        lines.append(f"{who}  {name:38}  {size}")
    lines += ["", f"level  stride      map  {'student':>9}  {'teacher':>9}  {'adapter':>9}  {'share':>7}  cwd=100"]
    for x in found["levels"]:
        channels = f"{x['student_channels']:9,}  {x['teacher_channels']:9,}  {x['adapter_parameters']:9,}"
        shares = f"{_times(x['share']):>7}  {_times(x['fixed_share']):>7}"
        lines.append(f"{x['name']:5}  {x['stride']:6}  {x['map']:3}x{x['map']:<3}  {channels}  {shares}")
    where = f"batch {found['batch']}, {found['imgsz']} px, {found['device']}"
    on = "the embedded images" if found["data"] is None else "the data"
    holds = "allocated on the GPU" if "cuda" in found["device"] else "resident memory of the process"
    peaks = found["peak_mib"]
    paragraphs = {
        "step": f"{found['step_ratio']:.2f}x a plain one, measured on two batches of {on} ({where})",
        "memory": f"{peaks['distilled']:,} MiB at its peak, {peaks['plain']:,} MiB for a plain step ({holds})",
        "teacher": f"calculates in {found['teacher']['precision']}",
    }
    for name in ("stages", "unlabeled", "completed"):
        if found.get(name):
            paragraphs[name] = found[name]
    if found["levels"]:
        paragraphs["share"] = balance(found["levels"], found["balanced"])
    if "scores" in found:
        known = {who: value for who, value in found["scores"].items() if value is not None}
        shown = ", ".join(f"{who} {100 * value:.1f}" for who, value in known.items())
        paragraphs["score"] = f"{found['score']}: {shown or 'not known'}"
    lines += ["", *(_paragraph(*item) for item in (paragraphs | {"classes": found["classes"]}).items())]
    return "\n".join([*lines, "", _paragraph("verdict", found["verdict"])])


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2g}x" if ratio < 10 else f"{ratio:,.0f}x"


def _paragraph(name: str, text: str) -> str:
    return textwrap.fill(text, WIDTH, initial_indent=f"{name:10}", subsequent_indent=" " * 10, break_on_hyphens=False)
