"""The examples for clusters and for Ray Tune."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import SHORT
from ultralytics import YOLO
from ultralytics.cfg import DEFAULT_CFG_DICT

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
