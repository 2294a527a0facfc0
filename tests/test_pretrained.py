"""A student that comes with weights: shares of the gradient, fitted adapters, class maps."""

import csv
import math
import shutil
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from conftest import STUDENT, settled, settled_on
from test_state import interrupted, resume
from ultralytics import YOLO
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn.tasks import DetectionModel

from yolo_cwd import CWDTrainer
from yolo_cwd.config import ConfigError, Settings
from yolo_cwd.method.fpn import match_levels, pyramid_taps
from yolo_cwd.method.prepare import measure
from yolo_cwd.method.regression import Regression
from yolo_cwd.method.teacher import Teacher, TeacherMaps
from yolo_cwd.method.terms import StudentMaps, Term, build_terms
from yolo_cwd.run.state import load_state

PRETRAINED = Path(__file__).parents[2] / "shared" / "data" / "pretrained"
Train = Callable[..., CWDTrainer]


@pytest.fixture
def student(tmp_path: Path, data: str) -> str:
    """A detector of the ten digits."""
    torch.manual_seed(1)
    model = YOLO(STUDENT)
    model.model = settled(DetectionModel(STUDENT, nc=10, verbose=False), data)
    model.model.names = {i: str(i) for i in range(10)}
    model.save(tmp_path / "student.pt")
    return str(tmp_path / "student.pt")


@pytest.fixture
def teacher(data: str) -> DetectionModel:
    """A detector that knows five of the digits, in an order of its own, and one thing more."""
    torch.manual_seed(2)
    model = settled(DetectionModel(STUDENT, nc=6, verbose=False), data)
    model.names = {0: "7", 1: "tube", 2: "0", 3: "3", 4: "9", 5: "1"}
    return model


def table(trainer: CWDTrainer) -> list[dict[str, float]]:
    with trainer.csv.open() as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def test_a_weight_that_is_given_is_fixed(train: Train, student: str) -> None:
    trainer = train(model=student, cwd=10.0)
    assert trainer.distillation.criterion.weight == 10.0
    assert trainer.distillation.criterion.weights.tolist() == [10.0, 10.0, 10.0]


def test_distillation_gets_its_share_of_the_gradient(train: Train, student: str, teacher: DetectionModel) -> None:
    options = {"share": 0.25, "class_share": 0.5, "level_weights": (1, 2, 1), "epochs": 12, "lr0": 1e-7}
    options["cwd"] = "balanced"
    row = table(train(model=student, teacher=teacher, **options))[-1]
    for name, wanted in {"P3": 0.25, "P4": 0.5, "P5": 0.25, "classmap": 0.5}.items():
        assert wanted / 2 < row[f"train/{name}_share"] < 2 * wanted, name  # gradients of random networks jump
        assert row[f"train/{name}_loss"] > 0


def test_a_compiled_step_has_the_weights_of_an_eager_one(
    train: Train, student: str, teacher: DetectionModel, traced: list[Any]
) -> None:
    options = {"model": student, "teacher": teacher, "cwd": "balanced", "adapter": "fitted", "lr0": 1e-7}
    runs = [train(**options, compile=on) for on in (False, True)]
    assert [hasattr(run.model, "_orig_mod") for run in runs] == [False, True]
    eager, compiled = (table(run)[0] for run in runs)
    for name in ("P3", "P4", "P5", "classmap"):
        assert compiled[f"train/{name}_share"] > 0
        assert compiled[f"train/{name}_loss"] == pytest.approx(eager[f"train/{name}_loss"], rel=0.5)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"levels": "P5", "class_share": 0.0}, id="level"),  # finer ones get gradients of coarser ones too
        pytest.param({"share": 0.0, "class_share": 0.3}, id="class maps"),
    ],
)
def test_the_weight_is_that_of_gradients_taken_apart(
    train: Train, student: str, teacher: DetectionModel, options: dict[str, Any]
) -> None:
    """Two backward passes over the batch that was measured, of the detection loss and of all."""
    shares: list[float] = []

    def look(trainer: CWDTrainer) -> None:
        criterion, batch = trainer.distillation.criterion, trainer.preprocess_batch(next(iter(trainer.train_loader)))
        criterion.weight = 1.0
        criterion.meter.means.zero_()
        measure(criterion, trainer.model, trainer.distillation.teacher, batch)
        batch["teacher"] = trainer.distillation.teacher.maps(batch["img"])
        preds = trainer.model.train()(batch["img"])
        maps = preds["scores"] if trainer.distillation.classes else preds["feats"][2]
        losses = [loss(preds, batch)[0].sum() for loss in (criterion.criterion, criterion)]
        task, whole = (torch.autograd.grad(loss, maps, retain_graph=True)[0] for loss in losses)
        shares.append(float((whole - task).norm() / task.norm()))

    train(
        model=student,
        teacher=teacher,
        callbacks={"on_train_start": look},
        **{"cwd": "balanced", "share": 0.3, **options},
    )
    assert shares == pytest.approx([0.3], rel=1e-3)


