"""The images of a pool: what names them, and which are left out."""

import os
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml
from labeling import label, records
from PIL import Image

from yolo_cwd.config import ConfigError, Settings
from yolo_cwd.pool.images import list_images

pytestmark = pytest.mark.usefixtures("cache")


def test_sources_are_folders_globs_lists_and_images(pictures: Path, tmp_path: Path) -> None:
    below = sorted((pictures / "below").iterdir())
    (tmp_path / "far.jpg").write_bytes(below[0].read_bytes())
    (tmp_path / "list.txt").write_text(f"{below[0]}\n./far.jpg\n\n{below[0]}\n")
    everything = list_images([str(pictures)])
    assert len(everything) == 7
    assert list_images([str(pictures / "below"), str(pictures / "*.jpg")]) == everything
    assert list_images([str(tmp_path / "list.txt")]) == sorted([below[0], tmp_path / "far.jpg"])
    assert list_images([str(below[1])]) == [below[1]]
    assert list_images([str(pictures / "below" / "0000[0-9].jpg")]) == below
    assert list_images([str(pictures / "below" / "0000?.jpg")]) == below
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


def test_a_folder_may_have_a_number_for_a_name(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(pictures, tmp_path / "2024")
    monkeypatch.chdir(tmp_path)
    assert Settings.parse({"teacher": "t", "unlabeled": 2024}).unlabeled == (str(tmp_path / "2024"),)


def test_what_is_no_use_is_left_out_with_a_warning(
    teachers: dict[str, str], sets: dict[str, str], pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images, data = tmp_path / "images", Path(sets["detect"]).parent
    shutil.copytree(pictures, images)
    shutil.copy(next(pictures.glob("*.jpg")), images / "again.jpg")
    (images / "torn.jpg").write_bytes(next(pictures.glob("*.jpg")).read_bytes()[:900])
    (images / "text.png").write_text("no image")
    cv2.imwrite(str(images / "tiny.png"), np.zeros((4, 4, 3), np.uint8))
    cv2.imwrite(str(images / "torn.tif"), np.random.default_rng(0).integers(0, 255, (60, 60, 3), dtype=np.uint8))
    (images / "torn.tif").write_bytes((images / "torn.tif").read_bytes()[:5000])
    Image.new("RGB", (40, 40)).save(images / "other.jpg", "GIF")  # Ultralytics trains on none, whatever its name
    cv2.imwrite(str(images / "torn.bmp"), np.zeros((40, 40, 3), np.uint8))
    (images / "torn.bmp").write_bytes((images / "torn.bmp").read_bytes()[:200])
    shutil.copy(next(pictures.glob("*.jpg")), os.fsencode(images) + b"/caf\xe9.jpg")
    shutil.copy(next((data / "images" / "val").iterdir()), images / "leak.jpg")
    shutil.copy(next((data / "images" / "train").iterdir()), images / "known.jpg")
    pool = label(teachers["detect"], f"{images},{data / 'images' / 'val'}", sets["detect"])
    assert pool.summary.images == 7
    expected = "7 unreadable, 1 there twice, 1 among the training images, 5 among the images that models are scored on"
    assert pool.summary.left_out == expected
    assert [r.levelname for r in caplog.records if expected in r.message] == ["WARNING"]


@pytest.mark.parametrize("split", ["val", "test", "minival"])
def test_images_of_every_split_that_models_are_scored_on_are_left_out(
    teachers: dict[str, str], sets: dict[str, str], pictures: Path, tmp_path: Path, split: str
) -> None:
    """Content decides: here they lie elsewhere, under other names."""
    content = yaml.safe_load(Path(sets["detect"]).read_text()) | {"path": str(Path(sets["detect"]).parent)}
    (tmp_path / "held-out").mkdir()
    for i, image in enumerate(sorted((pictures / "below").iterdir())):
        shutil.copy(image, tmp_path / "held-out" / f"other-{i}.jpg")
    (tmp_path / "data.yaml").write_text(yaml.safe_dump({**content, split: str(tmp_path / "held-out")}))
    pool = label(teachers["detect"], str(pictures), str(tmp_path / "data.yaml"))
    assert pool.summary.left_out == "2 among the images that models are scored on"
    assert sorted(records(pool)) == sorted(file.name for file in pictures.glob("*.jpg"))
    assert len(Path(pool.train[-1]).read_text().splitlines()) == 5
