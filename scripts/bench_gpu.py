# SPDX-License-Identifier: AGPL-3.0-or-later
"""What only a GPU can tell of a distilled step: parts of bench.py, and two reports of all parts within a time limit.

    python scripts/bench.py report=1                     # the loss, steps, where their time goes, the teacher
    python scripts/bench.py report=2                     # mixed precision, NCCL, resuming, the tests

Each report takes at most `WHOLE` seconds. It runs its parts in processes of their own, each within a limit, and ends
those that exceed it; what they have found until then is kept. All of it also runs on a CPU, where it says less.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import bench
import psutil
import torch
from bench import Say, Words
from torch import Tensor
from torch.autograd.profiler import record_function
from torch.profiler import ProfilerActivity, profile
from ultralytics.utils.dist import find_free_network_port

from yolo_cwd import CWDLoss, CWDTrainer

WHOLE = 270  # seconds of a report
BEGIN = 15  # of them to begin and to end
REPORTS = {  # the parts of each report that share a process, and its seconds
    "1": {"machine,loss": 45, "step": 75, "profile,syncs,memory": 75, "teacher": 30},
    "2": {"amp": 35, "processes": 50, "resume": 30, "tests": 65},
}
PROFILED = 3  # steps under the profiler
PREFIX = "part: "  # of our marks in a trace
LAUNCHES, WORK = {"cuda_runtime", "cuda_driver"}, {"kernel", "gpu_memcpy", "gpu_memset"}  # categories in a trace
ROOT = Path(__file__).parents[1]
RUNS = bench.FOLDER / "trained"


def profile_(words: Words, say: Say) -> None:
    """Say where the time of a step goes: launches, time on GPU and host by part, and how long the GPU idles.

    The profiler slows the host, so the share in which the GPU idles is also given by the time of a step without it.
    """
    for batch in words["batch"]:
        for arm in ("plain", "ours"):
            trainer, raw = alone(arm, words, batch)
            (times,) = bench.timed({"": partial(bench.take_step, trainer, raw)}, words).values()
            with marks(trainer):
                marked_step(trainer, raw)
                found, idle = by_part(traced(partial(marked_step, trainer, raw), words["device"]), PROFILED)
            launches, busy = (sum(row[name] for row in found.values()) for name in ("launches", "gpu_ms"))
            shares = {"idle_share": max(0.0, 1 - busy / times["ms"]), "idle_share_profiled": idle} if busy else {}
            say(f"{arm}, batch {batch}", ms=times["ms"], gpu_ms=busy, launches=launches, **shares)
            for part, row in sorted(found.items()):
                say(f"{arm}, batch {batch}, {part}", **row)
            del trainer


def alone(arm: str, words: Words, batch: int) -> tuple[Any, Words]:
    """Return a trainer that is ready, and a batch, once the memory of those before it has been freed."""
    gc.collect()  # trainers refer to themselves
    if words["device"].type == "cuda":
        torch.cuda.empty_cache()
    return bench.set_up(arm, words, batch)


def marked_step(trainer: Any, raw: Words) -> None:
    """Take a step of bench.py with marks around its parts."""
    with bench.autocast(trainer.amp, device=trainer.device.type):
        with record_function(f"{PREFIX}images"):
            batch = trainer.preprocess_batch(dict(raw))
        with record_function(f"{PREFIX}student"):
            loss, _ = trainer.model(batch)
    with record_function(f"{PREFIX}backward"):
        trainer.scaler.scale(loss.sum()).backward()
    with record_function(f"{PREFIX}optimizer"):
        trainer.optimizer_step()


@contextmanager
def marks(trainer: Any) -> Iterator[None]:
    """Mark in a trace what is ours in a step: teacher, loss, hooks and meter; a plain trainer has none of them."""

    def marked(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*words: Any, **named: Any) -> Any:
            with record_function(PREFIX + part):
                return function(*words, **named)

        return run

    if not isinstance(trainer, CWDTrainer):
        yield
        return
    distillation, register = trainer.distillation, Tensor.register_hook
    assert distillation.criterion is not None
    changes = [
        patch.object(distillation.teacher, "maps", marked("teacher", distillation.teacher.maps)),
        patch.object(distillation.criterion, "criterion", marked("task's loss", distillation.criterion.criterion)),
        patch.object(CWDLoss, "__call__", marked("ours, loss", CWDLoss.__call__)),
        patch.object(distillation, "step", marked("ours, meter", distillation.step)),
        patch.object(Tensor, "register_hook", lambda x, hook: register(x, marked("ours, hooks", hook))),
    ]
    with ExitStack() as stack:
        for change in changes:
            stack.enter_context(change)
        yield


def traced(run: Callable[[], None], device: torch.device) -> list[dict[str, Any]]:
    """Return the events of the profiler's trace of some runs."""
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=kinds) as profiler:
        for _ in range(PROFILED):
            run()
        bench.wait_for(device)
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(str(Path(folder) / "trace.json"))
        events: list[dict[str, Any]] = json.loads((Path(folder) / "trace.json").read_text(encoding="utf-8"))[
            "traceEvents"
        ]
    return events