def test_a_measurement_does_not_depend_on_the_loss_scale(train: Train, student: str, teacher: DetectionModel) -> None:
    found: list[torch.Tensor] = []

    def look(trainer: CWDTrainer) -> None:
        criterion, batch = trainer.distillation.criterion, trainer.preprocess_batch(next(iter(trainer.train_loader)))
        for scale in (1.0, 65536.0, 1e38):  # with the last one, every gradient overflows at first
            criterion.meter.means.zero_()
            measure(criterion, trainer.model, trainer.distillation.teacher, batch, scale)
            found.append(criterion.meter.means.clone())

    train(model=student, teacher=teacher, cwd="balanced", callbacks={"on_train_start": look})
    assert (found[0] > 0).all()
    assert torch.allclose(found[1], found[0], rtol=1e-4)
    assert torch.allclose(found[2], found[0], rtol=1e-4)


@pytest.mark.skipif(not PRETRAINED.exists(), reason="the checkpoints are not here")
def test_adapters_begin_fitted(train: Train) -> None:
    first = {}
    student, teacher = (str(PRETRAINED / name) for name in ("yolov8n.pt", "yolo11n.pt"))
    for adapter in ("conv", "fitted"):
        trainer = train(model=student, teacher=teacher, adapter=adapter, lr0=1e-7, seed=1)
        first[adapter] = [table(trainer)[0][f"train/{level}_nats"] for level in ("P3", "P4", "P5")]
    assert all(0.1 < share <= 1 for share in trainer.distillation.explained)
    assert all(fitted < random for fitted, random in zip(first["fitted"], first["conv"], strict=True))


