# SPDX-License-Identifier: AGPL-3.0-or-later
"""Search the options of distillation with Ray Tune, through Ultralytics (pip install "ray[tune]" optuna).

    python examples/tune.py student=yolov8n.pt teacher=best.pt data=my.yaml epochs=30 iterations=20

Other words are arguments and options of the training. Ultralytics passes what stands in `space` on to `YOLO.train`, the
trainer and its options included; a teacher elsewhere it would take for an unknown argument.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ray import tune
from ultralytics import YOLO

from yolo_cwd import CWDTrainer
from yolo_cwd.cli import parse


def main() -> None:
    """Search, and print the best trial."""
    words: dict[str, Any] = parse(sys.argv[1:])
    student, iterations = words.pop("student"), words.pop("iterations", 20)
    words["data"] = str(Path(words["data"]).resolve())  # every trial has a working folder of its own
    ours = {"trainer": CWDTrainer, "teacher": str(Path(words.pop("teacher")).resolve())}
    space = {
        **ours,
        "share": tune.loguniform(0.25, 4),
        "tau": tune.loguniform(0.5, 4),
        "lr0": tune.loguniform(1e-4, 1e-2),
    }
    results = YOLO(student).tune(use_ray=True, iterations=iterations, space=space, **words)
    best = results.get_best_result("metrics/mAP50-95(B)", "max")
    chosen = " ".join(f"{name}={best.config[name]:.4g}" for name in ("share", "tau", "lr0"))
    print(f"{chosen}: mAP50-95 {100 * best.metrics['metrics/mAP50-95(B)']:.1f} on the validation images")


if __name__ == "__main__":
    main()
