"""The form of labels: the data's classes, boxes or outlines."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml
from labeling import label, predicted, records, renamed, rows
from ultralytics import YOLO
from ultralytics.data.dataset import YOLODataset
from ultralytics.data.utils import check_det_dataset

from yolo_cwd.config import ConfigError

pytestmark = pytest.mark.usefixtures("cache")


def test_boxes_beside_outlines_are_outlines(
    teachers: dict[str, str], sets: dict[str, str], pictures: Path, tmp_path: Path
) -> None:
    """Ultralytics drops the outlines of all images where one has a box."""
    outlined = Path(sets["segment"])
    pool = label(teachers["detect"], str(pictures), str(outlined))
    plain = label(teachers["detect"], str(pictures), sets["detect"])
    assert pool.folder != plain.folder
    read = [YOLODataset(str(list_), imgsz=64, data=check_det_dataset(str(pool.data))) for list_ in pool.train]
    assert all(label["segments"] for dataset in read for label in dataset.labels if len(label["cls"]))
    both = YOLODataset(pool.train, imgsz=64, data=check_det_dataset(str(pool.data)))
    assert sum(len(label["segments"]) for label in both.labels) == sum(len(label["cls"]) for label in both.labels) > 0
    for name, record in records(pool).items():
        corners = [row[1:].reshape(-1, 2) for row in rows(pool, record)]
        boxes = [row[1:] for row in rows(plain, records(plain)[name])]
        sizes = [np.concatenate([(c.min(0) + c.max(0)) / 2, np.ptp(c, axis=0)]) for c in corners]
        assert np.allclose(sizes, boxes, atol=2e-6)


@pytest.mark.parametrize("task", ["detect", "semantic"])
def test_classes_are_matched_by_name(
    teachers: dict[str, str], sets: dict[str, str], pictures: Path, tmp_path: Path, task: str
) -> None:
    names = list(YOLO(teachers[task]).names.values())
    turned = renamed(teachers[task], tmp_path, names[::-1])
    ours = label(teachers[task], str(pictures), sets[task], task).summary.objects
    theirs = label(turned, str(pictures), sets[task], task).summary.objects
    assert {names[len(names) - 1 - names.index(name)]: number for name, number in ours.items()} == theirs


def test_classes_that_the_teacher_does_not_know(
    teachers: dict[str, str], sets: dict[str, str], pictures: Path, tmp_path: Path, cache: Path
) -> None:
    teacher = renamed(teachers["detect"], tmp_path, [*"01234", "a", "b", "c", "d", "9"])
    with pytest.raises(ConfigError, match=r"does not know 5, 6, 7, 8 of the data.*or pool_classes=known") as error:
        label(teacher, str(pictures), sets["detect"])
    assert len(str(error.value)) < 300
    assert not cache.exists()
    found = label(teacher, str(pictures), sets["detect"], pool_classes="known").summary.objects
    assert found
    assert set(found) <= set("012349")


def test_pixels_of_a_class_that_the_data_lack_do_not_count(
    teachers: dict[str, str], sets: dict[str, str], pictures: Path, tmp_path: Path
) -> None:
    names = YOLO(teachers["semantic"]).names
    seen = np.asarray(predicted(teachers["semantic"], next(pictures.rglob("*.jpg"))).semantic_mask.data)
    foreign = int(np.bincount(seen.ravel()).argmax())
    teacher = renamed(teachers["semantic"], tmp_path, ["x" if i == foreign else name for i, name in names.items()])
    pool = label(teacher, str(pictures), sets["semantic"], "semantic", pool_classes="known")
    assert not {"x", names[foreign]} & set(pool.summary.objects)
    for record in records(pool).values():
        expected = np.asarray(predicted(teacher, Path(record["source"])).semantic_mask.data).squeeze()
        written = cv2.imread(str(pool.folder / record["label"]), cv2.IMREAD_UNCHANGED)
        assert written.tolist() == np.where(expected == foreign, 255, expected).tolist()


def test_class_maps_that_are_drawn_from_polygons_are_refused(
    teachers: dict[str, str], sets: dict[str, str], pictures: Path, tmp_path: Path, cache: Path
) -> None:
    content = yaml.safe_load(Path(sets["segment"]).read_text()) | {"path": str(Path(sets["segment"]).parent)}
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError, match=r"unlabeled=.*: class maps are written as images.*give data with masks_dir"):
        label(teachers["semantic"], str(pictures), str(tmp_path / "data.yaml"), "semantic")
    assert not cache.exists()
