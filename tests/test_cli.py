"""The command, as users type it."""

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import STUDENT, TEACHER
from processes import Started

from yolo_cwd import __version__
from yolo_cwd.cli import command_of, main, parse
from yolo_cwd.config import OPTIONS, ConfigError, Settings
from yolo_cwd.run.request import read
from yolo_cwd.trainer import CWDTrainer


def run(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "yolo_cwd", *words], capture_output=True, text=True, cwd=cwd)


def cpu_seconds_of_children() -> float:
    times = os.times()
    return times.children_user + times.children_system


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "yolo_cwd train teacher="),
        (["help"], "yolo_cwd train teacher="),
        (["--help"], "yolo_cwd train teacher="),
        (["version"], __version__),
        (["settings"], "softmax temperature"),
        (["help", "train"], "yolo_cwd train teacher=MODEL student=MODEL"),
    ],
)
def test_answers_at_once(words: list[str], expected: str) -> None:
    seconds: list[float] = []
    for _ in range(3):
        begin = cpu_seconds_of_children()
        result = run(*words)
        seconds.append(cpu_seconds_of_children() - begin)
    assert result.returncode == 0
    assert expected in result.stdout
    assert not result.stderr
    assert min(seconds) < 0.5


def test_help_does_not_import_torch() -> None:
    code = "import sys; from yolo_cwd.cli import main; main(['settings']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_settings_list_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["settings"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(OPTIONS)
    assert all(option.meaning in line for option, line in zip(OPTIONS.values(), lines, strict=True))


def test_parse_reads_what_yolo_reads(tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    file.write_text(yaml.safe_dump({"tau": 3.0, "epochs": 7, "imgsz": 320}))
    words = [
        "teacher",
        "=",
        "yolov8l",
        "levels=8,16",
        "lr0=1e-3",
        "cos_lr",
        f"cfg={file}",
        "epochs=9",
        "complete_labels",
    ]
    assert parse(words) == {
        "tau": 3.0,
        "imgsz": 320,
        "epochs": 9,
        "teacher": "yolov8l",
        "levels": (8, 16),
        "lr0": 0.001,
        "cos_lr": True,
        "complete_labels": True,
    }


@pytest.mark.parametrize(
    ("file", "typed", "expected"),
    [
        pytest.param({"student": "a.pt"}, ["model=b.pt"], {"model": "b.pt"}, id="model over student"),
        pytest.param({"model": "a.pt"}, ["student=b.pt"], {"student": "b.pt"}, id="student over model"),
        pytest.param({"student": "a.pt"}, ["tau=2"], {"student": "a.pt", "tau": 2}, id="neither"),
        pytest.param(
            {"hide_labels": True, "student": "a.pt"},
            ["show_labels=True"],
            {"show_labels": True, "student": "a.pt"},
            id="an older name",
        ),
    ],
)
def test_what_is_typed_wins_over_the_file(
    file: dict[str, object], typed: list[str], expected: dict[str, object], tmp_path: Path
) -> None:
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(file))
    assert parse([f"cfg={tmp_path / 'my.yaml'}", *typed]) == expected
    asked = read(str(tmp_path / "my.yaml"), {"teacher": "t.pt", "data": "d.yaml", **parse(typed)})
    assert asked.args.model == ("b.pt" if "b.pt" in typed[0] else file.get("student"))


