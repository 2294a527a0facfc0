#!/usr/bin/env python
# SPDX-License-Identifier: AGPL-3.0-or-later
"""What does a GPU make of yolo_cwd? One command, ten minutes at most, nothing downloaded.

    python scripts/gpu_report.py                                  # writes gpu_report.json and gpu_report.md
    python scripts/gpu_report.py teachers=best.pt student=yolo11n imgsz=640 batches=8,32 device=1
    python scripts/gpu_report.py only=loss,teacher out=first      # some sections, other files

Every section has a process of its own and a time limit: an error, a crash or a hang is written into the report, with
the rows that were measured until then, and the next section goes on. The exit code is 1 if there was one. Models by
name begin from random weights, which cost what trained ones cost; how exact a low precision is, only a trained teacher
can tell. `smoke=True` is for tests: at toy size, on a CPU, in one process.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

Words = dict[str, Any]
Rows = Iterator[tuple[str, dict[str, Any]]]

DEFAULTS: Words = {
    "student": "yolov8n",
    "teachers": "yolov8l,yolov8x",
    "imgsz": 640,
    "batches": "16,64",
    "repeats": 9,
    "device": "0",
    "only": "",
    "out": "gpu_report",
    "smoke": False,
    "section": "",  # this process measures one, and writes its rows to `out`
}
TOY = {"teachers": "yolov8n", "imgsz": 64, "batches": "2", "repeats": 1, "device": "cpu"}
OURS = "cwd-balanced, class maps"
ARMS = {"plain": "plain", "builtin": "built-in", OURS: "yolo_cwd"}  # of the benchmark, by what the table calls them


def _benchmark() -> Any:
    """Return the script that makes trainers and times their steps."""
    spec = importlib.util.spec_from_file_location("bench_step", Path(__file__).with_name("bench_step.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


bench = _benchmark()


def main() -> None:
    """Write the report, or measure the one section that is asked for."""
    given = {name: value for name, _, value in (word.partition("=") for word in sys.argv[1:])}
    if unknown := given.keys() - DEFAULTS.keys():
        sys.exit(f"{', '.join(sorted(unknown))}: unknown; known are {', '.join(DEFAULTS)}")
    smoke = given.get("smoke") == "True"
    words = {**DEFAULTS, **(TOY if smoke else {}), **given, "smoke": smoke}
    words |= {name: int(words[name]) for name in ("imgsz", "repeats")}
    if name := words["section"]:
        measure(name, words)
        return
    chosen = words["only"].split(",") if words["only"] else list(SECTIONS)
    if unknown := set(chosen) - SECTIONS.keys():
        sys.exit(f"only={words['only']}: no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    report: dict[str, Any] = {"settings": words, "sections": {}}
    with tempfile.TemporaryDirectory() as folder:
        for name in chosen:
            begin = time.perf_counter()
            found = here(name, words, Path(folder)) if smoke else apart(name, words, Path(folder))
            found["seconds"] = round(time.perf_counter() - begin, 1)
            report["sections"][name] = found
            write(report, words["out"])  # after each, whatever becomes of the next
            print(f"{name:10}{found['seconds']:7.1f} s  {found.get('error', '')}", flush=True)
    failed = [name for name, found in report["sections"].items() if "error" in found]
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


def here(name: str, words: Words, folder: Path) -> dict[str, Any]:
    """Measure a section in this process."""
    found: dict[str, Any] = {"rows": {}}
    try:
        for row, values in SECTIONS[name].measure(words, folder):
            found["rows"][row] = values
    except Exception as error:
        found["error"] = _line(error)
    return found


def apart(name: str, words: Words, folder: Path) -> dict[str, Any]:
    """Measure a section in a process of its own, for as long as it may take, and return the rows that were ready."""
    rows, limit = folder / f"{name}.json", SECTIONS[name].seconds
    asked = {**words, "section": name, "out": rows}
    command = [sys.executable, __file__, *(f"{key}={value}" for key, value in asked.items())]
    environment = {**os.environ, "YOLO_CONFIG_DIR": str(folder), "YOLO_OFFLINE": "True"}
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=environment,
        start_new_session=True,
    )
    failure: dict[str, Any] = {}
    try:
        _, said = process.communicate(timeout=limit)
        if process.returncode:
            failure = {"error": (said.strip().splitlines() or [f"exit code {process.returncode}"])[-1], "said": said}
    except subprocess.TimeoutExpired:
        failure = {"error": f"stopped after {limit} s"}
    finally:
        end(process)
    if "said" in failure:
        failure["said"] = failure["said"][-4000:]
    return {"rows": json.loads(rows.read_text(encoding="utf-8")) if rows.is_file() else {}, **failure}


def end(process: subprocess.Popen[str]) -> None:
    """End a process, and where that can be done those that it has started."""
    if hasattr(os, "killpg"):
        with suppress(ProcessLookupError):  # all of them have ended
            os.killpg(process.pid, signal.SIGKILL)  # it leads a group of its own
    elif process.poll() is None:
        process.kill()
    process.wait()


def measure(name: str, words: Words) -> None:
    """Measure a section, and write what is there after every row."""
    from ultralytics.utils import USER_CONFIG_DIR

    file = Path(words["out"])
    (USER_CONFIG_DIR / "Arial.ttf").touch()  # of a passing folder: no font is fetched, and none is drawn with
    rows = {}
    with patch("ultralytics.engine.trainer.check_amp", return_value=True):  # it fetches a model
        for row, values in SECTIONS[name].measure(words, file.parent):
            rows[row] = values
            aside = file.with_suffix(".part")
            aside.write_text(json.dumps(rows), encoding="utf-8")
            aside.replace(file)


def machine(words: Words, folder: Path) -> Rows:
    """What it ran on."""
    import ultralytics

    import yolo_cwd

    yield (
        "software",
        {
            "name": f"Python {sys.version.split()[0]}, PyTorch {torch.__version__}, Ultralytics "
            f"{ultralytics.__version__}, yolo_cwd {yolo_cwd.__version__}, CUDA {torch.version.cuda}"
        },
    )
    yield "processor", {"name": f"{os.cpu_count()} cores"}
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        yield f"GPU {i}", {"name": f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB"}
    _require(words)


def loss(words: Words, folder: Path) -> Rows:
    """The divergence and its gradient on the device, against float64 by automatic differentiation on the CPU."""
    from yolo_cwd.method.loss import channel_wise_divergence

    _require(words)
    shape = (2, 8, 8, 8) if words["smoke"] else (4, 256, 80, 80)
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for tau in (1.0, 4.0):
            maps = [(3 * torch.randn(shape, generator=generator)).to(dtype) for _ in range(2)]
            exact, gradient = reference(*maps, tau)
            student, teacher = (m.to(_device(words)) for m in maps)
            value = channel_wise_divergence(student.requires_grad_(), teacher, tau)
            value.backward()
            yield (
                f"{str(dtype).removeprefix('torch.')}, tau={tau:g}",
                {
                    "value": value.item(),
                    "in float64": exact.item(),
                    "error of the value": abs(value.item() / exact.item() - 1),
                    "error of the gradient": _error(student.grad, gradient),
                },
            )


def reference(student: torch.Tensor, teacher: torch.Tensor, tau: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the divergence of maps [N, C, H, W] and its gradient, in float64 by automatic differentiation."""
    leaf = student.detach().double().requires_grad_()
    log_q, log_p = ((m.flatten(2) / tau).log_softmax(-1) for m in (leaf, teacher.double()))
    total = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="sum")
    value = total * tau**2 / (student.shape[0] * student.shape[1])
    return value.detach(), torch.autograd.grad(value, leaf)[0]