def by_part(events: Iterable[dict[str, Any]], steps: int) -> tuple[dict[str, dict[str, float]], float]:
    """Return what each part of a step costs, and the share of the time in which the GPU is idle.

    What is launched belongs to the innermost mark around its launch, in whichever thread: autograd runs the backward
    pass in one of its own, while the main one waits.

    Args:
        events: Of a trace in Chrome's format, in microseconds.
        steps: How many steps were traced.
    """
    events = [event for event in events if event.get("ph") == "X"]
    spans = [(e["ts"], e["dur"], part) for e in events if (part := _part_of(e))]
    launched = {
        e["args"]["correlation"]: e["ts"]
        for e in events
        if e.get("cat") in LAUNCHES and "correlation" in e.get("args", {})
    }
    found: dict[str, dict[str, float]] = defaultdict(lambda: {"launches": 0, "gpu_ms": 0.0, "host_ms": 0.0})
    for _, duration, part in spans:
        found[part]["host_ms"] += duration / 1e3 / steps  # with the parts inside of it
    busy = []
    for event in (e for e in events if e.get("cat") in WORK):
        at = launched.get(event["args"].get("correlation"), event["ts"])
        around = [(duration, part) for begin, duration, part in spans if begin <= at <= begin + duration]
        row = found[min(around)[1] if around else "rest"]
        row["launches"] += 1 / steps
        row["gpu_ms"] += event["dur"] / 1e3 / steps
        busy.append((event["ts"], event["ts"] + event["dur"]))
    return {part: {**row, "launches": round(row["launches"])} for part, row in found.items()}, idle_share(busy)


def _part_of(event: dict[str, Any]) -> str:
    """Return the part that an event marks: one of ours, or the backward pass of the divergence; nothing for others."""
    name, category = event["name"], event.get("cat")
    if category == "user_annotation" and name.startswith(PREFIX):
        return str(name.removeprefix(PREFIX))
    backward = category == "cpu_op" and name.startswith("autograd::engine") and "Divergence" in name
    return "ours, divergence backward" if backward else ""


def idle_share(busy: Sequence[tuple[float, float]]) -> float:
    """Return the share of the time from the first interval to the last that none of them covers; 0 without any."""
    covered, end = 0.0, float("-inf")
    for begin, until in sorted(busy):
        covered += max(0.0, until - max(begin, end))
        end = max(end, until)
    return 1 - covered / (end - min(busy)[0]) if covered else 0.0


def syncs(words: Words, say: Say) -> None:
    """Count how often a step waits for the GPU, and where: Ultralytics' own loss does so too."""
    for batch in words["batch"]:
        counts = {}
        for arm in ("plain", "ours"):
            trainer, raw = alone(arm, words, batch)
            run = partial(bench.take_step, trainer, raw)
            for _ in range(2):
                run()
            counts[arm] = waits(run, words["device"])
            say(f"{arm}, batch {batch}", syncs=counts[arm].total(), where=dict(counts[arm]))
            del trainer, run
        say(f"added, batch {batch}", syncs=counts["ours"].total() - counts["plain"].total())


