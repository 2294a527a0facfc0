"""Lists of labeled images: what is in them, and that they are made again if deleted."""

import shutil
from pathlib import Path

import pytest
from labeling import label

pytestmark = pytest.mark.usefixtures("cache")


@pytest.mark.parametrize("suffix", [".txt", ".yaml", ".json"])
def test_a_list_that_was_deleted_is_made_again(
    teachers: dict[str, str], sets: dict[str, str], pictures: Path, suffix: str
) -> None:
    pool = label(teachers["detect"], str(pictures), sets["detect"])
    content = {file: file.read_bytes() for file in (pool.folder / "lists").iterdir()}
    pool.data.with_suffix(suffix).unlink()
    assert label(teachers["detect"], str(pictures), sets["detect"]) == pool
    assert {file: file.read_bytes() for file in (pool.folder / "lists").iterdir()} == content


def test_lines_of_a_list_that_are_gone_are_counted_no_more(
    teachers: dict[str, str], sets: dict[str, str], pictures: Path, tmp_path: Path
) -> None:
    """A list that names the same images, and fewer that are not there, is another list."""
    listed, images = tmp_path / "list.txt", sorted(pictures.rglob("*.jpg"))[:2]
    listed.write_text("\n".join([*map(str, images), "/absent.jpg"]))
    assert label(teachers["detect"], str(listed), sets["detect"]).summary.left_out == "1 unreadable"
    listed.write_text("\n".join(map(str, images)))
    assert label(teachers["detect"], str(listed), sets["detect"]).summary.left_out == ""


def test_unreadable_images_are_counted_as_they_are_now(
    teachers: dict[str, str], sets: dict[str, str], pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Not again those of an earlier training by the same teacher: mended, removed, or of another list."""
    folder, whole = tmp_path / "pool", sorted(pictures.rglob("*.jpg"))[:3]
    folder.mkdir()
    for image in whole[:2]:
        shutil.copy(image, folder)
    torn = folder / "torn.jpg"

    def left_out(source: Path) -> str:
        caplog.clear()
        found = label(teachers["detect"], str(source), sets["detect"]).summary.left_out
        said = [line for line in caplog.messages if "left out" in line]
        assert len(said) == bool(found), "once"
        assert all(line.endswith(f": {found}") for line in said)
        return found

    torn.write_bytes(whole[2].read_bytes()[:900])
    assert [left_out(folder) for _ in range(2)] == ["1 unreadable"] * 2
    (folder / "torn.png").write_bytes(b"torn")
    assert left_out(folder) == "2 unreadable"
    (tmp_path / "list.txt").write_text(f"{folder / whole[0].name}\n{torn}\n")
    assert left_out(tmp_path / "list.txt") == "1 unreadable"
    shutil.copy(whole[2], torn)
    assert left_out(folder) == "1 unreadable"
    (folder / "torn.png").unlink()
    assert left_out(folder) == ""
