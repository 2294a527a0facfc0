# SPDX-License-Identifier: AGPL-3.0-or-later
"""Pictures of what is distilled, for the run folder: the curves, the maps of teacher and student, and their distance.

The maps show a few validation images as the averaged student (EMA) sees them through the adapters, without gradient.
The EMA is what the checkpoints hold, and is always in evaluation mode. Drawing changes nothing in the training: no
mode, no statistics, no random number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec

import numpy as np
import torch
from torch import Tensor
from ultralytics.data.augment import LetterBox
from ultralytics.utils import plt_settings

from yolo_cwd.log import warn
from yolo_cwd.method.divergence import log_distribution
from yolo_cwd.method.fpn import head_inputs
from yolo_cwd.method.terms import LevelTerm
from yolo_cwd.view.report import Curves, read_curves

# Distinguishable for color-blind readers (Okabe and Ito).
COLORS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
P = ParamSpec("P")
IMAGES = 4  # validation images to show
CHANNELS = 1  # channels to show per level
START, END = COLORS[5], COLORS[1]


class View(NamedTuple):
    """One level as teacher and student see it.

    Attributes:
        name: The level's name.
        divergence: Divergence of every channel on every image [N, C], in nats.
        channels: The K channels to show.
        teacher: The teacher's probability maps for them [N, K, H, W].
        student: The student's.
    """

    name: str
    divergence: Tensor
    channels: list[int]
    teacher: Tensor
    student: Tensor


def drawn(draw: Callable[P, None]) -> Callable[P, None]:
    """Make a function draw with Ultralytics' fonts and backend."""
    decorated: Callable[P, None] = plt_settings({"font.size": 11})(draw)
    return decorated


@contextmanager
def never_fatal(what: str) -> Iterator[None]:
    """Turn an error into a warning: a failed picture must not end a training."""
    try:
        yield
    except Exception as error:
        warn(f"no {what}: {type(error).__name__}: {error}")


def channel_divergences(student: Tensor, teacher: Tensor, tau: float) -> Tensor:
    """Return the divergence of every channel [N, C] of maps [N, C, H, W]; the mean is the criterion's value."""
    log_q, log_p = log_distribution(student, tau), log_distribution(teacher, tau)  # [N, C, HW]
    return (log_p.exp() * (log_p - log_q)).sum(-1).clamp_min(0) * tau**2


def probability_maps(maps: Tensor, tau: float) -> Tensor:
    """Return the probability of every position in each channel, [N, C, H, W]; each channel sums to 1."""
    return log_distribution(maps, tau).exp().view(maps.shape)