def teacher(words: Words, folder: Path) -> Rows:
    """The teacher's forward pass in every precision, and the error of its worst map against float64 on the CPU."""
    from yolo_cwd import ConfigError
    from yolo_cwd.method.teacher import DTYPES, load_teacher

    _require(words)
    device, batch = _device(words), min(_numbers(words["batches"]))
    images = pictures(words, folder, batch)
    for name in words["teachers"].split(","):
        loaded = load_teacher(str(checkpoint(words, name, folder)))
        with torch.no_grad():
            exact = list(deepcopy(loaded.body).double()(images[:1].double()))
        for wanted in (*DTYPES, "auto"):
            tried = deepcopy(loaded)
            tried.settle(device)
            try:
                tried.calibrate(wanted, images[:1].to(device))
            except ConfigError as error:
                yield f"{_stem(name)}, {wanted}", {"error": _line(error)}
                continue
            run = {"teacher": lambda tried=tried: tried(images.to(device))}
            peak = Peak(device)
            times = bench.interleaved(run, words["repeats"], device)["teacher"]
            found = tried(images[:1].to(device))
            yield (
                f"{_stem(name)}, {wanted}",
                {
                    "precision": tried.precision.name,
                    "batch": batch,
                    "ms": 1000 * median(times),
                    "peak MiB": peak.read(),
                    "error": max(_error(ours, theirs) for ours, theirs in zip(found, exact, strict=True)),
                },
            )
            del tried, run, found
            _free()


