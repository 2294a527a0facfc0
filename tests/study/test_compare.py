"""Comparisons: what is asked for, how runs are shared out, and the statistics of the summary."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import STUDENT, bare
from processes import CONTEXT
from ultralytics import YOLO
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.nn.tasks import DetectionModel

from yolo_cwd.cli import main
from yolo_cwd.config import ConfigError
from yolo_cwd.run.results import read_rows
from yolo_cwd.run.score import SILENT
from yolo_cwd.study import compare
from yolo_cwd.study.comparison import Comparison, parse_seeds
from yolo_cwd.study.summary import as_text, paired_interval, summarize, table, write_summary

SHORT = {"imgsz": 64, "batch": 4, "epochs": 1, "plots": False, "device": "cpu", "amp": False, "verbose": False}


@pytest.fixture
def words(data: str, checkpoints: Path, tmp_path: Path) -> dict[str, Any]:
    folder = str(tmp_path / "comparison")
    teacher = str(checkpoints / "small.pt")
    return {
        "teacher": teacher,
        "teacher_epochs": 0,
        "student": STUDENT,
        "data": data,
        "seeds": 2,
        "folder": folder,
        **SHORT,
    }


def test_the_built_in_arm_waits_for_a_teacher_from_a_description(
    words: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ultralytics' own distillation takes none: it is trained first, or the arm is refused."""
    content = yaml.safe_load(Path(words["data"]).read_text())
    words["data"] = str(tmp_path / "letters.yaml")  # classes that no model has by default
    Path(words["data"]).write_text(yaml.safe_dump({**content, "names": dict(enumerate("abcdefghij"))}))
    words |= {"teacher": bare("yolov8s.yaml"), "arms": "plain,builtin"}
    with pytest.raises(ConfigError, match=r"is not trained, .* takes a \.pt; leave arm builtin out$"):
        compare.run(words)
    assert not Path(words["folder"]).exists()
    monkeypatch.setattr(compare, "claim", lambda *_: pytest.exit("rehearsed"))
    with pytest.raises(pytest.exit.Exception, match="rehearsed"):
        compare.run({**words, "teacher_epochs": 1})


def test_an_arm_that_frozen_layers_keep_from_its_teacher_is_refused_at_once(words: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"freeze=5: teacher=.* cannot reach the student; freeze fewer layers$"):
        compare.run({**words, "arms": "plain,cwd", "freeze": 5, "class_share": 0})
    assert not Path(words["folder"]).exists()


