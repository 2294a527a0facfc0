#!/usr/bin/env python
# SPDX-License-Identifier: AGPL-3.0-or-later
"""What does a distilled step cost, beside a plain one and beside Ultralytics' own distillation?

    python scripts/bench.py                              # every part, on the GPU if there is one
    python scripts/bench.py part=step teacher=yolov8x batch=8,32 device=1
    python scripts/bench.py part=step,loss imgsz=320 batch=8 device=cpu
    python scripts/bench.py part=count                   # kernels and bytes on paper; needs no GPU
    python scripts/bench.py report=1                     # and report=2: all that a GPU can tell, in limited time

Parts: `machine`; `loss` alone; `teacher` alone; `step`, plain, built-in and ours in turns; `count`, of fake tensors.
Those of bench_gpu.py, by name only: `profile`, `syncs`, `memory`, `amp`, `processes`, `resume`, `tests`.
Each finding is printed and written at once, as a line of JSON at the end of the file `out`: by default `bench.jsonl` in
the folder $OUT. So a run that is cut off has kept what it found. Models by name have random weights, which cost what
trained ones cost. Nothing is downloaded.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

os.environ["YOLO_CONFIG_DIR"] = tempfile.mkdtemp(prefix="bench-")  # the user's settings and loggers stay out of it
os.environ |= {"YOLO_OFFLINE": "True", "YOLO_VERBOSE": "False"}

import torch
import torch.nn.functional as F
import ultralytics
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.swa_utils import update_bn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from ultralytics import YOLO
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.utils.torch_utils import autocast

import yolo_cwd
from yolo_cwd import ConfigError, CWDLoss, CWDTrainer, channel_wise_divergence
from yolo_cwd.config import Settings
from yolo_cwd.method import fused
from yolo_cwd.method.distillation import Distillation
from yolo_cwd.method.teacher import DTYPES, Precision, load_teacher, wait_for
from yolo_cwd.study import made_up

FOLDER = Path(os.environ["YOLO_CONFIG_DIR"])
atexit.register(shutil.rmtree, FOLDER, ignore_errors=True)
(FOLDER / "Arial.ttf").touch()  # nothing is drawn, so no font is fetched
FAKE = FakeTensorMode()
DEVICE = "0" if torch.cuda.is_available() else "cpu"
DEFAULTS = {"part": "all", "teacher": "yolov8l", "student": "yolov8n", "imgsz": 640, "batch": "16,64", "repeats": 15}
DEFAULTS |= {"report": "", "steps": 200}  # what bench_gpu.py asks for
DEFAULTS |= {"device": DEVICE, "out": os.environ.get("OUT", ".") + "/bench.jsonl"}
MAPS = {8: 256, 16: 512, 32: 512}  # channels by stride, of the loss alone: YOLOv8l's
OPTIONS = {"teacher_epochs": 0, "adapter": "conv", "schedule": "constant"}  # a fit beforehand leaves a step as it is
Words = dict[str, Any]
Say = Callable[..., None]
ARMS = ("plain", "built-in", "ours")  # the trainings that are compared


def machine(words: Words, say: Say) -> None:
    """Say what it runs on."""
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "ultralytics": ultralytics.__version__}
    cores = {"cores": os.cpu_count(), "threads": torch.get_num_threads()}
    say("processor", python=sys.version.split()[0], yolo_cwd=yolo_cwd.__version__, **versions, **cores)
    if words["device"].type == "cuda":
        gpu = torch.cuda.get_device_properties(words["device"])
        say("gpu", model=gpu.name, GiB=gpu.total_memory / 2**30, tf32_convolutions=torch.backends.cudnn.allow_tf32)


def loss(words: Words, say: Say) -> None:
    """Compare the divergence and its gradient with float64, and time both for all levels beside plain autograd."""
    kinds = {"autograd": partial(with_gradient, by_autograd), "ours": partial(with_gradient, channel_wise_divergence)}
    if fused.usable(words["device"]):
        kinds["kernel"] = by_kernel
    for name, dtype in DTYPES.items():
        some = [(3 * torch.randn(2, 64, 40, 40)).to(dtype) for _ in "st"]
        exact = with_gradient(by_autograd, *(m.double() for m in some))
        for kind, function in kinds.items():
            found = function(*(m.to(words["device"]) for m in some))
            errors = (float((f.cpu().double() - e).norm() / e.norm()) for f, e in zip(found, exact, strict=True))
            say(f"{name}, {kind}, against float64", **dict(zip(("error", "error of gradient"), errors, strict=True)))
        for batch in words["batch"]:
            shapes = [(batch, channels, words["imgsz"] // s, words["imgsz"] // s) for s, channels in MAPS.items()]
            sides = [[torch.randn(s, device=words["device"]).to(dtype) for _ in "st"] for s in shapes]
            arms = {k: lambda f=f, sides=sides: [f(*pair) for pair in sides] for k, f in kinds.items()}
            for kind, times in timed(arms, words).items():
                say(f"{name}, batch {batch}, {kind}", **times)


def by_autograd(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the divergence of maps [N, C, H, W] by its definition, in float32 at least, for autograd to derive."""
    wide = torch.promote_types(student.dtype, torch.float32)
    log_q, log_p = (m.to(wide).flatten(2).log_softmax(-1) for m in (student, teacher))
    return F.kl_div(log_q, log_p, log_target=True, reduction="sum") / student.shape[:2].numel()