def step(words: Words, folder: Path) -> Rows:
    """A whole step: plain, `distill_model`, and ours, on a GPU in every `teacher_forward`; medians, peak memory."""
    _require(words)
    on_gpu = _device(words).type == "cuda"
    for batch in _numbers(words["batches"]):
        for name in words["teachers"].split(","):
            checkpoint(words, name, folder)
            try:
                yield from _steps({**words, "teacher": name, "batch": batch}, folder, "stream" if on_gpu else "")
            except torch.cuda.OutOfMemoryError as error:
                yield f"{_stem(name)}, batch {batch}", {"error": _line(error)}
            _free()
    if on_gpu:  # last, and of one pair: it takes its time to begin
        found = _steps(_first_pair(words, folder), folder, "compile")
        yield from (row for row in found if "compile" in row[0])


def _steps(given: Words, folder: Path, forward: str) -> Rows:
    """Measure a step of every arm, and one of ours with another `teacher_forward`."""
    device, batch = _device(given), given["batch"]
    steps, peaks = {}, {}
    arms: list[tuple[str, str, Words]] = [(arm, label, {}) for arm, label in ARMS.items()]
    if forward:
        arms.append((OURS, f"yolo_cwd, teacher_forward={forward}", {"teacher_forward": forward}))
    for arm, label, more in arms:
        peak = Peak(device)  # beside what the arms before it hold
        steps[label] = bench.step_of(bench.make_trainer(arm, given, folder, **more))
        for _ in range(2):
            steps[label]()
        peaks[label] = peak.read()
    times = bench.interleaved(steps, given["repeats"], device)
    typical = {label: median(values) for label, values in times.items()}
    for label, seconds in typical.items():
        row = {"ms": 1000 * seconds, "images/s": batch / seconds, "peak MiB": peaks[label]}
        row |= {f"of {other}": seconds / typical[other] for other in ("plain", "built-in")}
        yield f"{_stem(given['teacher'])}, batch {batch}, {label}", row


def layout(words: Words, folder: Path) -> Rows:
    """The same step with the student's weights in either order."""
    yield from _variants(words, folder, "channels_last", (False,) if words["smoke"] else (False, True))


def compiled(words: Words, folder: Path) -> Rows:
    """The same step eager and compiled; the first one compiles."""
    if words["smoke"]:
        yield "left out", {"reason": "compiling takes half a minute"}
        return
    yield from _variants(words, folder, "compile", (False, True))


def _variants(words: Words, folder: Path, argument: str, values: tuple[bool, ...]) -> Rows:
    _require(words)
    device, given = _device(words), _first_pair(words, folder)
    for arm in (OURS,) if words["smoke"] else (OURS, "plain"):
        for value in values:
            run = bench.step_of(bench.make_trainer(arm, given, folder, **{argument: value}))
            peak, begin = Peak(device), time.perf_counter()
            run()
            first = bench_wait(device) - begin
            times = bench.interleaved({"step": run}, words["repeats"], device)["step"]
            row = {"ms": 1000 * median(times), "first ms": 1000 * first, "peak MiB": peak.read()}
            yield f"{ARMS[arm]}, {argument}={value}", row
            del run
            _free()


def bench_wait(device: torch.device) -> float:
    """Return the time once the device has done what it was given."""
    from yolo_cwd.method.teacher import wait_for

    wait_for(device)
    return time.perf_counter()