def test_numbers_in_a_file_are_those_of_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text(
        "cwd: 1e2\ntau: 2.5E-1\nlr0: -1e+3\nname: '1e2'\nproject: e2\nepochs: 12\nseed: 11e193ba\n"
    )
    expected = {
        "cwd": 100.0,
        "tau": 0.25,
        "lr0": -1000.0,
        "name": "1e2",
        "project": "e2",
        "epochs": 12,
        "seed": "11e193ba",
    }
    assert parse([f"cfg={tmp_path / 'my.yaml'}"]) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: 1\nb: [1\nc: 2\n", "cannot be read (line 3 is not YAML: "),
        ("hello", "cannot be read (holds no mapping of names to values); give the path of a YAML file of arguments"),
        (None, "cannot be read (no such file); give"),
    ],
)
def test_files_of_arguments_that_cannot_be_read(content: str | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    if content:
        file.write_text(content)
    for begin in (lambda: parse([f"cfg={file}"]), lambda: read(str(file), {"teacher": "t.pt"})):
        with pytest.raises(ConfigError, match=re.escape(f"cfg={file}: {message}")):
            begin()


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("train detect a=b", ("train", ["task=detect", "a=b"])),
        ("detect train a=b", ("train", ["task=detect", "a=b"])),
        ("a=b train", ("train", ["a=b"])),
        ("segment a=b train resume", ("train", ["task=segment", "a=b", "resume"])),
        ("compare semantic", ("compare", ["task=semantic"])),
        ("mode=train a=b", ("train", ["a=b"])),
        ("train name = check", ("train", ["name", "=", "check"])),
        ("train --epochs=3", ("train", ["epochs=3"])),
        ("-h", ("help", [])),
        ("train -h", ("help", ["train"])),
        ("compare a=b --help", ("help", ["compare"])),
        ("check help", ("help", ["check"])),
        ("help compare", ("help", ["compare"])),
        ("-v", ("version", [])),
        ("--version", ("version", [])),
    ],
)
def test_words_stand_in_any_order(typed: str, expected: tuple[str, list[str]]) -> None:
    commands = ["train", "check", "compare", "demo", "settings", "help", "version"]
    assert command_of(typed.split(), commands) == expected


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("teacher=t.pt data=d.yaml", "teacher=t.pt: no command; give one of train, check"),
        ("val model=best.pt", "val: a command of Ultralytics; use 'yolo val'"),
        ("detect predict", "predict: a command of Ultralytics; use 'yolo predict'"),
        ("detect tarin", "tarin: unknown command; did you mean train?"),
        ("lable source=a", "lable: unknown command; did you mean label?"),
        ("xyz", "xyz: unknown command; give one of train, check"),
        ("help nonsense", "nonsense: unknown command; give one of train, check"),
        ("help comapre", "comapre: unknown command; did you mean compare?"),
        ("nonsense --help", "nonsense: unknown command; give one of"),
        ("help predict", "predict: a command of Ultralytics; use 'yolo predict'"),
        ("train resme", "resme: not of the form key=value; did you mean resume?"),
        ("train mode=val", "mode=val: 'yolo_cwd train' trains; use 'yolo val'"),
    ],
)
def test_words_that_name_something_else(typed: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*typed.split(), "teacher=yolov8s.yaml", "student=yolov8n.yaml", "data=absent.yaml"]) == 2
    assert capsys.readouterr().err.startswith(f"yolo_cwd: {message}")


