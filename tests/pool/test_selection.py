"""Which images of a pool are used, by their content and number; no teacher is asked."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from ultralytics.utils import colorstr

from yolo_cwd.config import ConfigError, Settings
from yolo_cwd.pool.images import (
    Split,
    Survey,
    abbreviated,
    content_of,
    evenly,
    fingerprint,
    identity,
    images_of_data,
    is_cut_off,
    is_readable,
    list_images,
    select_images,
    survey,
    unrepaired,
)
from yolo_cwd.pool.store import folder_for


def image(file: Path, seed: int, size: tuple[int, int] = (20, 30)) -> Path:
    """Write an image of random pixels, and return its path."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)
    return file


def some(folder: Path, seeds: Sequence[int]) -> list[Path]:
    return [image(folder / f"{i}.bmp", seed) for i, seed in enumerate(seeds)]  # files of one size


def options(**given: object) -> Settings:
    return Settings.parse({"teacher": "t.pt", "unlabeled": "pool", **given})


def test_content_decides_what_is_left_out(tmp_path: Path) -> None:
    """An image of both the training and the held-out images counts as held out, and the first of equal ones stays."""
    pool = some(tmp_path / "pool", [0, 1, 2, 3, 4, 4, 0])
    (tmp_path / "pool" / "text.png").write_text("none")
    data = Split(some(tmp_path / "train", [0, 1, 2, 1]), some(tmp_path / "val", [0, 9]))
    found = survey([*pool, tmp_path / "pool" / "text.png"], data)
    assert found == Survey([pool[3], pool[4]], unreadable=1, duplicates=1, held_out=2, labeled=2)
    assert found.describe() == (
        "2 images can be used; left out: 1 unreadable, 1 there twice, 2 among the training images, 2 among the images "
        "that models are scored on"
    )
    assert survey(pool[3:5], Split([], [])).describe() == "2 images can be used"
    assert survey([], data) == Survey([])


def test_images_of_the_data_that_are_gone_do_no_harm(tmp_path: Path) -> None:
    pool = some(tmp_path / "pool", [0, 1])
    assert survey(pool, Split([tmp_path / "gone.bmp"], [tmp_path / "gone too.bmp"])) == Survey(pool)


def test_every_split_that_models_are_scored_on_is_held_out(tmp_path: Path) -> None:
    files = {split: str(some(tmp_path / split, [0])[0]) for split in ("train", "val", "test", "minival")}
    lists = {split: [file] if split == "val" else file for split, file in files.items()}
    found = images_of_data({**lists, "names": {}, "train": [files["train"], files["train"]]})
    assert found.held_out == sorted(Path(files[split]) for split in ("val", "test", "minival"))
    assert found.train == [Path(files["train"])] * 2, "Ultralytics trains on it twice"
    assert images_of_data({"train": str(tmp_path / "absent"), "val": []}) == Split([], [])
    assert images_of_data({"train": files["train"], "val": None}) == Split([Path(files["train"])], [])


@pytest.mark.parametrize(
    ("ratio", "labeled", "used"),
    [
        pytest.param(None, 4, [0, 1, 2, 3, 4, 5, 6, 7, 8], id="all"),
        pytest.param(0.75, 4, [0, 4, 8], id="of the labeled images that are used"),
        pytest.param(0.5, 5, [0, 8], id="rounded"),
        pytest.param(0.01, 4, [0], id="one at least"),
        pytest.param(9.0, 4, [0, 1, 2, 3, 4, 5, 6, 7, 8], id="more than there are"),
    ],
)
def test_the_ratio_is_to_the_labeled_images(ratio: float | None, labeled: int, used: list[int], tmp_path: Path) -> None:
    pool = some(tmp_path / "pool", range(9))
    data = Split(some(tmp_path / "train", range(20, 26)), [])
    found = select_images(options(pool_ratio=ratio), pool, data, labeled)
    assert found.images == [pool[i] for i in used]
    assert select_images(options(pool_ratio=ratio), pool, Split([], []), 0).images == pool, "there are none to compare"