def loader(words: Words, folder: Path) -> Rows:
    """How long a step waits for its batch; the images are small ones, so that real ones take longer to read."""
    from yolo_cwd import digits

    _require(words)
    given, device = _first_pair(words, folder), _device(words)
    count = 2 if words["smoke"] else 12
    data = str(digits.build(folder, {"train": count * given["batch"], "val": 4}))
    workers = 0 if words["smoke"] else min(8, os.cpu_count() or 1)
    trainer = bench.make_trainer(OURS, given, folder, data=data, workers=workers)
    waits, works, before = [], [], bench_wait(device)
    for raw in trainer.train_loader:
        came = time.perf_counter()
        bench.take_step(trainer, raw)
        after = bench_wait(device)
        waits.append(came - before)
        works.append(after - came)
        before = after
    kept = slice(count // 3, None)  # the first ones fill the queue
    wait, work = sum(waits[kept]), sum(works[kept])
    steps = len(waits[kept])
    row = {"workers": workers, "waiting ms": 1000 * wait / steps, "working ms": 1000 * work / steps}
    yield f"batch {given['batch']}", {**row, "share of waiting": wait / (wait + work)}
    getattr(trainer.train_loader, "close", lambda: None)()


def training(words: Words, folder: Path) -> Rows:
    """Two epochs, interrupted after the first and resumed, with validation."""
    import csv

    from yolo_cwd import CWDTrainer, digits

    _require(words)
    given = _first_pair(words, folder)
    batch = given["batch"]
    overrides = {
        "model": bench.model_file(words["student"]),
        "teacher": str(bench.teacher_checkpoint(given, folder)),
        "data": str(digits.build(folder, {"train": 4 * batch, "val": 4})),
        **{"imgsz": words["imgsz"], "batch": batch, "nbs": batch, "device": words["device"], "epochs": 2},
        **{"workers": 0, "plots": False, "verbose": False, "schedule": "constant"},
        "save_dir": str(folder / "training"),
    }

    def interrupt(trainer: Any) -> None:
        raise KeyboardInterrupt

    trainer = CWDTrainer(overrides=overrides)
    trainer.add_callback("on_fit_epoch_end", interrupt)
    for label in ("until it is interrupted", "resumed"):
        begin = time.perf_counter()
        try:
            trainer.train()
        except KeyboardInterrupt:
            last = str(folder / "training" / "weights" / "last.pt")
            trainer = CWDTrainer(overrides={"resume": last, "device": words["device"]})
        with (folder / "training" / "results.csv").open(encoding="utf-8") as file:
            rows = [{name.strip(): value for name, value in row.items()} for row in csv.DictReader(file)]
        lost = {name: float(rows[-1][f"train/{name}"]) for name in ("box_loss", "cls_loss", "dfl_loss", "cwd_loss")}
        yield label, {"seconds": time.perf_counter() - begin, "epochs": len(rows), **lost}


def estimate(words: Words, folder: Path) -> Rows:
    """`batch=-1`, plain and with a teacher, and what two steps of that batch then need."""
    from yolo_cwd import digits

    _require(words)
    device, given = _device(words), _first_pair(words, folder)
    data = str(digits.build(folder, {"train": 16 if words["smoke"] else 512, "val": 4}))
    for arm, label, more in (("cwd", "yolo_cwd", {"adapter": "conv"}), ("plain", "plain", {})):
        peak = Peak(device)
        trainer = bench.make_trainer(arm, given, folder, data=data, batch=-1, **more)
        run = bench.step_of(trainer)
        for _ in range(2):
            run()
        row = {"batch": trainer.batch_size, "peak MiB": peak.read()}
        if device.type == "cuda":
            total = torch.cuda.get_device_properties(device).total_memory / 2**20
            row["of the memory"] = row["peak MiB"] / total
        yield label, row
        del trainer, run
        _free()


def processes(words: Words, folder: Path) -> Rows:
    """Two steps on all GPUs together, one process each, by torchrun and NCCL."""
    from yolo_cwd import digits

    count = torch.cuda.device_count()
    if count < 2 or words["smoke"]:
        yield "left out", {"GPUs": count}
        return
    given = _first_pair(words, folder)
    batch = given["batch"] * count
    arguments = {
        "teacher": bench.teacher_checkpoint(given, folder),
        "student": bench.model_file(words["student"]),
        "data": digits.build(folder, {"train": 2 * batch, "val": 4}),
        "device": ",".join(map(str, range(count))),
        **{"imgsz": words["imgsz"], "batch": batch, "nbs": batch, "epochs": 1, "amp": False},
        **{"workers": 0, "plots": False, "val": False, "project": folder / "processes"},
    }
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    typed = [f"{name}={value}" for name, value in arguments.items()]
    begin = time.perf_counter()
    subprocess.run([*launch, "-m", "yolo_cwd", "train", *typed], check=True, stdout=subprocess.DEVNULL)
    yield "torchrun", {"processes": count, "batch": batch, "seconds": time.perf_counter() - begin}


class Section(NamedTuple):
    """What is measured, and the seconds it may take; all together are ten minutes."""

    measure: Callable[[Words, Path], Rows]
    seconds: int


SECTIONS = {
    "machine": Section(machine, 20),
    "loss": Section(loss, 25),
    "teacher": Section(teacher, 55),
    "step": Section(step, 190),
    "layout": Section(layout, 40),
    "compiled": Section(compiled, 90),
    "loader": Section(loader, 35),
    "training": Section(training, 50),
    "estimate": Section(estimate, 45),
    "processes": Section(processes, 50),
}


class Peak:
    """The most memory that tensors on a GPU have taken since, in MiB, beyond what they took before."""

    def __init__(self, device: torch.device) -> None:
        """Begin now."""
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)

    def read(self) -> float | None:
        """Return it; None on anything but a GPU."""
        if self.device.type != "cuda":
            return None
        return float(torch.cuda.max_memory_allocated(self.device) - self.before) / 2**20


