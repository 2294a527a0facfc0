#!/usr/bin/env python
# SPDX-License-Identifier: AGPL-3.0-or-later
"""What does a distillation step cost, beside plain training and beside Ultralytics' own distillation?

    python scripts/bench_step.py teacher=yolov8l student=yolov8n imgsz=320 batch=8 repeats=7 device=cpu
    python scripts/bench_step.py part=scaling     # 4 batch sizes x 3 image sizes, with fitted exponents
    python scripts/bench_step.py part=start       # seconds from the command to the first step
    python scripts/bench_step.py part=memory      # peak memory, one process an arm

All arms of `part=step` live in one process and take turns, so that a busy machine is busy for all of them; the table
shows medians. Steps are those of Ultralytics' loop on one prepared batch: no data loading, no validation. Models start
from random weights, which cost what trained ones cost. `json=file` writes the table as well; `smoke=True` is for tests.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from statistics import median
from typing import Any

import torch

OPTIONS: dict[str, dict[str, Any]] = {  # of the arms that are ours
    "cwd": {"cwd": 100},
    "cwd-fp32": {"cwd": 100, "teacher_dtype": "fp32"},
    "cwd-balanced": {"cwd": "balanced", "class_share": 0},
    "cwd-balanced, class maps": {"cwd": "balanced", "class_share": 1},
}
ARMS = ("plain", "builtin", *OPTIONS)
DEFAULTS = {
    "part": "step",
    "teacher": "yolov8l",
    "student": "yolov8n",
    "imgsz": 320,
    "batch": 8,
    "repeats": 7,
    "device": "cpu",
    "arm": "",
    "json": "",
    "smoke": False,
}


def main() -> None:
    """Measure the part that is asked for, and print its table."""
    words = DEFAULTS | {name: _value(text) for name, _, text in (word.partition("=") for word in sys.argv[1:])}
    if unknown := words.keys() - DEFAULTS.keys():
        sys.exit(f"{', '.join(sorted(unknown))}: unknown; known are {', '.join(DEFAULTS)}")
    if words["smoke"]:
        words |= {"teacher": "yolov8n", "imgsz": 64, "batch": 2, "repeats": 1}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["YOLO_CONFIG_DIR"] = folder
        table = {"step": steps, "scaling": scaling, "start": starts, "memory": memory, "arm": one_arm}[words["part"]](
            words, Path(folder)
        )
    if words["json"]:
        content = json.dumps({"settings": words, "table": table}, indent=1) + "\n"
        Path(words["json"]).write_text(content, encoding="utf-8")


def _value(text: str) -> Any:
    return {"True": True, "False": False}.get(text, int(text) if text.isdecimal() else text)


def steps(words: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Time a whole step of every arm, the teacher's forward pass in every form, and the loss alone."""
    from yolo_cwd.method.teacher import DTYPES, Precision

    trainers = {arm: make_trainer(arm, words, folder) for arm in ARMS}
    arms: dict[str, Callable[[], Any]] = {f"step: {arm}": step_of(trainer) for arm, trainer in trainers.items()}
    arms["step: cwd, idle cores left idle"] = on_no_more_cores(arms["step: cwd"])
    arms["step: cwd-fp32, idle cores left idle"] = on_no_more_cores(arms["step: cwd-fp32"])
    ours = trainers["cwd"]
    images = first_batch(ours)["img"]

    whole = deepcopy(trainers["builtin"].model.teacher_model).eval()
    arms["teacher: whole, fp32"] = lambda: whole(images)
    headless = deepcopy(whole)
    headless.model = headless.model[:-1]
    headless.save = [i for i in headless.save if i < len(headless.model)]
    arms["teacher: no head"] = lambda: headless(images)
    exact = trainers["cwd-fp32"].teacher
    contiguous = deepcopy(exact.body).to(memory_format=torch.contiguous_format)  # on a GPU it is channels-last
    arms["teacher: + fused"] = lambda: contiguous(images)
    channels_last = images.to(memory_format=torch.channels_last)
    arms["teacher: + channels_last"] = lambda: exact.body(channels_last)
    low = deepcopy(exact)
    name = "fp16" if images.is_cuda else "bf16"
    low.body, low.precision = low.body.to(DTYPES[name]), Precision(name)
    arms[f"teacher: + {name}"] = lambda: low.body(channels_last.to(DTYPES[name]))
    arms["teacher: + idle cores, fp32"] = lambda: exact(images)
    arms[f"teacher: + idle cores, {name}"] = lambda: low(images)

    arms["loss alone"] = loss_alone(ours, images, fused=True)
    arms["loss alone, by autograd"] = loss_alone(ours, images, fused=False)

    times = interleaved(arms, words["repeats"], images.device)
    seconds = {name: median(values) for name, values in times.items()}
    plain, builtin = seconds["step: plain"], seconds["step: builtin"]
    rows = {name: {"seconds": s, "of plain": s / plain, "of builtin": s / builtin} for name, s in seconds.items()}
    show(f"{words['teacher']} -> {words['student']}, {words['imgsz']} px, batch {words['batch']}", rows)
    print(f"\nteacher_dtype=auto chose {ours.teacher.precision}")
    print("beyond the student's own step and the teacher's forward pass, median over the turns:")
    chosen = ours.teacher.precision.name
    overhead = {
        arm: median(
            1 - (own + forward) / whole_step
            for own, forward, whole_step in zip(
                times["step: plain"], times[f"teacher: + idle cores, {dtype}"], times[f"step: {arm}"], strict=True
            )
        )
        for arm, dtype in (("cwd", chosen), ("cwd-fp32", "fp32"))
    }
    for arm, share in overhead.items():
        print(f"  {100 * share:.1f} % of a step of {arm}")
    return {"rows": rows, "overhead": overhead, "precision": ours.teacher.precision._asdict()}