def test_a_pool_of_nothing_is_refused(tmp_path: Path) -> None:
    pool = some(tmp_path / "pool", [0, 0])
    held_out = Split([], pool[:1])
    with pytest.raises(ConfigError, match=r"^source=.*pool: 0 images can be used; left out: 2 among the images that"):
        select_images(options(), pool, held_out, 0, "source")
    with pytest.raises(ConfigError, match=r"^unlabeled=.*pool: there are none; give other images$"):
        select_images(options(), [], held_out, 0)
    many = options(unlabeled=",".join(f"/folder{i}" for i in range(50)))
    with pytest.raises(ConfigError, match=r"^unlabeled=/folder0,.{88}\.\.\.: there are none"):
        select_images(many, [], held_out, 0)


def test_even_intervals() -> None:
    images = [Path(str(i)) for i in range(7)]
    assert evenly(images, 7) == evenly(images, 8) == images
    assert evenly(images, 3) == [images[0], images[3], images[6]]
    assert evenly(images, 1) == images[:1]


def test_a_name_for_a_state_changes_with_all_of_it(tmp_path: Path) -> None:
    file = image(tmp_path / "a.bmp", 0)
    name = identity(file)
    assert name == identity(file) == fingerprint(str(file), file.stat().st_size, file.stat().st_mtime_ns)[:16]
    assert len(name) == 16
    os.utime(file, ns=(5, 5))
    assert identity(file) != name
    content = content_of(file)
    file.rename(tmp_path / "b.bmp")
    assert content_of(tmp_path / "b.bmp") == content
    assert len({identity(tmp_path / "b.bmp"), name}) == 2
    (tmp_path / "large").write_bytes(bytes(2**20) + b"1")
    (tmp_path / "other").write_bytes(bytes(2**20) + b"2")
    assert content_of(tmp_path / "large") != content_of(tmp_path / "other"), "what follows the first block counts"


@pytest.mark.parametrize(
    ("name", "size", "readable"),
    [
        pytest.param("a.png", (10, 10), True, id="smallest"),
        pytest.param("a.png", (9, 40), False, id="too low"),
        pytest.param("a.png", (40, 9), False, id="too narrow"),
        pytest.param("a.JPG", (20, 20), True, id="a suffix in capitals"),
        pytest.param("a.webp", (20, 20), True, id="not verified by Pillow"),
        pytest.param("a.jp2", (20, 20), True, id="a suffix that is not the name of its format"),
        pytest.param("a.gif", (20, 20), False, id="no format of Ultralytics"),
    ],
)
def test_what_ultralytics_can_train_on(name: str, size: tuple[int, int], readable: bool, tmp_path: Path) -> None:
    assert is_readable(image(tmp_path / name, 0, size)) == readable


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.bmp", "a.tif", "a.webp"])
@pytest.mark.parametrize("suffix", ["", ".jpg", ".PNG"])
def test_what_is_torn_cannot_be_trained_on(name: str, suffix: str, tmp_path: Path) -> None:
    """Under whatever name, which need not say what is in it."""
    whole = image(tmp_path / name, 0)
    torn = tmp_path / f"torn{suffix or whole.suffix}"
    torn.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    assert [is_readable(whole), is_readable(torn)] == [True, False]


