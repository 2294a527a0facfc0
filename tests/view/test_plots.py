"""The pictures of a run and its sentences: what they show, and that drawing them changes nothing."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import pictures
import pytest
import torch
from conftest import TEACHER
from test_state import interrupted, resume
from test_trainer import TERMS, rows
from ultralytics.utils.callbacks.base import default_callbacks

from yolo_cwd import CWDTrainer
from yolo_cwd.config import Settings
from yolo_cwd.method.divergence import channel_wise_divergence
from yolo_cwd.method.parts import divergences
from yolo_cwd.method.terms import StudentMaps
from yolo_cwd.run.state import FILE
from yolo_cwd.tasks import TASKS
from yolo_cwd.view import plots
from yolo_cwd.view.plots import channel_divergences, look, most_divergent, probability_maps, probe_images
from yolo_cwd.view.report import outcome, read_curves

Train = Callable[..., CWDTrainer]
ANSI = re.compile(r"\x1b\[[0-9;]*[a-zA-Z]")


def maps(*shape: int, seed: int) -> torch.Tensor:
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pictures_of(trainer: CWDTrainer) -> list[str]:
    return sorted(f.name for f in trainer.save_dir.glob("cwd_*"))


@pytest.fixture(autouse=True)
def only_ours(drawn_pictures: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw our pictures and leave out those of Ultralytics; test_trainer.py has all of them."""
    pictures.only_ours(monkeypatch)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What our own lines have said since the last call."""
    monkeypatch.setattr("ultralytics.utils.LOGGER.propagate", True)

    def lines() -> list[str]:
        messages = dict.fromkeys((r.created, ANSI.sub("", r.getMessage())) for r in caplog.records)
        caplog.clear()
        return [text.removeprefix("CWD: ") for _, text in messages if text.startswith("CWD: ")]

    return lines


def test_probability_maps_sum_to_one() -> None:
    probabilities = probability_maps(maps(2, 3, 4, 5, seed=0), tau=2.0)
    assert probabilities.shape == (2, 3, 4, 5)
    assert torch.allclose(probabilities.sum((2, 3)), torch.ones(2, 3))


@pytest.mark.parametrize("tau", [1.0, 3.0])
def test_the_channels_add_up_to_the_criterions_value(tau: float) -> None:
    student, teacher = maps(2, 5, 6, 6, seed=1), maps(2, 5, 6, 6, seed=2)
    divergence = channel_divergences(student, teacher, tau)
    assert divergence.shape == (2, 5)
    assert divergence.mean().item() == pytest.approx(channel_wise_divergence(student, teacher, tau).item(), rel=1e-5)


def test_a_channel_by_hand() -> None:
    """Two positions: the teacher has 3/4 and 1/4, the student one half each."""
    teacher = torch.tensor([[[[math.log(3.0), 0.0]], [[0.0, 0.0]]]])  # the second channel agrees
    divergence = channel_divergences(torch.zeros(1, 2, 1, 2), teacher, tau=1.0)
    assert divergence[0].tolist() == pytest.approx([0.75 * math.log(1.5) + 0.25 * math.log(0.5), 0.0], abs=1e-6)


def test_the_channels_of_most_divergence_are_picked() -> None:
    divergence = torch.tensor([[0.1, 0.9, 0.4, math.nan], [0.1, 0.1, 0.8, 5.0]])  # means 0.1, 0.5, 0.6, none
    assert most_divergent(divergence, 3) == [2, 1, 0]


def test_what_is_seen_is_what_the_criterion_compares(train: Train) -> None:
    trainer = train(tau=2.0)
    for parameter in trainer.distillation.terms.parameters():
        parameter.data.mul_(1e3)  # an untrained network's maps are almost constant
    dataset = trainer.test_loader.dataset
    images = probe_images(dataset, 64)
    assert images.shape == (4, 3, 64, 64)
    expected_image = cv2.cvtColor(dataset.load_image(2)[0], cv2.COLOR_BGR2RGB)
    assert torch.equal((images[2] * 255).round().byte().permute(1, 2, 0), torch.from_numpy(expected_image))
    views = look(trainer, images)
    features: list[torch.Tensor] = []
    handle = trainer.ema.ema.model[-1].register_forward_pre_hook(lambda module, inputs: features.extend(inputs[0]))
    with torch.no_grad():
        trainer.ema.ema(images)
        student, teacher = StudentMaps(features, None), trainer.distillation.teacher.maps(images)
        expected = divergences(trainer.distillation.criterion.pairs(student, teacher))
    handle.remove()
    assert [view.name for view in views] == ["P3", "P4", "P5"]
    assert [view.divergence.mean().item() for view in views] == pytest.approx([x.item() for x in expected], rel=1e-4)
    for view in views:
        p, q, n = view.teacher[0, 0], view.student[0, 0], view.channels[0]
        assert (4 * p * (p / q).log()).sum().item() == pytest.approx(view.divergence[0, n].item(), rel=1e-3)


def test_a_run_draws_its_pictures_and_trains_the_same(
    train: Train, monkeypatch: pytest.MonkeyPatch, said: Callable[[], list[str]]
) -> None:
    drawn: dict[str, Any] = {}
    at_end: list[list[str]] = []
    monkeypatch.setitem(default_callbacks, "on_train_end", [lambda trainer: at_end.append(pictures_of(trainer))])
    for name in ("draw_levels", "draw_channels"):
        draw = getattr(plots, name)
        monkeypatch.setattr(plots, name, lambda *a, name=name, draw=draw: (drawn.update({name: a}), draw(*a)))
    arguments = {"epochs": 2, "val": True, "mosaic": 1.0, "seed": 4, "schedule": "cosine"}
    bare, full = train(**arguments), train(**arguments, plots=True)
    assert said() == [], "verbose=False"
    assert pictures_of(bare) == []
    assert pictures_of(full) == ["cwd_channels.png", "cwd_levels.png", "cwd_maps_epoch1.jpg", "cwd_maps_epoch2.jpg"]
    assert at_end == [[], pictures_of(full)], "loggers collect them then"
    for name in pictures_of(full):
        assert full.save_dir / name in full.plots, "loggers read them there"
        assert cv2.imread(str(full.save_dir / name)).std() > 10
    for model in (lambda t: t.model, lambda t: t.ema.ema, lambda t: t.distillation.terms):
        expected, got = model(bare).state_dict(), model(full).state_dict()
        assert all(torch.equal(expected[k], got[k]) for k in expected)
    assert [r["train/cwd_loss"] for r in rows(bare)] == [r["train/cwd_loss"] for r in rows(full)]
    _, curves = drawn["draw_levels"]
    assert (curves.epochs, curves.weight) == ([1, 2], [100, 0])
    _, start, views, epoch = drawn["draw_channels"]
    assert (list(start), epoch) == (["P3", "P4", "P5"], 2)
    assert all(
        start[v.name].shape == v.divergence.shape and not torch.equal(start[v.name], v.divergence) for v in views
    )


def test_a_resumed_run_knows_its_start_and_its_student(
    train: Train, tmp_path: Path, said: Callable[[], list[str]]
) -> None:
    last = interrupted(train, tmp_path, 1, epochs=2, plots=True, verbose=True)
    said()
    kept = torch.load(last.parent / FILE, weights_only=True)["start"]
    trainer = resume(last)
    assert said()[0].startswith(f"yolov8n learns P3, P4, P5 from {TEACHER} ")
    assert list(kept) == ["P3", "P4", "P5"]
    assert all(torch.equal(kept[name], trainer.state.start[name]) for name in kept)
    assert pictures_of(trainer) == ["cwd_channels.png", "cwd_levels.png", "cwd_maps_epoch1.jpg", "cwd_maps_epoch2.jpg"]
    assert not (last.parent / FILE).exists()


def test_a_picture_that_fails_does_not_fail_the_training(
    train: Train, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*arguments: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("ultralytics.utils.LOGGER.propagate", True)
    monkeypatch.setattr(plots, "draw_levels", fail)
    trainer = train(plots=True, save=False)
    assert "no pictures of the distillation: OSError: no space left" in caplog.text
    assert trainer.save_dir / "cwd_levels.png" not in trainer.plots


def test_curves_take_the_weights_out(tmp_path: Path) -> None:
    table = tmp_path / "results.csv"
    table.write_text(
        "epoch,train/box_loss,train/cls_loss,train/P3_loss,train/P4_loss,train/cwd_loss,train/cwd_weight,"
        "train/P3_nats,train/P4_nats,"
        "metrics/mAP50-95(B)\n1,3,2,8,1,9,10,0.8,0.2,0.1\n2,2,2,2,0.5,2.5,5,0.4,0.2,0.3\n3,1,2,0,0,0,0,0,0,0.2\n"
    )
    curves = read_curves(table, {"P3": 1.0, "P4": 0.5}, TASKS["detect"].score)
    assert curves.task == [5, 4, 3]
    assert curves.divergence["P3"][:2] == pytest.approx([0.8, 0.4])
    assert curves.divergence["P4"][:2] == pytest.approx([0.2, 0.2])
    assert math.isnan(curves.divergence["P3"][2])
    assert outcome(curves, TASKS["detect"].score) == (
        "best mAP50-95 0.300 in epoch 2; divergence from the teacher, epoch 1 to 2: "
        "P3 0.8 to 0.4 (-50 %), P4 0.2 to 0.2 (+0 %)"
    )


def test_the_best_error_is_the_least(tmp_path: Path) -> None:
    table = tmp_path / "results.csv"
    columns = "epoch,train/dlog_loss,train/P3_loss,train/cwd_loss,train/cwd_weight,metrics/abs_rel"
    table.write_text(f"{columns}\n1,1,1,1,1,0.5\n2,1,1,1,1,0\n3,1,1,1,1,0.25\n")  # epoch 2 was not validated
    score = TASKS["depth"].score
    said = outcome(read_curves(table, {"P3": 1.0}, score), score)
    assert said.startswith("best relative error 0.250 in epoch 3")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cwd": 100, "schedule": "constant"}, "weight 100"),
        ({}, "gradient share 1 falling to 0 (cosine)"),
        ({"schedule": "linear", "cwd": 8, "cwd_final": 0.5}, "weight 8 falling to 4 (linear)"),
        ({"cwd": "balanced", "share": 0.25, "cwd_final": 0.5}, "gradient share 0.25 falling to 0.125 (cosine)"),
    ],
)
def test_the_weights_course_in_words(options: dict[str, Any], words: str) -> None:
    assert Settings.parse({"teacher": "t", **options}).describe_schedule() == words


def test_a_run_says_what_it_distils_and_what_came_of_it(
    train: Train, said: Callable[[], list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    train(epochs=3, verbose=True, levels="P3,P4", level_weights=(1, 0.5), val=True, schedule="cosine")
    assert f"teacher={TEACHER}: a model file has random weights, and teaches nothing" in caplog.text
    first, score, last = said()
    assert first == (
        f"yolov8n learns P3, P4 from {TEACHER} (0.7M parameters, fp32), weight 100 falling to 0 "
        "(cosine), tau 1, level weights 1 0.5"
    )
    assert score == "the teacher has no score here: it is not trained"
    change = r"[\d.e-]+ to [\d.e-]+ \([+-]\d+ %\)"
    course = f"divergence from the teacher, epoch 1 to 2: P3 {change}, P4 {change}"
    assert re.fullmatch(rf"(best mAP50-95 0\.\d+ in epoch \d|mAP50-95 0); {course}", last)


def test_without_weight_the_run_says_so_and_draws_nothing(train: Train, said: Callable[[], list[str]]) -> None:
    trainer = train(verbose=True, cwd=0, plots=True)
    assert said()[0] == "cwd=0: nothing is distilled, yolov8n trains as it would without a teacher"
    assert pictures_of(trainer) == []


def test_the_progress_bar_is_narrow(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = train(verbose=True)
    header = trainer.progress_string().lstrip("\n")
    lines = ANSI.sub("", capsys.readouterr().out).replace("\r", "\n").splitlines()
    described = [line.partition(": ")[0] for line in lines if line.lstrip().startswith("1/1 ")]
    assert header.split() == ["Epoch", "GPU_mem", "box_loss", "cls_loss", "dfl_loss", "cwd_loss", "Instances", "Size"]
    assert described
    assert {len(line) for line in (header, *described)} == {88}
    assert {f"train/{term}" for term in TERMS} <= rows(trainer)[0].keys(), "the levels are in results.csv"