def with_gradient(function: Callable[..., Tensor], student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Return a divergence and its gradient at the student's maps."""
    value = function(leaf := student.detach().requires_grad_(), teacher)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


def by_kernel(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Return what the kernel makes of maps [N, C, H, W]: the divergence, and its gradient in their precision."""
    s, t = student.flatten(2), teacher.flatten(2)
    scale = fused.scale_of(s.shape[2])
    value = fused.divergence_(s, t, derivative := torch.empty_like(s), 1.0, scale)
    return value, derivative.float().view_as(student) / (student.shape[:2].numel() * scale)


def teacher(words: Words, say: Say) -> None:
    """Time the teacher with class maps in each precision, with its error."""
    _, distillation = distilled(words)
    for precision in (*DTYPES, "auto"):
        model = deepcopy(distillation.teacher)
        model.place(words["device"])
        image = torch.rand(1, 3, words["imgsz"], words["imgsz"], device=words["device"])
        try:
            model.calibrate(precision, image)
        except ConfigError as problem:  # the device lacks it
            say(precision, failed=str(problem))
            continue
        for batch in words["batch"]:
            (found,) = timed({"": partial(model.maps, image.repeat(batch, 1, 1, 1))}, words).values()
            say(f"{precision}, batch {batch}", **found, runs=model.precision.name, error=model.precision.error)


def step(words: Words, say: Say) -> None:
    """Time steps in turns."""
    for batch in words["batch"]:
        runs = {name: partial(take_step, *set_up(name, words, batch)) for name in ARMS}
        for name, found in timed(runs, words).items():
            say(f"{name}, batch {batch}", **found)
        del runs
        gc.collect()


def take_step(trainer: Any, raw: Words) -> None:
    """Take a training step on a batch of the loader, as Ultralytics' loop does."""
    with autocast(trainer.amp, device=trainer.device.type):
        loss, _ = trainer.model(trainer.preprocess_batch(dict(raw)))
    trainer.scaler.scale(loss.sum()).backward()
    trainer.optimizer_step()


def count(words: Words, say: Say) -> None:
    """Count the kernels and the bytes of a step without the task's own loss, on fake CUDA tensors in float16."""
    student, distillation = distilled(words)
    on_paper(student)
    on_paper(distillation.terms)
    on_paper(distillation.teacher, torch.float16)
    distillation.teacher.precision = Precision("fp16")
    for batch in words["batch"]:
        plain, ours = (count_step(student, arm, batch, words["imgsz"]) for arm in (None, distillation))
        added = {part: [a - b for a, b in zip(ours.found[part], plain.found[part], strict=True)] for part in ours.found}
        rows = {f"student, {part}": plain.found[part] for part in ("forward", "backward")}
        rows |= {"teacher": added["teacher"]}
        own = {f"ours, {part}": added[part] for part in ("loss", "backward", "optimizer step")}
        rows |= {**own, "ours, all": list(map(sum, zip(*own.values(), strict=True)))}
        for name, (kernels, moved, copies) in rows.items():
            say(f"{name}, batch {batch}", kernels=kernels, GB=moved / 1e9, copies=copies)
        peaks = {
            "plain_MiB": plain.peak / 2**20,
            "ours_MiB": ours.peak / 2**20,
        }  # what the task's loss needs is missing
        say(f"alive at once, batch {batch}", **peaks, added_MiB=(ours.peak - plain.peak) / 2**20)


def count_step(student: Any, distillation: Distillation | None, batch: int, imgsz: int) -> Count:
    """Count a step of a student on paper, on so many images; plain without a distillation."""
    criterion, device = stand_in, torch.device("cuda")
    with counting() as counter, torch.autocast("cuda", torch.float16):
        taught, scale = {"img": torch.empty(batch, 3, imgsz, imgsz, device=device)}, torch.ones((), device=device)
        if distillation:
            criterion = distillation.criterion = CWDLoss(stand_in, distillation.terms, 1.0, device)
            distillation.past_first_batch()
            counter.part = "teacher"
            distillation.teach(taught, student, False, float)
        counter.part = "forward"
        preds = student(taught["img"])
        counter.part = "loss"
        loss = criterion(preds, taught)[0].sum() * scale
        counter.part = "backward"
        loss.backward()
        if distillation:
            counter.part = "optimizer step"
            distillation.step(scale)
    for module in (student, *(distillation.terms if distillation else [])):
        module.zero_grad()
    return counter


def stand_in(preds: Any, batch: Words) -> tuple[Tensor, dict[str, Tensor]]:
    """Send gradients where the task's loss does; that one chooses by values, and fake tensors have none."""
    made = tree_leaves({name: made for name, made in preds.items() if name != "feats"})
    return torch.stack([x.float().mean() for x in made]) * len(batch["img"]), {}


def on_paper(module: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Move a module to a GPU that need not exist: its tensors keep their shapes and lose their content."""

    def fake(x: Tensor) -> Tensor:
        order = torch.channels_last if x.ndim == 4 else torch.contiguous_format
        kept = dtype if dtype and x.is_floating_point() else x.dtype
        return torch.empty(x.shape, dtype=kept, device="cuda", memory_format=order)

    with FAKE:
        module._apply(fake)


class Count(TorchDispatchMode):
    """Counts what operators on fake CUDA tensors would do; one that needs a value, and so would wait for it, fails.

    An operator that writes is one kernel, whatever it launches in truth. It reads each operand once and writes each
    result once. Views and fresh memory are free.

    Attributes:
        part: The part that runs now; nothing is counted before the first.
        found: By part, the kernels, the bytes, and the copies from the host.
        peak: The most bytes that were alive at once, of what operators have made.
    """

    OVERWRITES = ("copy_", "fill_", "zero_")

    def __init__(self) -> None:
        """Begin with nothing."""
        super().__init__()
        self.part = ""
        self.found: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, and count it."""
        kwargs, name = kwargs or {}, func._schema.name.split("::")[1]
        if func is torch.ops.prim.device.default:
            return torch.device("cpu")  # or autograd asks for a stream of a GPU that is not there
        if torch._C._current_graph_task_id() >= 0 and kwargs.get("device") == torch.device("cpu"):
            kwargs = {**kwargs, "device": torch.device("cuda")}  # autograd has believed it
        result = func(*args, **kwargs)
        read, made = ([x for x in tree_leaves(tree) if isinstance(x, Tensor)] for tree in ((args, kwargs), result))
        known = {x.untyped_storage()._cdata for x in read}
        writes = func._schema.is_mutable or any(x.untyped_storage()._cdata not in known for x in made)
        to, of = [(x.dtype, x.device, x.stride()) for x in made], [(x.dtype, x.device, x.stride()) for x in read]
        free = "empty" in name or name == "detach_" or (name == "_to_copy" and to == of)  # asked for as it is
        if self.part and writes and not free:
            touched = [*read[name in self.OVERWRITES :], *(made or read)]  # an operator on a list returns nothing
            row = self.found[self.part]
            row[0] += 1
            row[1] += sum(min(x.nbytes, x.untyped_storage().nbytes()) for x in touched)
            row[2] += len({x.device.type for x in touched if x.ndim}) > 1
        if self.part:
            self._note_memory(storage for x in made if (storage := x.untyped_storage())._cdata not in known)
        return result

    def _note_memory(self, made: Iterable[torch.UntypedStorage]) -> None:
        self.alive = {key: (ref, size) for key, (ref, size) in self.alive.items() if not ref.expired()}
        self.alive |= {storage._cdata: (StorageWeakRef(storage), storage.nbytes()) for storage in made}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))


class AsOnCuda(TorchFunctionMode):
    """What autocast and `is_cpu` make of CUDA tensors; fake ones that hide their device are overlooked by both."""

    HALF = (torch.conv2d, F.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, torch.einsum)
    FULL = (torch.softmax, F.softmax, torch.log_softmax, F.log_softmax, Tensor.softmax, Tensor.log_softmax)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function on operands in the precision that autocast gives them."""
        if func == Tensor.is_cpu.__get__:
            return args[0].device.type == "cpu"
        dtype = torch.float16 if func in self.HALF else torch.float32 if func in self.FULL else None
        if dtype and torch.is_autocast_enabled("cuda"):
            args = tree_map_only(Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, args)
        return func(*args, **(kwargs or {}))


@contextmanager
def counting() -> Iterator[Count]:
    """Make tensors fake, and count what is done with them, with a GPU or without; the kernel of fused.py runs there."""
    there = patch("torch.cuda.amp.common.amp_definitely_not_available", return_value=False)
    one_thread = torch.autograd.set_multithreading_enabled(False)
    with FAKE, AsOnCuda(), Count() as found, there, one_thread, patch.object(fused, "usable", return_value=True):
        yield found


def distilled(words: Words) -> tuple[Any, Distillation]:
    """Return a student and its distillation with class maps, on the CPU and without a trainer."""
    file = teacher_file(words["teacher"])
    distillation = Distillation(Settings.parse({**OPTIONS, "teacher": str(file)}), load_teacher(file))
    student = YOLO(words["student"]).model.train()
    distillation.build(student, "student", list(distillation.teacher.names.values()), torch.device("cpu"))
    return student, distillation


def set_up(arm: str, words: Words, batch: int) -> tuple[Any, Words]:
    """Return a trainer of Ultralytics or ours that is ready for its first step, and its first batch."""
    file, on_gpu = teacher_file(words["teacher"]), words["device"].type == "cuda"
    overrides = {"model": words["student"], "data": data_file(file, batch), "project": str(FOLDER / "runs")}
    overrides |= {"imgsz": words["imgsz"], "batch": batch, "nbs": batch, "optimizer": "AdamW", "workers": 0}
    overrides |= {"device": str(words["device"].index) if on_gpu else "cpu", "amp": on_gpu, "plots": False}
    overrides |= {"plain": {}, "built-in": {"distill_model": file}, "ours": {"teacher": file, **OPTIONS}}[arm]
    with patch("ultralytics.engine.trainer.check_amp", return_value=True):  # it fetches a model
        trainer = (CWDTrainer if arm == "ours" else DetectionTrainer)(overrides=overrides)
        trainer._setup_train()
    trainer.epoch = 0
    trainer.run_callbacks("on_train_epoch_start")
    trainer._model_train()
    raw = next(iter(trainer.train_loader))
    return trainer, {name: x.to(trainer.device) if isinstance(x, Tensor) else x for name, x in raw.items()}


@cache
def teacher_file(name: str) -> str:
    """Return the teacher's checkpoint; one of random weights gets normalization statistics, or its maps vanish."""
    if name.endswith(".pt"):
        return name
    torch.manual_seed(0)
    model = YOLO(name)
    update_bn([torch.rand(4, 3, 160, 160)], model.model)
    model.save(FOLDER / "teacher.pt")
    return str(FOLDER / "teacher.pt")


@cache
def data_file(teacher: str, batch: int) -> str:
    """Return a data set of one batch, with the teacher's classes: all of them have class maps."""
    images = {"train": max(batch, 4), "val": 4}
    return str(made_up.build(FOLDER / f"images{batch}", images, "detect", dict(YOLO(teacher).names)))


def timed(arms: dict[str, Callable[[], Any]], words: Words) -> dict[str, dict[str, float]]:
    """Run arms in turns, and return the time of each, relative to those before it, and on a GPU the memory it adds."""
    device, times = words["device"], {name: [] for name in arms}
    found: dict[str, dict[str, float]] = {}
    for turn in range(words["repeats"] + 2):  # two for warming up
        for name, run in arms.items():
            wait_for(device)
            begin = time.perf_counter()
            run()
            wait_for(device)
            times[name] += [time.perf_counter() - begin] * (turn > 1)
    for name, run in arms.items():
        pairs = {f"of {other}": zip(times[name], times[other], strict=True) for other in found}
        ratios = {other: median(a / b for a, b in turns) for other, turns in pairs.items()}
        found[name] = {"ms": 1e3 * median(times[name]), **ratios}
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            run()
            found[name]["peak MiB"] = (torch.cuda.max_memory_allocated(device) - before) / 2**20
    return found


PARTS = {"machine": machine, "loss": loss, "teacher": teacher, "step": step, "count": count}  # in the order of `all`


def known_parts() -> dict[str, Callable[[Words, Say], None]]:
    """Return all parts by name; those of bench_gpu.py use this module, by whichever name it runs."""
    sys.modules.setdefault("bench", sys.modules[__name__])
    import bench_gpu

    return {**PARTS, **bench_gpu.PARTS}


def parse(arguments: list[str]) -> Words:
    """Return the words of the command line, with the defaults of the others."""
    given = {name: value for name, _, value in (word.partition("=") for word in arguments)}
    if unknown := given.keys() - DEFAULTS.keys():
        sys.exit(f"{', '.join(sorted(unknown))}: unknown; known are {', '.join(DEFAULTS)}")
    words: Words = {**DEFAULTS, **given}
    words["part"] = list(PARTS) if words["part"] == "all" else words["part"].split(",")
    if unknown := set(words["part"]) - (known := known_parts()).keys():
        sys.exit(f"part={','.join(sorted(unknown))}: must be all or some of {','.join(known)}")
    if words["report"] not in {"", "1", "2"}:
        sys.exit(f"report={words['report']}: must be 1 or 2")
    words |= {name: int(words[name]) for name in ("imgsz", "repeats", "steps")}
    words |= {name: f"{words[name]}.yaml" for name in ("teacher", "student") if not Path(words[name]).suffix}
    device = torch.device("cpu" if words["device"] == "cpu" else f"cuda:{words['device']}")
    return {**words, "device": device, "batch": [int(batch) for batch in words["batch"].split(",")]}


def main() -> None:
    """Measure the parts that are asked for; the exit code is 1 if one of them failed."""
    words, failed, parts = parse(sys.argv[1:]), [], known_parts()
    if words["report"]:
        others = [word for word in sys.argv[1:] if word.partition("=")[0] not in {"report", "part"}]
        sys.exit(sys.modules["bench_gpu"].report(words["report"], others, Path(words["out"])))
    case = f"{Path(words['teacher']).stem} over {Path(words['student']).stem}, {words['imgsz']} px, {words['device']}"
    with Path(words["out"]).open("a", encoding="utf-8") as file:

        def say(part: str, name: str, **found: Any) -> None:
            shown = "  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in found.items())
            print(f"{part:8} {name:44} {shown}", flush=True)
            print(json.dumps({"part": part, "case": case, "name": name, **found}), file=file, flush=True)

        for part in words["part"]:
            try:
                parts[part](words, partial(say, part))
            except Exception as error:  # the next part may still be measured
                say(part, "failed", error=f"{type(error).__name__}: {error}".splitlines()[0][:300])
                failed.append(part)
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
