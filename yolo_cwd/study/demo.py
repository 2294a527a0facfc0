# SPDX-License-Identifier: AGPL-3.0-or-later
"""`yolo_cwd demo`: a comparison of a plain and a distilled student on the embedded images, in minutes on a CPU.

It is the usual case made small: a trained teacher that has seen more labels than there are for the student. Both
students begin with the same weights, see the same images in the same order, and train equally long. compare.py does
the work.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from joblib import cpu_count
from ultralytics.cfg import get_save_dir

from yolo_cwd import bccd
from yolo_cwd.config import ConfigError
from yolo_cwd.study import results as results_of
from yolo_cwd.study.compare import train_missing
from yolo_cwd.view.gallery import draw_comparison

IMAGE_SIZE = 160
SCHEDULE: dict[str, Any] = {
    "imgsz": IMAGE_SIZE,
    "epochs": 20,
    "batch": 16,
    "nbs": 16,
    "optimizer": "AdamW",
    "lr0": 5e-4,
    "warmup_epochs": 1,
    "amp": False,
    "val": False,
    "plots": False,
    "verbose": False,
    "workers": 0,  # so that a seed gives the same images with any number of cores
    "cache": "ram",
    "device": "cpu",  # the same on every machine
}
TITLES = {"teacher": "teacher", "plain": "plain student", "cwd": "distilled student"}
MOST_THREADS = 8  # more are of no use to such small images
EVERY = 4  # of so many validation images, one may be shown
SHOWN = 3


def run(words: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Train both students, print the table, draw the picture, and return the scores of all three by name.

    Args:
        words: The arguments of the command: `seed`, which is 0 by default.

    Raises:
        ConfigError: If there are others, or if the seed is none.
    """
    seed, begin = _seed(words), time.perf_counter()
    folder = get_save_dir(SimpleNamespace(project="", task="detect", name="demo", mode="train", exist_ok=False))
    models = {"teacher": str(bccd.TEACHER), "student": str(bccd.STUDENT), "data": bccd.NAME}
    seeds = [seed] if seed else 1  # a number is how many
    with _all_cores():
        train_missing({**models, **SCHEDULE, "arms": "plain,cwd", "seeds": seeds, "folder": str(folder)})
        arms = {scores["arm"]: scores for scores in results_of.of_runs(folder)}
        results = {"teacher": results_of.of_teacher(folder)[1] or {}, **arms}
        picture = folder / "found.png"
        _draw(picture, results)
    print(f"\n{table(results, time.perf_counter() - begin)}\n")
    print(f"What they find in the same images: {picture}")
    print(f"Weights of the distilled student: {results['cwd']['weights']}")
    print("This is one seed on few images. On yours: yolo_cwd compare teacher=best.pt student=yolov8n.pt data=my.yaml")
    return results


def _seed(words: Mapping[str, Any]) -> int:
    for name, value in words.items():
        if name != "seed":
            raise ConfigError(f"{name}={value}: 'yolo_cwd demo' takes nothing but seed=; see 'yolo_cwd help compare'")
    seed = words.get("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise ConfigError(f"seed={seed}: must be a whole number from 0 on, such as seed=1")
    return seed


@contextmanager
def _all_cores() -> Iterator[None]:
    """Calculate on all cores: Ultralytics leaves all but one to the loading of images, which takes no time here."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(cpu_count(), MOST_THREADS))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _draw(file: Path, results: Mapping[str, Mapping[str, Any]]) -> None:
    images = sorted((bccd.build().parent / "images" / "val").iterdir())[::EVERY]
    weights = {"teacher": bccd.TEACHER, **{arm: results[arm]["weights"] for arm in ("plain", "cwd")}}
    columns = {f"{TITLES[name]}: mAP50-95 {100 * results[name]['score']:.1f}": file for name, file in weights.items()}
    draw_comparison(file, images, columns, IMAGE_SIZE, SHOWN)


def table(results: Mapping[str, Mapping[str, Any]], seconds: float) -> str:
    """Return scores in points, the gain and the time as text.

    Args:
        results: The scores of `teacher`, `plain` and `cwd`.
        seconds: The time that all of it has taken.
    """
    lines = [f"{'':18} mAP50-95  mAP50  training"]
    for name, title in TITLES.items():
        of_one = results[name]
        trained = f"{of_one['seconds']:6.0f} s" if "seconds" in of_one else "shipped, on four times the labels"
        lines.append(f"{title:18} {100 * of_one['score']:8.1f}  {100 * of_one['second']:5.1f}  {trained}")
    gain = 100 * (results["cwd"]["score"] - results["plain"]["score"])
    lines += ["", f"Distillation changed the student by {gain:+.1f} points of mAP50-95, at no cost in use."]
    return "\n".join([*lines, f"All of it took {seconds // 60:.0f} min {seconds % 60:.0f} s."])
