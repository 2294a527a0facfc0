#!/usr/bin/env python
# SPDX-License-Identifier: AGPL-3.0-or-later
"""Kill a training again and again, resume it each time, and see what is lost.

    python scripts/crash_drill.py kills=25 seed=0 task=detect

One training of a task by the command line, on a few images, is killed (SIGKILL) `kills` times: in turns at a random
moment, and while a checkpoint is being written. After each kill every checkpoint must load in plain Ultralytics, and
`resume` must go on; in the end `results.csv` must have every epoch once. It prints a table, and exits with 1 if
anything was lost or torn.
"""

from __future__ import annotations

import csv
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TIMEOUT = 300.0


def main() -> int:
    """Run the drill; return the exit code."""
    words = {"kills": "25", "seed": "0", "task": "detect"} | dict(word.split("=", 1) for word in sys.argv[1:])
    with tempfile.TemporaryDirectory() as folder:
        os.environ["YOLO_CONFIG_DIR"] = folder
        from yolo_cwd import ConfigError

        try:
            return drill(Path(folder), words["task"], int(words["kills"]), random.Random(int(words["seed"])))
        except ConfigError as error:
            print(f"crash_drill: {error}", file=sys.stderr)
            return 2


def drill(folder: Path, task: str, kills: int, moments: random.Random) -> int:
    """Kill and resume one training, and print what happened."""
    epochs = 4 * kills + 4
    words = _words(folder, task, epochs)
    weights = folder / "run" / "weights"
    print(f"{'kill':>4}  {'moment':28}{'epochs in last.pt':>18}{'epochs lost':>12}  state", flush=True)
    faults = 0
    for kill in range(1, kills + 1):
        before = _epochs_in(weights / "last.pt")
        process = _start(folder, words)
        moment = _kill(process, weights, moments, while_writing=kill % 2 == 0)
        kept, begun = _epochs_in(weights / "last.pt"), _rows(folder)
        state = _faults(weights)
        faults += bool(state) or kept < before
        lost = max(0, len(begun) - kept)
        print(f"{kill:4}  {moment:28}{kept:18}{lost:12}  {state or 'every checkpoint whole'}", flush=True)
    process = _start(folder, words)
    code = process.wait(TIMEOUT)
    complete = _rows(folder) == list(range(1, epochs + 1))
    print(f"\n{kills} kills; the last resume ended with exit code {code}; ", end="")
    print(f"results.csv has {'every epoch once' if complete else f'these epochs: {_rows(folder)}'}; {faults} faults")
    return int(bool(faults or code or not complete))


def _words(folder: Path, task: str, epochs: int) -> list[str]:
    """Return the command line that begins the training."""
    from yolo_cwd.study import made_up
    from yolo_cwd.tasks import TASKS

    data = made_up.build(folder / "data", {"train": 8, "val": 4}, task, {0: "cell", 1: "other"})
    family = "yolo26" if task in {"semantic", "depth"} else "yolov8"  # YOLOv8 has no models for maps
    teacher, student = (f"{family}{size}{TASKS[task].suffix}.yaml" for size in "sn")
    new = f"teacher={teacher} student={student} data={data} imgsz=64 batch=4 epochs={epochs} amp=False plots=False"
    return [
        *new.split(),
        "teacher_epochs=0",
        "tau=0.01",  # the maps of random weights hardly vary, and every divergence would be 0
        "device=cpu",
        "save_period=3",
        f"project={folder}",
        "name=run",
        "exist_ok=True",
    ]


def _start(folder: Path, words: list[str]) -> subprocess.Popen[bytes]:
    """Begin the training, or go on with it where there is a checkpoint."""
    last = folder / "run" / "weights" / "last.pt"
    words = ["resume", f"model={last}"] if last.exists() else words
    command = [sys.executable, "-m", "yolo_cwd", "train", *words]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=folder)


def _kill(process: subprocess.Popen[bytes], weights: Path, moments: random.Random, while_writing: bool) -> str:
    """Wait for the moment, kill, and name the moment."""
    deadline = time.monotonic() + TIMEOUT
    stamp = _stamp(weights / "last.pt")
    while _stamp(weights / "last.pt") == stamp and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)  # until it has made an epoch
    moment = "at a random moment"
    if while_writing:
        moment = "while a checkpoint is written"
        while not _unfinished(weights) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.0005)
        time.sleep(moments.uniform(0, 0.05))
    else:
        time.sleep(moments.uniform(0, 1.5))
    process.send_signal(signal.SIGKILL)
    process.wait()
    return moment


def _unfinished(weights: Path) -> bool:
    return any(f.name.startswith(".") for f in weights.iterdir())


def _stamp(file: Path) -> int:
    return file.stat().st_mtime_ns if file.exists() else 0


def _epochs_in(checkpoint: Path) -> int:
    import torch

    if not checkpoint.exists():
        return 0
    return int(torch.load(checkpoint, map_location="cpu", weights_only=False)["epoch"]) + 1


def _faults(weights: Path) -> str:
    """Return what is wrong with the files in the folder of the checkpoints, or nothing."""
    from ultralytics import YOLO

    from yolo_cwd.run.state import load_state

    wrong = []
    for file in weights.glob("[!.]*.pt"):
        try:
            if file.name == "cwd.pt":
                load_state(file.with_name("last.pt"))
            else:
                YOLO(file)
        except Exception as error:
            wrong.append(f"{file.name}: {error}")
    return "; ".join(wrong)


def _rows(folder: Path) -> list[int]:
    table = folder / "run" / "results.csv"
    if not table.exists():
        return []
    with table.open(encoding="utf-8") as file:
        return [int(row["epoch"]) for row in csv.DictReader(file)]


if __name__ == "__main__":
    sys.exit(main())
