# SPDX-License-Identifier: AGPL-3.0-or-later
"""The table `results.csv` of a run: reading it, and keeping it whole over interruptions."""

from __future__ import annotations

import csv
import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from yolo_cwd.run.files import write_atomic


def read_rows(table: Path) -> list[dict[str, float]]:
    """Return the rows of a `results.csv`, one per epoch, by column; nan where plain Ultralytics has left ours out."""
    with table.open(encoding="utf-8") as file:
        return [{name.strip(): float(value or "nan") for name, value in row.items()} for row in csv.DictReader(file)]


def first_time(table: Path) -> float | None:
    """Return the time that a `results.csv` has for its first epoch; None if it has none."""
    rows = read_rows(table) if table.is_file() else []
    return rows[0].get("time") if rows else None


def ordered(metrics: dict[str, Any], ours: Collection[str], table: Path, resumed: bool) -> dict[str, Any]:
    """Return the values of an epoch in the order of the columns, ours last: rows of plain Ultralytics end before them.

    Args:
        metrics: The values by column.
        ours: The names of our columns.
        table: The file; in a resumed run it gets the columns that it lacks.
        resumed: Whether the run was resumed.
    """
    metrics = dict(sorted(metrics.items(), key=lambda item: item[0] in ours))
    if not resumed:
        return metrics
    _, _, *columns = widen(table, ["epoch", "time", *metrics])
    return {name: metrics.get(name, math.nan) for name in columns}


def drop_rows_after(table: Path, epoch: int) -> None:
    """Drop the rows of a `results.csv` that belong to a later epoch (counted from 1) or that a kill has torn.

    A row that plain Ultralytics has added ends before our columns, and gets nan there.
    """
    text = table.read_text(encoding="utf-8") if table.exists() else ""
    lines = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
    if not lines:  # emptied by a power cut, perhaps: Ultralytics writes the header into a new file alone
        table.unlink(missing_ok=True)
        return
    header, *rows = (line.strip().split(",") for line in lines)
    whole = [row for row in rows if row[0].strip().isdecimal() and int(row[0]) <= epoch and len(row) <= len(header)]
    padded = [row + ["nan"] * (len(header) - len(row)) for row in whole]
    write_atomic(table, "".join(",".join(row) + "\n" for row in [header, *padded]))


def widen(table: Path, columns: Sequence[str]) -> list[str]:
    """Give a `results.csv` these columns, with nan in its old rows, and return all that it has, others last.

    A newer release may resume a run, or another teacher with other classes take over.
    """
    if not table.exists():
        return list(columns)
    with table.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    columns = list(dict.fromkeys([*columns, *(rows[0] if rows else ())]))
    if rows and list(rows[0]) != columns:
        lines = [",".join(row.get(name) or "nan" for name in columns) for row in rows]
        write_atomic(table, "\n".join([",".join(columns), *lines]) + "\n")
    return columns
