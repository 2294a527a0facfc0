"""The examples for clusters, for Ray Tune, for pruning and for growing."""

import importlib
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import SHORT
from ultralytics import YOLO
from ultralytics.cfg import DEFAULT_CFG_DICT
from ultralytics.nn.modules import C2PSA

from yolo_cwd import cli
from yolo_cwd.config import Settings, check_names, split_options
from yolo_cwd.run.request import EXTRA_ARGUMENTS

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


def check_launch(command: str, nodes: str) -> None:
    """Check a command that begins with torchrun: its arguments are known, and a restart goes on."""
    launcher, _, ours = command.partition(" -m yolo_cwd train ")
    assert shlex.split(launcher)[0] == "torchrun"
    assert f"--nnodes={nodes}" in launcher
    assert int(re.search(r"--max-restarts=(\d+)", launcher)[1]) > 0
    options, arguments = split_options(cli.parse(shlex.split(ours)))
    check_names(arguments, DEFAULT_CFG_DICT.keys() | EXTRA_ARGUMENTS)
    Settings.parse(options)
    assert arguments["resume"] is True
    assert arguments["name"]
    assert arguments["project"].startswith("/shared/")
    assert arguments["batch"] % 16 == 0


def test_slurm() -> None:
    file = EXAMPLES / "slurm.sbatch"
    subprocess.run(["bash", "-n", file], check=True)
    text = re.sub(r"\\\n\s*", "", file.read_text(encoding="utf-8"))
    check_launch(re.search(r"^srun (torchrun .*)$", text, re.MULTILINE)[1], nodes='"$SLURM_NNODES"')
    assert {"nodes=2", "ntasks-per-node=1", "gpus-per-node=8", "requeue"} <= set(re.findall(r"#SBATCH --(\S+)", text))


def run_example(name: str, monkeypatch: pytest.MonkeyPatch, *words: Any) -> None:
    """Run a script as `python` does, but in this process."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def count_parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_kubernetes() -> None:
    job = yaml.safe_load((EXAMPLES / "kubernetes.yaml").read_text(encoding="utf-8"))
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert sum(replicas[kind]["replicas"] for kind in ("Master", "Worker")) == 2
    for replica in replicas.values():
        pod = replica["template"]["spec"]
        (container,) = pod["containers"]
        assert container["name"] == "pytorch"
        check_launch(container["args"][0].removeprefix("exec "), nodes="2")
        assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}


@pytest.mark.slow
def test_ray_tune(data: str, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="ray is not installed: pip install 'ray[tune]' optuna")
    YOLO("yolov8n.yaml").save(tmp_path / "student.pt")
    YOLO("yolov8s.yaml").save(tmp_path / "teacher.pt")
    given = {k: v for k, v in SHORT.items() if k not in {"model", "val", "lr0"}}
    given |= {"student": "student.pt", "teacher": "teacher.pt", "data": data, "iterations": 2, "project": tmp_path}
    command = [sys.executable, EXAMPLES / "tune.py", *(f"{k}={v}" for k, v in given.items())]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    assert re.match(r"share=\S+ tau=\S+ lr0=\S+: mAP50-95 ", result.stdout.splitlines()[-1])
    shares = [yaml.safe_load(file.read_text())["share"] for file in tmp_path.glob("tune_*/cwd.yaml")]
    assert len(set(shares)) == 2


@pytest.mark.slow
def test_prune(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch_pruning", reason="torch-pruning is not installed: pip install torch-pruning")
    YOLO("yolov8n.yaml").save(tmp_path / "best.pt")
    run_example("prune.py", monkeypatch, tmp_path / "best.pt", tmp_path / "pruned.pt", 0.5)
    assert 35 <= int(re.search(r"pruned\.pt: (\d+)% of the FLOPs", capsys.readouterr().out)[1]) <= 50
    whole, pruned = (YOLO(tmp_path / name).model.float() for name in ("best.pt", "pruned.pt"))
    assert {type(m) for m in pruned.modules()} == {type(m) for m in whole.modules()}
    assert count_parameters(pruned) < 0.6 * count_parameters(whole)
    assert pruned.eval()(torch.rand(1, 3, 64, 64))[0].shape == whole.eval()(torch.rand(1, 3, 64, 64))[0].shape


def test_what_the_pruning_splits_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch_pruning", reason="torch-pruning is not installed: pip install torch-pruning")
    monkeypatch.syspath_prepend(EXAMPLES)
    prune = importlib.import_module("prune")
    block, x = YOLO("yolov8n.yaml").model.model[2].eval(), torch.rand(2, 32, 8, 8)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter)
    before = block(x)
    split = prune.SplitC2f(block).eval()
    torch.testing.assert_close(split(x), before)
    torch.testing.assert_close(split.joined().eval()(x), before)


@pytest.mark.parametrize("family", ["yolov8", "yolo11"])
def test_growing_keeps_the_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    torch.manual_seed(0)
    small = YOLO(f"{family}n.yaml")
    for name, value in small.model.state_dict().items():
        if value.is_floating_point() and name.split(".")[-2] != "conv":  # biases and normalizations as after a training
            value.add_(torch.rand_like(value), alpha=0.2)
    small.model.names = {i: f"class {i}" for i in range(80)}
    small.save(tmp_path / "n.pt")
    run_example("grow.py", monkeypatch, tmp_path / "n.pt", f"{family}s.yaml", tmp_path / "grown.pt", 0)
    before, after = (YOLO(tmp_path / name) for name in ("n.pt", "grown.pt"))
    assert after.names == small.model.names
    assert count_parameters(after.model) > 3 * count_parameters(before.model)
    x = torch.rand(2, 3, 64, 64)
    expected, grown = (yolo.model.float().eval()(x)[0] for yolo in (before, after))
    assert expected[:, 4:].logit().std() > 0.1
    torch.testing.assert_close(grown[:, :4], expected[:, :4], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(grown[:, 4:].logit(), expected[:, 4:].logit(), rtol=1e-3, atol=1e-3)


def test_grown_copies_can_become_different(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    grow = importlib.import_module("grow")
    small, large = (YOLO(f"yolov8{size}.yaml").model for size in "ns")
    grow.grow(small, large)
    first, second = large.model[0].conv.weight.detach()[:2]
    assert 0 < float((first - second).std() / first.std()) < 0.1


def test_grown_attention_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    grow = importlib.import_module("grow")
    small, large = (torch.nn.ModuleDict({"block": C2PSA(width, width)}) for width in (128, 256))
    for parameter in small.parameters():
        torch.nn.init.normal_(parameter)
    grow.grow(small, large, noise=0)
    x, copies = torch.rand(2, 128, 4, 4), grow.sources(128, 256)
    expected = small["block"].eval()(x)[:, copies]
    torch.testing.assert_close(
        large["block"].eval()(x[:, copies]), expected, rtol=1e-3, atol=1e-4 * expected.std().item()
    )
