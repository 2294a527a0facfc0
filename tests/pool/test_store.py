"""The folder of labeled images: links, what is used again, and several writers."""

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import cv2
import pytest
from labeling import label, records
from processes import Started
from ultralytics import YOLO
from ultralytics.utils.dist import find_free_network_port

from yolo_cwd.config import ConfigError
from yolo_cwd.pool import store

pytestmark = pytest.mark.usefixtures("cache")


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


def test_labeling_that_is_cut_off_goes_on(
    teachers: dict[str, str], sets: dict[str, str], pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    write, predict = store._put, store.predictions

    def cut_off(*words: Any) -> Iterator[Any]:
        yield from islice(predict(*words), 4)
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
    monkeypatch.setattr(store, "predictions", lambda *words: (asked.append(len(words[2])), predict(*words))[1])
    assert label(teachers["detect"], str(images), sets["detect"]) == pool
    assert asked == []
    image = cv2.imread(str(next(images.glob("*.jpg"))))
    cv2.imwrite(str(images / "new.png"), image[::-1])
    assert label(teachers["detect"], str(images), sets["detect"]).summary.images == 8
    assert asked == [1]
    for part in ("images", "labels"):
        shutil.rmtree(pool.folder / part)
        assert label(teachers["detect"], str(images), sets["detect"]).summary.images == 8
    other = label(teachers["detect"], str(images), sets["detect"], pool_conf=0.5)
    assert asked == [1, 8, 8, 8]
    assert other.folder != pool.folder


def test_a_teacher_is_known_by_its_content(
    teachers: dict[str, str], sets: dict[str, str], pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have been moved since, or trained anew into the same file."""
    asked: list[int] = []
    predict = store.predictions
    monkeypatch.setattr(store, "predictions", lambda *words: (asked.append(len(words[2])), predict(*words))[1])
    shutil.copy(teachers["detect"], tmp_path / "first.pt")
    first = label(str(tmp_path / "first.pt"), str(pictures), sets["detect"])
    (tmp_path / "first.pt").rename(tmp_path / "moved.pt")
    assert label(str(tmp_path / "moved.pt"), str(pictures), sets["detect"]) == first
    assert asked == [7]
    model = YOLO(teachers["detect"])
    for branch in model.model.model[-1].cv3:
        branch[-1].bias.data -= 9  # it sees nothing now
    model.save(tmp_path / "first.pt")
    anew = label(str(tmp_path / "first.pt"), str(pictures), sets["detect"])
    assert anew.folder != first.folder
    assert asked == [7, 7]
    assert first.summary.objects
    assert not anew.summary.objects


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


def test_results_do_not_wait_on_the_gpu(
    teachers: dict[str, str], sets: dict[str, str], pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dozens of them wait to be written, and hundreds of masks each would fill it."""

    class OnGpu:
        """A result that can only be moved."""

        def __init__(self, result: Any) -> None:
            self.cpu = lambda: result

    written: list[type] = []
    predict, write = store.predictions, store._put
    on_gpu = lambda *words: ((source, OnGpu(result)) for source, result in predict(*words))  # noqa: E731
    monkeypatch.setattr(store, "predictions", on_gpu)
    monkeypatch.setattr(store, "_put", lambda *words: (written.append(type(words[1])), write(*words)))
    label(teachers["detect"], str(pictures), sets["detect"])
    assert len(written) == 7
    assert OnGpu not in written


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


def test_a_cache_that_cannot_be_written_is_named(
    teachers: dict[str, str], sets: dict[str, str], pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"cannot write .*; set XDG_CACHE_HOME to a folder of yours"):
        label(teachers["detect"], str(pictures), sets["detect"])


def test_two_machines_may_share_a_cache_folder(tmp_path: Path) -> None:
    """Each has a first process of its own; none waits for the lock where the other waits for it."""
    shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(find_free_network_port())}
    shared |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    words = "processes:write_alone", str(tmp_path / "folder")
    both = [Started(*words, cwd=tmp_path, env={**shared, "RANK": str(rank)}) for rank in range(2)]
    assert [one.wait(60).code for one in both] == [0, 0]
    assert sorted((tmp_path / "said").read_text().split()) == ["0", "1"]
