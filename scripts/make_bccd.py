"""Makes yolo_cwd/bccd/data.zip, the embedded blood cells, and the data set that their teacher was trained on.

    python scripts/make_bccd.py path/to/bccd teacher-data

The first folder holds BCCD in YOLO's layout: `images` and `labels`, each with `train`, `val` and `test`. Images are
scaled to 320 pixels. The embedded set has every fourth training image by name, and the validation and test images
together for validation: 52 and 159. The second folder is written; it has all 205 training images, scaled as well.
"""

import io
import shutil
import sys
import zipfile
from pathlib import Path

import cv2
import yaml

LONG_SIDE = 320  # pixels
QUALITY = 80  # of the JPEG files
EVERY = 4  # of so many training images, the student gets one
FILE = Path(__file__).parent.parent / "yolo_cwd" / "bccd" / "data.zip"
NAMES = {0: "Platelets", 1: "RBC", 2: "WBC"}
LAYOUT = {"train": "images/train", "val": "images/val"}


def main() -> None:
    """Write both sets."""
    source, whole = map(Path, sys.argv[1:])
    splits = {"train": _images(source, "train"), "val": _images(source, "val", "test")}
    shutil.rmtree(whole, ignore_errors=True)
    for name, content in _files(splits).items():
        (whole / name).parent.mkdir(parents=True, exist_ok=True)
        (whole / name).write_bytes(content)
    layout = yaml.safe_dump({"path": str(whole.resolve()), **LAYOUT, "names": NAMES})
    (whole / "bccd.yaml").write_text(layout, encoding="utf-8")
    with zipfile.ZipFile(FILE, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in _files({**splits, "train": splits["train"][::EVERY]}).items():
            packed.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)  # undated: always the same archive
    print(f"{FILE}: {FILE.stat().st_size / 1e6:.2f} MB")


def _images(source: Path, *splits: str) -> list[Path]:
    return [file for split in splits for file in sorted((source / "images" / split).iterdir())]


def _files(splits: dict[str, list[Path]]) -> dict[str, bytes]:
    """Return the content of every image and label file by its name."""
    files = {}
    for split, images in splits.items():
        for image in images:
            labels = Path(*("labels" if part == "images" else part for part in image.parts)).with_suffix(".txt")
            files[f"images/{split}/{image.stem}.jpg"] = _scaled(image)
            files[f"labels/{split}/{image.stem}.txt"] = labels.read_bytes()
    return files


def _scaled(image: Path) -> bytes:
    pixels = cv2.imread(str(image))
    scale = LONG_SIDE / max(pixels.shape[:2])
    pixels = cv2.resize(pixels, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    return io.BytesIO(cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1]).getvalue()


if __name__ == "__main__":
    main()
