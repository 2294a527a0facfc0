"""First measurements, and what fitting leaves untouched."""

from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from ultralytics.data.dataset import YOLODataset

from yolo_cwd.method import prepare
from yolo_cwd.method.distillation import Distillation
from yolo_cwd.method.prepare import _squares, some_images, statistics_untouched


def maps(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("gradient", [1e-9, 1e3])
def test_half_precision_gradients_are_measured_under_the_loss_scale(gradient: float) -> None:
    """Too small for float16 without a scale, or too large with it; a smaller one is then taken."""
    leaf = torch.ones(1, 2, 3, 3, requires_grad=True)
    maps = leaf.half()
    parts: list[Any] = [(maps.float() * factor).sum() for factor in (1e3 * gradient, gradient)]
    squares = _squares(parts[0], parts[1:], [maps], 1.0)
    assert squares.isfinite().all() == (gradient < 1)
    scale = 65536.0
    while not (squares := _squares(parts[0], parts[1:], [maps], scale)).isfinite().all():
        scale /= 16
    assert squares.sqrt().tolist() == [pytest.approx([1e3 * gradient * 18**0.5, gradient * 18**0.5], rel=0.01)]


def test_fitting_leaves_no_trace_in_the_student() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    model[1].train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    with statistics_untouched(model):
        assert model.training
        model(maps(2, 3, 4, 4, seed=0))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model[1].momentum == 0.1
    assert [m.training for m in model.modules()] == modes


@pytest.mark.parametrize(("size", "taken"), [(64, 16), (16, 16), (4, 4)])
def test_preparation_reads_few_images(size: int, taken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    used: list[Any] = []

    def batches(size: int) -> Iterator[dict[str, Any]]:
        while True:
            read.append(size)
            yield {}

    monkeypatch.setattr(prepare, "fit", lambda criterion, student, teacher, batches: used.extend(batches))
    monkeypatch.setattr(prepare, "measure", lambda criterion, student, teacher, batch, scale: used.append(batch))
    balanced: Any = SimpleNamespace(is_balanced=True)
    prepare.fit_and_measure(balanced, nn.Identity(), balanced, batches, size, nullcontext, 1.0)
    assert read == [taken] * len(used)
    assert sum(read) <= 160


def sample(objects: int, seed: int, kind: str) -> dict[str, Any]:
    """An image of so many objects, as Ultralytics' data sets return it before it is put into a batch."""
    made = {"img": maps(3, 8, 8, seed=seed), "im_file": f"{seed}.jpg", "ori_shape": (8, 8)}
    made |= {
        "batch_idx": torch.zeros(objects),
        "cls": torch.full((objects, 1), seed),
        "bboxes": maps(objects, 4, seed=seed),
    }
    more = {
        "boxes": {},
        "key points": {"keypoints": maps(objects, 5, 3, seed=seed)},
        "a mask of all objects": {"masks": maps(1, 4, 4, seed=seed), "sem_masks": maps(4, 4, seed=seed)},
        "masks": {"masks": maps(objects, 4, 4, seed=seed)},
        "a class map": {"semantic_mask": maps(8, 8, seed=seed)},
    }
    return {**made, **more[kind]}


@pytest.mark.parametrize("kind", ["boxes", "key points", "a mask of all objects", "masks", "a class map"])
def test_half_a_batch_is_the_batch_of_half_of_the_images(kind: str) -> None:
    samples = [sample(objects, seed, kind) for seed, objects in enumerate((2, 0, 3, 2))]
    half, expected = some_images(YOLODataset.collate_fn(samples)), YOLODataset.collate_fn(samples[:2])
    assert half.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(half[name], value) if isinstance(value, torch.Tensor) else half[name] == value


def test_as_many_masks_as_images_are_not_parted() -> None:
    batch = YOLODataset.collate_fn([sample(1, seed, "masks") for seed in range(4)])
    assert len(some_images(batch)["img"]) == 4
    assert [len(some_images({"img": torch.zeros(n, 3, 8, 8)})["img"]) for n in (1, 2, 3, 5)] == [1, 2, 2, 3]


@pytest.mark.parametrize(("images", "measured"), [(64, 16), (8, 4), (1, 1)])
def test_gradients_are_measured_on_few_images(images: int, measured: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a compiled student the measurement runs one that is not, and may need more memory than a step."""
    seen: list[int] = []
    monkeypatch.setattr(prepare, "measure", lambda *words: seen.append(len(words[3]["img"])))
    made: Any = SimpleNamespace(
        criterion=SimpleNamespace(weight=1.0, unmeasured=[]),
        settings=SimpleNamespace(balanced=True),
        teacher=SimpleNamespace(maps=len),
        _batches=0,
    )
    batch: dict[str, Any] = {"img": torch.zeros(images, 3, 8, 8)}
    for _ in range(2):
        Distillation.teach(made, batch, nn.Identity(), True, float)
    assert seen == [measured]
    assert batch["teacher"].take() == images