def waits(run: Callable[[], Any], device: torch.device) -> Counter[str]:
    """Return how often a run waits for the GPU, by file and line."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    found = [w for w in said if "synchronizing CUDA operation" in str(w.message)]
    return Counter(f"{'/'.join(Path(w.filename).parts[-3:])}:{w.lineno}" for w in found)


def memory(words: Words, say: Say) -> None:
    """Say the peak memory of a step, reset after two others, where nothing else is on the GPU."""
    for batch in words["batch"]:
        for arm in bench.ARMS:
            trainer, raw = alone(arm, words, batch)
            for _ in range(2):
                bench.take_step(trainer, raw)
            say(f"{arm}, batch {batch}", **peak(partial(bench.take_step, trainer, raw), words["device"]))
            del trainer


def peak(run: Callable[[], Any], device: torch.device) -> dict[str, float]:
    """Return the peak memory of a run in MiB; on a CPU, what the process has after it."""
    if device.type != "cuda":
        run()
        return {"resident_MiB": psutil.Process().memory_info().rss / 2**20}
    torch.cuda.reset_peak_memory_stats(device)
    run()
    found = {"peak_MiB": torch.cuda.max_memory_allocated, "reserved_MiB": torch.cuda.max_memory_reserved}
    return {name: read(device) / 2**20 for name, read in found.items()}


def amp(words: Words, say: Say) -> None:
    """Take many steps in mixed precision, and say the loss scale, the terms left out, and the shares on the way."""
    trainer, raw = bench.set_up("ours", words, words["batch"][0])
    criterion = trainer.distillation.criterion
    for group in trainer.optimizer.param_groups:
        group["lr"] = 1e-4  # no warm-up raises it here
    for number in range(1, words["steps"] + 1):
        bench.take_step(trainer, raw)
        if number in {1, 2, 5, 10} or number % 20 == 0 or number == words["steps"]:
            shares = {f"share of {name}": share for name, share in criterion.meter.shares.items()}
            say(f"step {number}", scale=trainer.scaler.get_scale(), left_out=int(criterion.skipped_terms), **shares)
    models = trainer.model, trainer.distillation.terms
    say("in the end", finite=all(bool(p.isfinite().all()) for model in models for p in model.parameters()))


def processes(words: Words, say: Say) -> None:
    """Train in two processes of torchrun: by NCCL on two GPUs, by gloo on a CPU; NCCL takes no two on one GPU."""
    gpus = torch.cuda.device_count() if words["device"].type == "cuda" else 0
    if gpus == 1:
        say("2 by NCCL", failed="needs two GPUs")
        return
    arguments = {**training(words, 2, "processes", epochs=2), "device": "0,1" if gpus else "cpu"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    launch += [f"--master_port={find_free_network_port()}", str(ROOT / "scripts" / "bench_train.py"), "train"]
    begin = time.perf_counter()
    ended = subprocess.run([*launch, *(f"{k}={v}" for k, v in arguments.items())], **heard(words), check=False)
    said = (ended.stdout + ended.stderr).splitlines()
    rows = epochs_of(RUNS / "processes")
    odd = [line for line in said if "device" in line.lower() and "barrier" in line.lower()]
    found = {"code": ended.returncode, "epochs": len(rows), "warned_of_barriers": len(odd)}
    found |= {"last": rows[-1] if rows else said[-3:]}
    say(f"2 by {'NCCL' if gpus else 'gloo'}", **found, seconds=time.perf_counter() - begin)
    if ended.returncode:
        raise RuntimeError(f"two processes ended with {ended.returncode}")


def resume(words: Words, say: Say) -> None:
    """Interrupt a training after an epoch, and resume it."""

    def stop(trainer: Any) -> None:
        raise KeyboardInterrupt

    with patch("ultralytics.engine.trainer.check_amp", return_value=True):
        trainer = CWDTrainer(overrides=training(words, 1, "resumed", epochs=3))
        trainer.add_callback("on_model_save", stop)
        try:
            trainer.train()
        except KeyboardInterrupt:
            say("interrupted", epochs=len(epochs_of(trainer.save_dir)))
        means = trainer.distillation.measured()
        again = CWDTrainer(overrides={"resume": str(trainer.last)})
        again.add_callback("on_train_start", lambda again: say("resumed", means_kept=near(again, means)))
        again.train()
    say("ended", begun_at=again.start_epoch, epochs=[int(float(row["epoch"])) for row in epochs_of(again.save_dir)])


def near(trainer: Any, means: dict[str, list[float]]) -> bool:
    """Return whether a trainer goes on with these means of gradients."""
    found = trainer.distillation.measured()
    return all(torch.allclose(torch.tensor(found[name]), torch.tensor(row)) for name, row in means.items())


def tests(words: Words, say: Say) -> None:
    """Run the tests that need a GPU."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-n",
        "0",
        "-m",
        "gpu",
        "-p",
        "no:cacheprovider",
        "tests/test_gpu.py",
    ]
    ended = subprocess.run(command, **{**heard(words), "cwd": ROOT}, check=False)
    lines = ended.stdout.splitlines() or ended.stderr.splitlines()
    say("pytest -m gpu", code=ended.returncode, last=lines[-1], failed=[x for x in lines if x.startswith("FAILED")])
    if ended.returncode:
        raise RuntimeError(f"pytest ended with {ended.returncode}")


