"""Images without labels: what the teacher's labels are, where they lie, which images are left out, and the training."""

import json
import math
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from itertools import islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import yaml
from conftest import SHORT, STUDENT, TEACHER, narrow, settled
from processes import Started, together
from test_distributed import as_words
from test_state import interrupted, resume
from test_trainer import rows as results
from ultralytics import YOLO
from ultralytics.cfg import get_cfg
from ultralytics.data.augment import Mosaic
from ultralytics.data.build import build_yolo_dataset
from ultralytics.data.dataset import YOLODataset
from ultralytics.data.utils import check_det_dataset
from ultralytics.engine.results import Results
from ultralytics.nn.tasks import guess_model_task
from ultralytics.utils import DEFAULT_CFG_DICT
from ultralytics.utils.ops import xywhr2xyxyxyxy

from yolo_cwd import CWDTrainer, digits
from yolo_cwd.cli import main
from yolo_cwd.config import ConfigError, Settings
from yolo_cwd.method import prepare
from yolo_cwd.pool import complete, confidence, plan, store
from yolo_cwd.pool.images import list_images
from yolo_cwd.pool.labels import painted
from yolo_cwd.pool.weight import Mates, PoolWeight
from yolo_cwd.study import compare
from yolo_cwd.study import label as label_command

MODELS = {
    "detect": "yolov8n.yaml",
    "segment": "yolov8n-seg.yaml",
    "pose": "yolov8n-pose.yaml",
    "obb": "yolov8n-obb.yaml",
    "semantic": "yolo26n-sem.yaml",
    "depth": "yolo26n-depth.yaml",
}
POOL = {"pool_conf": 0.004, "pool_unsure": 0.004}  # what untrained teachers say


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "yolo_cwd" / "unlabeled"


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """YAML paths of the digits by task, 6 training and 4 validation images each."""
    root = tmp_path_factory.mktemp("sets")
    return {task: str(digits.build(root, {"train": 6, "val": 4}, task=task)) for task in MODELS}


def suited(name: str, data: str, folder: Path) -> YOLO:
    """A narrow model of random weights for the classes and key points of a data set."""
    description, content = (yaml.safe_load(Path(file).read_text()) for file in (narrow(name), data))
    description |= {"nc": len(content["names"])} | {k: content[k] for k in ("kpt_shape",) if k in content}
    file = folder / name
    file.write_text(yaml.safe_dump(description))
    return YOLO(str(file))


