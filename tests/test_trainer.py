"""What distillation does and what it leaves alone, in real short trainings."""

import csv
import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import SHORT, STUDENT, TAUGHT, TEACHER, narrow
from torch import nn
from ultralytics import YOLO
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn.tasks import DetectionModel

from yolo_cwd import ConfigError, CWDLoss, CWDTrainer, channel_wise_divergence
from yolo_cwd.method.fpn import student_features
from yolo_cwd.method.teacher import load_teacher

Train = Callable[..., CWDTrainer]
TERMS = ["P3_loss", "P4_loss", "P5_loss", "cwd_loss"]


def rows(trainer: DetectionTrainer) -> list[dict[str, float]]:
    with trainer.csv.open() as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def snapshot(values: list[torch.Tensor]) -> list[torch.Tensor]:
    return [v.detach().clone() for v in values]


def test_without_weight_it_is_ultralytics_bit_for_bit(train: Train, train_plain: Callable[..., Any]) -> None:
    arguments = {"epochs": 2, "val": True, "warmup_epochs": 1, "lr0": 0.01, "seed": 3}
    plain = train_plain(**arguments)
    ours = train(cwd=0.0, **arguments)
    for expected, got in zip(rows(plain), rows(ours), strict=True):
        assert all(got[name] == value for name, value in expected.items() if name != "time")
        assert all(got[f"train/{term}"] == 0 for term in TERMS)
    for model in ("model", "ema.ema"):
        expected, got = (dict(_get(trainer, model).state_dict()) for trainer in (plain, ours))
        assert expected.keys() == got.keys()
        assert all(torch.equal(expected[k], got[k]) for k in expected)


def _get(trainer: Any, path: str) -> nn.Module:
    for name in path.split("."):
        trainer = getattr(trainer, name)
    return trainer


def test_the_student_moves_to_the_teachers_maps(train: Train, tmp_path: Path) -> None:
    """The distance is between the very maps: the same architecture, and adapters that change nothing."""
    torch.manual_seed(0)
    YOLO(model := narrow("yolov8n.yaml")).save(tmp_path / "teacher.pt")
    teacher = load_teacher(tmp_path / "teacher.pt")
    images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))

    def keep_adapters(trainer: CWDTrainer) -> None:
        for term in trainer.distillation.terms:
            nn.init.dirac_(term.adapter.weight)
            term.requires_grad_(False)

    def distance(cwd: float) -> float:
        trainer = train(
            model=model,
            teacher=str(tmp_path / "teacher.pt"),
            cwd=cwd,
            epochs=4,
            lr0=5e-3,
            seed=5,
            callbacks={"on_train_start": keep_adapters},
        )
        student = trainer.model.train()
        with torch.no_grad():
            pairs = zip(student_features(student(images)), teacher(images), strict=True)
            return sum(channel_wise_divergence(ours, theirs).item() for ours, theirs in pairs)

    alone, taught = distance(0.0), distance(50.0)
    assert taught < 0.7 * alone


def test_adapters_learn_and_the_teacher_does_not(train: Train) -> None:
    before: dict[str, list[torch.Tensor]] = {}

    def remember(trainer: CWDTrainer) -> None:
        before["adapters"] = snapshot(list(trainer.distillation.terms.parameters()))
        before["teacher"] = snapshot(list(trainer.distillation.teacher.state_dict().values()))

    trainer = train(callbacks={"on_train_start": remember})
    assert [tuple(p.shape) for p in trainer.distillation.terms.parameters()] == [
        (32, 16, 1, 1),
        (64, 32, 1, 1),
        (128, 64, 1, 1),
    ]
    assert not any(
        torch.equal(a, b) for a, b in zip(before["adapters"], trainer.distillation.terms.parameters(), strict=True)
    )
    after = trainer.distillation.teacher.state_dict().values()
    assert all(torch.equal(a, b) for a, b in zip(before["teacher"], after, strict=True))


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW", "MuSGD", "auto"])
def test_adapters_follow_warmup_and_schedule(train: Train, optimizer: str) -> None:
    rates: list[tuple[float, float]] = []

    def note(trainer: CWDTrainer) -> None:
        plain = [g["lr"] for g in trainer.optimizer.param_groups[:-1] if g["param_group"] == "weight"]
        rates.append((trainer.optimizer.param_groups[-1]["lr"], min(plain)))
        assert trainer.optimizer.param_groups[-1]["params"] == list(trainer.distillation.terms.parameters())

    train(optimizer=optimizer, epochs=3, warmup_epochs=1, callbacks={"on_train_batch_end": note})
    assert rates[0][0] < rates[2][0] > rates[-1][0] > 0  # rises in warm-up, falls with the schedule
    assert all(ours == theirs for ours, theirs in rates)


