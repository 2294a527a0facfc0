"""Labels: what the teacher predicts, in the form that Ultralytics reads."""

from collections.abc import Callable
from pathlib import Path

import cv2
import digits
import numpy as np
import pytest
import torch
import yaml
from labeling import OLD, Said, completed, label, label_files, labeled_data, predicted, records, rows, snapshot
from ultralytics.data.dataset import YOLODataset
from ultralytics.data.utils import check_det_dataset
from ultralytics.utils.ops import xywhr2xyxyxyxy

pytestmark = pytest.mark.usefixtures("cache")


def within(corners: np.ndarray) -> np.ndarray:
    """Corners as they are, unless the upright box around them is none that Ultralytics would read."""
    low, high = corners.min(axis=0), corners.max(axis=0)
    usable = ((low + high) / 2 >= 0).all() and ((low + high) / 2 <= 1).all() and (high - low <= 1).all()
    return corners if usable else corners.clip(0, 1)


def turned(*box: float) -> str:
    """The line of a label file, after the class, for a box of a center, a size and an angle."""
    return " ".join(f"{x:.6f}" for x in (xywhr2xyxyxyxy(torch.tensor(box)) / torch.tensor([100, 50])).ravel().tolist())


SAME, ELSEWHERE = [12, 6, 31, 44, 0.9, OLD], [60, 10, 80, 30, 0.9, OLD]  # of the label, and beside it

CORNERS = "0.600000 0.200000 0.800000 0.200000 0.800000 0.600000 0.600000 0.600000"


@pytest.mark.parametrize("task", ["detect", "segment", "pose", "obb"])
def test_labels_are_what_the_teacher_predicts(
    teachers: dict[str, str], sets: dict[str, str], pictures: Path, task: str
) -> None:
    before = snapshot(pictures)
    pool = label(teachers[task], str(pictures), sets[task], task)
    assert snapshot(pictures) == before
    found = records(pool)
    assert pool.summary.images == len(found) == 7
    objects = 0  # one image at a time differs in the last digits
    for image in pictures.rglob("*.jpg"):
        result = predicted(teachers[task], image)
        written = rows(pool, found[image.name])
        boxes = result.obb if task == "obb" else result.boxes
        assert len(written) == len(boxes)
        for row, i in zip(written, range(len(boxes)), strict=True):
            objects += 1
            assert row[0] == int(boxes.cls[i])
            if task == "detect":
                expected = boxes.xywhn[i].numpy()
            elif task == "segment":
                expected = result.masks.xyn[i].ravel()
                if len(expected) < 6:
                    continue
            elif task == "obb":
                expected = within(boxes.xyxyxyxyn[i].numpy()).ravel()
            else:
                expected = np.concatenate([boxes.xywhn[i].numpy(), result.keypoints.xyn[i].numpy().clip(0, 1).ravel()])
            assert row[1:] == pytest.approx(expected, abs=1e-3)
    assert objects == sum(pool.summary.objects.values()) >= 7


def test_class_maps_are_what_the_teacher_predicts(
    teachers: dict[str, str], sets: dict[str, str], pictures: Path
) -> None:
    pool = label(teachers["semantic"], str(pictures), sets["semantic"], "semantic")
    for name, record in records(pool).items():
        written = cv2.imread(str(pool.folder / record["label"]), cv2.IMREAD_UNCHANGED)
        expected = predicted(teachers["semantic"], Path(record["source"])).semantic_mask.data
        assert record["label"].startswith("masks/")
        assert written.tolist() == np.asarray(expected).squeeze().tolist(), name
    assert sum(pool.summary.objects.values()) == 7 * digits.SIZE**2


def test_depth_maps_are_what_the_teacher_predicts(
    teachers: dict[str, str], sets: dict[str, str], pictures: Path
) -> None:
    pool = label(teachers["depth"], str(pictures), sets["depth"], "depth")
    for record in records(pool).values():
        written = np.load(pool.folder / record["label"])
        assert written == pytest.approx(
            np.asarray(predicted(teachers["depth"], Path(record["source"])).depth.data), abs=1e-4
        )


@pytest.mark.parametrize(
    ("task", "own", "kind", "found", "added"),
    [
        pytest.param("detect", "0.2 0.5 0.2 0.8", "boxes", [SAME, ELSEWHERE], "0.700000 0.400000 0.200000 0.400000"),
        pytest.param("detect", "0.1 0.1 0.3 0.1 0.3 0.9 0.1 0.9", "boxes", [SAME, ELSEWHERE], CORNERS, id="outlines"),
        pytest.param("segment", "0.1 0.1 0.3 0.1 0.3 0.9 0.1 0.9", "boxes", [SAME, ELSEWHERE], CORNERS),
        pytest.param(
            "pose",
            "0.2 0.5 0.2 0.8" + 4 * " 0.5 0.5",
            "keypoints",
            [SAME, ELSEWHERE],
            "0.700000 0.400000 0.200000 0.400000" + 4 * " 0.250000 0.500000",
        ),
        pytest.param(
            "obb",
            turned(20, 25, 8, 46, 0.6),
            "obb",
            [[20, 26, 8, 46, 0.6, 0.9, OLD], [20, 25, 8, 46, -0.6, 0.9, OLD]],  # the upright boxes are the same
            turned(20, 25, 8, 46, -0.6),
        ),
    ],
)
def test_what_is_added_has_the_form_of_the_labels(
    old: dict[str, str],
    say: Callable[..., Said],
    tmp_path: Path,
    task: str,
    own: str,
    kind: str,
    found: list[list[float]],
    added: str,
) -> None:
    more = {"kpt_shape": [4, 2], "flip_idx": [1, 0, 3, 2]} if task == "pose" else {}
    data = labeled_data(tmp_path / "new", {"a": f"1 {own}\n"}, **more)
    say({"a": found}, kind)
    assert label_files(completed(old[task], data, task)) == {"a": f"1 {own}\n0 {added}\n"}


def test_no_row_can_be_taken_for_key_points(
    teachers: dict[str, str], sets: dict[str, str], pictures: Path, tmp_path: Path
) -> None:
    """Data of two key points of two numbers make Ultralytics read rows of nine columns as a box with these."""
    content = yaml.safe_load(Path(sets["segment"]).read_text())
    content |= {"path": str(Path(sets["segment"]).parent), "kpt_shape": [2, 2]}
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(content))
    pool = label(teachers["detect"], str(pictures), str(tmp_path / "data.yaml"))
    plain = label(teachers["detect"], str(pictures), sets["detect"])
    data = check_det_dataset(str(pool.data))
    read = YOLODataset(pool.train[-1], imgsz=64, data=data).labels
    boxes = {Path(record["image"]).stem: rows(plain, record) for record in records(plain).values()}
    assert sum(len(found["cls"]) for found in read) > 0
    for found in read:
        expected = np.array(boxes[Path(found["im_file"]).stem]).reshape(-1, 5)[:, 1:]
        for ours, theirs in ((found["bboxes"], expected), (expected, found["bboxes"])):  # it drops what is there twice
            assert all(abs(theirs - box).max(axis=1).min() < 1e-5 for box in ours)
