"""The benchmark, in its smallest form, and its counter against numbers made by hand."""

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import STUDENT, TEACHER
from torch._subclasses.fake_tensor import DataDependentOutputException

SCRIPT = Path(__file__).parent.parent / "scripts" / "bench.py"
Run = Callable[..., dict[str, dict[str, Any]]]


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    """The script as a module."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("YOLO_CONFIG_DIR", "YOLO_OFFLINE", "YOLO_VERBOSE"):
            patch.setenv(name, "of the script's choice")  # to be set back
        patch.syspath_prepend(SCRIPT.parent)
        spec = importlib.util.spec_from_file_location("bench", SCRIPT)
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, "bench", module)
        patch.delitem(sys.modules, "bench_gpu", raising=False)  # it would know an earlier one
        spec.loader.exec_module(module)
        yield module


@pytest.fixture
def run(bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Run its main function with so many words, and return the findings by name."""

    def run(*words: str, code: Any = 0) -> dict[str, dict[str, Any]]:
        tiny = [f"student={STUDENT}", f"teacher={TEACHER}", "imgsz=64", "batch=2", "repeats=1", "device=cpu"]
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *tiny, f"out={tmp_path / 'found.jsonl'}", *words])
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as ended:
            bench.main()
        assert ended.value.code == code
        assert not list(tmp_path.glob("runs"))
        found = map(json.loads, (tmp_path / "found.jsonl").read_text(encoding="utf-8").splitlines())
        return {row["name"]: row for row in found}

    return run


def test_kernels_and_bytes_are_those_counted_by_hand(bench: Any) -> None:
    with bench.counting() as count:
        x = torch.empty(4, 8, device="cuda", requires_grad=True)  # 128 bytes
        weight = torch.empty(8, 2, device="cuda")  # 64
        count.part = "forward"
        y = x.exp()  # reads 128, writes 128
        z = y.t().flatten().view(4, 8)  # the transposed one is copied: 128 and 128
        w = (z + 1) @ weight  # 128 and 128; 128, 64 and 32
        total = w.sum()  # 32 and 4
        count.part = "backward"
        total.backward()
        count.part = "in place"
        with torch.no_grad():
            torch._foreach_mul_([x, weight], 2.0)  # reads and writes 192
            x.expand(3, 4, 8).add(1)  # the operand is 128, however often it is read, and the result 384
            torch.empty(2, device="cuda").new_empty(3)  # nothing
        count.part = "host"
        torch.ones(2).to("cuda")  # a kernel there, and a copy
        weight.to("cuda", torch.float32)  # nothing
        with pytest.raises(DataDependentOutputException):
            weight.sum().item()
    assert count.found["forward"] == [5, 256 + 256 + 256 + 224 + 36, 0]
    assert count.found["in place"] == [2, 2 * 192 + 128 + 384, 0]
    assert count.found["host"] == [3, 8 + 16 + 68, 1]
    kernels, moved, copies = count.found["backward"]
    assert copies == 0
    # ones like the total; the matrix product, of one repeated number and 64 bytes; the product with the exponential;
    # a copy, since the gradient that comes is transposed
    assert kernels == 4
    assert moved == (4 + 4) + (4 + 64 + 128) + 3 * 128 + 2 * 128


def test_half_precision_is_that_of_autocast(bench: Any) -> None:
    with bench.counting() as count, torch.autocast("cuda", torch.float16):
        x = torch.empty(4, 8, device="cuda")
        count.part = "linear"
        y = x @ torch.empty(8, 2, device="cuda")  # both are converted first: 128 to 64 and 64 to 32
        assert y.dtype == torch.float16
        assert y.softmax(-1).dtype == torch.float32
        with torch.autocast("cuda", enabled=False):
            assert (x @ x.t()).dtype == torch.float32
        assert not x.is_cpu
    assert count.found["linear"][0] == 3 + 2 + 1


def test_ours_on_paper(run: Run) -> None:
    found = run("part=count", "batch=2,4")
    rows = {name: found[f"{name}, batch 2"] for name in ("student, forward", "teacher", "ours, loss", "ours, all")}
    assert all(row["kernels"] > 0 and row["GB"] > 0 for row in rows.values())
    parts = [found[f"ours, {part}, batch 2"] for part in ("loss", "backward", "optimizer step")]
    assert rows["ours, all"]["kernels"] == sum(part["kernels"] for part in parts)
    for name, row in rows.items():  # as many kernels whatever the batch, on more data
        assert found[f"{name}, batch 4"]["kernels"] == row["kernels"]
        assert 1.2 < found[f"{name}, batch 4"]["GB"] / row["GB"] <= 2
    assert rows["teacher"]["copies"] == 0
    assert rows["ours, all"]["copies"] <= 1  # the sums of an epoch move to the device once


def test_the_loss_is_exact_and_timed_beside_autograd(run: Run) -> None:
    found = run("part=loss")
    for name, bound in {"fp32": 1e-5, "bf16": 1e-2, "fp16": 1e-2}.items():
        exact = found[f"{name}, ours, against float64"]
        assert exact["error"] < 1e-5
        assert exact["error of gradient"] < bound
        assert found[f"{name}, batch 2, ours"]["of autograd"] > 0


def test_the_teacher_in_each_precision(run: Run) -> None:
    found = run("part=teacher,machine")
    assert found["fp32, batch 2"]["error"] == 0
    assert 1e-4 < found["bf16, batch 2"]["error"] < 0.5
    assert all(found[f"{name}, batch 2"]["ms"] > 0 for name in ("fp32", "bf16", "fp16", "auto"))
    assert found["processor"]["torch"] == torch.__version__


def test_steps_in_turns(run: Run) -> None:
    found = run("part=step")
    assert found["plain, batch 2"]["ms"] > 0
    assert found["ours, batch 2"]["of plain"] > 0
    assert found["ours, batch 2"]["of built-in"] > 0


def test_a_part_that_fails_is_reported_and_the_next_goes_on(
    run: Run, bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_off(words: Any, say: Any) -> None:
        say("the first", ms=1.0)
        raise RuntimeError("CUDA error: an illegal memory access\nwas encountered")

    monkeypatch.setitem(bench.PARTS, "step", break_off)
    found = run("part=step,machine", code="failed: step")
    assert found["failed"]["error"] == "RuntimeError: CUDA error: an illegal memory access"
    assert found["the first"] | {"case": ""} == {"part": "step", "case": "", "name": "the first", "ms": 1.0}
    assert "processor" in found


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("imagesize=3", "imagesize: unknown; known are part, teacher"),
        ("part=steps", "part=steps: must be all or some of machine,loss"),
    ],
)
def test_what_it_does_not_know_is_refused(word: str, message: str, bench: Any) -> None:
    with pytest.raises(SystemExit, match=message):
        bench.parse([word])