@pytest.mark.usefixtures("drawn_pictures")
def test_terms_are_columns_of_training_only(train: Train) -> None:
    trainer = train(epochs=2, val=True, plots=True)
    names = list(rows(trainer)[0])
    first = names.index("train/P3_loss")
    assert [f"train/{term}" for term in TERMS] == names[first : first + 4]
    assert not [name for name in names[first:] if name.startswith(("metrics/", "val/", "lr/"))], "ours are the last"
    assert not [name for name in names if name.startswith("val/") and name.removeprefix("val/") in TERMS]
    for row in rows(trainer):
        levels = [row[f"train/{term}"] for term in TERMS[:3]]
        assert min(levels) > 0
        assert row["train/cwd_loss"] == pytest.approx(sum(levels), rel=1e-3)
    assert trainer.progress_string().split()[-3:] == ["cwd_loss", "Instances", "Size"]
    assert (trainer.save_dir / "results.png").stat().st_size > 10_000
    assert (trainer.save_dir / "train_batch0.jpg").exists()


def test_settings_are_written_beside_the_arguments(train: Train) -> None:
    trainer = train(tau=2.0, levels="P4,P5", level_weights=(1, 0.5), schedule="cosine")
    written = yaml.safe_load((trainer.save_dir / "cwd.yaml").read_text())
    assert written["teacher"] == TEACHER
    assert (written["tau"], written["levels"], written["level_weights"]) == (2.0, [16, 32], [1.0, 0.5])
    names = list(rows(trainer)[0])
    assert names[names.index("train/P4_loss") :][:3] == ["train/P4_loss", "train/P5_loss", "train/cwd_loss"]
    assert "train/P3_loss" not in names
    assert not {"teacher", "tau", "levels"} & yaml.safe_load((trainer.save_dir / "args.yaml").read_text()).keys()


def test_the_weight_follows_its_schedule(train: Train) -> None:
    weights: list[float] = []
    trainer = train(
        cwd=8.0,
        schedule="linear",
        cwd_final=0.0,
        epochs=3,
        callbacks={"on_train_epoch_end": lambda trainer: weights.append(trainer.distillation.criterion.weight)},
    )
    assert weights == [8.0, 4.0, 0.0]
    assert rows(trainer)[-1]["train/cwd_loss"] == 0