def test_a_path_that_is_no_text_cannot_be_written_into_a_list(tmp_path: Path) -> None:
    whole = image(tmp_path / "a.png", 0)
    assert not is_readable(whole.rename(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png")))


def test_who_waits_sees_how_far_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pool = [*some(tmp_path, [0, 1]), image(tmp_path / "other.bmp", 2, (30, 30))]
    survey([], Split([], []))
    assert capsys.readouterr().out == "", "for nothing"
    survey(pool, Split([], []))
    lines = [line for line in capsys.readouterr().out.splitlines() if "100%" in line]
    for line, doing, total in zip(
        lines, ("looking at the images", "comparing images of one size"), (3, 2), strict=True
    ):
        assert f"{colorstr('CWD:')} {doing}: 100%" in line
        assert f" {total}/{total} " in line


def test_a_jpeg_that_lacks_its_end_would_be_repaired(tmp_path: Path) -> None:
    whole = image(tmp_path / "whole.jpg", 0)
    torn = tmp_path / "torn.png"
    torn.write_bytes(whole.read_bytes() + b"\n")
    assert [is_cut_off(whole), is_cut_off(torn), is_cut_off(image(tmp_path / "a.png", 0))] == [False, True, False]
    with unrepaired(torn) as given:
        assert (given.name, given.read_bytes()) == ("torn.png", torn.read_bytes())
        assert given != torn
    assert not given.exists()
    for as_it_is in (whole, tmp_path / "absent.jpg"):
        with unrepaired(as_it_is) as given:
            assert given == as_it_is


def test_images_are_named_once_in_the_order_of_their_paths(tmp_path: Path) -> None:
    files = some(tmp_path / "pool", range(3))
    (tmp_path / "pool" / "notes.md").write_text("none")
    (tmp_path / "list.txt").write_text("".join(f"{file}\n" for file in reversed(files)))
    assert list_images([str(tmp_path / "list.txt"), str(tmp_path / "pool")]) == files
    assert list_images([str(tmp_path / "absent")]) == []


def test_labels_are_kept_by_what_decides_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The teacher's content and not its path; its sight and its threshold; and what labels look like."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name, content in {"a.pt": b"1", "moved.pt": b"1", "b.pt": b"2"}.items():
        (tmp_path / name).write_bytes(content)

    def folder(
        teacher: str = "a.pt", form: str = "x", imgsz: int = 64, kind: str = "unlabeled", conf: float = 0.2
    ) -> Path:
        asked = options(teacher=str(tmp_path / teacher), pool_conf=conf)
        return folder_for(kind, asked, SimpleNamespace(imgsz=imgsz), form)

    assert folder() == folder(teacher="moved.pt")
    assert folder().parent == tmp_path / "yolo_cwd" / "unlabeled"
    others = [folder(teacher="b.pt"), folder(form="y"), folder(imgsz=96), folder(kind="completed"), folder(conf=0.3)]
    assert len({folder(), *others}) == 6


def test_what_a_source_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder to any depth, a glob with what its folders hold, a list, an image; paths with patterns as they are."""
    first, below = image(tmp_path / "pool" / "a.b.bmp", 0), image(tmp_path / "pool" / "x[1]" / "y" / "c.PNG", 1)
    pool = str(tmp_path / "pool")
    assert list_images([pool], "source") == [first, below]
    assert list_images([f"{pool}/x[[]1]"], "source") == [below]
    assert list_images([f"{pool}/x[1]"], "source") == [below]
    assert list_images([f"{pool}/**/*.PNG"], "source") == [below]
    assert list_images([f"{pool}/?.b.bmp"], "source") == list_images([str(first)], "source") == [first]
    with pytest.raises(ConfigError, match=r"^source=.*/absent: names no file; give a folder, a glob, a \.txt list, or"):
        list_images([f"{pool}/absent"], "source")
    (tmp_path / "gone.bmp").symlink_to(tmp_path / "absent")
    for nothing in (f"{pool}/*.gif", str(tmp_path / "gone.bmp")):
        with pytest.raises(ConfigError, match=rf"^source={re.escape(nothing)}: names no file"):
            list_images([nothing], "source")
    monkeypatch.chdir(tmp_path)
    assert list_images(["pool"], "source") == [first, below]


def test_lines_of_a_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ascii_locale: None) -> None:
    """Relative to the working folder where they are found there, unless they begin with `./`; else to the list."""
    for folder in ("here", "lists"):
        for name in ("both.bmp", "other.bmp", "größer.bmp"):
            image(tmp_path / folder / name, 0)
    here, lists = tmp_path / "here", tmp_path / "lists"
    (here / "größer.bmp").unlink()
    listing = lists / "LIST.TXT"
    listing.write_text("both.bmp \n\n größer.bmp\n./other.bmp\n", encoding="utf-8-sig")
    monkeypatch.chdir(here)
    assert list_images([str(listing)]) == [here / "both.bmp", lists / "größer.bmp", lists / "other.bmp"]
    listing.write_bytes("größer.bmp".encode("latin-1"))
    for argument, said in (("source", "source"), ("", "data")):
        message = rf"^{said}=.*LIST\.TXT: not text in UTF-8; save the list as UTF-8$"
        with pytest.raises(ConfigError, match=message):
            list_images([str(listing)], argument)

    def refuse(*_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refuse)
    for argument, said in (("source", "source"), ("", "data")):
        message = rf"^{said}=.*LIST\.TXT: cannot be read \(Permission denied\); let yourself read the list$"
        with pytest.raises(ConfigError, match=message):
            list_images([str(listing)], argument)


@pytest.mark.parametrize(("length", "shown"), [(100, "/" + 99 * "x"), (101, "/" + 96 * "x" + "...")])
def test_long_names_of_a_pool_are_cut(length: int, shown: str) -> None:
    assert abbreviated(options(unlabeled="/" + (length - 1) * "x")) == shown