def test_seeds() -> None:
    assert parse_seeds(3) == (0, 1, 2)
    assert parse_seeds((5, 7)) == (5, 7)
    for bad in (0, -1, 1.5, "x", (1, 1), [], True):
        with pytest.raises(ConfigError, match="seeds="):
            parse_seeds(bad)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student": None}, "student=None: missing"),
        ({"model": "yolov8s.yaml"}, "model=yolov8s.yaml names another one"),
        ({"data": None}, "data=None: missing"),
        ({"device": "0,1"}, "device=0,1: "),
        ({"batch": -1}, "batch=-1: would be another in every arm"),
        ({"arms": "plain,cwd:batch=0"}, "batch=0: "),
        ({"teacher": None}, "teacher: missing"),
        ({"split": "half"}, "split=half: must be one of"),
        ({"arms": "cwd:tau=0"}, "tau=0: must be a number above 0"),
        ({"epoch": 3}, "did you mean epochs"),
        ({"epochs": "many"}, "epochs=many"),
        ({"seed": 3}, "seed=3: every run of a comparison has its own; use seeds="),
    ],
)
def test_refused_comparisons(words: dict[str, Any], change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Comparison.parse({**words, **change})
    assert not Path(words["folder"]).exists()


@pytest.mark.usefixtures("drawn_pictures")
def test_a_comparison_from_start_to_summary(words: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    summary = compare.run({**words, "arms": "plain,cwd:tau=2,builtin"})
    folder = Path(words["folder"])
    assert list(summary["arms"]) == ["plain", "cwd_tau=2", "builtin"]
    assert all(arm["seeds"] == [0, 1] for arm in summary["arms"].values())
    for name in ("summary.json", "summary.csv", "summary.md", "curves.png", "scores.png", "classes.png"):
        assert (folder / name).stat().st_size > 100
    assert yaml.safe_load((folder / "runs" / "cwd_tau=2-1" / "cwd.yaml").read_text())["tau"] == 2
    assert (
        yaml.safe_load((folder / "runs" / "builtin-0" / "args.yaml").read_text())["distill_model"] == words["teacher"]
    )
    assert yaml.safe_load((folder / "runs" / "plain-1" / "args.yaml").read_text())["seed"] == 1
    assert summary["teacher"] is None
    assert "it is of another task, or of other classes" in summary["verdict"]
    assert "95 % interval" in capsys.readouterr().out
    assert len((folder / "summary.csv").read_text().splitlines()) == 7


def test_a_killed_comparison_goes_on_and_trains_nothing_twice(
    words: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[str] = []

    def train_arm(comparison: Comparison, arm: compare.Arm, seed: int) -> dict[str, Any]:
        if len(trained) == 3 and "killed" not in trained:
            trained.append("killed")
            raise KeyboardInterrupt
        trained.append(f"{arm.name}-{seed}")
        return result(arm.name, seed, 0.1)

    monkeypatch.setattr(compare, "train_arm", train_arm)
    with pytest.raises(KeyboardInterrupt):
        compare.run({**words, "arms": "plain,cwd"})
    compare.run({**words, "arms": "plain,cwd"})
    assert trained == ["plain-0", "cwd-0", "plain-1", "killed", "cwd-1"]


def test_arms_and_seeds_are_added_to_a_comparison(words: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[str] = []

    def train_arm(comparison: Comparison, arm: compare.Arm, seed: int) -> dict[str, Any]:
        trained.append(f"{arm.name}-{seed}")
        return result(arm.name, seed, 0.1)

    monkeypatch.setattr(compare, "train_arm", train_arm)
    compare.run({**words, "arms": "plain,cwd", "seeds": 2})
    summary = compare.run({**words, "arms": "cwd,cwd:tau=2", "seeds": (1, 4)})
    assert trained == ["plain-0", "cwd-0", "plain-1", "cwd-1", "cwd_tau=2-1", "cwd-4", "cwd_tau=2-4"]
    assert {name: arm["seeds"] for name, arm in summary["arms"].items()} == {
        "plain": [0, 1],
        "cwd": [0, 1, 4],
        "cwd_tau=2": [1, 4],
    }
    assert summary["comparison"]["seeds"] == [0, 1, 4]


def test_a_comparison_goes_on_with_the_same_files_by_other_paths(
    words: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "train_arm", lambda comparison, arm, seed: result(arm.name, seed, 0.1))
    shutil.copy(words["teacher"], tmp_path / "near.pt")
    arms = tmp_path / "arms.yaml"
    arms.write_text(yaml.safe_dump({"plain": {}, "cwd": {"teacher": str(tmp_path / "near.pt")}}))
    words = {**words, "arms": str(arms), "teacher": str(tmp_path / "near.pt")}
    compare.run(words)
    monkeypatch.chdir(tmp_path)
    arms.write_text(yaml.safe_dump({"plain": {}, "cwd": {"teacher": "near.pt"}}))
    compare.run({**words, "teacher": "near.pt"})
    shutil.copy("near.pt", "other.pt")
    with pytest.raises(ConfigError, match="holds a comparison with other teacher; give another folder="):
        compare.run({**words, "teacher": "other.pt"})


@pytest.mark.parametrize(
    ("change", "differing"),
    [
        pytest.param({"epochs": 2}, "epochs", id="another value"),
        pytest.param({"cos_lr": True, "split": "train"}, "cos_lr, split", id="left out before"),
        pytest.param({"arms": {"plain": {}, "cwd": {"tau": 2.0}}}, "arm cwd", id="an arm of the same name"),
    ],
)
def test_what_cannot_be_added_to_a_comparison(
    change: dict[str, Any], differing: str, words: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "train_arm", lambda comparison, arm, seed: result(arm.name, seed, 0.1))
    compare.run({**words, "arms": "plain,cwd"})
    before = (Path(words["folder"]) / "comparison.yaml").read_text()
    if "arms" in change:
        (tmp_path / "arms.yaml").write_text(yaml.safe_dump(change["arms"]))
        change = {"arms": str(tmp_path / "arms.yaml")}
    monkeypatch.setattr(compare, "rehearse", lambda comparison: pytest.fail("has taken time"))
    with pytest.raises(ConfigError, match=f"holds a comparison with other {differing}; give another folder="):
        compare.run({**words, "arms": "plain,cwd", **change})
    assert (Path(words["folder"]) / "comparison.yaml").read_text() == before


def epochs_of(run: Path) -> list[str]:
    return [row.split(",")[0].strip() for row in (run / "results.csv").read_text().splitlines()[1:]]


@pytest.mark.parametrize("method", compare.METHODS)
def test_a_killed_run_goes_on_from_its_last_epoch(
    method: str, words: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the third epoch of four, when its row has been written and its checkpoint has not."""
    save_model = BaseTrainer.save_model

    def killed(trainer: BaseTrainer) -> Any:
        if trainer.epoch == 2 and not trainer.resume:
            raise KeyboardInterrupt
        return save_model(trainer)

    monkeypatch.setattr(BaseTrainer, "save_model", killed)
    words |= {"arms": method, "seeds": [3], "epochs": 4, "cos_lr": True, "levels": "P3,P4"}
    with pytest.raises(KeyboardInterrupt):
        compare.run(words)
    run = Path(words["folder"]) / "runs" / f"{method}-3"
    assert epochs_of(run) == ["1", "2", "3"]
    before = compare._seconds(read_rows(run / "results.csv")[:2])
    begun: list[int] = []
    monkeypatch.setattr(BaseTrainer, "save_model", lambda trainer: begun.append(trainer.epoch) or save_model(trainer))
    compare.run(words)
    found = json.loads((run.parents[1] / "results" / f"{method}-3.json").read_text())
    assert begun == [2, 3]
    assert epochs_of(run) == ["1", "2", "3", "4"]
    assert len(found["curve"]) == 4
    assert found["seconds"] > before > 0
    arguments = yaml.safe_load((run / "args.yaml").read_text())
    assert (arguments["seed"], arguments["cos_lr"], arguments["epochs"]) == (3, True, 4)
    assert (arguments["distill_model"] is not None) == (method == "builtin")
    assert (run / "cwd.yaml").exists() == (method == "cwd")


@pytest.mark.parametrize("stripped", [True, False])
@pytest.mark.parametrize("method", compare.METHODS)
def test_a_run_killed_before_it_was_scored_is_not_trained_again(
    method: str, stripped: bool, words: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    words |= {"arms": method, "seeds": [3], "epochs": 2}
    with monkeypatch.context() as patch:
        patch.setattr(*((compare, "score") if stripped else (BaseTrainer, "final_eval")), killed)
        patch.setattr(compare, "score_teacher", lambda *_: None)
        with pytest.raises(KeyboardInterrupt):
            compare.run(words)
    monkeypatch.setattr(compare, "_trainer", None)
    compare.run(words)
    found = json.loads((Path(words["folder"]) / "results" / f"{method}-3.json").read_text())
    assert len(found["curve"]) == 2
    assert found["seconds"] > 0
    assert type(YOLO(found["weights"]).model) is DetectionModel


@pytest.mark.parametrize("change", [{"epochs": 1}, {"time": 1}, {"save_dir": "elsewhere"}, None])
def test_what_a_killed_run_cannot_go_on_from(change: dict[str, Any] | None, tmp_path: Path) -> None:
    last = tmp_path / "weights" / "last.pt"
    assert compare._find_interrupted(tmp_path) is None
    last.parent.mkdir()
    (tmp_path / "results.csv").write_text("epoch,time\n1,2.5\n2,4\n")
    arguments = {"epochs": 5, "time": None, "save_dir": str(tmp_path), **(change or {})}
    torch.save({"epoch": 0, "model": DetectionModel(STUDENT, verbose=False), "train_args": arguments}, last)
    if not change:
        assert compare._find_interrupted(tmp_path) == (2.5, False)
        last.write_bytes(last.read_bytes()[:-1000])  # torn
    assert compare._find_interrupted(tmp_path) == ((2.5, True) if change == {"epochs": 1} else None)


def test_time_of_a_run_that_was_resumed_twice() -> None:
    rows = [{"time": t} for t in (1.0, 2.0, 3.5, 1.0, 2.5, 0.5)]
    assert compare._seconds(rows) == 3.5 + 2.5 + 0.5
    assert compare._seconds([]) == 0


def _work(words: dict[str, Any]) -> None:
    def train_arm(comparison: Comparison, arm: compare.Arm, seed: int) -> dict[str, Any]:
        with (comparison.folder / "log.txt").open("a") as file:
            file.write(f"{arm.name}-{seed}\n")
        compare.time.sleep(0.3)
        return result(arm.name, seed, 0.1)

    compare.train_arm = train_arm
    compare.run(words)


def test_two_processes_share_the_runs(words: dict[str, Any]) -> None:
    workers = [CONTEXT.Process(target=_work, args=({**words, "arms": "plain,cwd", "seeds": 4},)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0
    lines = (Path(words["folder"]) / "log.txt").read_text().split()
    assert sorted(lines) == sorted(f"{arm}-{seed}" for arm in ("plain", "cwd") for seed in range(4))


def result(arm: str, seed: int, score: float, seconds: float = 10.0) -> dict[str, Any]:
    classes = {"cat": score, "dog": score / 2}
    return {
        "arm": arm,
        "seed": seed,
        "seconds": seconds,
        "score": score,
        "second": 2 * score,
        "classes": classes,
        "curve": [0.0, score],
    }


RESULTS = [
    *(result("plain", seed, score) for seed, score in enumerate((0.30, 0.32, 0.31))),
    *(result("cwd", seed, score, 12.0) for seed, score in enumerate((0.33, 0.34, 0.35))),
]
TEACHER = {"score": 0.41, "second": 0.6, "classes": {}}


def test_paired_interval_by_hand() -> None:
    """Differences 3, 2, 4: mean 3, sd 1, and t(0.975, 2) is 4.30265 in printed tables."""
    low, high = paired_interval([3.0, 2.0, 4.0])
    assert (low, high) == pytest.approx((3 - 4.30265 / 3**0.5, 3 + 4.30265 / 3**0.5), abs=1e-4)
    assert paired_interval([1.0]) is None


def test_statistics() -> None:
    arm = summarize(["plain", "cwd"], TEACHER, RESULTS)["arms"]["cwd"]
    assert arm["score"] == pytest.approx(0.34)
    assert arm["sd"] == pytest.approx(0.01)
    assert arm["gain"] == pytest.approx(0.03)
    assert arm["interval"] == pytest.approx((0.03 - 0.0248414, 0.03 + 0.0248414), abs=1e-6)
    assert arm["gap_closed"] == pytest.approx(0.3)
    assert arm["time_ratio"] == pytest.approx(1.2)
    assert arm["class_gains"] == pytest.approx({"cat": 0.03, "dog": 0.015})


def test_only_seeds_of_both_arms_are_paired() -> None:
    arm = summarize(["plain", "cwd"], TEACHER, [*RESULTS, result("cwd", 9, 0.9)])["arms"]["cwd"]
    assert arm["gain"] == pytest.approx(0.03)
    assert (arm["runs"], arm["pairs"]) == (4, 3)
    assert summarize(["plain", "cwd"], TEACHER, RESULTS[1:])["arms"]["cwd"]["pairs"] == 2


def test_an_arm_may_be_compared_with_another_one() -> None:
    more = [result("taught", seed, score) for seed, score in enumerate((0.36, 0.36, 0.36))]
    arms = summarize(["plain", "cwd", "taught"], TEACHER, [*RESULTS, *more], {"taught": "cwd"})["arms"]
    assert arms["taught"]["gain"] == pytest.approx(0.02)
    assert arms["cwd"]["gain"] == pytest.approx(0.03)


def test_a_teacher_that_is_no_better_is_named() -> None:
    weak = {**TEACHER, "score": 0.3}
    summary = summarize(["plain", "cwd"], weak, RESULTS)
    assert "not better than the plain student (-1.0 points)" in summary["verdict"]
    assert summary["arms"]["cwd"]["gap_closed"] is None


def test_table_and_files(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    for r in RESULTS:
        (tmp_path / "results" / f"{r['arm']}-{r['seed']}.json").write_text(json.dumps(r))
    (tmp_path / "results" / "teacher.json").write_text(json.dumps(TEACHER))
    (tmp_path / "comparison.yaml").write_text(
        yaml.safe_dump({"task": "detect", "arms": {"plain": {}, "cwd": {}}}, sort_keys=False)
    )
    summary = write_summary(tmp_path)
    shown = as_text(table(summary)).splitlines()
    assert shown[1].split() == ["teacher", "41.0", "60.0"]
    assert shown[3].split() == ["cwd", "3", "34.0", "1.0", "68.0", "+3.0", "3", "+0.5", "to", "+5.5", "30%", "1.20x"]
    assert "| cwd | 3 | 34.0 |" in (tmp_path / "summary.md").read_text()
    assert json.loads((tmp_path / "summary.json").read_text())["teacher"] == TEACHER
    assert sorted(p.name for p in tmp_path.glob(".*")) == []


@pytest.mark.usefixtures("drawn_pictures")
def test_epochs_without_validation_are_not_drawn_as_zero(words: dict[str, Any]) -> None:
    compare.run({**words, "arms": "plain", "seeds": 1, "val": False})
    folder = Path(words["folder"])
    assert json.loads((folder / "results" / "plain-0.json").read_text())["curve"] == []
    assert (folder / "curves.png").exists()


def test_a_teacher_of_the_same_classes_is_scored(words: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    compare.run({**words, "arms": "plain", "seeds": 1})
    first = Path(words["folder"]) / "runs" / "plain-0" / "weights" / "best.pt"
    monkeypatch.setattr(compare, "train_arm", lambda comparison, arm, seed: result(arm.name, seed, 0.1))
    summary = compare.run({**words, "arms": "plain", "teacher": str(first), "folder": words["folder"] + "2"})
    assert summary["teacher"].keys() == {"score", "second", "classes"}


def test_a_score_is_that_of_val_with_the_arguments_of_the_run(
    words: dict[str, Any], data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored: list[dict[str, Any]] = []
    val = YOLO.val
    monkeypatch.setattr(YOLO, "val", lambda yolo, **given: (scored.append(given), val(yolo, **given))[1])
    own = {"one": {"method": "plain", "classes": [1], "imgsz": 96}, "two": {"method": "plain", "max_det": 5}}
    (tmp_path / "arms.yaml").write_text(yaml.safe_dump(own))
    shared = {"classes": [3, 4], "conf": 0.002, "iou": 0.6, "agnostic_nms": True, "lr0": 0.02, "tau": 2.0}
    compare.run({**words, **shared, "arms": str(tmp_path / "arms.yaml"), "seeds": 1})
    found = {f.stem: json.loads(f.read_text()) for f in (Path(words["folder"]) / "results").glob("*.json")}
    assert found["one-0"]["classes"].keys() == {"1"}
    assert found["two-0"]["classes"].keys() == {"3", "4"}
    for run, given in zip(("one", "two"), scored[-2:], strict=True):
        asked = {**SHORT, **shared, **own[run], "data": data}
        asked = {name: value for name, value in asked.items() if name not in {"method", "tau", *SILENT}}
        assert {name: given.get(name) for name in asked} == asked
        theirs = val(YOLO(found[f"{run}-0"]["weights"]), **asked, plots=False, project=str(tmp_path / "val"))
        assert theirs.box.map == found[f"{run}-0"]["score"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": "absent.yaml"}, "data=absent.yaml: no such file"),
        ({"data": "{unlabeled}"}, "No labels found"),
        ({"split": "test"}, "'test:' images not found"),
        ({"teacher": "absent.pt"}, "teacher=absent.pt: no such file"),
        ({"student": "yolov8nn.yaml"}, "student=yolov8nn.yaml: no such file; give an existing"),
        ({"pretrained": "absent.pt"}, "pretrained=absent.pt: no such file; give an existing"),
        ({"optimizer": "foo"}, "optimizer=foo: there is none of this name; give one of auto, SGD, "),
        ({"device": "7"}, "Invalid CUDA 'device=7' requested. Use 'device=cpu'"),
        ({"freeze": 100}, "'freeze=100' froze the entire model"),
        ({"arms": "plain,cwd:levels=P2"}, "levels=P2: the student has P3, P4, P5"),
        ({"arms": "plain,cwd:adapter=mlp", "student": "yolov8n.yaml"}, "adapter=mlp: must be one of fitted, conv"),
        ({"arms": "plain,cwd", "level_weights": (1, 2)}, "2 weights for the 3 distilled levels P3, P4, P5"),
        ({"arms": "plain,cwd:optimizer=foo"}, "optimizer=foo: "),
        ({"folder": "/proc/comparison"}, "folder=/proc/comparison: cannot write "),
    ],
    ids=lambda x: ",".join(f"{k}={v}" for k, v in x.items()) if isinstance(x, dict) else "",
)
def test_what_cannot_be_trained_is_refused_before_the_first_run(
    change: dict[str, Any],
    message: str,
    words: dict[str, Any],
    data: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def train_arm(*_: Any) -> None:
        raise AssertionError("a run has begun")

    (unlabeled := tmp_path / "unlabeled").mkdir()
    shutil.copytree(Path(data).parent / "images", unlabeled / "images")
    description = yaml.safe_load(Path(data).read_text())
    (unlabeled / "data.yaml").write_text(yaml.safe_dump({**description, "path": str(unlabeled)}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare, "train_arm", train_arm)
    unlabeled_file = str(unlabeled / "data.yaml")
    asked = {"arms": "plain", **words, **change}
    asked = {k: unlabeled_file if v == "{unlabeled}" else v for k, v in asked.items()}
    typed = [f"{k}={','.join(map(str, v)) if isinstance(v, tuple) else v}" for k, v in asked.items()]
    before = {f for f in tmp_path.rglob("*") if unlabeled not in f.parents}
    assert main(["compare", *typed]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("yolo_cwd: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert {f for f in tmp_path.rglob("*") if unlabeled not in f.parents} == before


def test_only_arms_with_runs_to_do_are_set_up(words: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []
    set_up = compare.set_up
    monkeypatch.setattr(compare, "set_up", lambda *given: (tried.append(given[1]["name"]), set_up(*given)))
    monkeypatch.setattr(compare, "train_arm", lambda comparison, arm, seed: result(arm.name, seed, 0.1))
    compare.run({**words, "arms": "plain,builtin"})
    compare.run({**words, "arms": "plain,builtin,cwd"})
    assert tried == ["plain-0", "builtin-0", "cwd-0"]
    assert not list((Path(words["folder"]) / "runs").iterdir())
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_teacher_of_one_class_is_scored_on_data_of_one_class(
    words: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = YOLO(STUDENT)
    teacher.model.names = {0: "item"}
    teacher.save(tmp_path / "one.pt")
    monkeypatch.setattr(compare, "train_arm", lambda comparison, arm, seed: result(arm.name, seed, 0.1))
    words |= {"teacher": str(tmp_path / "one.pt"), "single_cls": True, "arms": "plain"}
    assert compare.run(words)["teacher"]["classes"].keys() == {"item"}
    assert compare.run({**words, "single_cls": False, "folder": words["folder"] + "2"})["teacher"] is None


@pytest.mark.usefixtures("ascii_locale")
def test_a_comparison_under_another_locale(
    tmp_path: Path, data: str, checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "train_arm", lambda comparison, arm, seed: result(arm.name, seed, 0.1))
    arms = yaml.safe_dump({"plain": {}, "größer": {"method": "cwd"}}, allow_unicode=True, sort_keys=False)
    (tmp_path / "arms.yaml").write_bytes(arms.encode())
    words = {"teacher": str(checkpoints / "small.pt"), "student": "yolov8n.yaml", "data": data, "device": "cpu"}
    words |= {"arms": str(tmp_path / "arms.yaml"), "seeds": 2, "folder": str(tmp_path / "größer")}
    assert list(compare.run(words)["arms"]) == ["plain", "größer"]
    assert "| größer | 2 |" in (tmp_path / "größer" / "summary.md").read_text(encoding="utf-8")
    assert compare.run(words)["arms"].keys() == {"plain", "größer"}  # and again, from what has been written
