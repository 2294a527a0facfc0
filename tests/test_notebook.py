"""The notebook, run from the first cell to the last."""

import json
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parent.parent / "docs" / "quickstart.ipynb"


def test_no_output_is_stored() -> None:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert len(cells) > 5
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)


@pytest.mark.slow
def test_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("nbclient", "nbformat", "ipykernel", "onnx", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install -e '.[dev,docs]'")
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.delenv("PYTEST_CURRENT_TEST")  # under a test Ultralytics writes runs into its own folder
    (tmp_path / "Ultralytics").mkdir()
    (tmp_path / "Ultralytics" / "settings.json").write_text(json.dumps({"runs_dir": str(tmp_path / "runs")}))
    for folder in ("YOLO_CONFIG_DIR", "XDG_CACHE_HOME", "IPYTHONDIR"):
        monkeypatch.setenv(folder, str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parent.parent), prepend=":")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    (best,) = tmp_path.rglob("student/weights/best.pt")
    assert best.with_suffix(".onnx").exists()
    printed = "".join(o.get("text", "") for c in notebook.cells for o in c.get("outputs", []))
    assert "best.onnx  mAP50-95" in printed
