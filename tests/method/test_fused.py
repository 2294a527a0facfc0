"""The fused divergence against float64: the kernel in Triton's interpreter, the products around it, when it runs."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_divergence import maps
from torch import Tensor, nn
from ultralytics.utils import LOGGER

from yolo_cwd.method import fused, parts
from yolo_cwd.method.fpn import Level
from yolo_cwd.method.parts import Pair, divergences
from yolo_cwd.method.terms import ClassTerm, LevelTerm, Term

KERNEL = Path(__file__).with_name("run_kernel.py")
MOST = {"float32": 1e-6, "float16": 5e-4, "bfloat16": 5e-3}  # of the derivative: half of the last digit, on average


@pytest.fixture(scope="module")
def errors() -> dict[str, dict[str, float]]:
    """What `run_kernel.py` finds; Triton decides on its import whether it interprets, so in a process of its own."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, KERNEL], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", MOST)
@pytest.mark.parametrize("order", ["contiguous", "channels-last", "one of each", "in place"])
def test_the_kernel_agrees_with_float64(errors: dict[str, dict[str, float]], dtype: str, order: str) -> None:
    found = {name: error for name, error in errors.items() if name.startswith(f"{dtype}, {order}, ")}
    assert len(found) >= 5
    for name, error in found.items():
        assert error["value"] < 1e-5, name
        assert error["derivative"] < MOST[dtype], name


@pytest.mark.slow
def test_what_is_not_finite_stays_so_in_its_own_channel(errors: dict[str, dict[str, float]]) -> None:
    assert errors["one infinite number"] == {"channels that are not finite": 1}


@pytest.mark.slow
def test_the_kernel_passes_the_trial_and_overwrites_what_it_has_read(errors: dict[str, dict[str, float]]) -> None:
    assert errors["trial"]["error"] < 1e-3
    assert errors["adapted"]["value"] < 1e-5


@pytest.mark.parametrize(("capability", "dtype"), [(75, "fp16"), (80, "bf16"), (90, "fp16"), (90, "fp32")])
@pytest.mark.parametrize("together", [1, 16])
def test_the_kernel_compiles_for_gpus_that_are_not_there(
    capability: int, dtype: str, together: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    triton = pytest.importorskip("triton", minversion="3.3")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from yolo_cwd.method.kernel import TILE, _divergence

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    sizes = {"TOGETHER": together, "AT_ONCE": TILE // together}
    types = dict.fromkeys(("student", "teacher", "gradient"), f"*{dtype}") | dict.fromkeys(sizes, "constexpr")
    types |= {"found": "*fp32", "tau": "fp32", "scale": "fp32"}
    signature = {name: types.get(name, "i32") for name in _divergence.arg_names}
    source = ASTSource(fn=_divergence, signature=signature, constexprs=sizes)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8})
    assert made.asm["cubin"]


def plainly(student: Tensor, teacher: Tensor, derivative: Tensor, tau: float, scale: float) -> Tensor:
    """What the kernel does, in float64."""
    log_q, log_p = ((m.double() / tau).log_softmax(-1) for m in (student, teacher))
    derivative.copy_(scale * (log_q.exp() - log_p.exp()))
    return tau**2 * (log_p.exp() * (log_p - log_q)).sum(-1).float()


