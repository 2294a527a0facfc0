"""The embedded data set."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from processes import CONTEXT

from yolo_cwd import digits
from yolo_cwd.trainer import CWDTrainer

SMALL = {"train": 40, "val": 10}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return digits.build(tmp_path_factory.mktemp("digits"), SMALL).parent


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.*")) if p.suffix != ".yaml"}


def test_layout(folder: Path) -> None:
    for split, count in SMALL.items():
        images, labels = (sorted((folder / kind / split).iterdir()) for kind in ("images", "labels"))
        assert [p.stem for p in images] == [p.stem for p in labels]
        assert len(images) == count
        assert cv2.imread(str(images[0])).shape == (digits.SIZE, digits.SIZE, 3)


def test_the_same_seed_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    assert files(digits.build(tmp_path, SMALL).parent) == files(folder)
    assert files(digits.build(tmp_path, SMALL, seed=1).parent) != files(folder)


def test_no_scan_is_in_both_splits() -> None:
    splits = {name: {scan.tobytes() for _, scan in scans} for name, scans in digits.scans_by_split().items()}
    assert not splits["train"] & splits["val"]
    assert sum(len(scans) for scans in digits.scans_by_split().values()) == 1797
    assert {digit for digit, _ in digits.scans_by_split()["val"]} == set(range(10))


def test_labels_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a black background without noise, the box of each digit is the box of its ink."""
    monkeypatch.setattr(digits, "_background", lambda rng: np.zeros((digits.SIZE, digits.SIZE, 3)))
    monkeypatch.setattr(digits, "_heights", lambda rng: np.array([40.0]))
    monkeypatch.setattr(digits, "_ink_colour", lambda window, rng: np.full(3, 255.0))
    monkeypatch.setattr(digits.cv2, "GaussianBlur", lambda image, *args: image)
    rng = np.random.default_rng(0)
    monkeypatch.setattr(digits, "_render", lambda scan, height, rng: np.ones((40, 25)))
    image, [(_, x, y, w, h)] = digits.compose(digits.scans_by_split()["train"], rng)
    rows, columns = np.nonzero(image[..., 0] > 100)
    box = np.array([x - w / 2, y - h / 2, x + w / 2, y + h / 2]) * digits.SIZE
    assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def test_rendered_ink_fills_its_box() -> None:
    rng = np.random.default_rng(0)
    for _, scan in digits.scans_by_split()["train"][:50]:
        ink = digits._render(scan, rng.uniform(10, 90), rng)
        edges = [ink[0], ink[-1], ink[:, 0], ink[:, -1]]
        assert all(edge.max() > 0.25 for edge in edges)


def test_sizes_give_every_level_work(folder: Path) -> None:
    lines = [line.split() for p in (folder / "labels").rglob("*.txt") for line in p.read_text().splitlines()]
    heights = np.array([float(line[4]) for line in lines]) * digits.SIZE
    assert heights.min() < 16
    assert heights.max() > 64
    assert {line[0] for line in lines} == {str(d) for d in range(10)}
    assert all(0 <= float(v) <= 1 for line in lines for v in line[1:])


def test_an_existing_data_set_is_not_built_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digits, "_write", lambda *args: pytest.fail("built again"))
    assert digits.build(folder.parent, SMALL).exists()


def test_a_killed_build_leaves_nothing_that_looks_like_a_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(digits.cv2, "imwrite", killed)
    with pytest.raises(KeyboardInterrupt):
        digits.build(tmp_path, SMALL)
    assert not list(tmp_path.iterdir())


def _build(root: Path) -> Path:
    return digits.build(root, SMALL)


def test_two_builds_at_once(folder: Path, tmp_path: Path) -> None:
    with CONTEXT.Pool(2) as pool:
        first, second = pool.map(_build, [tmp_path, tmp_path])
    assert first == second
    assert [p.name for p in tmp_path.iterdir()] == [first.parent.name]
    assert files(first.parent) == files(folder)


def test_data_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(digits, "IMAGES", SMALL)
    options = {"model": "yolov8n.yaml", "teacher": "yolov8s.yaml", "data": "digits", "project": str(tmp_path)}
    trainer = CWDTrainer(overrides={**options, "device": "cpu"})
    assert trainer.data["nc"] == 10
    assert Path(trainer.args.data).is_relative_to(tmp_path / "cache" / "yolo_cwd")