def most_divergent(divergence: Tensor, count: int = CHANNELS) -> list[int]:
    """Return the channels with the largest divergence, averaged over the images of [N, C], largest first."""
    order: list[int] = divergence.mean(0).nan_to_num(nan=-1.0).argsort(descending=True, stable=True).tolist()
    return order[:count]


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """Return some items, spread evenly over a sequence, so that none is hand-picked."""
    return [items[i] for i in sorted({i * len(items) // count for i in range(count)})]


def probe_images(dataset: Any, size: int) -> Tensor:
    """Return a few unaugmented images [N, C, size, size] in 0 to 1, spread over a data set of Ultralytics."""
    chosen = spread(range(len(dataset)), IMAGES)
    images = [LetterBox((size, size))(image=dataset.load_image(i)[0]) for i in chosen]  # [H, W, C], BGR
    images = [image[..., ::-1] if image.shape[-1] == 3 else image for image in images]
    return torch.from_numpy(np.stack(images).copy()).permute(0, 3, 1, 2) / 255


@torch.no_grad()
def look(trainer: Any, images: Tensor) -> list[View]:
    """Return each distilled level of some images, as seen by the teacher and, through the adapters, the student's EMA.

    The channels shown are those with the largest divergence before training, so they are the same throughout a run.

    Args:
        trainer: The `CWDTrainer`.
        images: Images [N, C, H, W] in 0 to 1.
    """
    student, criterion = trainer.ema.ema, trainer.distillation.criterion
    dtype = next(student.parameters()).dtype
    seen, taught = [], []
    for i in range(len(images)):  # one by one: less memory than a training step
        image = images[i : i + 1].to(trainer.device)
        seen.append([maps.float() for maps in head_inputs(student, image.to(dtype))])
        taught.append(trainer.distillation.teacher.maps(image).pyramid)
    features, pyramid = ([torch.cat(maps) for maps in zip(*x, strict=True)] for x in (seen, taught))
    views = []
    for term in _of_levels(criterion.terms):
        ours, theirs = term.adapter(features[term.level.student_index]), pyramid[term.level.teacher_index]
        divergence = channel_divergences(ours, theirs, trainer.settings.tau).cpu()
        channels = most_divergent(trainer.state.start.get(term.name, divergence))
        maps = [probability_maps(m[:, channels], trainer.settings.tau).cpu() for m in (theirs, ours)]
        views.append(View(term.name, divergence, channels, *maps))
    return views


def _of_levels(terms: Any) -> list[LevelTerm]:
    return [term for term in terms if isinstance(term, LevelTerm)]


def remember_start(trainer: Any) -> None:
    """Keep the divergence of every channel before training; a resumed run already has it."""
    if trainer.start_epoch == 0:
        with never_fatal("figures of the start"):
            views = look(trainer, probe_images(trainer.test_loader.dataset, trainer.args.imgsz))
            trainer.state.start = {view.name: view.divergence for view in views}


def show_first_epoch(trainer: Any) -> None:
    """Draw the maps after the first epoch."""
    if trainer.epoch == 0:
        with never_fatal("picture of the maps"):
            _show_maps(trainer)


def show_end(trainer: Any) -> None:
    """Draw the pictures of a complete training."""
    with never_fatal("pictures of the distillation"):
        curves, channels = trainer.save_dir / "cwd_levels.png", trainer.save_dir / "cwd_channels.png"
        course = read_curves(trainer.csv, trainer.distillation.shares, trainer.task.score)
        draw_levels(curves, course._replace(teacher=trainer.state.score))
        draw_channels(channels, trainer.state.start, _show_maps(trainer), trainer.epoch + 1)
        trainer.on_plot(curves)
        trainer.on_plot(channels)


def _show_maps(trainer: Any) -> list[View]:
    epoch = trainer.epoch + 1
    file = trainer.save_dir / f"cwd_maps_epoch{epoch}.jpg"
    images = probe_images(trainer.test_loader.dataset, trainer.args.imgsz)
    views = look(trainer, images)
    draw_maps(file, images, views, epoch)
    trainer.on_plot(file)  # for the loggers
    return views


@drawn
def draw_levels(file: Path, curves: Curves) -> None:
    """Draw divergence, loss terms, shares of the gradient and the score beside the teacher's over the epochs."""
    from matplotlib import pyplot as plt

    figure, (left, middle, right, last) = plt.subplots(1, 4, figsize=(18.5, 4.2), sharex=True, layout="constrained")
    colors = dict(zip(curves.terms, COLORS[1:], strict=False))
    middle.plot(curves.epochs, curves.task, ".-", color=COLORS[0], label="the task's own loss")
    for name, color in colors.items():
        left.plot(curves.epochs, curves.divergence[name], ".-", color=color, label=name)
        middle.plot(curves.epochs, curves.terms[name], ".-", color=color, label=f"{name}, weighted")
        right.plot(curves.epochs, curves.shares[name], ".-", color=color, label=name)
    left.set(title="Divergence from the teacher", ylabel="nats per channel (weight taken out)")
    middle.set(title="Terms of the training loss", ylabel="loss")
    right.set(title="Share of the gradient at the student's maps", ylabel="norm beside the task's own")
    _draw_score(last, curves)
    for axes in (left, middle, right, last):
        axes.set(xlabel="epoch", ylim=(0, None))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    left.legend()
    middle.legend()
    figure.savefig(file, dpi=120)
    plt.close(figure)


def _draw_score(axes: Any, curves: Curves) -> None:
    """Draw the student's score over the epochs that were validated, and the teacher's as a line."""
    known = [(epoch, 100 * value) for epoch, value in zip(curves.epochs, curves.score, strict=True) if value]
    axes.plot([epoch for epoch, _ in known], [value for _, value in known], ".-", color=COLORS[0], label="student")
    if curves.teacher is not None:
        axes.axhline(100 * curves.teacher, color=COLORS[1], ls="--", label="teacher")
    axes.set(title="Score by epoch, on the validation images", ylabel=f"{curves.label} (points)")
    axes.legend()


@drawn
def draw_maps(file: Path, images: Tensor, views: Sequence[View], epoch: int) -> None:
    """Draw images beside the maps of teacher and student: one row per image, two columns per channel."""
    from matplotlib import pyplot as plt

    pairs = [(view, k) for view in views for k in range(len(view.channels))]
    size = (2 * (1 + 2 * len(pairs)), 2.2 * len(images) + 1)
    figure, grid = plt.subplots(len(images), 1 + 2 * len(pairs), figsize=size, layout="constrained", squeeze=False)
    for row, image in enumerate(images):
        picture = (image[:3].permute(1, 2, 0) if len(image) >= 3 else image[0]).numpy()
        grid[row, 0].imshow(picture, cmap="gray", vmin=0, vmax=1)
        for column, (view, k) in enumerate(pairs):
            teacher, student = view.teacher[row, k], view.student[row, k]
            left, right = grid[row, 1 + 2 * column : 3 + 2 * column]
            for axes, who, maps in ((left, "teacher", teacher), (right, "student", student)):
                axes.imshow(maps.sqrt().numpy(), vmin=0, vmax=float(torch.stack([teacher, student]).max().sqrt()))
                axes.set_title(f"{view.name} channel {view.channels[k]}\n{who}" if row == 0 else "")
            right.set_xlabel(f"{float(view.divergence[row, view.channels[k]]):.2g} nats apart")
    grid[0, 0].set_title("validation\nimage")
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
    figure.suptitle(
        f"Where teacher and student look, after epoch {epoch}: the channel of each level that differed most before "
        "training\nbright: high probability (its square root, on one scale for each pair)"
    )
    figure.savefig(file, dpi=100)
    plt.close(figure)


@drawn
def draw_channels(file: Path, start: Mapping[str, Tensor], views: Sequence[View], epoch: int) -> None:
    """Draw the distribution of the channels' divergence before and after training, one panel per level.

    Args:
        file: The file to write.
        start: For each level, the divergence of every channel [N, C] before training, if known.
        views: The levels after training.
        epoch: The epoch after which they were seen.
    """
    from matplotlib import pyplot as plt

    figure, grid = plt.subplots(1, len(views), figsize=(4.7 * len(views), 4.2), layout="constrained", squeeze=False)
    for axes, view in zip(grid[0], views, strict=True):
        shown = [(f"after epoch {epoch}", END, view.divergence)]
        if view.name in start:
            shown.insert(0, ("before training", START, start[view.name]))
        values = [_finite(divergence.mean(0)) for *_, divergence in shown]
        bins = np.geomspace(min(map(np.min, values)) * 0.9, max(map(np.max, values)) * 1.1, 25)
        for (label, color, _), channels in zip(shown, values, strict=True):
            axes.hist(channels, bins, color=color, alpha=0.35)
            axes.hist(channels, bins, color=color, histtype="step", lw=2, label=label)
            axes.axvline(channels.mean(), color=color, lw=2, ls="--", label=f"mean {channels.mean():.3g} nats")
        axes.set(xscale="log", title=f"{view.name}: {view.divergence.shape[1]} channels")
        axes.set(
            xlabel="divergence of a channel (nats)", ylabel="number of channels", ylim=(0, 1.45 * axes.get_ylim()[1])
        )
        axes.grid(alpha=0.3)
        axes.legend(loc="upper left", fontsize=10)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def _finite(values: Tensor) -> Any:
    return values[values.isfinite()].clamp_min(1e-6).numpy()  # a logarithmic axis has no zero