def test_the_handler_of_a_program_around_the_command_is_put_back() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        main(["version"])
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")]
)
def test_an_interrupted_comparison_says_how_to_go_on(
    number: int, code: int, word: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("yolo_cwd.study.compare.run", lambda arguments: signal.raise_signal(number))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell has put the tests aside
    try:
        assert main(["compare", "teacher=t.pt"]) == code
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == f"yolo_cwd: {word}; run the same command again to continue\n"


SHORT = ["imgsz=64", "batch=4", "epochs=1", "plots=False", "device=cpu"]


def test_training_by_command_from_start_to_export(data: str, tmp_path: Path) -> None:
    result = run("train", f"teacher={TEACHER}", f"student={STUDENT}", f"data={data}", *SHORT, f"project={tmp_path}")
    assert result.returncode == 0, result.stderr
    assert (
        f"learns P3, P4, P5 and the maps of 10 classes from {TEACHER} (0.7M parameters, "
        in result.stdout + result.stderr
    )
    best = tmp_path / "train" / "weights" / "best.pt"
    images = Path(data).parent / "images" / "val"
    ended = Started("processes:use_without_us", str(best), data, str(images), cwd=tmp_path).wait()
    assert ended.code == 0, ended.stderr
    assert best.with_suffix(".onnx").exists()


# arguments that replace those of a training that would start, and what the one line must hold
BAD_INPUT = {
    "unknown option": (["tua=2"], "tua=2: unknown argument; did you mean tau?"),
    "unknown argument": (["epoch=2"], "epoch=2: unknown argument; did you mean epochs?"),
    "no value": (["tau="], "tau=: has no value"),
    "no key": (["fast"], "fast: not of the form key=value"),
    "missing teacher": (["teacher=None"], "teacher: missing"),
    "absent teacher": (["teacher=absent.pt"], "teacher=absent.pt: no such file"),
    "absent teacher by name": (["teacher=absent"], "teacher=absent.pt: no such file"),
    "absent teacher of a size that is none": (["teacher=yolov8nn.yaml"], "teacher=yolov8nn.yaml: no such file"),
    "teacher that classifies": (["teacher={checkpoints}/classify.pt"], "it has no pyramid"),
    "truncated teacher": (["teacher={folder}/truncated.pt"], "truncated.pt: "),
    "teacher of another format": (["teacher={folder}/teacher.onnx"], "the suffix .onnx is none of .pt, .yaml"),
    "missing student": (["student=None"], "student=None: missing"),
    "absent student": (["student=absent.pt"], "student=absent.pt: "),
    "absent student file": (["student=absent.yaml"], "student=absent.yaml: no such file"),
    "absent student of a size that is none": (["student=yolov8nn.yaml"], "student=yolov8nn.yaml: no such file"),
    "student that classifies": (["student={checkpoints}/classify.pt"], "task=classify: has no pyramid to distill"),
    "two students": (["model=yolov8s.yaml"], "model=yolov8s.yaml names another one"),
    "no common stride": (["student={folder}/p2.yaml"], "levels=all: the student has P2 and the teacher P3, P4, P5"),
    "level that is not there": (["levels=P2"], "levels=P2: the student has P3, P4, P5"),
    "level that is none": (["levels=high"], "levels=high: must be all, names or strides"),
    "level_weights of the wrong length": (["level_weights=1,2"], "2 weights for the 3 distilled levels P3, P4, P5"),
    "negative level weight": (["level_weights=1,1,-1"], "level_weights=-1: must be a number at least 0"),
    "tau of zero": (["tau=0"], "tau=0: must be a number above 0"),
    "negative weight": (["cwd=-1"], "cwd=-1: must be balanced or a number at least 0"),
    "NaN": (["cwd=nan"], "cwd=nan: must be balanced or a number at least 0"),
    "infinite": (["tau=inf"], "tau=inf: must be a number above 0"),
    "wrong type": (["tau=warm"], "tau=warm: must be a number above 0"),
    "wrong type of an Ultralytics argument": (["epochs=many"], "epochs=many"),
    "value out of an Ultralytics range": (["mosaic=2"], "mosaic=2"),
    "unknown optimizer": (["optimizer=Magic"], "optimizer=Magic: there is none of this name; give one of auto, SGD, "),
    "schedule": (["schedule=cosin"], "schedule=cosin: must be one of constant, linear, cosine"),
    "adapter": (["adapter=mlp"], "adapter=mlp: must be one of fitted, conv"),
    "missing data": (["data=None"], "data=None: missing"),
    "absent data": (["data=absent.yaml"], "data=absent.yaml: "),
    "data without images": (["data={folder}/hollow.yaml"], "hollow.yaml: images not found, missing path "),
    "data without training images": (
        ["data={folder}/no-images.yaml"],
        "images/absent does not exist; correct the data set",
    ),
    "data without classes": (
        ["data={folder}/nameless.yaml"],
        "nameless.yaml: key missing. either 'names' or 'nc' are required in all data YAMLs; correct the data set",
    ),
    "data that are no YAML": (["data={folder}/broken.yaml"], "broken.yaml: line 2 is not YAML: "),
    "data without labels": (["data={folder}/unlabeled/data.yaml"], "data.yaml: No labels found in "),
    "data in a folder without a file": (
        ["data={folder}/unlabeled/images"],
        "; give the path of a data set's YAML file",
    ),
    "absent pretrained weights": (["pretrained=absent.pt"], "pretrained=absent.pt: no such file"),
    "a place that cannot be": (["project={folder}/teacher.onnx"], "project={folder}/teacher.onnx: cannot write "),
    "grayscale data": (["data={folder}/gray.yaml"], "takes images of 3 channels"),
    "absent cfg": (["cfg=absent.yaml"], "cfg=absent.yaml: cannot be read"),
    "built-in distillation beside ours": (["distill_model=yolov8s.pt"], "distill_model=yolov8s.pt: "),
    "automatic batch of several processes": (
        ["device=0,1", "batch=-1"],
        "batch=-1: is estimated for one process only; give a number of images, batch=32",
    ),
    "absent devices": (["device=0,1", "batch=4"], "CUDA"),
    "a part of an image": (
        ["batch=7.5"],
        "batch=7.5: must be a whole number of images",
    ),
    "batch that does not divide": (["device=0,1", "batch=3"], "batch=3: does not divide over 2 processes"),
    "absent device": (["device=7"], "CUDA"),
    "bf16 on a CPU": (["amp=bf16"], "amp=bf16: "),
    "resume": (["resume=absent.pt"], "resume=absent.pt: no such checkpoint"),
    "resume of a run by its name without a teacher": (
        ["resume=True", "name=big", "teacher=None"],
        "resume=True: model=yolov8n.yaml is not a checkpoint to resume from; name one: resume model=runs/.../last.pt",
    ),
    "resume without a run": (["resume=True", "student=None"], "resume=True: there is no run below this folder"),
    "teacher that is a folder": (
        ["teacher={folder}/unlabeled"],
        "unlabeled: is a folder; name the model in it, such",
    ),
    "student that is a folder": (
        ["student={folder}/unlabeled"],
        "unlabeled: is a folder; name the model in it, such",
    ),
    "another mode": (["mode=val"], "mode=val: 'yolo_cwd train' trains; use 'yolo val'"),
    "everything frozen": (["freeze=100"], "freeze=100"),
}


@pytest.fixture
def folder(tmp_path: Path, data: str, checkpoints: Path) -> Path:
    """A folder with the files the bad inputs name."""
    whole = (checkpoints / "small.pt").read_bytes()
    (tmp_path / "truncated.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "teacher.onnx").write_bytes(b"")
    detector = {"nc": 80, "backbone": [[-1, 1, "Conv", [8, 3, 2]], [-1, 1, "Conv", [16, 3, 2]]]}
    (tmp_path / "p2.yaml").write_text(yaml.safe_dump({**detector, "head": [[[1], 1, "Detect", ["nc"]]]}))
    (tmp_path / "hollow.yaml").write_text(yaml.safe_dump({"path": "nowhere", "train": "t", "val": "v", "names": ["a"]}))
    description = yaml.safe_load(Path(data).read_text())
    (tmp_path / "gray.yaml").write_text(yaml.safe_dump({**description, "channels": 1}))
    (tmp_path / "no-images.yaml").write_text(yaml.safe_dump({**description, "train": "images/absent"}))
    (tmp_path / "nameless.yaml").write_text(yaml.safe_dump({k: v for k, v in description.items() if k != "names"}))
    (tmp_path / "broken.yaml").write_text("path: [here\ntrain: images\n")
    shutil.copytree(Path(data).parent / "images", tmp_path / "unlabeled" / "images")
    (tmp_path / "unlabeled" / "labels").mkdir()
    for split in ("train", "val"):  # Ultralytics keeps what it has found beside them
        (tmp_path / "unlabeled" / "labels" / f"{split}.cache").touch()
    (tmp_path / "unlabeled" / "data.yaml").write_text(
        yaml.safe_dump({**description, "path": str(tmp_path / "unlabeled")})
    )
    return tmp_path


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_one_line_and_leaves_nothing_behind(
    name: str,
    folder: Path,
    data: str,
    checkpoints: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words, expected = BAD_INPUT[name]
    monkeypatch.chdir(folder)
    given = dict(w.split("=", 1) for w in ("teacher=yolov8s.yaml", "student=yolov8n.yaml", f"data={data}", *SHORT))
    changed = [w.format(folder=folder, checkpoints=checkpoints) for w in words]
    kept = [f"{k}={v}" for k, v in given.items() if k not in {w.split("=")[0] for w in changed}]
    before = sorted(folder.rglob("*"))
    assert main(["train", *kept, f"project={folder}/runs/here", *changed]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("yolo_cwd: ")]
    assert len(lines) == 1
    assert expected.format(folder=folder) in lines[0]
    assert not re.search(r"\x1b|❌|Errno", lines[0])
    assert sorted(folder.rglob("*")) == before


@pytest.mark.usefixtures("whole_messages")
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_full_disk(
    number: int, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model = CWDTrainer.save_model

    def full(trainer: CWDTrainer) -> None:
        if trainer.epoch:
            raise OSError(number, os.strerror(number), str(trainer.last))
        save_model(trainer)

    monkeypatch.setattr(CWDTrainer, "save_model", full)
    given = [f"teacher={TEACHER}", f"student={STUDENT}", f"data={data}", *SHORT, "epochs=2", f"project={tmp_path}"]
    assert main(["train", *given]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("yolo_cwd: ")]
    last = tmp_path / "train" / "weights" / "last.pt"
    assert line.startswith(
        f"yolo_cwd: project={tmp_path}: cannot write {last} ({os.strerror(number)}); make room, and "
    )
    assert line.endswith(f"'yolo_cwd train resume model={last}' continues it")


def test_a_full_disk_in_a_comparison_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(arguments: dict[str, object]) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "c/results/plain-0.json")

    monkeypatch.setattr("yolo_cwd.study.compare.run", full)
    assert main(["compare", "teacher=t.pt", "folder=c"]) == 2
    written = "yolo_cwd: folder=c: cannot write c/results/plain-0.json (No space left on device)"
    assert capsys.readouterr().err == f"{written}; make room, and run the same command again to continue\n"


def test_bad_input_from_the_shell(tmp_path: Path) -> None:
    result = run("train", "teacher=yolov8s.yaml", "student=yolov8n.yaml", "data=absent.yaml", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("yolo_cwd: data=absent.yaml: ")
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", [["tarin"], ["demo", "epochs=3"]])
def test_unknown_commands(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_fault_during_training_is_not_called_bad_input(data: str, tmp_path: Path, monkeypatch) -> None:
    def fail(*args: object) -> torch.Tensor:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr("yolo_cwd.method.terms.channel_wise_divergence", fail)
    with pytest.raises(RuntimeError, match="a fault of ours"):
        main(["train", f"teacher={TEACHER}", f"student={STUDENT}", f"data={data}", *SHORT, f"project={tmp_path}"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"share": 2, "cwd": 10}, "share=2 needs cwd=balanced"),
        ({"cwd_final": 0.5, "schedule": "constant"}, "cwd_final=0.5 needs schedule=cosine"),
        (
            {"pool_conf": 0.5, "pool_ratio": 2},
            "pool_conf=0.5 needs labels by the teacher: unlabeled= or complete_labels=True; pool_ratio=2 needs ",
        ),
        ({"complete_labels": True, "pool_conf": 0.5, "pool_classes": "known"}, "pool_classes=known needs unlabeled="),
        ({"share": 2, "pool_conf": 0.3, "cwd_final": 0.5}, None),
        ({"pool_conf": 0.5, "pool_ratio": 2, "pool_classes": "known", "unlabeled": "x"}, None),
    ],
)
def test_options_without_effect_are_told(
    options: dict[str, Any], said: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    read({}, {"teacher": "t.pt", "student": "s.pt", "data": "d.yaml", **options})
    told = [record.message for record in caplog.records if "without effect: " in record.message]
    assert [said in message for message in told] == [True] * bool(said)


def test_the_home_folder_is_filled_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "my.yaml").write_text("data: ~/d.yaml")
    found = {"project": str(tmp_path / "runs"), "name": "a~b", "data": str(tmp_path / "d.yaml")}
    assert parse(["project=~/runs", "name=a~b", "cfg=~/my.yaml"]) == found
    asked = read({}, {"teacher": "~/t", "student": Path("~/s.yaml"), "data": "d.yaml"})
    assert (asked.settings.teacher, asked.args.model) == (str(tmp_path / "t.pt"), str(tmp_path / "s.yaml"))


def test_a_folder_beside_a_checkpoint_of_its_name_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    (tmp_path / "t.pt").touch()
    assert Settings.parse({"teacher": tmp_path / "t"}).teacher == str(tmp_path / "t.pt")


def test_parse_refuses_words_without_a_value() -> None:
    with pytest.raises(ConfigError, match="epochs: not of the form key=value"):
        parse(["epochs"])