def on_no_more_cores(run: Callable[[], Any]) -> Callable[[], Any]:
    """Let a step think that the machine has but one core."""

    def alone() -> Any:
        os.environ["LOKY_MAX_CPU_COUNT"] = "1"
        try:
            return run()
        finally:
            del os.environ["LOKY_MAX_CPU_COUNT"]

    return alone


def interleaved(arms: dict[str, Callable[[], Any]], repeats: int, device: Any) -> dict[str, list[float]]:
    """Return the times of every arm, each warmed up once and then run in turns."""
    from yolo_cwd.method.teacher import wait_for

    times: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(repeats + 1):
        for name, run in arms.items():
            wait_for(device)
            begin = time.perf_counter()
            with torch.set_grad_enabled(not name.startswith("teacher")):
                run()
            wait_for(device)
            if turn:
                times[name].append(time.perf_counter() - begin)
    return times


def make_trainer(arm: str, words: dict[str, Any], folder: Path, **more: Any) -> Any:
    """Return a trainer of Ultralytics or ours, ready for its first step; `more` are training arguments."""
    from ultralytics.models.yolo.detect import DetectionTrainer

    from yolo_cwd import CWDTrainer, digits

    data = digits.build(folder, {"train": max(words["batch"], 4), "val": 4})
    teacher = teacher_checkpoint(words, folder)
    overrides = {
        "model": model_file(words["student"]),
        "data": str(data),
        "imgsz": words["imgsz"],
        "batch": words["batch"],
        "nbs": words["batch"],
        "device": words["device"],
        "optimizer": "AdamW",
        "amp": words["device"] != "cpu",
        "workers": 0,
        "plots": False,
        "verbose": False,
        "project": str(folder / "runs"),
        **more,
    }
    if arm == "plain":
        trainer = DetectionTrainer(overrides=overrides)
    elif arm == "builtin":
        trainer = DetectionTrainer(overrides={**overrides, "distill_model": str(teacher)})
    else:
        trainer = CWDTrainer(overrides={**overrides, "teacher": str(teacher), **OPTIONS[arm]})
    trainer._setup_train()
    trainer._model_train()
    trainer.epoch = 0
    trainer.run_callbacks("on_train_epoch_start")
    return trainer


def teacher_checkpoint(words: dict[str, Any], folder: Path) -> Path:
    """Return the checkpoint of the teacher, which another process may have made, or make one."""
    from ultralytics import YOLO

    file = Path(model_file(words["teacher"]))
    path = file if file.suffix == ".pt" else folder / f"{file.stem}.pt"
    if not path.exists():
        torch.manual_seed(0)
        YOLO(file).save(path)
    return path


def model_file(name: str) -> str:
    """Return the file of a model: a .pt or .yaml as it is, and of another name Ultralytics' .yaml."""
    return name if name.endswith((".pt", ".yaml")) else f"{name}.yaml"


def first_batch(trainer: Any) -> dict[str, Any]:
    """Return the first batch of the trainer's loader, on its device, as Ultralytics prepares it."""
    from ultralytics.models.yolo.detect import DetectionTrainer

    return DetectionTrainer.preprocess_batch(trainer, next(iter(trainer.train_loader)))


def step_of(trainer: Any) -> Callable[[], None]:
    """Return one training step of a trainer on one batch of its loader."""
    raw = next(iter(trainer.train_loader))
    return lambda: take_step(trainer, raw)


def take_step(trainer: Any, raw: dict[str, Any]) -> None:
    """Make a training step of a trainer on a batch of its loader, as in Ultralytics' loop."""
    from ultralytics.utils.torch_utils import autocast, unwrap_model

    with autocast(trainer.amp, device=trainer.device.type):
        batch = trainer.preprocess_batch(dict(raw))
        if trainer.args.compile:
            loss, _ = unwrap_model(trainer.model).loss(batch, trainer.model(batch["img"]))
        else:
            loss, _ = trainer.model(batch)
    trainer.scaler.scale(loss.sum()).backward()
    trainer.optimizer_step()