class _Times(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor


def test_checkpoints_are_plain_at_every_moment(train: Train, train_plain: Callable[..., Any]) -> None:
    def sizes(trainer: Any) -> None:
        trainer.noted = [*getattr(trainer, "noted", []), trainer.last.stat().st_size]

    ours = train(epochs=2, save_period=1, val=True, callbacks={"on_model_save": sizes})
    plain = train_plain(epochs=2, save_period=1, val=True)
    reference = torch.load(plain.wdir / "epoch1.pt", weights_only=False)
    for name in ("epoch0.pt", "epoch1.pt", "last.pt", "best.pt"):
        file, expected = ours.wdir / name, plain.wdir / name
        assert file.stat().st_size == pytest.approx(expected.stat().st_size, rel=0.01)
        checkpoint = torch.load(file, weights_only=False)
        model = checkpoint.get("ema") or checkpoint["model"]
        assert type(model) is DetectionModel
        assert model.state_dict().keys() == reference["ema"].state_dict().keys()
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        assert getattr(model, "criterion", None) is None
    optimizer = torch.load(ours.wdir / "epoch1.pt", weights_only=False)["optimizer"]
    assert [len(g["params"]) for g in optimizer["param_groups"]] == [
        len(g["params"]) for g in reference["optimizer"]["param_groups"]
    ]
    assert ours.noted[0] == pytest.approx((plain.wdir / "epoch0.pt").stat().st_size, rel=0.01)
    assert len(ours.optimizer.param_groups) == len(reference["optimizer"]["param_groups"]) + 1


def test_plain_ultralytics_resumes_a_distilled_run(train: Train, data: str) -> None:
    ours = train(epochs=3, save_period=1)
    plain = DetectionTrainer(overrides={"resume": str(ours.wdir / "epoch1.pt"), "data": data})
    plain.train()
    assert plain.start_epoch == 2
    assert type(plain.model) is DetectionModel


def test_a_teacher_that_breaks_does_not_break_the_student(
    train: Train, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ultralytics.utils.LOGGER.propagate", True)

    def overflow(trainer: CWDTrainer) -> None:
        if trainer.epoch == 1:
            trainer.distillation.teacher.register_forward_hook(lambda module, images, maps: [m / 0 for m in maps])

    trainer = train(epochs=3, callbacks={"on_train_epoch_start": overflow})
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    assert all(row["train/box_loss"] > 0 for row in rows(trainer))
    assert [row["train/cwd_loss"] == 0 for row in rows(trainer)] == [False, True, True]
    message = "6 terms of this epoch were not finite and have been left out"  # 2 batches of 3 levels
    assert len({record.created for record in caplog.records if message in record.getMessage()}) == 2


def test_a_teacher_that_is_broken_from_the_start_stops_the_training(train: Train) -> None:
    def overflow(trainer: CWDTrainer) -> None:
        trainer.distillation.teacher.register_forward_hook(lambda module, images, maps: [m / 0 for m in maps])

    with pytest.raises(ConfigError, match="teaches nothing, since no divergence so far is finite; give amp=False"):
        train(epochs=9, callbacks={"on_train_start": overflow})


def test_out_of_memory_is_retried_with_half_the_batch(train: Train) -> None:
    sizes: list[int] = []

    def fail(module: nn.Module, images: Any) -> None:
        sizes.append(len(images[0]))
        if len(sizes) == 1:
            raise RuntimeError("CUDA out of memory")

    trainer = train(callbacks={"on_train_start": lambda t: t.distillation.teacher.register_forward_pre_hook(fail)})
    assert sizes == [4, 2, 2, 2, 2]
    assert trainer.batch_size == 2
    assert all(0 < row[f"train/{term}"] < 1e3 for row in rows(trainer) for term in TERMS)


def test_recovery_from_a_nan_loss(train: Train) -> None:
    """Ultralytics reloads last.pt; the adapters go back with it, the teacher stays out of the EMA."""

    def poison(trainer: CWDTrainer) -> None:
        if trainer.epoch == 1 and not trainer.nan_recovery_attempts:
            trainer.loss = torch.tensor(float("nan"))
            with torch.no_grad():
                next(trainer.distillation.terms.parameters()).fill_(float("nan"))

    trainer = train(epochs=3, callbacks={"on_train_epoch_end": poison})
    assert [row["epoch"] for row in rows(trainer)] == [1, 2, 3]
    assert not isinstance(getattr(trainer.ema.ema, "criterion", None), CWDLoss)
    assert trainer.optimizer.param_groups[-1]["params"] == list(trainer.distillation.terms.parameters())
    assert all(p in trainer.optimizer.state and p.isfinite().all() for p in trainer.distillation.terms.parameters())


def mosaics(trainer: CWDTrainer) -> list[float]:
    """The probabilities of the mosaics among the training transforms."""
    transforms = [trainer.train_loader.dataset.transforms]
    found = []
    for transform in transforms:
        transforms.extend(getattr(transform, "transforms", None) or [])
        if type(transform).__name__ == "Mosaic":
            found.append(transform.p)
    return found


def test_patience(train: Train) -> None:
    def no_progress(trainer: CWDTrainer) -> None:
        trainer.validate = lambda: ({}, 0.5)
        trainer.best_fitness = 0.5

    trainer = train(
        patience=1, epochs=9, val=True, callbacks={"on_train_start": no_progress, "on_fit_epoch_end": no_progress}
    )
    assert trainer.epoch + 1 == 2


def test_mixed_precision(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ultralytics has bfloat16 on GPUs only; the same autocast runs on a CPU."""
    seen: dict[str, torch.dtype] = {}

    def note(trainer: CWDTrainer) -> None:
        for name, layer in {
            "student": trainer.model.model[2].conv,
            "adapter": trainer.distillation.terms[0].adapter,
        }.items():
            layer.register_forward_hook(lambda module, inputs, maps, name=name: seen.update({name: maps.dtype}))

    monkeypatch.setattr(
        "ultralytics.engine.trainer.autocast", lambda *a, **k: torch.autocast("cpu", dtype=torch.bfloat16)
    )
    trainer = train(callbacks={"on_train_start": note})
    assert seen == {"student": torch.bfloat16, "adapter": torch.float32}
    assert 0 < rows(trainer)[0]["train/cwd_loss"] < 1e3
    assert {p.dtype for p in trainer.distillation.terms.parameters()} == {torch.float32}


def test_the_teacher_chooses_its_precision(train: Train) -> None:
    trainer = train(teacher_dtype="bf16")
    assert {p.dtype for p in trainer.distillation.teacher.parameters()} == {torch.bfloat16}
    assert yaml.safe_load((trainer.save_dir / "cwd.yaml").read_text())["teacher_dtype"] == "bf16"
    assert train(teacher_dtype="auto").distillation.teacher.precision.error < 0.02


@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_adapters_are_clipped_by_their_own_norm_whatever_the_loss_scale(train: Train, scale: float) -> None:
    norms: list[float] = []

    def scaled(trainer: CWDTrainer) -> None:
        trainer.scaler, step = torch.amp.GradScaler("cpu", init_scale=scale), trainer.optimizer.step

        def note(*args: Any, **kwargs: Any) -> Any:
            norms.append(torch.cat([p.grad.flatten() for p in trainer.distillation.terms.parameters()]).norm().item())
            return step(*args, **kwargs)

        trainer.optimizer.step = note

    train(cwd=1e6, adapter="conv", callbacks={"on_train_start": scaled})
    assert norms == pytest.approx([10.0, 10.0], rel=1e-3)


def test_a_resting_teacher_costs_nothing(train: Train) -> None:
    def refuse(trainer: CWDTrainer) -> None:
        trainer.distillation.teacher.body = None

    trainer = train(cwd=0, teacher_dtype="bf16", callbacks={"on_train_start": refuse})
    assert trainer.distillation.teacher.precision.name == "fp32", "not calibrated"


ARGUMENTS: dict[str, tuple[dict[str, Any], Callable[[CWDTrainer], bool]]] = {
    "batch": ({"batch": 2}, lambda t: len(t.train_loader) == 4),
    "multi_scale": ({"multi_scale": 0.5}, lambda t: t.args.multi_scale == 0.5),
    "rect": ({"rect": True}, lambda t: t.train_loader.dataset.rect),
    "freeze": ({"freeze": 3}, lambda t: not next(t.model.model[2].parameters()).requires_grad),
    "nbs": ({"nbs": 8}, lambda t: t.accumulate == 2),
    "single_cls": ({"single_cls": True}, lambda t: t.model.nc == 1),
    "close_mosaic": ({"epochs": 2, "close_mosaic": 1}, lambda t: mosaics(t) == [0.0]),
    "fraction": ({"fraction": 0.5}, lambda t: len(t.train_loader.dataset) == 4),
    "cache": ({"cache": "ram"}, lambda t: t.train_loader.dataset.cache == "ram"),
    "time": ({"time": 0.0005, "epochs": 50}, lambda t: 0 < t.epoch + 1 < 50),
    "save_period": ({"save_period": 1}, lambda t: (t.wdir / "epoch0.pt").exists()),
    "val": ({"val": True}, lambda t: rows(t)[0]["val/box_loss"] > 0),
    "cos_lr": ({"cos_lr": True, "epochs": 2}, lambda t: t.args.cos_lr),
    "cls_pw": ({"cls_pw": 0.5}, lambda t: t.distillation.criterion.class_weights is not None),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_ultralytics_arguments_work_with_distillation(train: Train, name: str) -> None:
    arguments, holds = ARGUMENTS[name]
    trainer = train(**arguments)
    assert holds(trainer)
    assert all(0 < row[f"train/{term}"] < 1e3 for row in rows(trainer) for term in TERMS)


FAMILIES = {
    "yolov3-tiny.yaml": "P4 P5",
    "yolov3.yaml": "P3 P4 P5",
    "yolov5n.yaml": "P3 P4 P5",
    "yolov5n-p6.yaml": "P3 P4 P5 P6",
    "yolov6n.yaml": "P3 P4 P5",
    "yolov8n.yaml": "P3 P4 P5",
    "yolov8n-p2.yaml": "P2 P3 P4 P5",
    "yolov8n-p6.yaml": "P3 P4 P5 P6",
    "yolov9t.yaml": "P3 P4 P5",
    "yolov10n.yaml": "P3 P4 P5",
    "yolo11n.yaml": "P3 P4 P5",
    "yolo12n.yaml": "P3 P4 P5",
    "yolo26n.yaml": "P3 P4 P5",
    "yolo26n-p2.yaml": "P2 P3 P4 P5",
    "yolo26n-p6.yaml": "P3 P4 P5 P6",
}


@pytest.mark.parametrize(("student", "teacher"), [*pairwise([*FAMILIES, *FAMILIES][: len(FAMILIES) + 1])])
def test_every_family_in_both_roles(train: Train, student: str, teacher: str) -> None:
    """Each learns from the next one, and so is a teacher as well."""
    steps: list[dict[str, float]] = []

    def note(trainer: CWDTrainer) -> None:
        steps.append(trainer.distillation.criterion.columns["loss"])

    def small(name: str) -> str:
        return narrow(name, 1 if name == "yolo12n.yaml" else 0.25)  # whose attention takes multiples of 32 channels

    trainer = train(model=small(student), teacher=small(teacher), callbacks={"on_train_batch_end": note})
    common = set(FAMILIES[student].split()) & set(FAMILIES[teacher].split())
    assert len(steps) == 2
    for items in steps:
        assert list(items) == sorted(common)
        assert all(0 < value < 1e3 for value in items.values())
    assert type(torch.load(trainer.last, weights_only=False)["ema"]) is DetectionModel


def test_python_api_of_ultralytics(data: str, tmp_path: Path, checkpoints: Path) -> None:
    teacher = YOLO(checkpoints / "small.pt")
    head = teacher.model.model[-1]
    model = YOLO(STUDENT)
    arguments = {"imgsz": 64, "batch": 4, "epochs": 1, "plots": False, "project": str(tmp_path), "verbose": False}
    model.train(trainer=CWDTrainer, teacher=teacher, data=data, cwd=3.0, adapter="conv", **arguments)
    assert rows(model.trainer)[0]["train/cwd_loss"] > 0
    assert teacher.model.model[-1] is head
    assert type(model.model) is DetectionModel
    again = YOLO(model.trainer.best)
    again.train(data=data, **arguments)  # and on without a teacher
    assert type(again.trainer) is DetectionTrainer


def test_options_in_a_configuration_file(data: str, tmp_path: Path, train: Train) -> None:
    file = tmp_path / "my.yaml"
    file.write_text(yaml.safe_dump({"teacher": TEACHER, "tau": 3.0, "imgsz": 64, "data": data}))
    trainer = CWDTrainer(cfg=str(file), overrides={"student": STUDENT, "tau": 2.0, "project": str(tmp_path)})
    assert (trainer.settings.tau, trainer.args.imgsz, str(trainer.args.model)) == (2.0, 64, STUDENT)


def test_a_training_that_cannot_start_leaves_no_folder(train: Train, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="level_weights"):
        train(level_weights=(1, 2))
    with pytest.raises(RuntimeError, match="froze the entire model"):
        train(freeze=100)
    assert not (tmp_path / "runs").exists()


def test_a_folder_that_was_there_before_stays(train: Train, tmp_path: Path) -> None:
    kept = tmp_path / "runs" / "mine" / "notes.txt"
    kept.parent.mkdir(parents=True)
    kept.write_text("keep")
    with pytest.raises(ConfigError, match="level_weights"):
        train(name="mine", exist_ok=True, level_weights=(1, 2))
    assert kept.read_text() == "keep"


def test_two_runs_begun_at_once_get_folders_of_their_own(data: str, tmp_path: Path) -> None:
    def begin(_: int) -> CWDTrainer:
        return CWDTrainer(overrides={**TAUGHT, **SHORT, "data": data, "project": str(tmp_path / "runs")})

    with ThreadPoolExecutor(4) as pool:
        folders = [trainer.save_dir.name for trainer in pool.map(begin, range(4))]
    assert sorted(folders) == ["train", "train-2", "train-3", "train-4"]


@pytest.mark.parametrize("names", [None, "coco"])
def test_advice_on_classes(
    train: Train,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    checkpoints: Path,
    data: str,
    names: str | None,
) -> None:
    monkeypatch.setattr("ultralytics.utils.LOGGER.propagate", True)
    teacher = YOLO(checkpoints / "small.pt")
    teacher.model.names = {0: names} if names else yaml.safe_load(Path(data).read_text())["names"]
    train(teacher=teacher, verbose=True)
    assert ("does not know 0, 1, 2, 3 and 6 more" in caplog.text) == (names is not None)


@pytest.mark.slow
def test_many_steps_leak_nothing(train: Train) -> None:
    seen: list[tuple[float, int, int]] = []

    def look(trainer: CWDTrainer) -> None:
        if trainer.epoch not in {10, 30}:
            return
        gc.collect()
        modules = [
            *trainer.model.modules(),
            *trainer.distillation.teacher.modules(),
            *trainer.distillation.terms.modules(),
        ]
        hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in modules)
        tensors = sum(isinstance(o, torch.Tensor) for o in gc.get_objects())
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        seen.append((pages, tensors, hooks))

    train(epochs=31, batch=2, nbs=2, save=False, callbacks={"on_train_epoch_end": look})  # 4 steps an epoch
    (pages, tensors, hooks), (pages_later, tensors_later, hooks_later) = seen
    assert pages_later < 1.01 * pages
    assert tensors_later <= tensors
    assert hooks_later == hooks == 0