def training(words: Words, processes: int, name: str, **more: Any) -> dict[str, Any]:
    """Return the arguments of a short distilled training."""
    batch = words["batch"][0] * processes
    file, on_gpu = bench.teacher_file(words["teacher"]), words["device"].type == "cuda"
    arguments = {"teacher": file, "teacher_epochs": 0, "model": words["student"], "data": bench.data_file(file, batch)}
    arguments |= {
        "schedule": "constant",
        "imgsz": words["imgsz"],
        "batch": batch,
        "workers": 0,
        "amp": on_gpu,
        "plots": False,
    }
    arguments |= {"project": str(RUNS), "name": name, "device": str(words["device"].index) if on_gpu else "cpu"}
    return {**arguments, **more}


def epochs_of(run: Path) -> list[dict[str, str]]:
    """Return the rows of a run's results.csv."""
    lines = (run / "results.csv").read_text(encoding="utf-8").splitlines() if (run / "results.csv").is_file() else [""]
    names = [name.strip() for name in lines[0].split(",")]
    return [dict(zip(names, map(str.strip, line.split(",")), strict=True)) for line in lines[1:]]


def heard(words: Words) -> dict[str, Any]:
    """Return how to run a process of its own and to hear what it says."""
    known = os.environ.get("PYTHONPATH", "")
    path = os.pathsep.join([str(ROOT), *([known] if known else [])])
    return {"capture_output": True, "text": True, "env": {**os.environ, "PYTHONPATH": path}}


def report(number: str, arguments: Sequence[str], out: Path) -> int:
    """Run the parts of a report, each process within its limit; return the exit code.

    Args:
        number: Which report.
        arguments: The other words of the command.
        out: The file of the findings.
    """
    failed = False
    for parts, limit in REPORTS[number].items():
        begin, how = time.perf_counter(), "ended"
        process = subprocess.Popen(
            [sys.executable, str(bench.__file__), *arguments, f"part={parts}"],
            env={**os.environ, "TMPDIR": str(bench.FOLDER)},  # what a process that is ended leaves is removed with ours
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code, how = end(process), "cut off"
            with out.open("a", encoding="utf-8") as file:
                print(json.dumps({"part": parts, "name": "cut off", "seconds": limit}), file=file)
        how = "failed" if code and how == "ended" else how
        print(f"{parts}: {how} after {time.perf_counter() - begin:.0f} s", flush=True)
        failed = failed or bool(code)
    return int(failed)


def end(process: subprocess.Popen[bytes]) -> int:
    """End a process and those that it has started, and return its exit code."""
    for one in [*psutil.Process(process.pid).children(recursive=True), process]:
        with suppress(psutil.NoSuchProcess):
            one.kill()
    return process.wait()


PARTS = {"profile": profile_, "syncs": syncs, "memory": memory, "amp": amp}
PARTS |= {"processes": processes, "resume": resume, "tests": tests}