@pytest.fixture
def as_on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a CPU do what a GPU would."""
    monkeypatch.setattr(fused, "usable", lambda device: True)
    monkeypatch.setattr(fused, "_kernel", plainly)


def levels_of(*channels: int) -> list[Level]:
    return [Level(f"P{i + 3}", 8 * 2**i, i, i, 5, c) for i, c in enumerate(channels)]


def adapter_term() -> LevelTerm:
    term = LevelTerm(levels_of(20)[0], 1.0, False, 2.0, False)
    nn.init.normal_(term.adapter.weight, generator=torch.Generator().manual_seed(3))
    return term


SCORES = maps(3, 4, 80 + 20, seed=5)
CASES = {
    "level": (adapter_term, maps(3, 5, 8, 10, seed=1), [maps(3, 20, 8, 10, seed=2)]),
    "all classes": (
        lambda: ClassTerm(levels_of(9, 9), [8, 16], [0, 1, 2, 3], 1.0, 2.0),
        SCORES,
        [maps(3, 4, 8, 10, seed=6), maps(3, 4, 4, 5, seed=7)],
    ),
    "some classes": (
        lambda: ClassTerm(levels_of(9, 9), [8, 16], [2, 0], 1.0, 2.0),
        SCORES,
        [maps(3, 2, 8, 10, seed=6), maps(3, 2, 4, 5, seed=7)],
    ),
    "one class of one image": (
        lambda: ClassTerm(levels_of(9, 9), [8, 16], [3], 1.0, 2.0),
        SCORES[:1],
        [maps(1, 1, 8, 10, seed=6), maps(1, 1, 4, 5, seed=7)],
    ),
}


class Squared(Term):
    """A term of another kind, which knows nothing of kernels."""

    def forward(self, student: Tensor, teacher: list[Tensor]) -> Tensor:
        return (student - teacher[0]).square().mean()


@pytest.mark.usefixtures("as_on_gpu")
def test_a_term_without_a_kernel_is_derived_by_autograd() -> None:
    student, teacher = maps(3, 5, 8, 10, seed=1).half().requires_grad_(), maps(3, 5, 8, 10, seed=2).half()
    (value,) = divergences([Pair(Squared("boxes", 1.0), student, [teacher])])
    (1e4 * value).backward()
    difference = student.detach().float() - teacher.float()
    assert value.item() == pytest.approx(difference.square().mean().item(), rel=1e-5)
    torch.testing.assert_close(student.grad.float(), 2e4 * difference / difference.numel(), rtol=2e-3, atol=1e-3)


@pytest.mark.usefixtures("as_on_gpu")
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("case", CASES)
def test_a_term_has_the_gradients_of_autograd(
    case: str, dtype: torch.dtype, most: float, order: torch.memory_format
) -> None:
    make, student, teacher = CASES[case]
    student, teacher = student.to(dtype), [x.to(dtype).contiguous(memory_format=order) for x in teacher]
    if student.ndim == 4:
        student = student.contiguous(memory_format=order)
    student = student.detach().clone().requires_grad_()
    exact = make().double()
    leaf = student.detach().double().requires_grad_()
    value = exact(leaf, [x.double() for x in teacher])
    (1e4 * value).backward()

    term: Term = make()
    (found,) = divergences([Pair(term, student, teacher)])
    (1e4 * found).backward()
    assert found.item() == pytest.approx(value.item(), rel=most)
    assert student.grad.dtype is dtype
    assert student.grad.stride() == student.stride()
    pairs = [(student, leaf), *zip(term.parameters(), exact.parameters(), strict=True)]
    for ours, theirs in pairs:
        assert (ours.grad.double() - theirs.grad).norm() < most * theirs.grad.norm()


@pytest.mark.usefixtures("as_on_gpu")
def test_gradients_too_small_for_half_precision_are_kept() -> None:
    student, teacher = maps(1, 5, 80, 80, seed=1, dtype=torch.float16), maps(1, 20, 80, 80, dtype=torch.float16)
    (found,) = divergences([Pair(adapter_term(), student.requires_grad_(), [teacher])])
    stored = found.grad_fn.saved_tensors[0]
    (gradient,) = torch.autograd.grad(found * 1e5, student)  # a factor beyond float16
    assert gradient.isfinite().all()
    assert stored.dtype is torch.float16
    assert stored.abs().median() > 1e-4  # far from the smallest numbers of float16


@pytest.mark.usefixtures("as_on_gpu")
def test_maps_of_different_shapes_are_refused() -> None:
    make, student, teacher = CASES["level"]
    with pytest.raises(ValueError, match="differ in shape"):
        make().with_gradients(student, [teacher[0][..., 1:]])


@pytest.mark.usefixtures("as_on_gpu")
def test_a_term_that_is_not_finite_sends_no_gradient() -> None:
    make, student, teacher = CASES["level"]
    teacher = [teacher[0].index_fill(0, torch.tensor([1]), torch.inf)]
    term, student = make(), student.clone().requires_grad_()
    (found,) = divergences([Pair(term, student, teacher)])
    found.masked_fill(~found.isfinite(), 0).backward()
    assert student.grad.abs().sum() == term.adapter.weight.grad.abs().sum() == 0


def test_a_cpu_has_no_use_for_it() -> None:
    assert not fused.suits(torch.zeros(1, 1, 1))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A GPU that nobody has asked yet."""
    monkeypatch.setattr(fused, "usable", fused.usable.__wrapped__)
    monkeypatch.setattr(fused, "find_spec", lambda name: name)
    return torch.device("cuda")


def test_the_environment_switches_it_off(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "trial", lambda device: 0.0)
    assert fused.usable(gpu)
    assert not fused.suits(torch.zeros(1, dtype=torch.float64, device="meta"))
    monkeypatch.setenv(fused.SWITCH, "0")
    assert not fused.usable(gpu)


@pytest.mark.parametrize(
    ("trial", "reason"),
    [
        pytest.param(
            RuntimeError("Failed to find C compiler\nand more"), "Failed to find C compiler", id="no compiler"
        ),
        pytest.param(0.5, "differs by 0.5", id="another result"),
    ],
)
def test_a_trial_that_fails_costs_one_line(
    gpu: torch.device, monkeypatch: pytest.MonkeyPatch, trial: float | Exception, reason: str
) -> None:
    def run(device: torch.device) -> float:
        if isinstance(trial, Exception):
            raise trial
        return trial

    warnings: list[str] = []
    monkeypatch.setattr(fused, "trial", run)
    monkeypatch.setattr(LOGGER, "warning", warnings.append)
    assert not fused.usable(gpu)
    (warning,) = warnings
    assert reason in warning
    assert "\n" not in warning
    assert len(warning) < 300


def test_the_trial_finds_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "_kernel", plainly)
    assert fused.trial(torch.device("cpu")) < 1e-3
    monkeypatch.setattr(fused, "_kernel", lambda *of: plainly(of[1], of[0], *of[2:]))
    assert fused.trial(torch.device("cpu")) > fused.MAX_ERROR


def test_a_large_gpu_takes_larger_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    for gib, elements in ((16, 2**24), (64, 2**26)):
        gpu = type("Properties", (), {"total_memory": gib * 2**30})
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, gpu=gpu: gpu)
        assert parts._part_elements(torch.device("cuda")) == elements
