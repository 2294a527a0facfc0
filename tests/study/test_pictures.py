"""The three pictures of a comparison: what is drawn where, in which color, under which words."""

from pathlib import Path
from typing import Any

import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from test_summary import TEACHER, result, written

from yolo_cwd.view.plots import COLORS

RESULTS = [
    {**result("plain", 0, 0.30, cat=0.2, dog=0.1), "curve": [0.1, 0.2, 0.3]},
    {**result("plain", 1, 0.40, cat=0.2, dog=0.1), "curve": [0.3, 0.4]},
    {**result("cwd", 0, 0.50, cat=0.3, dog=0.3), "curve": [0.2, 0.5, 0.6]},
    {**result("far", 0, 0.60, cat=0.1), "curve": []},
]


@pytest.fixture
def drawn(drawn_pictures: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The axes of each picture, when it is saved."""
    figures: list[Figure] = []
    save = Figure.savefig

    def note(figure: Figure, file: Any, **words: Any) -> None:
        figures.append(figure)
        save(figure, file, **words)

    monkeypatch.setattr(Figure, "savefig", note)
    written(tmp_path, {"plain": {}, "cwd": {}, "far": {}}, RESULTS, teacher=TEACHER)
    names = ("curves", "scores", "classes")
    assert all((tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in names)
    return {name: figure.axes[0] for name, figure in zip(names, figures, strict=True)}


def near(values: Any) -> Any:
    return pytest.approx(list(values))


def labels(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_curves_are_means_over_the_epochs_that_all_seeds_have(drawn: dict[str, Any]) -> None:
    axes = drawn["curves"]
    plain, cwd = axes.lines
    assert (list(plain.get_xdata()), list(cwd.get_xdata())) == ([1, 2], [1, 2, 3])
    assert list(plain.get_ydata()) == near([20, 30])
    assert list(cwd.get_ydata()) == near([20, 50, 60])
    assert [to_hex(line.get_color()) for line in axes.lines] == [to_hex(c) for c in COLORS[:2]]
    band = axes.collections[0].get_paths()[0].vertices
    assert {(round(x), round(y)) for x, y in band} == {(1, 10), (2, 20), (1, 30), (2, 40)}, "least to most"
    assert [to_hex(band.get_facecolor()[0]) for band in axes.collections] == [to_hex(c) for c in COLORS[:2]]
    assert [(band.get_alpha(), list(band.get_linewidth())) for band in axes.collections] == [(0.15, [0])] * 2
    assert labels(axes) == ["plain", "cwd"]
    said = axes.get_xlabel(), axes.get_ylabel(), axes.get_title()
    assert said == ("epoch", "mAP50-95 on the val split (points)", "Mean over seeds; band: least to most")


def test_scores_are_dots_and_their_mean(drawn: dict[str, Any]) -> None:
    axes = drawn["scores"]
    *of_arms, teacher = axes.lines
    dots, means = of_arms[::2], of_arms[1::2]
    assert [(list(line.get_xdata()), line.get_marker(), line.get_alpha()) for line in dots] == [
        ([0, 0], "o", 0.6),
        ([1], "o", 0.6),
        ([2], "o", 0.6),
    ]
    assert [list(line.get_ydata()) for line in dots] == [near([30, 40]), near([50]), near([60])]
    assert all(line.get_linestyle() == "None" for line in dots)
    assert [list(line.get_xdata()) for line in means] == [near([i - 0.25, i + 0.25]) for i in range(3)]
    assert [list(line.get_ydata()) for line in means] == [near([y, y]) for y in (35, 50, 60)]
    assert {line.get_linewidth() for line in means} == {2}
    for lines in (dots, means):
        assert [to_hex(line.get_color()) for line in lines] == [to_hex(c) for c in COLORS[:3]]
    assert (list(teacher.get_ydata()), teacher.get_linestyle(), teacher.get_color()) == (near([44, 44]), "--", "0.4")
    assert labels(axes) == ["teacher"]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["plain", "cwd", "far"]
    assert list(axes.get_xticks()) == [0, 1, 2]
    assert (axes.get_ylabel(), axes.get_title()) == ("mAP50-95 (points)", "One dot a seed; line: mean")


def test_gains_are_bars_beside_each_other(drawn: dict[str, Any]) -> None:
    """Of all arms but plain; a class that an arm has no gain of has a bar of no height."""
    axes = drawn["classes"]
    bars = [[(bar.get_x() + bar.get_width() / 2, bar.get_height()) for bar in group] for group in axes.containers]
    assert [[x for x, _ in group] for group in bars] == [near([-0.2, 0.8]), near([0.2, 1.2])]
    assert [[y for _, y in group] for group in bars] == [near([10, 20]), near([-10, 0])]
    assert {round(bar.get_width(), 6) for group in axes.containers for bar in group} == {0.4}
    assert [to_hex(group[0].get_facecolor()) for group in axes.containers] == [to_hex(c) for c in COLORS[1:3]]
    (zero,) = axes.lines
    assert (list(zero.get_ydata()), zero.get_color(), zero.get_linewidth()) == ([0, 0], "0.4", 1)
    ticks = axes.get_xticklabels()
    assert [(t.get_text(), t.get_rotation(), t.get_ha()) for t in ticks] == [("cat", 45, "right"), ("dog", 45, "right")]
    assert labels(axes) == ["cwd", "far"]
    said = axes.get_ylabel(), axes.get_title()
    assert said == ("gain over plain (points of mAP50-95)", "Gain by class, mean over seeds")


def test_all_pictures_are_of_one_kind(drawn: dict[str, Any]) -> None:
    for axes in drawn.values():
        assert list(axes.figure.get_size_inches()) == [8, 5]
        assert axes.xaxis.get_gridlines()[0].get_visible()
        assert axes.xaxis.get_gridlines()[0].get_alpha() == 0.3


def test_without_curves_gains_or_a_teacher_nothing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **words: figures.append(figure))
    written(tmp_path, {"plain": {}, "late": {}}, [result("plain", 0, 0.3)])
    assert [figure.axes[0].get_legend() for figure in figures] == [None] * 3


def test_an_arm_without_curves_leaves_those_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **words: figures.append(figure))
    written(tmp_path, {"far": {}, "plain": {}}, RESULTS)
    assert labels(figures[0].axes[0]) == ["plain"]
    (bars,) = figures[2].axes[0].containers
    assert {round(bar.get_width(), 6) for bar in bars} == {0.8}, "one arm has all the room"