@pytest.fixture(scope="module")
def teachers(sets: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Checkpoints by task: of random weights, settled, with the names of the data."""
    folder = tmp_path_factory.mktemp("teachers")
    for task, name in MODELS.items():
        torch.manual_seed(3)
        model = suited(name, sets[task], folder)
        settled(model.model, sets[task])
        model.model.names = yaml.safe_load(Path(sets[task]).read_text())["names"]
        model.save(folder / f"{task}.pt")
    return {task: str(folder / f"{task}.pt") for task in MODELS}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 7 images without labels, two of them in a folder below."""
    root = tmp_path_factory.mktemp("pictures")
    built = digits.build(root / "set", {"train": 7, "val": 1}, seed=5).parent
    (root / "images" / "below").mkdir(parents=True)
    for i, file in enumerate(sorted((built / "images" / "train").iterdir())):
        shutil.copy(file, root / "images" / ("below" if i > 4 else ".") / file.name)
    return root / "images"


def arguments(data: str | None, **overrides: Any) -> Any:
    words = {"data": data, "imgsz": 64, "batch": 3, "device": "cpu", **overrides}
    return get_cfg(DEFAULT_CFG_DICT, words)


def settings(teacher: str, images: Any, **options: Any) -> Settings:
    return Settings.parse({"teacher": teacher, "unlabeled": images, **POOL, **options})


def label(teacher: str, images: Any, data: str | None, task: str = "detect", **options: Any) -> store.Pool:
    return store.prepare(settings(teacher, images, **options), task, arguments(data))


def records(pool: store.Pool) -> dict[str, dict[str, Any]]:
    found = [json.loads(file.read_text()) for file in (pool.folder / "records").iterdir()]
    return {Path(record["source"]).name: record for record in found}


def rows(pool: store.Pool, record: dict[str, Any]) -> list[np.ndarray]:
    lines = (pool.folder / record["label"]).read_text().splitlines()
    return [np.array(line.split(), float) for line in lines]


def predicted(teacher: str, image: Path, conf: float = POOL["pool_conf"]) -> Any:
    return YOLO(teacher).predict(str(image), conf=conf, imgsz=64, device="cpu", verbose=False, save=False)[0]


def within(corners: np.ndarray) -> np.ndarray:
    """Corners as they are, unless the upright box around them is none that Ultralytics would read."""
    low, high = corners.min(axis=0), corners.max(axis=0)
    usable = ((low + high) / 2 >= 0).all() and ((low + high) / 2 <= 1).all() and (high - low <= 1).all()
    return corners if usable else corners.clip(0, 1)


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(f): (f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(folder.rglob("*"))}


@pytest.mark.parametrize("task", ["detect", "segment", "pose", "obb"])
def test_labels_are_what_the_teacher_predicts(
    teachers: dict[str, str], sets: dict[str, str], pictures: Path, task: str
) -> None:
    before = snapshot(pictures)
    pool = label(teachers[task], str(pictures), sets[task], task)
    assert snapshot(pictures) == before
    found = records(pool)
    assert pool.found.images == len(found) == 7
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
    assert objects == sum(pool.found.objects.values()) >= 7


def test_class_maps_are_what_the_teacher_predicts(
    teachers: dict[str, str], sets: dict[str, str], pictures: Path
) -> None:
    pool = label(teachers["semantic"], str(pictures), sets["semantic"], "semantic")
    for name, record in records(pool).items():
        written = cv2.imread(str(pool.folder / record["label"]), cv2.IMREAD_UNCHANGED)
        expected = predicted(teachers["semantic"], Path(record["source"])).semantic_mask.data
        assert record["label"].startswith("masks/")
        assert written.tolist() == np.asarray(expected).squeeze().tolist(), name
    assert sum(pool.found.objects.values()) == 7 * digits.SIZE**2


def test_depth_maps_are_what_the_teacher_predicts(
    teachers: dict[str, str], sets: dict[str, str], pictures: Path
) -> None:
    pool = label(teachers["depth"], str(pictures), sets["depth"], "depth")
    for record in records(pool).values():
        written = np.load(pool.folder / record["label"])
        assert written == pytest.approx(
            np.asarray(predicted(teachers["depth"], Path(record["source"])).depth.data), abs=1e-4
        )


@pytest.mark.parametrize("task", MODELS)
def test_a_training_sees_the_images_of_the_pool_and_their_labels(
    train: Callable[..., CWDTrainer], teachers: dict[str, str], sets: dict[str, str], pictures: Path, task: str
) -> None:
    seen: list[Any] = []
    words = {"unlabeled": str(pictures), "cwd": 0 if task == "obb" else "balanced", **POOL}
    callbacks = {"on_train_start": lambda trainer: seen.append(trainer.train_loader.dataset)}
    model = narrow(MODELS[task])
    trainer = train(model=model, data=sets[task], teacher=teachers[task], callbacks=callbacks, **words)
    assert len(seen[0]) == 6 + 7
    ours = [label for label in seen[0].labels if str(trainer.pool.folder) in label["im_file"]]
    assert len(ours) == 7
    if task not in {"semantic", "depth"}:
        written = [
            set((trainer.pool.folder / r["label"]).read_text().splitlines()) for r in records(trainer.pool).values()
        ]
        read = sum(len(label["cls"]) for label in ours)
        assert 2 < read <= sum(map(len, written))  # 8.4.116 takes outlines with the same box for duplicates
        assert read == sum(map(len, written)) or task in {"segment", "obb"}
    assert trainer.args.data == sets[task]
    assert str(trainer.pool.folder) not in str(YOLO(trainer.last).ckpt["train_args"])


def test_sources_are_folders_globs_lists_and_images(pictures: Path, tmp_path: Path) -> None:
    below = sorted((pictures / "below").iterdir())
    (tmp_path / "far.jpg").write_bytes(below[0].read_bytes())
    (tmp_path / "list.txt").write_text(f"{below[0]}\n./far.jpg\n\n{below[0]}\n")
    everything = list_images([str(pictures)])
    assert len(everything) == 7
    assert list_images([str(pictures / "below"), str(pictures / "*.jpg")]) == everything
    assert list_images([str(tmp_path / "list.txt")]) == sorted([below[0], tmp_path / "far.jpg"])
    assert list_images([str(below[1])]) == [below[1]]
    with pytest.raises(ConfigError, match=r"unlabeled=.*nowhere: names no file; give a folder"):
        list_images([str(tmp_path / "nowhere")], "unlabeled")
    (tmp_path / "latin.txt").write_bytes("größer.jpg".encode("latin-1"))
    assert list_images([str(tmp_path / "*")]) == [tmp_path / "far.jpg"], "a list counts where it is named itself"
    with pytest.raises(ConfigError, match=r"unlabeled=.*latin\.txt: not text in UTF-8; save the list as UTF-8"):
        list_images([str(tmp_path / "latin.txt")], "unlabeled")
    (tmp_path / "long.txt").write_text("x" * 5000 + ".jpg\n")
    assert len(list_images([str(tmp_path / "long.txt")])) == 1
    both = f"{pictures / 'below'},{tmp_path}"
    assert Settings.parse({"teacher": "t", "unlabeled": both}).unlabeled == (str(pictures / "below"), str(tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unlabeled": True}, "unlabeled=True: not a path"),
        ({"pool_conf": 2}, "pool_conf=2: must be a number"),
        ({"pool_conf": 0.05}, "pool_unsure=0.1: must be at most pool_conf=0.05"),
        ({"pool_ratio": 0}, "pool_ratio=0: must be a number above 0"),
        ({"pool_weight": 2}, "pool_weight=2: must be a number at least 0 and at most 1"),
        ({"pool_classes": "some"}, "pool_classes=some: must be one of all, known"),
    ],
)
def test_refused_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Settings.parse({"teacher": "t", **options})


def test_uncertain_objects_are_painted_over_but_where_a_certain_one_is() -> None:
    image = np.zeros((20, 20, 3), np.uint8)
    box = np.array([[2, 2], [10, 2], [10, 10], [2, 10]])
    gray = painted(image, [box], [box + 6])
    assert (gray[2:8, 2:11] == 114).all()
    assert not gray[9:, 9:].any()
    assert not image.any()


@pytest.fixture
def unsure(teachers: dict[str, str], pictures: Path) -> dict[str, float]:
    """Thresholds between which the teacher has objects in some of the images."""
    images = sorted(map(str, pictures.rglob("*.jpg")))
    found = [predicted(teachers["detect"], Path(image), 0.0005) for image in images]
    confidences = sorted(c for result in found for c in result.boxes.conf.tolist())
    return {"pool_unsure": confidences[0], "pool_conf": confidences[-1] * 1.01}


def test_images_with_uncertain_objects_are_painted_copies(
    teachers: dict[str, str], sets: dict[str, str], pictures: Path, unsure: dict[str, float]
) -> None:
    before = snapshot(pictures)
    pool = label(teachers["detect"], str(pictures), sets["detect"], **unsure)
    found = records(pool)
    assert pool.found.painted == sum(record["painted"] for record in found.values()) > 0
    for name, record in found.items():
        source, ours = Path(record["source"]), pool.folder / record["image"]
        assert source.name == name
        assert source.samefile(ours) != record["painted"]
        assert rows(pool, record) == []  # none is certain
        boxes = predicted(teachers["detect"], source, unsure["pool_unsure"]).boxes.xyxy.round().int().tolist()
        image = cv2.imread(str(ours)).astype(int)
        for x1, y1, x2, y2 in boxes:
            assert abs(image[y1 + 4 : y2 - 3, x1 + 4 : x2 - 3] - 114).mean() < 2
    assert snapshot(pictures) == before


def test_links_to_images_are_followed(
    teachers: dict[str, str], sets: dict[str, str], pictures: Path, tmp_path: Path
) -> None:
    (tmp_path / "links").mkdir()
    (tmp_path / "real.jpg").write_bytes(next(pictures.glob("*.jpg")).read_bytes())
    (tmp_path / "links" / "linked.jpg").symlink_to("../real.jpg")
    pool = label(teachers["detect"], str(tmp_path / "links"), sets["detect"])
    assert cv2.imread(str(pool.folder / records(pool)["linked.jpg"]["image"])) is not None


def test_where_there_can_be_no_link_images_are_copied(
    teachers: dict[str, str], sets: dict[str, str], pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError("another disk")

    monkeypatch.setattr("os.link", refuse)
    pool = label(teachers["detect"], str(pictures), sets["detect"])
    for record in records(pool).values():
        source, ours = Path(record["source"]), pool.folder / record["image"]
        assert not source.samefile(ours)
        assert source.read_bytes() == ours.read_bytes()


def test_labelling_that_is_cut_off_goes_on(
    teachers: dict[str, str], sets: dict[str, str], pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    write, predict = store._put, store.predictions

    def cut_off(plan: Any, images: list[str]) -> Iterator[Any]:
        yield from islice(predict(plan, images), 4)
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "_put", lambda *words: (done.append(words[2].name), write(*words)))
    monkeypatch.setattr(store, "predictions", cut_off)
    with pytest.raises(KeyboardInterrupt, match="run the same command again to continue"):
        label(teachers["detect"], str(pictures), sets["detect"])
    first, done[:] = list(done), []
    monkeypatch.setattr(store, "predictions", predict)
    pool = label(teachers["detect"], str(pictures), sets["detect"])
    assert len(first) == 4
    assert sorted(first + done) == sorted(file.name for file in pictures.rglob("*.jpg"))
    assert not [file for file in pool.folder.rglob("*") if file.name.startswith(("tmp", "."))]
    still_open = [file.readlink() for file in Path("/proc/self/fd").glob("*") if file.is_symlink()]
    assert not [file for file in still_open if pool.folder in file.parents], "Windows removes no open file"


def test_labels_that_are_there_are_used_again(
    teachers: dict[str, str], sets: dict[str, str], pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(pictures, images := tmp_path / "images")
    pool = label(teachers["detect"], str(images), sets["detect"])
    asked: list[int] = []
    predict = store.predictions
    monkeypatch.setattr(store, "predictions", lambda plan, todo: (asked.append(len(todo)), predict(plan, todo))[1])
    assert label(teachers["detect"], str(images), sets["detect"]) == pool
    assert asked == []
    image = cv2.imread(str(next(images.glob("*.jpg"))))
    cv2.imwrite(str(images / "new.png"), image[::-1])
    assert label(teachers["detect"], str(images), sets["detect"]).found.images == 8
    assert asked == [1]
    for part in ("images", "labels"):
        shutil.rmtree(pool.folder / part)
        assert label(teachers["detect"], str(images), sets["detect"]).found.images == 8
    other = label(teachers["detect"], str(images), sets["detect"], pool_conf=0.5)
    assert asked == [1, 8, 8, 8]
    assert other.folder != pool.folder


def test_two_at_once_label_each_image_once(
    teachers: dict[str, str], sets: dict[str, str], pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    write = store._put
    monkeypatch.setattr(store, "_put", lambda *words: (asked.append(words[2].name), write(*words)))
    with ThreadPoolExecutor(2) as threads:
        works = [threads.submit(label, teachers["detect"], str(pictures), sets["detect"]) for _ in range(2)]
    assert works[0].result() == works[1].result()
    assert len(asked) == len(set(asked)) == 7


def test_what_is_no_use_is_left_out_with_a_warning(
    teachers: dict[str, str], sets: dict[str, str], pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images, data = tmp_path / "images", Path(sets["detect"]).parent
    shutil.copytree(pictures, images)
    shutil.copy(next(pictures.glob("*.jpg")), images / "again.jpg")
    (images / "torn.jpg").write_bytes(next(pictures.glob("*.jpg")).read_bytes()[:900])
    (images / "text.png").write_text("no image")
    cv2.imwrite(str(images / "tiny.png"), np.zeros((4, 4, 3), np.uint8))
    cv2.imwrite(str(images / "torn.bmp"), np.zeros((40, 40, 3), np.uint8))
    (images / "torn.bmp").write_bytes((images / "torn.bmp").read_bytes()[:200])
    shutil.copy(next(pictures.glob("*.jpg")), os.fsencode(images) + b"/caf\xe9.jpg")
    shutil.copy(next((data / "images" / "val").iterdir()), images / "leak.jpg")
    shutil.copy(next((data / "images" / "train").iterdir()), images / "known.jpg")
    pool = label(teachers["detect"], f"{images},{data / 'images' / 'val'}", sets["detect"])
    assert pool.found.images == 7
    expected = "5 unreadable, 1 there twice, 1 among the training images, 5 among the images that models are scored on"
    assert pool.found.left_out == expected
    assert [r.levelname for r in caplog.records if expected in r.message] == ["WARNING"]


def test_an_image_that_ultralytics_would_repair_is_copied(
    teachers: dict[str, str], sets: dict[str, str], pictures: Path, tmp_path: Path
) -> None:
    """Its content says that it is a JPEG, whatever its name, and a link would let the user's image be changed."""
    original = tmp_path / "images" / "torn.png"
    original.parent.mkdir()
    original.write_bytes(next(pictures.glob("*.jpg")).read_bytes() + b"\n")
    pool = label(teachers["detect"], str(original.parent), sets["detect"])
    (copy,) = (pool.folder / "images").iterdir()
    assert copy.read_bytes() == original.read_bytes()
    assert not copy.samefile(original)


def test_a_crowded_image_is_told(
    teachers: dict[str, str],
    sets: dict[str, str],
    pictures: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert store.MOST_OBJECTS > 300, "more than Ultralytics looks for"
    monkeypatch.setattr(store, "MOST_OBJECTS", 2)
    pool = label(teachers["detect"], str(pictures), sets["detect"])
    found = [len(rows(pool, record)) for record in records(pool).values()]
    assert max(found) == 2
    assert f"{found.count(2)} images may have more than 2 objects; the rest of them counts as background" in caplog.text


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


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param({"imgsz": "abc"}, "imgsz", id="a wrong argument"),
        pytest.param({"device": "7"}, "device", id="a device that is not there"),
        pytest.param({"source": "a" * 400 + ".jpg,b.jpg"}, "names no file", id="a name that is too long"),
    ],
)
def test_bad_input_of_the_command_is_one_line(
    teachers: dict[str, str],
    sets: dict[str, str],
    pictures: Path,
    capsys: pytest.CaptureFixture[str],
    words: dict[str, str],
    message: str,
) -> None:
    given = {"teacher": teachers["detect"], "source": str(pictures), "data": sets["detect"], "device": "cpu", **words}
    assert main(["label", *(f"{name}={value}" for name, value in given.items())]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("yolo_cwd: ")]
    assert message in line


def test_a_cache_that_cannot_be_written_is_named(
    teachers: dict[str, str], sets: dict[str, str], pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"cannot write .*; set XDG_CACHE_HOME to a folder of yours"):
        label(teachers["detect"], str(pictures), sets["detect"])


def test_a_folder_may_have_a_number_for_a_name(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(pictures, tmp_path / "2024")
    monkeypatch.chdir(tmp_path)
    assert Settings.parse({"teacher": "t", "unlabeled": 2024}).unlabeled == (str(tmp_path / "2024"),)


def test_a_validation_image_that_is_missing_does_not_matter(
    teachers: dict[str, str], sets: dict[str, str], pictures: Path, tmp_path: Path
) -> None:
    content = yaml.safe_load(Path(sets["detect"]).read_text())
    folder = Path(sets["detect"]).parent
    (tmp_path / "val.txt").write_text("\n".join([*map(str, (folder / "images" / "val").iterdir()), "/absent.jpg"]))
    content |= {"path": str(folder), "val": str(tmp_path / "val.txt")}
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(content))
    words = {"teacher": teachers["detect"], "source": pictures, "data": tmp_path / "data.yaml", "imgsz": 64, **POOL}
    assert main(["label", *(f"{name}={value}" for name, value in words.items())]) == 0


def test_a_pool_without_a_usable_image_is_refused_and_leaves_nothing(
    teachers: dict[str, str], sets: dict[str, str], cache: Path
) -> None:
    held_out = Path(sets["detect"]).parent / "images" / "val"
    with pytest.raises(
        ConfigError, match="0 images can be used; left out: 4 among the images that models are"
    ) as error:
        label(teachers["detect"], str(held_out), sets["detect"])
    assert len(str(error.value)) < 300
    assert list(cache.rglob("*")) == []


@pytest.mark.parametrize("batch", [-1, 0.7])
def test_a_batch_that_is_to_be_estimated_is_none_for_labelling(
    teachers: dict[str, str], sets: dict[str, str], pictures: Path, batch: float
) -> None:
    asked = arguments(sets["detect"], batch=batch)
    assert store.prepare(settings(teachers["detect"], str(pictures)), "detect", asked).found.images == 7


def test_the_ratio_bounds_the_pool_evenly(teachers: dict[str, str], sets: dict[str, str], pictures: Path) -> None:
    pool = label(teachers["detect"], str(pictures), sets["detect"], pool_ratio=0.5)
    everything = sorted(pictures.rglob("*.jpg"))
    assert set(records(pool)) == {everything[i].name for i in (0, 3, 6)}


def renamed(teacher: str, folder: Path, names: list[str]) -> str:
    model = YOLO(teacher)
    model.model.names = dict(enumerate(names))
    model.save(folder / "renamed.pt")
    return str(folder / "renamed.pt")


@pytest.mark.parametrize("task", ["detect", "semantic"])
def test_classes_are_matched_by_name(
    teachers: dict[str, str], sets: dict[str, str], pictures: Path, tmp_path: Path, task: str
) -> None:
    names = list(YOLO(teachers[task]).names.values())
    turned = renamed(teachers[task], tmp_path, names[::-1])
    ours = label(teachers[task], str(pictures), sets[task], task).found.objects
    theirs = label(turned, str(pictures), sets[task], task).found.objects
    assert {names[len(names) - 1 - names.index(name)]: number for name, number in ours.items()} == theirs


def test_classes_that_the_teacher_does_not_know(
    teachers: dict[str, str], sets: dict[str, str], pictures: Path, tmp_path: Path, cache: Path
) -> None:
    teacher = renamed(teachers["detect"], tmp_path, [*"01234", "a", "b", "c", "d", "9"])
    with pytest.raises(ConfigError, match=r"does not know 5, 6, 7, 8 of the data.*or pool_classes=known") as error:
        label(teacher, str(pictures), sets["detect"])
    assert len(str(error.value)) < 300
    assert not cache.exists()
    found = label(teacher, str(pictures), sets["detect"], pool_classes="known").found.objects
    assert found
    assert set(found) <= set("012349")


def test_teachers_that_cannot_label_are_refused(
    teachers: dict[str, str], sets: dict[str, str], pictures: Path, cache: Path
) -> None:
    with pytest.raises(ConfigError, match="a model for task=segment cannot label images for task=detect"):
        label(teachers["segment"], str(pictures), sets["detect"])
    with pytest.raises(ConfigError, match=r"\.yaml: cannot label images, it is not trained; give a \.pt checkpoint"):
        label(narrow("yolov8n.yaml"), str(pictures), sets["detect"])
    with pytest.raises(ConfigError, match="teacher=YOLO: cannot label images as an object"):
        label(YOLO(teachers["detect"]), str(pictures), sets["detect"])
    assert not cache.exists()


def test_a_resumed_run_finds_its_pool_again(
    train: Callable[..., CWDTrainer],
    teachers: dict[str, str],
    sets: dict[str, str],
    pictures: Path,
    tmp_path: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(pictures.parent)
    words = {"data": sets["detect"], "teacher": teachers["detect"], "unlabeled": pictures.name, **POOL}
    last = interrupted(train, tmp_path, 1, epochs=2, fraction=0.5, **words)
    monkeypatch.chdir(tmp_path)
    shutil.rmtree(cache)
    trainer = resume(last)
    assert len(trainer.train_loader.dataset) == 3 + 7
    assert trainer.epoch == 1


def test_a_pool_that_has_moved_is_named_anew_on_resuming(
    train: Callable[..., CWDTrainer], teachers: dict[str, str], sets: dict[str, str], pictures: Path, tmp_path: Path
) -> None:
    shutil.copytree(pictures, tmp_path / "before")
    words = {"data": sets["detect"], "teacher": teachers["detect"], "unlabeled": str(tmp_path / "before"), **POOL}
    last = interrupted(train, tmp_path, 1, epochs=2, **words)
    (tmp_path / "before").rename(tmp_path / "after")
    with pytest.raises(ConfigError, match="before: names no file"):
        resume(last)
    assert len(resume(last, unlabeled=str(tmp_path / "after")).train_loader.dataset) == 6 + 7


def test_images_of_the_data_without_a_label_file_are_told(
    train: Callable[..., CWDTrainer], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = digits.build(tmp_path, {"train": 4, "val": 2})
    next((data.parent / "labels" / "train").iterdir()).unlink()
    train(data=str(data), verbose=True)
    assert sum("1 of 4 training images have no label file, and count" in r.message for r in caplog.records) == 1


def test_the_command_says_what_was_found(
    teachers: dict[str, str], sets: dict[str, str], pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"teacher={teachers['detect']}", f"source={pictures}", f"data={sets['detect']}", "imgsz=64", "device=cpu"]
    assert main(["label", *words, *(f"{name}={value}" for name, value in POOL.items())]) == 0
    said = capsys.readouterr().out
    places = dict(re.findall(r"^(labels|pictures|data)\s+(/.*)$", said, flags=re.MULTILINE))
    assert "7 images labelled by" in said
    assert "warning: no image has 0, 1" in said
    assert cv2.imread(places["pictures"]) is not None
    assert len(yaml.safe_load(Path(places["data"]).read_text())["train"]) == 2
    assert main(["label", f"teacher={teachers['detect']}"]) == 2
    assert "source: missing" in capsys.readouterr().err


def test_the_command_warns_of_images_of_another_kind() -> None:
    found = store.Found("detect", 9, {"a": 9}, 0, 0, confidence=0.4, left_out="", scored_on=0)
    assert not label_command._warnings(found, {0: "a"}, usual=0.5)
    assert "mean confidence 0.40, there 0.60" in label_command._warnings(found, {0: "a"}, usual=0.6)[0]


def test_check_counts_without_labelling(
    teachers: dict[str, str],
    sets: dict[str, str],
    pictures: Path,
    cache: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [f"teacher={teachers['detect']}", f"student={STUDENT}", f"data={sets['detect']}", f"unlabeled={pictures}"]
    assert main(["check", *words, "imgsz=64", "batch=2", "device=cpu"]) == 0
    assert "unlabeled 7 images can be used" in capsys.readouterr().out
    assert not cache.exists()


def test_an_arm_may_have_a_pool(teachers: dict[str, str], sets: dict[str, str], pictures: Path, tmp_path: Path) -> None:
    pool = "".join(f",{name}={value}" for name, value in POOL.items())
    words: dict[str, Any] = {**SHORT, "student": STUDENT, "teacher": teachers["detect"], "data": sets["detect"]}
    words |= {"folder": str(tmp_path / "compared"), "seeds": 1}
    del words["model"]
    summary = compare.run({**words, "arms": f"unl:unlabeled={pictures},cwd=0{pool}"})
    assert list(summary["arms"]) == ["unl"]
    assert str(pictures) in (tmp_path / "compared" / "runs" / "unl-0" / "cwd.yaml").read_text()


def trained_by_two(words: dict[str, Any], folder: Path) -> str:
    """Train by two processes, and return what they have said."""
    ended = together(2, "processes:main", "train", *as_words(**words), cwd=folder)
    assert [one.code for one in ended] == [0, 0], ended[0].stderr[-2000:]
    return "".join(one.stdout + one.stderr for one in ended)


@pytest.mark.slow
def test_several_processes_label_once(
    teachers: dict[str, str], sets: dict[str, str], pictures: Path, tmp_path: Path, cache: Path
) -> None:
    words = {**SHORT, "teacher": teachers["detect"], "data": sets["detect"], "unlabeled": pictures, **POOL}
    words |= {"verbose": True, "project": tmp_path / "runs", "model": teachers["detect"]}
    said = trained_by_two(words, tmp_path)
    assert said.count("labels 7 images") == 1
    assert "13 images" in said
    assert len(list(cache.glob("*/records/*.json"))) == 7


OLD_AND_NEW = {0: "old", 1: "new"}
OURS = [*"abcdefgh", "old", "new"]  # what the teacher calls its classes
OLD, NEW = OURS.index("old"), OURS.index("new")
CONFIDENT = {"complete_labels": True, "pool_conf": 0.5, "pool_unsure": 0.1}


@pytest.fixture(scope="module")
def old(teachers: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Checkpoints by task that know a class that is called old, and one that is called new."""
    tasks = ("detect", "segment", "pose", "obb")
    return {task: renamed(teachers[task], tmp_path_factory.mktemp(task), OURS) for task in tasks}


def labelled(folder: Path, labels: dict[str, str | None], names: dict[int, str] = OLD_AND_NEW, **more: Any) -> str:
    """Make a data set of dark images, 100 by 50 pixels, with the given label files, and return its YAML file."""
    rng = np.random.default_rng(0)
    for part in ("images", "labels"):
        (folder / part / "train").mkdir(parents=True)
    for name, rows in labels.items():
        image = rng.integers(0, 99, (50, 100, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / "images" / "train" / f"{name}.png"), image)
        if rows is not None:
            (folder / "labels" / "train" / f"{name}.txt").write_bytes(rows.encode())
    held_out = digits.build(folder / "held-out", {"train": 1, "val": 2}).parent / "images" / "val"
    content = {"path": str(folder), "train": "images/train", "val": str(held_out), "names": names, **more}
    (folder / "data.yaml").write_text(yaml.safe_dump(content))
    return str(folder / "data.yaml")


class Said:
    """Stands for what teachers predict, and notes which images they are asked about."""

    def __init__(self, found: dict[str, list[list[float]]], kind: str = "boxes") -> None:
        self.found, self.kind = found, kind
        self.asked: list[str] = []

    def __call__(self, plan: Any, images: list[str]) -> Iterator[Results]:
        for image in images:
            self.asked.append(Path(image).stem)
            rows = torch.tensor(self.found.get(Path(image).stem, []))
            rows = rows if len(rows) else torch.zeros(0, 7 if self.kind == "obb" else 6)
            more = {"obb": rows} if self.kind == "obb" else {"boxes": rows}
            more |= {"keypoints": torch.full((len(rows), 4, 2), 25.0)} if self.kind == "keypoints" else {}
            yield Results(cv2.imread(image), image, plan.teacher.names, **more)


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Said]:
    """Let teachers predict rows of a box, a confidence and a class, by the name of the image."""

    def replace(found: dict[str, list[list[float]]], kind: str = "boxes") -> Said:
        said = Said(found, kind)
        monkeypatch.setattr(store, "predictions", said)
        return said

    return replace


def completed(teacher: str, data: str, task: str = "detect", **options: Any) -> store.Pool:
    overrides = {name: options.pop(name) for name in ("fraction", "single_cls") if name in options}
    images = options.pop("unlabeled", None)
    return complete.prepare(settings(teacher, images, **{**CONFIDENT, **options}), task, arguments(data, **overrides))


def label_files(pool: store.Pool) -> dict[str, str]:
    return {
        Path(name).stem: (pool.folder / r["label"]).read_bytes().decode() for name, r in sorted(records(pool).items())
    }


def test_labels_are_completed_and_what_the_user_labelled_stays(
    old: dict[str, str], say: Callable[..., Said], tmp_path: Path
) -> None:
    own = "1 0.3 0.5 0.40 0.8\r\n\n1 0.900000 0.1 .1 0.1"  # x 10 to 50, y 5 to 45, and a small one; no end of line
    data = labelled(tmp_path / "new", {"a": own, "b": "", "c": None, "d": "1 0.5 0.5 0.5 0.5\n"})
    say(
        {
            "a": [
                [60, 10, 80, 30, 0.9, OLD],
                [12, 6, 52, 44, 0.8, OLD],  # the same as the first label
                [80, 0, 100, 50, 0.7, OLD],  # one that has the small label in it
                [15, 10, 25, 20, 0.6, OLD],  # one that is in the first label
                [60, 32, 70, 48, 0.95, NEW],
                [70, 32, 78, 48, 0.95, 0],
            ],
            "c": [[0, 0, 50, 50, 0.5, OLD]],
        }
    )
    before = snapshot(tmp_path / "new")
    pool = completed(old["detect"], data)
    assert label_files(pool) == {
        "a": own
        + "\n0 0.700000 0.400000 0.200000 0.400000\n"
        + "0 0.900000 0.500000 0.200000 1.000000\n"
        + "0 0.200000 0.300000 0.100000 0.200000\n",
        "b": "",
        "c": "0 0.250000 0.500000 0.500000 1.000000\n",
        "d": "1 0.5 0.5 0.5 0.5\n",
    }
    assert snapshot(tmp_path / "new") == before
    assert (pool.found.images, pool.found.objects, pool.found.empty, pool.found.painted) == (4, {"old": 4}, 2, 0)
    assert pool.found.left_out == "1 that are labelled as something else"
    assert all(Path(r["source"]).samefile(pool.folder / r["image"]) for r in records(pool).values())


def test_nothing_is_painted_inside_a_label(old: dict[str, str], say: Callable[..., Said], tmp_path: Path) -> None:
    data = labelled(tmp_path / "new", {"a": "1 0.2 0.5 0.2 0.4\n"})  # x 10 to 30, y 15 to 35
    say(
        {
            "a": [
                [20, 10, 60, 40, 0.4, OLD],
                [5, 12, 28, 34, 0.4, OLD],  # by half in the label
                [70, 10, 90, 30, 0.4, NEW],
            ]
        }
    )
    pool = completed(old["detect"], data)
    record = records(pool)["a.png"]
    source, ours = (cv2.imread(str(pool.folder / file)) for file in (record["source"], record["image"]))
    expected = source.copy()
    expected[10:41, 20:61] = 114
    expected[15:36, 10:31] = source[15:36, 10:31]
    assert (ours == expected).all()
    assert label_files(pool) == {"a": "1 0.2 0.5 0.2 0.4\n"}
    assert pool.found.painted == 1


def turned(*box: float) -> str:
    """The line of a label file, after the class, for a box of a centre, a size and an angle."""
    return " ".join(f"{x:.6f}" for x in (xywhr2xyxyxyxy(torch.tensor(box)) / torch.tensor([100, 50])).ravel().tolist())


SAME, ELSEWHERE = [12, 6, 31, 44, 0.9, OLD], [60, 10, 80, 30, 0.9, OLD]  # of the label, and beside it
CORNERS = "0.600000 0.200000 0.800000 0.200000 0.800000 0.600000 0.600000 0.600000"


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
    data = labelled(tmp_path / "new", {"a": f"1 {own}\n"}, **more)
    say({"a": found}, kind)
    assert label_files(completed(old[task], data, task)) == {"a": f"1 {own}\n0 {added}\n"}


def test_completed_labels_are_used_again_until_a_label_file_changes(
    old: dict[str, str], say: Callable[..., Said], tmp_path: Path
) -> None:
    data = labelled(tmp_path / "new", {"a": "1 0.2 0.5 0.2 0.4\n", "b": "", "c": None})
    said = say({"b": [[60, 10, 80, 30, 0.9, OLD]]})
    pool = completed(old["detect"], data)
    assert completed(old["detect"], data) == pool
    assert said.asked == ["a", "b", "c"]
    (tmp_path / "new" / "labels" / "train" / "b.txt").write_text("1 0.7 0.4 0.2 0.4\n")
    said.asked.clear()
    again = completed(old["detect"], data)
    assert said.asked == ["b"]
    assert again.folder == pool.folder
    listed = [Path(line).stem for line in Path(again.train[0]).read_text().splitlines()]
    files = {name: (again.folder / "labels" / f"{name}.txt").read_text() for name in listed}
    assert sorted(files.values()) == ["", "1 0.2 0.5 0.2 0.4\n", "1 0.7 0.4 0.2 0.4\n"]
    (tmp_path / "new" / "labels" / "train" / "c.txt").write_text("")
    (tmp_path / "new" / "labels" / "train" / "a.txt").touch()
    said.asked.clear()
    completed(old["detect"], data)
    assert said.asked == []


def test_an_image_that_is_listed_twice_counts_twice(
    old: dict[str, str], say: Callable[..., Said], tmp_path: Path
) -> None:
    say({"a": [[10, 10, 20, 20, 0.9, 0]]})
    data = Path(labelled(tmp_path, {"a": "1 0.5 0.5 0.2 0.2\n", "b": "1 0.5 0.5 0.2 0.2\n"}))
    content = yaml.safe_load(data.read_text())
    a, b = list_images([str(tmp_path / "images" / "train")])
    (tmp_path / "twice.txt").write_text(f"{a}\n{b}\n{a}\n")
    data.write_text(yaml.safe_dump({**content, "train": str(tmp_path / "twice.txt")}))
    pool = completed(old["detect"], str(data))
    assert len(list(Path(pool.train[0]).read_text().splitlines())) == 3
    assert len(set(Path(pool.train[0]).read_text().splitlines())) == 2


def test_data_that_were_downloaded_in_part_are_used_whole() -> None:
    images = [Path(f"{i}.jpg") for i in range(6)]
    assert store.share(images, 0.5, {}) == images[:3]
    assert store.share(images, 0.5, {"complete": True}) == images


def test_completing_that_is_cut_off_goes_on(
    old: dict[str, str], say: Callable[..., Said], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = labelled(tmp_path / "new", {name: "1 0.2 0.5 0.2 0.4\n" for name in "abc"})
    said = say({})

    def cut_off(plan: Any, images: list[str]) -> Iterator[Any]:
        yield from islice(said(plan, images), 2)
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "predictions", cut_off)
    with pytest.raises(KeyboardInterrupt, match="run the same command again to continue"):
        completed(old["detect"], data)
    monkeypatch.setattr(store, "predictions", said)
    assert completed(old["detect"], data).found.images == 3
    assert said.asked == ["a", "b", "c"]


def test_classes_that_are_labelled_anywhere_are_left_to_the_labels(
    old: dict[str, str], say: Callable[..., Said], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Anywhere in the training images, whatever `fraction` of them is trained on."""
    names = {0: "e", 1: "new", 2: "old", 3: "strange"}
    own, old_line = "1 0.2 0.5 0.2 0.4\n", "2 0.700000 0.400000 0.200000 0.400000\n"
    data = labelled(tmp_path / "new", {"a": own, "b": None, "c": ""}, names)
    say({"a": [[0, 0, 50, 50, 0.9, OURS.index("e")], [60, 10, 80, 30, 0.8, OLD]]})
    both = label_files(completed(old["detect"], data, fraction=2))
    assert both == {"a": own + "0 0.250000 0.500000 0.500000 1.000000\n" + old_line, "b": ""}
    (tmp_path / "new" / "labels" / "train" / "c.txt").write_text("0 0.2 0.5 0.2 0.4\n")
    caplog.clear()
    pool = completed(old["detect"], data, fraction=2)
    assert pool.found.objects == {"old": 1}
    assert [Path(line).exists() for line in Path(pool.train[0]).read_text().splitlines()] == [True, True]
    assert own + old_line in [file.read_text() for file in (pool.folder / "labels").iterdir()]
    for expected in ("1 of 3 training images have no label file", "no label has strange, and"):
        assert [r.levelname for r in caplog.records if expected in r.message] == ["WARNING"]
    completed(old["detect"], data, fraction=2)
    assert sum("no label has strange, and" in r.message for r in caplog.records) == 2
    assert completed(old["detect"], data).found.images == 3
    (tmp_path / "new" / "labels" / "train" / "b.txt").write_text("2 0.9 0.9 0.1 0.1\n")
    with pytest.raises(ConfigError, match=r"labelled: e, new, old; the teacher's: a, b, c, d and 6 more.*name the old"):
        completed(old["detect"], data)


def test_images_that_cannot_be_used_are_told_and_left_out(
    old: dict[str, str], say: Callable[..., Said], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = labelled(tmp_path / "new", {"a": "1 0.2 0.5 0.2 0.4\n", "b": "1 0.2 5 0.2 0.4\n"})
    say({})
    assert list(label_files(completed(old["detect"], data))) == ["a"]
    assert "b.png: ignoring corrupt image/label" in caplog.text
    (tmp_path / "new" / "labels" / "train" / "a.txt").write_text("none\n")
    with pytest.raises(ConfigError, match=r"data=.*: no training .*a\.png: ignoring corrupt"):
        completed(old["detect"], data)


@pytest.mark.parametrize("task", ["semantic", "depth"])
def test_maps_are_not_completed(teachers: dict[str, str], sets: dict[str, str], cache: Path, task: str) -> None:
    with pytest.raises(ConfigError, match=f"complete_labels=True: labels of task={task} are maps.*; leave compl"):
        completed(teachers[task], sets[task], task)
    assert not cache.parent.exists()


def test_labels_that_cannot_be_completed_are_refused_and_leave_nothing(
    teachers: dict[str, str], sets: dict[str, str], cache: Path
) -> None:
    with pytest.raises(ConfigError, match=r"complete_labels=some: must be one of True, False"):
        Settings.parse({"teacher": "t", "complete_labels": "some"})
    with pytest.raises(ConfigError, match=r"it is not trained; give a \.pt checkpoint, or leave complete_labels out"):
        completed(narrow("yolov8n.yaml"), sets["detect"])
    with pytest.raises(ConfigError, match="task=segment; give a teacher for segment, or leave complete_labels out"):
        completed(teachers["detect"], sets["segment"], "segment")
    teacher = renamed(teachers["detect"], cache.parents[2], list("abcdefghij"))
    new = new_classes(cache.parents[2] / "new")
    teacher_of_old = renamed(teachers["detect"], cache.parents[2] / "new", [*"01234", "a", "b", "c", "d", "e"])
    with pytest.raises(ConfigError, match="does not know 5, 6, 7, 8 and 1 more of the data"):
        completed(teacher_of_old, new, unlabeled=str(Path(sets["depth"]).parent / "images"))
    with pytest.raises(ConfigError, match=r"unlabeled=.*: names no file"):
        completed(teacher_of_old, new, unlabeled="nowhere")
    with pytest.raises(ConfigError, match="knows no class of the data without labels") as error:
        completed(teacher, sets["detect"])
    assert len(str(error.value)) < 300
    assert list((cache.parent / "completed").rglob("*")) == []


def new_classes(folder: Path) -> str:
    """Make a data set of digits of which those from 5 on are labelled, and return its YAML file."""
    data = digits.build(folder, {"train": 6, "val": 4})
    for file in (data.parent / "labels" / "train").iterdir():
        file.write_text("".join(line for line in file.read_text().splitlines(True) if int(line[0]) > 4))
    return str(data)


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside a pool"])
def test_a_training_sees_the_completed_labels(
    train: Callable[..., CWDTrainer], teachers: dict[str, str], pictures: Path, tmp_path: Path, beside: bool
) -> None:
    data = new_classes(tmp_path / "new")
    teacher = renamed(teachers["detect"], tmp_path, [*"01234", "a", "b", "c", "d", "e"])
    options = {"complete_labels": True, "pool_conf": 0.001, "pool_unsure": 0.001, "fraction": 0.5}
    options |= {"unlabeled": str(pictures), "pool_classes": "known"} if beside else {}
    seen: list[Any] = []
    callbacks = {"on_train_start": lambda trainer: seen.append(trainer.train_loader.dataset.labels)}
    trainer = train(data=data, teacher=teacher, callbacks=callbacks, **options)
    ours = [label for label in seen[0] if "completed" in label["im_file"]]
    assert (len(ours), len(seen[0])) == (3, 10 if beside else 3)
    files = sorted((Path(data).parent / "labels" / "train").iterdir())[:3]
    own = [float(line.split()[1]) for file in files for line in file.read_text().splitlines()]
    kinds, boxes = (np.concatenate([label[part] for label in ours]) for part in ("cls", "bboxes"))
    assert sorted(boxes[kinds[:, 0] > 4, 0]) == pytest.approx(sorted(own))
    assert (kinds < 5).sum() >= 3
    assert "completed" not in str(trainer.validator.dataloader.dataset.im_files)
    description = yaml.safe_load(trainer.pool.data.read_text())
    assert [str(Path(path).parents[2].name) for path in description["train"]] == ["completed", "unlabeled"][
        : 1 + beside
    ]
    assert trainer.args.fraction == 0.5


def test_a_resumed_run_finds_its_completed_labels_again(
    train: Callable[..., CWDTrainer], teachers: dict[str, str], tmp_path: Path, cache: Path
) -> None:
    data = new_classes(tmp_path / "new")
    teacher = renamed(teachers["detect"], tmp_path, [*"01234", "a", "b", "c", "d", "e"])
    words = {"data": data, "teacher": teacher, "complete_labels": True, "fraction": 0.5, **POOL}
    last = interrupted(train, tmp_path, 1, epochs=2, **words)
    shutil.rmtree(cache.parent)
    trainer = resume(last)
    assert trainer.epoch == 1
    assert len(trainer.train_loader.dataset) == 3
    assert all("completed" in file for file in trainer.train_loader.dataset.im_files)


def test_completed_labels_can_be_seen_and_checked_before(
    teachers: dict[str, str], tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = new_classes(tmp_path / "new")
    teacher = renamed(teachers["detect"], tmp_path, [*"01234", "a", "b", "c", "d", "e"])
    words = [f"teacher={teacher}", f"data={data}", "imgsz=64", "device=cpu", "complete_labels=True"]
    words += [f"{name}={value}" for name, value in POOL.items()]
    assert main(["check", *words, f"student={STUDENT}", "batch=2"]) == 0
    assert "completed the labels of 6 images will be completed with: 0, 1, 2, 3, 4" in capsys.readouterr().out
    assert not cache.parent.exists()
    assert main(["label", *words]) == 0
    said = capsys.readouterr().out
    assert "6 images completed by" in said
    drawn = re.findall(r"^pictures\s+(/.*)$", said, flags=re.MULTILINE)
    assert cv2.imread(drawn[0]) is not None
    assert main(["label", *(word for word in words if "data" not in word)]) == 2
    assert "complete_labels=True: is about the labels of a data set; give data=" in capsys.readouterr().err


@pytest.mark.slow
def test_several_processes_complete_once(teachers: dict[str, str], tmp_path: Path, cache: Path) -> None:
    data = new_classes(tmp_path / "new")
    teacher = renamed(teachers["detect"], tmp_path, [*"01234", "a", "b", "c", "d", "e"])
    words = {**SHORT, "teacher": teacher, "data": data, "complete_labels": True, **POOL}
    words |= {"verbose": True, "project": tmp_path / "runs", "model": teachers["detect"]}
    said = trained_by_two(words, tmp_path)
    assert said.count("labels 6 images") == 1
    assert len(list((cache.parent / "completed").glob("*/records/*.json"))) == 6


HALVES = "0 0.7 0.4 0.2 0.4\n"  # x 60 to 80, y 10 to 30
SCRIPT = {  # what the teacher sees in the validation images; right are the surest one and that of 0.625
    "a": [[60, 10, 80, 30, 0.875, OLD], [60, 10, 80, 30, 0.75, NEW], [60, 10, 80, 30, 0.95, 0]],
    "b": [[10, 15, 30, 35, 0.625, NEW], [11, 15, 31, 35, 0.5, NEW], [80, 0, 100, 50, 0.375, OLD]],
    "c": [[0, 0, 20, 20, 0.25, OLD]],
}
TRUTH = {"a": HALVES, "b": "1 0.2 0.5 0.2 0.4\n0 0.45 0.5 0.1 0.1\n", "c": None}


def held_out(folder: Path, labels: dict[str, str | None], **more: Any) -> str:
    """Make a data set whose validation images have the given label files, and return its YAML file."""
    data = Path(labelled(folder, {"train": "0 0.5 0.5 0.5 0.5\n"}, **more))
    images = Path(labelled(folder / "checked", labels)).parent / "images" / "train"
    data.write_text(yaml.safe_dump({**yaml.safe_load(data.read_text()), "val": str(images)}))
    return str(data)


def chosen(
    teacher: str, images: Any, data: str | None, precision: float, task: str = "detect", **more: Any
) -> tuple[float, float]:
    """Return `pool_conf` and `pool_unsure` under a `pool_precision`."""
    overrides = {name: more.pop(name) for name in ("single_cls", "classes") if name in more}
    options = {"teacher": teacher, "unlabeled": images, "pool_precision": precision, **more}
    found = confidence.chosen(Settings.parse(options), task, arguments(data, **overrides))
    assert found.pool_precision is None
    return found.pool_conf, found.pool_unsure


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        pytest.param(1, 0.9, id="one label"),
        pytest.param(0.6, 0.6, id="lower where the curve rises again"),
        pytest.param(0.5, 0.5, id="exactly"),
        pytest.param(0.3, 0.2, id="all labels"),
    ],
)
def test_the_lowest_confidence_with_the_precision_is_chosen(value: float, expected: float) -> None:
    confidences, right = [0.2004, 0.9, 0.5, 0.8, 0.6, 0.2009], [False, True, False, False, True, False]
    curve = confidence.curve_of(confidences, right, objects=4)
    assert curve.confidences == [0.2, 0.5, 0.6, 0.8, 0.9]
    assert (curve.labels, curve.right) == ([6, 4, 3, 2, 1], [2, 2, 2, 1, 1])
    conf, labels, good = confidence._lowest(curve, value)
    assert conf == expected
    assert labels == sum(c >= conf for c in confidences)
    assert good == sum(r for c, r in zip(confidences, right, strict=True) if c >= conf)


def test_labels_are_as_precise_as_asked_on_the_validation_images(
    old: dict[str, str],
    say: Callable[..., Said],
    pictures: Path,
    tmp_path: Path,
    cache: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Classes are matched by name: the teacher's are others, in another order."""
    data = held_out(tmp_path / "new", TRUTH)
    said = say(SCRIPT)
    before = snapshot(tmp_path / "new")
    found = {value: chosen(old["detect"], str(pictures), data, value) for value in (1, 0.65, 0.5, 0.35, 0.3)}
    assert found == {1: (0.875, 0.1), 0.65: (0.625, 0.1), 0.5: (0.5, 0.1), 0.35: (0.375, 0.1), 0.3: (0.25, 0.1)}
    assert sorted(said.asked) == ["a", "b", "c"]  # once for all values
    assert chosen(old["detect"], str(pictures), data, 0.65, pool_unsure=0.8) == (0.625, 0.625)
    assert chosen(old["detect"], None, data, 0.65, complete_labels=True) == (0.625, 0.1)
    assert sorted(said.asked) == ["a", "b", "c"]
    assert snapshot(tmp_path / "new") == before
    assert [file.suffix for file in (cache.parent / "confidences").iterdir() if file.suffix != ".lock"] == [".json"]
    sentence = "confidence 0.625 is chosen; on the validation images 66.7 % of 3 labels are right there"
    assert [r.levelname for r in caplog.records if sentence in r.message] == 3 * ["WARNING"]
    assert "66.7 % of the objects are found" in caplog.text
    (tmp_path / "new" / "checked" / "labels" / "train" / "c.txt").write_text("0 0.1 0.2 0.2 0.4\n")
    assert chosen(old["detect"], str(pictures), data, 0.4) == (0.25, 0.1)
    assert sorted(said.asked) == ["a", "a", "b", "b", "c", "c"]


def test_classes_that_a_training_leaves_out_or_takes_for_one_do_not_count(
    old: dict[str, str], say: Callable[..., Said], pictures: Path, tmp_path: Path
) -> None:
    data = held_out(tmp_path / "new", TRUTH)
    say(SCRIPT)
    assert chosen(old["detect"], str(pictures), data, 0.5, classes=[1]) == (0.625, 0.1)  # that of 0.75 is wrong
    assert chosen(old["detect"], str(pictures), data, 0.5, classes=[0]) == (0.375, 0.1)
    data = held_out(tmp_path / "turned", {**TRUTH, "a": f"1{HALVES[1:]}"})
    assert chosen(old["detect"], str(pictures), data, 0.6) == (0.625, 0.1)
    assert chosen(old["detect"], str(pictures), data, 1, single_cls=True) == (0.875, 0.1)


@pytest.mark.parametrize(
    ("task", "right", "wrong", "kind"),
    [
        pytest.param("segment", "0.6 0.2 0.8 0.2 0.8 0.6 0.6 0.6", "0.6 0.2 0.62 0.2 0.8 0.6 0.78 0.6", "boxes"),
        pytest.param("pose", "0.7 0.4 0.2 0.4" + 4 * " 0.25 0.5", "0.7 0.4 0.2 0.4" + 4 * " 0.8 0.1", "keypoints"),
        pytest.param("obb", turned(70, 20, 20, 6, 0.6), turned(70, 20, 20, 6, -0.6), "obb"),
    ],
)
def test_a_label_is_right_by_what_its_task_is_about(
    old: dict[str, str],
    say: Callable[..., Said],
    pictures: Path,
    tmp_path: Path,
    task: str,
    right: str,
    wrong: str,
    kind: str,
) -> None:
    more = {"kpt_shape": [4, 2], "flip_idx": [1, 0, 3, 2]} if task == "pose" else {}
    data = held_out(tmp_path / "new", {"a": f"0 {right}\n", "b": f"0 {wrong}\n", "c": ""}, **more)
    box = [70, 20, 20, 6, 0.6] if task == "obb" else [60, 10, 80, 30]
    say({"a": [[*box, 0.75, OLD]], "b": [[*box, 0.5, OLD]], "c": [[*box, 0.25, OLD]]}, kind)
    assert chosen(old[task], str(pictures), data, 1, task) == (0.75, 0.1)
    assert chosen(old[task], str(pictures), data, 0.5, task) == (0.5, 0.1)
    assert chosen(old[task], str(pictures), data, 0.3, task) == (0.25, 0.1)


def test_the_precision_is_that_of_ultralytics_own_validation(
    teachers: dict[str, str], sets: dict[str, str], pictures: Path, tmp_path: Path
) -> None:
    description = yaml.safe_load(Path(narrow(MODELS["detect"])).read_text()) | {"nc": 1}
    (tmp_path / "yolov8n.yaml").write_text(yaml.safe_dump(description))
    torch.manual_seed(3)
    model = YOLO(str(tmp_path / "yolov8n.yaml"))
    settled(model.model, sets["detect"])
    head = model.model.model[-1]
    for boxes, classes in zip(head.cv2, head.cv3, strict=True):  # boxes of two cells, which the teacher is sure of
        boxes[-1].bias.data.view(4, -1)[:, 1] += 9
        classes[-1].bias.data += 6
    model.model.names = {0: "thing"}
    model.save(tmp_path / "sure.pt")
    teacher = str(tmp_path / "sure.pt")
    data = digits.build(tmp_path / "set", {"train": 2, "val": 6})
    for i, image in enumerate(sorted((data.parent / "images" / "val").iterdir())):
        boxes = predicted(teacher, image, 0.01).boxes.xywhn.tolist()
        boxes = boxes[: len(boxes) // 2] if i % 2 else boxes[::3]  # in some, the surer ones are right
        lines = "".join(f"0 {' '.join(f'{x:.6f}' for x in box)}\n" for box in boxes)
        (data.parent / "labels" / "val" / f"{image.stem}.txt").write_text(lines)
    for file in (data.parent / "labels" / "train").iterdir():
        file.write_text("")
    data.write_text(yaml.safe_dump({**yaml.safe_load(data.read_text()), "names": {0: "thing"}}))
    conf, _ = chosen(teacher, str(pictures), str(data), 0.6)
    curve = json.loads(next((tmp_path / "cache").rglob("confidences/*.json")).read_text())
    metrics = YOLO(teacher).val(data=str(data), imgsz=64, rect=False, device="cpu", plots=False, project=str(tmp_path))
    many = np.array(curve["labels"]) >= 100
    for name, (theirs,) in (("labels", metrics.box.p_curve), ("objects", metrics.box.r_curve)):
        ours = np.array(curve["right"]) / curve[name]
        assert ours[many] == pytest.approx(np.interp(curve["confidences"], metrics.box.px, theirs)[many], abs=0.02)
    assert many.sum() > 50
    assert conf == pytest.approx(metrics.box.px[(metrics.box.p_curve[0] >= 0.6).argmax()], abs=0.005)


def test_a_precision_that_is_never_reached_is_refused_with_one_that_is(
    old: dict[str, str], say: Callable[..., Said], pictures: Path, tmp_path: Path, cache: Path
) -> None:
    data = held_out(tmp_path / "new", {**TRUTH, "a": ""})
    say(SCRIPT)
    with pytest.raises(
        ConfigError,
        match=r"pool_precision=0\.5: .* reach 0\.3333 at most \(from confidence 0\.625 on\) .* give "
        r"pool_precision=0\.333 or less, or pool_conf instead",
    ) as error:
        chosen(old["detect"], str(pictures), data, 0.5)
    assert len(str(error.value)) < 300
    assert not cache.exists()
    assert chosen(old["detect"], str(pictures), data, 0.333) == (0.625, 0.1)
    say({})
    data = held_out(tmp_path / "unseen", {**TRUTH})
    with pytest.raises(ConfigError, match=r"labels are never right on the validation images; give pool_conf instead"):
        chosen(old["detect"], str(pictures), data, 0.5)


@pytest.mark.parametrize("value", [0, -1, 1.1, True, "high"])
def test_a_precision_is_a_share(value: Any) -> None:
    expected = rf"pool_precision={value}: must be a number above 0 and at most 1, such as pool_precision=0\.9"
    with pytest.raises(ConfigError, match=expected):
        Settings.parse({"teacher": "t", "pool_precision": value})


def test_a_precision_that_cannot_be_measured_is_refused(
    teachers: dict[str, str], sets: dict[str, str], old: dict[str, str], pictures: Path, tmp_path: Path, cache: Path
) -> None:
    with pytest.raises(ConfigError, match=r"pool_precision=0\.9: decides the confidence itself, but pool_conf=0\.5 is"):
        Settings.parse({"teacher": "t", "pool_precision": 0.9, "pool_conf": 0.5})
    for task in ("semantic", "depth"):
        with pytest.raises(ConfigError, match=f"pool_precision=0.9: labels of task={task} are maps.*leave pool_prec"):
            chosen(teachers[task], str(pictures), sets[task], 0.9, task)
    with pytest.raises(ConfigError, match=r"pool_precision=0\.9: is measured on .*; give data=, or pool_conf instead"):
        chosen(teachers["detect"], str(pictures), None, 0.9)
    with pytest.raises(ConfigError, match=r"unlabeled=.*nowhere: names no file"):
        chosen(teachers["detect"], "nowhere", sets["detect"], 0.9)
    with pytest.raises(ConfigError, match=r"validation images of data=.* have no usable labels; label some of them"):
        chosen(old["detect"], str(pictures), held_out(tmp_path / "new", {"a": "", "b": None, "c": "0 9 9 9 9"}), 0.9)
    assert not [file for file in cache.parent.rglob("*") if file.is_file()]


def surer(teacher: str, folder: Path) -> str:
    """Save a copy of a detector that is surer of what it sees."""
    model = YOLO(teacher)
    for branch in model.model.model[-1].cv3:
        branch[-1].bias.data += 5
    model.save(folder / "surer.pt")
    return str(folder / "surer.pt")


def seen_by(teacher: str, folder: Path) -> str:
    """Make a data set whose validation labels are what the teacher is surest of, and return its YAML file."""
    data = digits.build(folder, {"train": 6, "val": 4})
    for image in sorted((data.parent / "images" / "val").iterdir()):
        boxes = predicted(teacher, image, 0.02).boxes[:5]
        rows = zip(boxes.cls.tolist(), boxes.xywhn.tolist(), strict=True)
        lines = [f"{kind:.0f} {' '.join(f'{x:.6f}' for x in box)}\n" for kind, box in rows]
        (data.parent / "labels" / "val" / f"{image.stem}.txt").write_text("".join(lines))
    return str(data)


def test_a_resumed_run_and_the_command_use_the_confidence_again(
    train: Callable[..., CWDTrainer],
    teachers: dict[str, str],
    pictures: Path,
    tmp_path: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    teacher = surer(teachers["detect"], tmp_path)
    data = seen_by(teacher, tmp_path)
    asked: list[int] = []
    predict = store.predictions
    monkeypatch.setattr(store, "predictions", lambda plan, todo: (asked.append(len(todo)), predict(plan, todo))[1])
    words = {"data": data, "teacher": teacher, "unlabeled": str(pictures), "pool_precision": 0.6}
    last = interrupted(train, tmp_path, 1, epochs=2, **words)
    assert asked == [4, 7]
    files = {file.name for file in last.parents[1].rglob("*")}
    assert files == {"args.yaml", "cwd.yaml", "results.csv", "weights", "last.pt", "best.pt", "cwd.pt"}
    trainer = resume(last)
    assert asked == [4, 7]
    assert trainer.cwd.pool_precision == 0.6
    found = records(trainer.pool)
    curve = json.loads(next((cache.parent / "confidences").glob("*.json")).read_text())
    precise = np.array(curve["right"]) / curve["labels"] >= 0.6
    conf = curve["confidences"][precise.argmax()]
    assert precise.any()
    sure = [c for record in found.values() for c in record["confidences"]]
    assert min(sure) >= conf - 1e-4
    everything = [c for image in pictures.rglob("*.jpg") for c in predicted(teacher, image, conf).boxes.conf.tolist()]
    assert len(sure) == len(everything) > 0
    options = [f"teacher={teacher}", f"source={pictures}", "imgsz=64", "device=cpu", "pool_precision=0.6"]
    assert main(["label", *options, f"data={data}"]) == 0
    assert asked == [4, 7]
    assert "7 images labelled by" in capsys.readouterr().out
    assert main(["label", *options]) == 2
    assert "pool_precision=0.6: is measured on the validation images of a data set" in capsys.readouterr().err


def test_check_does_not_measure_the_precision(
    teachers: dict[str, str], sets: dict[str, str], pictures: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"unlabeled={pictures}", "pool_precision=0.9", "imgsz=64", "batch=2", "device=cpu"]
    of = {task: [f"teacher={teachers[task]}", f"data={sets[task]}"] for task in ("detect", "semantic")}
    assert main(["check", *of["detect"], f"student={STUDENT}", *words]) == 0
    assert "unlabeled 7 images can be used" in capsys.readouterr().out
    assert not cache.parent.exists()
    assert main(["check", *of["semantic"], f"student={narrow(MODELS['semantic'])}", *words]) == 2
    assert "pool_precision=0.9: labels of task=semantic are maps" in capsys.readouterr().err


@pytest.mark.slow
def test_several_processes_measure_once(teachers: dict[str, str], pictures: Path, tmp_path: Path, cache: Path) -> None:
    teacher = surer(teachers["detect"], tmp_path)
    words = {**SHORT, "teacher": teacher, "data": seen_by(teacher, tmp_path), "unlabeled": pictures}
    words |= {"pool_precision": 0.6, "verbose": True, "project": tmp_path / "runs", "model": teacher}
    said = trained_by_two(words, tmp_path)
    assert said.count("labels 4 validation images") == 1
    assert len(list((cache.parent / "confidences").glob("*.json"))) == 1


def beside_a_pool(task: str, data: str, folder: Path, **overrides: Any) -> tuple[Any, PoolWeight]:
    """Make a dataset of the 6 images of data and of copies of 4 of them in a pool, and return both."""
    root = Path(data).parent
    for part in ("images", "labels", "masks", "depth"):
        (folder / part).mkdir(parents=True)
        for file in sorted((root / part / "train").glob("*.*"))[:4]:
            shutil.copy(file, folder / part)
    args = arguments(data, task=task, **overrides)
    images = [str(root / "images" / "train"), str(folder / "images")]
    return build_yolo_dataset(args, images, 4, check_det_dataset(data)), PoolWeight(0.5, folder, args.overlap_mask)


@pytest.mark.parametrize(
    ("model", "overrides"),
    [
        *((name, {}) for name in MODELS.values()),
        *((f"yolo26n{task}.yaml", {}) for task in ("", "-seg", "-pose", "-obb")),  # with two heads
        *((f"{name}-seg.yaml", {"overlap_mask": False}) for name in ("yolov8n", "yolo26n")),
    ],
)
def test_images_of_the_pool_count_by_the_weight(
    sets: dict[str, str], tmp_path: Path, model: str, overrides: dict[str, Any]
) -> None:
    """The images of each kind, collated and seen by the student on their own, are the reference."""
    torch.manual_seed(0)
    task = guess_model_task(narrow(model))
    student = suited(model, sets[task], tmp_path).model
    dataset, weigh = beside_a_pool(task, sets[task], tmp_path / "pool", mosaic=0, **overrides)
    student.args = arguments(sets[task], **overrides)
    criterion = student.init_criterion()
    for layer in student.train().modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.eval()  # what it makes of an image then depends on no other one
    samples = [dataset[i] for i in (6, 0, 7, 8, 1)]

    def loss(of: list[int]) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
        batch = dataset.collate_fn(deepcopy([samples[i] for i in of]))
        batch["img"] = (batch["img"] / 255).requires_grad_()
        return *weigh(criterion, student(batch["img"]), batch), batch["img"]

    own, items, _ = loss([1, 4])
    weigh.weight = 1.0
    pool, further, _ = loss([0, 2, 3])
    for weight in (0.3, 0.0):
        weigh.weight = weight
        both, found, images = loss([0, 1, 2, 3, 4])
        assert both.shape == own.shape
        assert both.tolist() == pytest.approx((own + weight * pool).tolist(), rel=1e-4, abs=1e-5)
        expected = {name: (2 * item + weight * 3 * further[name]) / 5 for name, item in items.items()}
        assert {name: item.item() for name, item in found.items()} == pytest.approx(
            {name: item.item() for name, item in expected.items()}, rel=1e-4, abs=1e-5
        )
    both.sum().backward()
    assert [bool(image.any()) for image in images.grad] == [False, True, False, False, True]
    none, found, images = loss([0, 2, 3])
    none.sum().backward()
    assert not any(value.any() for value in (none, images.grad, *found.values()))


def test_a_batch_that_names_no_image_counts_fully() -> None:
    """As those on which Ultralytics estimates the batch size."""
    loss, _ = PoolWeight(0.0, Path("pool"), True)(lambda *_: (torch.ones(3), {}), None, {"img": torch.zeros(2)})
    assert loss.tolist() == [1, 1, 1]


@pytest.mark.parametrize("cache", [False, "ram"])
@pytest.mark.parametrize("task", ["detect", "segment", "semantic"])
def test_images_are_mixed_with_those_of_their_kind(sets: dict[str, str], tmp_path: Path, task: str, cache: Any) -> None:
    mixing = {"mosaic": 1, "mixup": 1, "cutmix": 1, "copy_paste": 1, "copy_paste_mode": "mixup"}
    dataset, weigh = beside_a_pool(task, sets[task], tmp_path / "pool", cache=cache, **mixing)
    weigh.keep_apart(dataset)
    dataset = pickle.loads(pickle.dumps(dataset))  # as it gets to workers
    seen: list[int] = []
    get = dataset.get_image_and_label
    dataset.get_image_and_label = lambda i: (seen.append(i), get(i))[1]
    drawn: set[int] = set()
    for i in [*range(10), *range(10)]:
        seen.clear()
        dataset[i]
        assert len(seen) > 4
        assert {image > 5 for image in seen} == {i > 5}
        drawn.update(seen)
    assert drawn == set(range(10))
    dataset.close_mosaic(arguments(sets[task]))
    seen.clear()
    dataset[7]
    assert seen == [7]


def test_a_mosaic_of_nine_is_of_one_kind(sets: dict[str, str], tmp_path: Path) -> None:
    dataset, weigh = beside_a_pool("detect", sets["detect"], tmp_path / "pool")
    mosaic = Mosaic(dataset, imgsz=64, p=1.0, n=9)
    dataset.transforms.transforms[0] = mosaic
    weigh.keep_apart(dataset)
    for i in (0, 9):
        dataset.transforms[0](dataset.get_image_and_label(i))
        positions = mosaic.get_indexes()
        assert len(positions) == 8
        files = {mosaic.dataset.get_image_and_label(position)["im_file"] for position in positions}
        assert {weigh.holds(file) for file in files} == {i == 9}


def test_few_images_in_memory_are_not_mixed_again_and_again(sets: dict[str, str], tmp_path: Path) -> None:
    dataset, weigh = beside_a_pool("detect", sets["detect"], tmp_path / "pool")
    weigh.keep_apart(dataset)
    mates = dataset.transforms[0]
    dataset.max_buffer_length, dataset.buffer = 8, [6, 7, 8, 3]
    mates({"im_file": dataset.im_files[3]})
    assert sorted(mates.buffer) == [0, 1, 2, 3, 4, 5]
    mates({"im_file": dataset.im_files[6]})
    assert [mates.get_image_and_label(i)["im_file"] for i in mates.buffer] == [dataset.im_files[i] for i in (6, 7, 8)]


@pytest.fixture
def unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a teacher that is asked for labels fail."""

    def refuse(*_: Any) -> None:
        raise AssertionError("asked for labels")

    monkeypatch.setattr(store, "predictions", refuse)
    for module in (plan, complete):
        monkeypatch.setattr(module, "whole_teacher", refuse)


@pytest.mark.usefixtures("unasked")
@pytest.mark.parametrize("task", MODELS)
def test_with_weight_0_any_teacher_will_do(
    train: Callable[..., CWDTrainer],
    teachers: dict[str, str],
    sets: dict[str, str],
    pictures: Path,
    task: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    seen: list[Any] = []
    teacher = teachers["pose" if task == "detect" else "detect"]
    callbacks = {"on_train_batch_end": lambda trainer: seen.append(trainer.train_loader.dataset)}
    words = {"cwd": "balanced", "adapter": "fitted", "epochs": 2, "close_mosaic": 1, "val": True, "batch": 3}
    words |= {"unlabeled": str(pictures), "pool_weight": 0, "callbacks": callbacks, "teacher": teacher}
    trainer = train(model=narrow(MODELS[task]), data=sets[task], **words)
    pool = [label for label in seen[0].labels if str(trainer.pool.folder) in label["im_file"]]
    assert (len(seen[0]), len(pool)) == (6 + 7, 7)
    assert not any(len(label["cls"]) for label in pool)
    assert all(math.isfinite(value) for row in results(trainer) for value in row.values())
    assert (trainer.criterion.meter.means > 0).all()
    assert "7 images without labels teach by the teacher's maps alone (pool_weight=0)" in caplog.text
    for record in records(trainer.pool).values():
        written = trainer.pool.folder / record["label"]
        assert Path(record["source"]).samefile(trainer.pool.folder / record["image"])
        if task == "semantic":
            assert (cv2.imread(str(written), cv2.IMREAD_UNCHANGED) == 255).all()
        elif task == "depth":
            assert not np.load(written).any()
        else:
            assert written.read_text() == ""


@pytest.mark.usefixtures("unasked")
def test_polygons_of_class_maps_may_have_a_pool_without_labels(
    train: Callable[..., CWDTrainer], sets: dict[str, str], pictures: Path, tmp_path: Path
) -> None:
    description = yaml.safe_load(Path(sets["segment"]).read_text())
    (tmp_path / "polygons.yaml").write_text(yaml.safe_dump(description))
    words = {"data": str(tmp_path / "polygons.yaml"), "unlabeled": str(pictures), "pool_weight": 0}
    words["teacher"] = YOLO(TEACHER)
    trainer = train(model=narrow(MODELS["semantic"]), **words)
    assert len(trainer.train_loader.dataset) == 6 + 7


def test_a_model_that_is_saved_while_a_pool_counts_less_is_plain(
    train: Callable[..., CWDTrainer], sets: dict[str, str], pictures: Path, tmp_path: Path
) -> None:
    file = tmp_path / "guest.pt"
    callbacks = {"on_train_batch_end": lambda trainer: torch.save({"model": trainer.model}, file)}
    words = {"unlabeled": str(pictures), "pool_weight": 0, "callbacks": callbacks}
    trainer = train(data=sets["detect"], **words)
    assert trainer.criterion.weigh is not None
    ended = Started("processes:load_without_us", str(file), cwd=tmp_path).wait()
    assert ended.code == 0, ended.stderr
    assert ended.stdout.split()[0] == "ultralytics.utils.loss"


@pytest.mark.parametrize("weight", [1, 0.5])
def test_the_weight_is_that_of_the_training(
    train: Callable[..., CWDTrainer],
    teachers: dict[str, str],
    sets: dict[str, str],
    pictures: Path,
    weight: float,
    caplog: pytest.LogCaptureFixture,
) -> None:
    words = {"teacher": teachers["detect"], "unlabeled": str(pictures), "pool_weight": weight, "cwd": 0, **POOL}
    seen: list[Any] = []
    callbacks = {"on_train_start": lambda trainer: seen.extend(trainer.train_loader.dataset.transforms.transforms)}
    trainer = train(data=sets["detect"], callbacks=callbacks, **words)
    assert any(isinstance(transform, Mates) for transform in seen) == (weight < 1)
    assert ("each counts as 0.5 of a labelled one" in caplog.text) == (weight < 1)
    batch = next(iter(trainer.train_loader))
    batch["img"] = batch["img"] / 255
    preds = trainer.model.train()(batch["img"])
    expected, _ = trainer.criterion.criterion(preds, batch)
    if weight == 1:
        assert trainer.criterion.weigh is None
    else:
        weigh = trainer.criterion.weigh
        assert weigh.weight == weight
        expected, _ = weigh(trainer.criterion.criterion, preds, batch)
    loss, _ = trainer.criterion(preds, batch)
    assert torch.equal(loss[: len(expected)], expected)


def test_a_compiled_step_weighs_the_images_of_the_pool(
    train: Callable[..., CWDTrainer],
    teachers: dict[str, str],
    sets: dict[str, str],
    pictures: Path,
    traced: list[Any],
) -> None:
    words = {"teacher": teachers["detect"], "unlabeled": str(pictures), "pool_weight": 0.5, "batch": 13, **POOL}
    runs = [train(data=sets["detect"], epochs=1, lr0=1e-7, compile=on, **words) for on in (False, True)]
    assert [hasattr(run.model, "_orig_mod") for run in runs] == [False, True]
    assert traced
    eager, compiled = (results(run)[0] for run in runs)
    for name in ("train/box_loss", "train/cls_loss", "train/cwd_loss"):
        assert compiled[name] == pytest.approx(eager[name], rel=0.1), name


def test_completed_labels_count_fully(
    train: Callable[..., CWDTrainer], teachers: dict[str, str], pictures: Path, tmp_path: Path
) -> None:
    data = new_classes(tmp_path / "new")
    teacher = renamed(teachers["detect"], tmp_path, [*"01234", "a", "b", "c", "d", "e"])
    words = {"data": data, "teacher": teacher, "complete_labels": True, "pool_weight": 0, **POOL}
    assert train(**words).criterion.weigh is None
    trainer = train(**words, unlabeled=str(pictures))  # the teacher knows too little to label these
    files = trainer.train_loader.dataset.im_files
    kinds = [Path(file).parents[2].name for file in files]
    assert [trainer.criterion.weigh.holds(file) for file in files] == [kind == "unlabeled" for kind in kinds]
    assert kinds.count("completed") == 6


def test_measuring_waits_for_an_image_with_labels(
    train: Callable[..., CWDTrainer], sets: dict[str, str], pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds: list[bool] = []
    measure = prepare.measure

    def noting(criterion: Any, student: Any, teacher: Any, batch: Any, scale: float) -> None:
        kinds.extend(criterion.weigh.holds(file) for file in batch["im_file"])
        measure(criterion, student, teacher, batch, scale)

    monkeypatch.setattr(prepare, "measure", noting)
    shares: list[dict[str, float]] = []
    callbacks = {"on_train_epoch_end": lambda trainer: shares.append(trainer.criterion.meter.shares)}
    words = {"unlabeled": str(pictures), "pool_weight": 0, "cwd": "balanced", "batch": 1, "fraction": 0.17}
    trainer = train(data=sets["detect"], callbacks=callbacks, **words)
    assert len(kinds) > 2
    assert kinds == [True] * (len(kinds) - 1) + [False]
    assert (trainer.criterion.meter.means > 0).all()
    assert trainer.criterion.taught == 8
    assert 0 < shares[0]["P3"] < 10


def test_a_training_without_any_measured_strength_stops(
    train: Callable[..., CWDTrainer], sets: dict[str, str], pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PoolWeight, "holds", lambda *_: True)
    monkeypatch.setattr(prepare, "MOST_MEASURED", 3)
    words = {"unlabeled": str(pictures), "pool_weight": 0, "cwd": "balanced", "class_share": 0}
    with pytest.raises(ConfigError, match=r"pool_weight=0: .* give pool_ratio=20, or a larger batch") as error:
        train(data=sets["detect"], **words)
    assert len(str(error.value)) < 300


def test_a_pool_that_would_teach_nothing_is_refused(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="pool_weight=0: with cwd=0 unlabelled images would teach nothing; leave one"):
        settings("t", str(pictures), pool_weight=0, cwd=0)
    assert Settings.parse({"teacher": "t", "pool_weight": 0, "cwd": 0}).pool_weight == 0
    assert main(["label", f"teacher={STUDENT}", f"source={pictures}", "pool_weight=0"]) == 2
    assert "pool_weight=0: such images get no labels" in capsys.readouterr().err


@pytest.mark.usefixtures("unasked")
def test_a_pool_without_labels_is_resumed_compared_and_checked(
    train: Callable[..., CWDTrainer],
    sets: dict[str, str],
    pictures: Path,
    tmp_path: Path,
    cache: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    last = interrupted(train, tmp_path, 1, epochs=2, data=sets["detect"], unlabeled=str(pictures), pool_weight=0)
    shutil.rmtree(cache)
    trainer = resume(last)
    assert (len(trainer.train_loader.dataset), trainer.epoch, trainer.criterion.weigh.weight) == (6 + 7, 1, 0)
    words: dict[str, Any] = {**SHORT, "student": STUDENT, "teacher": TEACHER, "data": sets["detect"], "seeds": 1}
    del words["model"]
    arms = f"maps:unlabeled={pictures},pool_weight=0"
    assert list(compare.run({**words, "folder": str(tmp_path / "compared"), "arms": arms})["arms"]) == ["maps"]
    shutil.rmtree(cache)
    words = {"teacher": TEACHER, "student": STUDENT, "data": sets["detect"], "unlabeled": pictures, "pool_weight": 0}
    assert main(["check", *as_words(**words), "imgsz=64", "batch=2", "device=cpu"]) == 0
    assert "unlabeled 7 images can be used" in capsys.readouterr().out
    assert not cache.exists()


@pytest.mark.slow
def test_several_processes_use_a_pool_without_labels(
    sets: dict[str, str], pictures: Path, tmp_path: Path, cache: Path
) -> None:
    words = {**SHORT, "teacher": TEACHER, "data": sets["detect"], "unlabeled": pictures, "pool_weight": 0}
    words |= {"verbose": True, "project": tmp_path / "runs"}
    said = trained_by_two(words, tmp_path)
    assert said.count("gathering 7 images") == 1
    assert "13 images" in said
    assert len(list(cache.glob("*/records/*.json"))) == 7