def loss_alone(trainer: Any, images: Any, fused: bool) -> Callable[[], None]:
    """Return the divergences of all levels, forward and backward, without adapters."""
    from yolo_cwd.method.loss import channel_wise_divergence

    def by_autograd(student: Any, teacher: Any) -> Any:
        log_q, log_p = (x.float().flatten(2).log_softmax(-1) for x in (student, teacher))
        return torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="sum")

    divergence = channel_wise_divergence if fused else by_autograd
    maps = trainer.teacher(images)
    students = [m.float().clone().contiguous().requires_grad_() for m in maps]

    def run() -> None:
        torch.stack([divergence(s, t) for s, t in zip(students, maps, strict=True)]).sum().backward()

    return run


def scaling(words: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Time the distilled step over batch and image sizes, and fit time = c * batch^a * pixels^b."""
    batches, sizes = ([1, 2], [64, 96]) if words["smoke"] else ([2, 4, 8, 16], [160, 224, 320])
    points = [(b, s) for b in batches for s in sizes]
    arms = {}
    for batch, size in points:
        trainer = make_trainer("cwd", {**words, "batch": batch, "imgsz": size}, folder / f"{batch}-{size}")
        arms[f"{batch} x {size} px"] = step_of(trainer)
    times = interleaved(arms, words["repeats"], trainer.device)
    seconds = {name: median(values) for name, values in times.items()}
    x = torch.tensor([[1.0, math.log(b), 2 * math.log(s)] for b, s in points], dtype=torch.float64)
    y = torch.tensor([[math.log(t)] for t in seconds.values()], dtype=torch.float64)
    _, a, b = torch.linalg.lstsq(x, y).solution.flatten().tolist()
    show("batch x size", {name: {"seconds": s} for name, s in seconds.items()})
    print(f"\ntime grows as batch^{a:.2f} and pixels^{b:.2f}")
    return {"seconds": seconds, "batch exponent": a, "pixel exponent": b}


def memory(words: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the peak memory of a process that makes a few steps of one arm, for every arm."""
    rows = {}
    settings = {**words, "teacher": teacher_checkpoint(words, folder), "smoke": False}
    kept = [f"{k}={v}" for k, v in settings.items() if k not in {"part", "arm", "json"}]
    for arm in ARMS[:3] if words["smoke"] else ARMS:
        command = [sys.executable, __file__, "part=arm", f"arm={arm}", *kept]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        rows[arm] = {"peak MiB": float(output.splitlines()[-1])}
    for row in rows.values():
        row["of builtin"] = row["peak MiB"] / rows["builtin"]["peak MiB"]
    show("peak memory", rows)
    return rows


def _peak_resident_mib() -> float:
    if sys.platform == "win32":
        import psutil

        return float(psutil.Process().memory_info().peak_wset) / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def one_arm(words: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Make a few steps of one arm and print the peak memory of the process in MiB: of the GPU where it runs on one."""
    trainer = make_trainer(words["arm"], words, folder)
    step = step_of(trainer)
    for _ in range(3):
        step()
    if trainer.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(trainer.device) / 2**20
    else:
        peak = _peak_resident_mib()
    print(peak)
    return {"peak MiB": peak}


START = """
import sys, time
import os; begin = float(os.environ["BEGIN"])
def stop(trainer):
    print("SECONDS", time.time() - begin, flush=True); os._exit(0)
if sys.argv[1] == "cwd":
    from yolo_cwd import CWDTrainer as Trainer
else:
    from ultralytics.models.yolo.detect import DetectionTrainer as Trainer
from ultralytics.cfg import smart_value
trainer = Trainer(overrides={k: smart_value(v) for k, v in (w.split("=", 1) for w in sys.argv[2:])})
trainer.add_callback("on_train_batch_start", stop)
trainer.train()
"""


def starts(words: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Time both trainers from the start of a process to the first step, in turns, data cached."""
    trainer = make_trainer("cwd", words, folder)
    common = [
        f"{name}={getattr(trainer.args, name)}"
        for name in ("model", "data", "imgsz", "batch", "device", "amp", "workers", "plots")
    ]
    teacher = teacher_checkpoint(words, folder)
    times: dict[str, list[float]] = {"plain": [], "cwd": []}
    for turn in range(words["repeats"] + 1):
        for arm, seconds in times.items():
            more = [f"teacher={teacher}"] if arm == "cwd" else []
            place = [f"project={folder / 'starts'}"]
            environment = {**os.environ, "BEGIN": str(time.time())}
            command = [sys.executable, "-c", START, arm, *common, *more, *place]
            output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
            if turn:
                seconds.append(float(output.rsplit("SECONDS", 1)[1]))
    rows = {arm: {"seconds": median(s), "of plain": median(s) / median(times["plain"])} for arm, s in times.items()}
    show("from the command to the first step", rows)
    return rows


def show(title: str, rows: dict[str, dict[str, float]]) -> None:
    """Print a table."""
    columns = list(next(iter(rows.values())))
    print(f"\n{title:45}" + "".join(f"{c:>12}" for c in columns))
    for name, row in rows.items():
        print(f"{name:45}" + "".join(f"{row[c]:12.3f}" for c in columns))


if __name__ == "__main__":
    main()