def checkpoint(words: Words, name: str, folder: Path) -> Path:
    """Return the checkpoint of a teacher; one of random weights gets normalization statistics, or its maps vanish."""
    from ultralytics import YOLO

    if (path := folder / f"{_stem(name)}.pt").is_file() or name.endswith(".pt"):
        return bench.teacher_checkpoint({"teacher": name}, folder)
    device = _device(words)
    torch.manual_seed(0)
    model = YOLO(bench.model_file(name))
    network = model.model.to(device).train()
    for layer in network.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.momentum = 1.0
    with torch.no_grad():
        network(pictures(words, folder, 16).to(device))
    network.cpu()
    model.save(path)
    return path


def pictures(words: Words, folder: Path, count: int) -> torch.Tensor:
    """Return images [N, 3, H, W] in 0 to 1, of digits."""
    import cv2
    import numpy as np

    from yolo_cwd import digits

    files = sorted((digits.build(folder, {"train": count, "val": 4}).parent / "images" / "train").iterdir())
    size = (words["imgsz"], words["imgsz"])
    images = np.stack([cv2.resize(cv2.imread(str(file)), size) for file in files])
    return torch.from_numpy(images).permute(0, 3, 1, 2) / 255


def write(report: dict[str, Any], out: str) -> None:
    """Write the report as JSON, and as tables for people."""
    Path(f"{out}.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    lines = ["# yolo_cwd on this machine", "", "    " + json.dumps(report["settings"])]
    for name, found in report["sections"].items():
        lines += ["", f"## {name}", "", f"{(SECTIONS[name].measure.__doc__ or '').strip()} {found['seconds']:g} s."]
        if "error" in found:
            lines += ["", f"**Failed:** {found['error']}"]
        rows = {row: {k: v for k, v in values.items() if v is not None} for row, values in found["rows"].items()}
        if columns := list(dict.fromkeys(column for values in rows.values() for column in values)):
            lines += ["", "| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
            lines += [
                f"| {row} | " + " | ".join(_shown(v.get(c, "")) for c in columns) + " |" for row, v in rows.items()
            ]
    Path(f"{out}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/")


def _require(words: Words) -> None:
    """Refuse a GPU that is not there, once the software has been named."""
    if words["device"] != "cpu" and not torch.cuda.is_available():
        raise RuntimeError(f"device={words['device']}: PyTorch sees no GPU")


def _device(words: Words) -> torch.device:
    return torch.device("cpu" if words["device"] == "cpu" else f"cuda:{words['device']}")


def _first_pair(words: Words, folder: Path) -> Words:
    teacher, *_ = words["teachers"].split(",")
    checkpoint(words, teacher, folder)
    return {**words, "teacher": teacher, "batch": min(_numbers(words["batches"]))}


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _stem(name: str) -> str:
    return Path(name).stem


def _error(found: Any, exact: torch.Tensor) -> float:
    return float((found.double().cpu() - exact).norm() / exact.norm())


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
