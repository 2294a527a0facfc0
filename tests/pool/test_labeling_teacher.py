"""The teacher that labels: crowded images, batches, and neighbors."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from labeling import arguments, label, predicted, records, rows, settings

from yolo_cwd.pool import teacher
from yolo_cwd.pool.pool import Labeler
from yolo_cwd.tasks import TASKS

pytestmark = pytest.mark.usefixtures("cache")


def test_a_crowded_image_is_told(
    teachers: dict[str, str],
    sets: dict[str, str],
    pictures: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert teacher.MOST_OBJECTS > 300, "more than Ultralytics looks for"
    monkeypatch.setattr(teacher, "MOST_OBJECTS", 2)
    pool = label(teachers["detect"], str(pictures), sets["detect"])
    found = [len(rows(pool, record)) for record in records(pool).values()]
    assert max(found) == 2
    assert f"{found.count(2)} images may have more than 2 objects; the rest of them counts as background" in caplog.text


@pytest.mark.parametrize("batch", [-1, 0.7])
def test_a_batch_that_is_to_be_estimated_is_none_for_labeling(
    teachers: dict[str, str], sets: dict[str, str], pictures: Path, batch: float
) -> None:
    asked = arguments(sets["detect"], batch=batch)
    assert Labeler(settings(teachers["detect"], str(pictures)), TASKS["detect"], asked).label().summary.images == 7


@pytest.mark.parametrize("batch", [1, 4])
def test_neighbors_and_batches_do_not_change_a_label(
    teachers: dict[str, str], sets: dict[str, str], pictures: Path, tmp_path: Path, batch: int
) -> None:
    """Padded together with others, these images would be seen otherwise; `yolo predict` sees one at a time."""
    images = sorted(pictures.glob("*.jpg"))[:3]
    for image, height in zip(images, (64, 32, 24), strict=True):
        cv2.imwrite(str(tmp_path / f"{height}.png"), cv2.imread(str(image))[:height])
    asked = settings(teachers["detect"], str(tmp_path / "*.png"), pool_conf=0.001)
    pool = Labeler(asked, TASKS["detect"], arguments(sets["detect"], batch=batch)).label()
    found = 0
    for name, record in records(pool).items():
        expected = predicted(teachers["detect"], tmp_path / name, 0.001).boxes
        written = rows(pool, record)
        assert [row[0] for row in written] == expected.cls.tolist()
        assert np.allclose(np.array(written).reshape(-1, 5)[:, 1:], expected.xywhn.numpy(), atol=1e-4)
        found += len(written)
    assert found > 2


def test_odd_names_stop_nothing(teachers: dict[str, str], sets: dict[str, str], pictures: Path, tmp_path: Path) -> None:
    images = sorted(pictures.rglob("*.jpg"))
    odd = ["a*.jpg", "ab.jpg", "two\nlines.jpg", " spaces .jpg", "[x].jpg", "gr\u00fc\u00dfe.JPG"]
    (tmp_path / "odd").mkdir()
    for name, image in zip(odd, images, strict=False):
        (tmp_path / "odd" / name).write_bytes(image.read_bytes())
    pool = label(teachers["detect"], str(tmp_path / "odd"), sets["detect"])
    assert set(records(pool)) == set(odd)
    assert pool.summary.left_out == ""
    for name, record in records(pool).items():
        assert (pool.folder / record["image"]).read_bytes() == (tmp_path / "odd" / name).read_bytes()
