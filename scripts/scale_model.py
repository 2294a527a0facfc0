#!/usr/bin/env python
# SPDX-License-Identifier: AGPL-3.0-or-later
"""What bounds a distilled training on many GPUs? A model on paper; docs/scale.md has its assumptions.

    python scripts/scale_model.py                     # YOLOv8l teaches YOLOv8n at 640 px on 8, 64 and 512 GPUs
    python scripts/scale_model.py cores=16 batch=32   # eight of which share a machine with so many cores each

Every number below may be given as key=value.
"""

from __future__ import annotations

import sys

ASSUMED = {
    "student_gflops": 8.86,  # forward, an image: Ultralytics' count at 640 px
    "teacher_gflops": 138.9,  # without its head
    "student_parameters": 3.157e6,
    "adapter_parameters": 0.213e6,
    "batch": 16.0,  # images a GPU
    "student_tflops": 15.0,  # what a GPU does of a small model in mixed precision
    "teacher_tflops": 80.0,  # and of a large one in float16, forward only
    "images_a_core": 100.0,  # decoded, augmented and put together, a second
    "cores": 8.0,  # of the machine for each GPU
    "inside_gbs": 200.0,  # bandwidth of a ring inside a machine, GB/s
    "outside_gbs": 20.0,  # and between machines, for each GPU
    "latency_us": 10.0,  # of a message
    "gpus_a_machine": 8.0,
}
BACKWARD = 2  # backward pass in forward passes
BYTES = 4  # of a gradient


def ring_seconds(count: float, parameters: float, a: dict[str, float]) -> float:
    """Return the seconds of a ring all-reduce over so many GPUs: 2 (n - 1) messages of a share of the gradients."""
    bandwidth = a["inside_gbs"] if count <= a["gpus_a_machine"] else a["outside_gbs"]
    messages = 2 * (count - 1)
    return messages * (parameters * BYTES / count / (bandwidth * 1e9) + a["latency_us"] * 1e-6)


def step(count: float, a: dict[str, float]) -> dict[str, float]:
    """Return the seconds of the parts of a step on so many GPUs, of the step itself, and images a second of all.

    The student's gradients travel while its backward pass goes on, and cost what is left of them after it; those of
    the adapters travel afterwards. Loading goes on beside all of it.
    """
    student = a["batch"] * a["student_gflops"] * (1 + BACKWARD) / a["student_tflops"] / 1e3
    teacher = a["batch"] * a["teacher_gflops"] / a["teacher_tflops"] / 1e3
    hidden = student * BACKWARD / (1 + BACKWARD)
    exposed = max(0.0, ring_seconds(count, a["student_parameters"], a) - hidden)
    adapters = ring_seconds(count, a["adapter_parameters"], a)
    loading = a["batch"] / (a["images_a_core"] * a["cores"])
    seconds = max(student + teacher + exposed + adapters, loading)
    return {
        "student": student,
        "teacher": teacher,
        "gradients": exposed + adapters,
        "loading": loading,
        "step": seconds,
        "images/s": count * a["batch"] / seconds,
    }


def main() -> None:
    """Print the parts of a step in milliseconds."""
    given = {name: float(value) for name, _, value in (word.partition("=") for word in sys.argv[1:])}
    if unknown := given.keys() - ASSUMED.keys():
        sys.exit(f"{', '.join(sorted(unknown))}: unknown; known are {', '.join(ASSUMED)}")
    assumed = ASSUMED | given
    alone = step(1, assumed)["images/s"]
    print("| GPUs | student | teacher | gradients left | loading | step, ms | images/s | of linear |")
    print("|---|---|---|---|---|---|---|---|")
    for count in (1, 8, 64, 512):
        parts = step(count, assumed)
        times = " | ".join(f"{1e3 * parts[k]:.1f}" for k in ("student", "teacher", "gradients", "loading", "step"))
        print(f"| {count} | {times} | {parts['images/s']:,.0f} | {parts['images/s'] / count / alone:.0%} |")


if __name__ == "__main__":
    main()