def test_the_training_sees_the_same_images_as_without_a_teacher(
    train: Train, train_plain: Any, student: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[type, list[float]] = {}
    prepare = DetectionTrainer.preprocess_batch

    def note(trainer: Any, batch: dict[str, Any]) -> dict[str, Any]:
        if hasattr(trainer, "train_time_start"):  # the steps alone
            seen.setdefault(type(trainer), []).append(float(batch["img"].sum()))
        return prepare(trainer, batch)

    monkeypatch.setattr(DetectionTrainer, "preprocess_batch", note)
    for run in (train_plain, train):
        run(model=student, mosaic=1.0, seed=3, workers=0)
    assert len(seen[CWDTrainer]) == 2
    assert seen[CWDTrainer] == seen[DetectionTrainer]


def test_an_interrupt_while_adapters_are_fitted_leaves_no_folder(
    train: Train, tmp_path: Path, student: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted_by_the_user(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("yolo_cwd.method.prepare.fit", interrupted_by_the_user)
    with pytest.raises(KeyboardInterrupt):
        train(model=student, adapter="fitted")
    assert not (tmp_path / "runs").exists()


def test_adapters_without_a_fit_are_refused(
    train: Train, tmp_path: Path, student: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    solve = Regression.solve
    monkeypatch.setattr(Regression, "solve", lambda self: (solve(self)[0] / 0, 0.0))
    with pytest.raises(ConfigError, match="adapter=fitted: the maps of student or teacher at P3 are not finite"):
        train(model=student, adapter="fitted")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("amp", "expected"), [(True, True), (False, False), ("bf16", torch.bfloat16)])
def test_fitting_has_the_mixed_precision_of_the_training(
    amp: Any, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer: Any = SimpleNamespace(args=SimpleNamespace(amp=amp), amp=bool(amp), device=torch.device("cuda"))
    monkeypatch.setattr("yolo_cwd.trainer.autocast", lambda enabled, device: (enabled, device))
    assert CWDTrainer.autocast(trainer) == (expected, "cuda")


def test_a_resumed_run_goes_on_with_its_rule_and_its_measurements(train: Train, tmp_path: Path, student: str) -> None:
    last = interrupted(train, tmp_path, 1, epochs=2, model=student, cwd="balanced")
    kept = load_state(last).epochs[0]["measured"]
    seen: list[Any] = []
    trainer = resume(last, {"on_train_start": lambda t: seen.append(t.distillation.criterion.meter.means.tolist())})
    assert trainer.settings.balanced
    assert seen[0] == [pytest.approx(row) for row in kept.values()]
    assert trainer.distillation.explained == [], "fitted once"


def test_a_term_that_a_resumed_run_had_not_is_measured(
    train: Train, tmp_path: Path, student: str, teacher: DetectionModel
) -> None:
    """The teacher is replaced by one that knows the classes of the data: class maps are added."""
    for name, names in {"first": {i: f"thing {i}" for i in range(6)}, "second": teacher.names}.items():
        model = YOLO(STUDENT)
        model.model = deepcopy(teacher)
        model.model.names = names
        model.save(tmp_path / f"{name}.pt")
    options = {"cwd": "balanced", "epochs": 3, "model": student}
    last = interrupted(train, tmp_path, 1, teacher=str(tmp_path / "first.pt"), **options)
    kept = load_state(last).epochs[0]["measured"]
    seen: list[Any] = []
    trainer = resume(
        last,
        {"on_train_start": lambda t: seen.append(t.distillation.criterion.meter.means.tolist())},
        teacher=str(tmp_path / "second.pt"),
    )
    assert seen == [[*(pytest.approx(row) for row in kept.values()), [0, 0]]]
    rows = table(trainer)[1:]
    assert [row[f"train/{name}_share"] > 0.05 for row in rows for name in ("P3", "P4", "P5", "classmap")] == [True] * 8


def test_another_teacher_is_told_on_resuming_and_columns_are_kept(
    train: Train,
    tmp_path: Path,
    student: str,
    teacher: DetectionModel,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ultralytics.utils.LOGGER.propagate", True)
    for name in ("first", "moved", "other"):
        model = YOLO(STUDENT)
        model.model = deepcopy(teacher)
        if name == "other":
            model.model.names = {i: f"thing {i}" for i in range(6)}
            next(model.model.parameters()).data.add_(1)
        model.save(tmp_path / f"{name}.pt")
    last = interrupted(train, tmp_path, 1, teacher=str(tmp_path / "first.pt"), cwd="balanced", epochs=3, model=student)
    shutil.copytree(last.parents[1], tmp_path / "runs" / "again")
    resume(last, teacher=str(tmp_path / "moved.pt"))
    assert "not the network that the run began with" not in caplog.text
    trainer = resume(tmp_path / "runs" / "again" / "weights" / "last.pt", teacher=str(tmp_path / "other.pt"))
    assert "other.pt: not the network that the run began with" in caplog.text
    known = [not math.isnan(row["train/classmap_share"]) for row in table(trainer)]
    assert known == [True, False, False]
    assert all(row["train/P3_share"] > 0 for row in table(trainer))


def test_class_maps_of_classes_that_are_left_out_are_not_taught(
    train: Train, student: str, teacher: DetectionModel
) -> None:
    """The teacher knows 7, 0, 3, 9 and 1."""
    assert train(model=student, teacher=teacher, cwd="balanced", classes=[3, 4, 9]).distillation.classes == [3, 9]


def test_a_term_that_gets_no_gradient_is_told(
    train: Train, student: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ultralytics.utils.LOGGER.propagate", True)
    trainer = train(model=student, cwd="balanced", epochs=2, freeze=3)  # up to P3
    assert trainer.distillation.criterion.unmeasured == ["P3"]
    assert "P3: nothing is taught so far, no gradient arrives there" in caplog.text


@pytest.mark.parametrize("family", ["yolov8n.yaml", "yolo11n.yaml", "yolov10n.yaml", "yolo26n.yaml"])
def test_class_maps_are_the_teachers_logits_of_the_classes_that_both_know(family: str) -> None:
    torch.manual_seed(3)
    model = settled_on(DetectionModel(family, nc=6, verbose=False), torch.rand(16, 3, 64, 64))
    model.names = {0: "7", 1: "tube", 2: "0", 3: "3", 4: "9", 5: "1"}
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        model.eval()(images)
        preds = model.eval()(images)[1]
        expected = preds.get("one2many", preds)["scores"]  # [N, 6, positions]
    taught, student = Teacher(model), DetectionModel(family, nc=10, verbose=False)
    taps = pyramid_taps(student, "student")
    levels, names = match_levels(taps, taught.taps, None), [str(i) for i in range(10)]
    *_, term = build_terms(Settings.parse({"teacher": "a.pt"}), levels, list(taps), student, taught, names)
    assert term.classes == [0, 1, 3, 7, 9]
    maps = term.of_teacher(taught.maps(images))
    assert len(maps) == 3
    found = torch.cat([m.flatten(2) for m in maps], -1)
    expected = expected[:, [2, 5, 3, 0, 4]]
    assert (found - expected).abs().max() < 0.01 < (found - expected.roll(1, dims=1)).abs().mean()


def test_a_teacher_of_other_classes_shows_none(train: Train, student: str) -> None:
    model = DetectionModel("yolov8n.yaml", nc=2, verbose=False)
    model.names = {0: "cat", 1: "dog"}
    trainer = train(model=student, teacher=model, cwd="balanced")
    assert trainer.distillation.criterion.meter.names == ["P3", "P4", "P5"]


def test_classes_are_numbered_as_in_the_data_whatever_their_order_there(
    train: Train, student: str, teacher: DetectionModel, data: str, tmp_path: Path
) -> None:
    """The teacher's 7, 0, 3, 9, 1 are the student's classes of these numbers."""
    described = yaml.safe_load(Path(data).read_text())
    described["path"] = str(Path(data).parent)
    described["names"] = {i: str(i) for i in range(9, -1, -1)}
    (tmp_path / "reversed.yaml").write_text(yaml.safe_dump(described, sort_keys=False))
    trainer = train(model=student, teacher=teacher, cwd="balanced", data=str(tmp_path / "reversed.yaml"))
    assert trainer.distillation.classes == [0, 1, 3, 7, 9]


def test_the_preparation_takes_fewer_images_if_memory_runs_out(
    train: Train, student: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def measure_few(criterion: Any, model: Any, teacher: Any, batch: dict[str, Any], scale: float) -> None:
        sizes.append(len(batch["img"]))
        if len(batch["img"]) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        measure(criterion, model, teacher, batch, scale)

    monkeypatch.setattr("yolo_cwd.method.prepare.measure", measure_few)
    trainer = train(model=student, cwd="balanced", adapter="fitted")
    assert sizes == [4, 2, 1, 1]
    assert trainer.batch_size == 4
    assert table(trainer)[0]["train/P3_share"] > 0


@pytest.mark.parametrize("model", ["yolov10n.yaml", "yolo26n.yaml"])
def test_end_to_end_students_have_class_maps_too(train: Train, teacher: DetectionModel, model: str) -> None:
    row = table(train(model=model, teacher=teacher, cwd="balanced", epochs=2))[-1]
    assert row["train/classmap_share"] > 0.05


class BoxTerm(Term):
    """The distributions of the box sides, as a term of another kind might compare them."""

    def of_student(self, maps: StudentMaps) -> torch.Tensor:
        """Return the logits of the sides' bins [N, 4 x bins, positions]."""
        boxes: torch.Tensor = maps.preds["boxes"]
        return boxes

    def of_teacher(self, maps: TeacherMaps) -> list[torch.Tensor]:
        """Return the same of each level, [N, 4 x bins, H, W]."""
        return maps.branches["boxes"]

    def forward(self, student: torch.Tensor, teacher: list[torch.Tensor]) -> torch.Tensor:
        """Return the divergence over the bins of a side, averaged."""
        sides = student, torch.cat([m.flatten(2) for m in teacher], -1)
        log_q, log_p = (m.unflatten(1, (4, -1)).log_softmax(2) for m in sides)
        return torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(2).mean()


def test_a_term_of_another_kind_is_one_class_and_two_lines(
    train: Train, tmp_path: Path, student: str, teacher: DetectionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has its columns, its share and its place in a resumed run, and changes what the student learns."""

    def with_boxes(*args: Any) -> torch.nn.ModuleList:
        terms, frozen = build_terms(*args), args[4]
        frozen.tap("boxes", frozen.head.cv2)
        return terms.append(BoxTerm("boxes", 0.5))

    options = {"cwd": "balanced", "epochs": 3, "model": student, "teacher": teacher, "schedule": "constant"}
    without = train(**options, name="without")
    monkeypatch.setattr("yolo_cwd.method.distillation.build_terms", with_boxes)
    last = interrupted(train, tmp_path, 1, **options)
    assert list(load_state(last).epochs[0]["measured"]) == ["P3", "P4", "P5", "classmap", "boxes"]
    model = YOLO(STUDENT)
    model.model = teacher
    model.save(tmp_path / "teacher.pt")
    trainer = resume(last, teacher=str(tmp_path / "teacher.pt"))
    rows = table(trainer)
    assert all(row["train/boxes_nats"] > 0 for row in rows)
    assert all(0.01 < row["train/boxes_share"] < 2 for row in rows)
    ours, theirs = trainer.model.state_dict(), without.model.state_dict()
    assert any(not torch.equal(ours[name], theirs[name]) for name in ours)
