"""The notebook of examples/ runs from top to bottom, and is stored without what it printed."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from improved_diffusion.metrics.inception.weights import packaged_weights

NOTEBOOK = Path(__file__).parent.parent / "examples" / "improved_diffusion.ipynb"


@pytest.mark.skipif(packaged_weights() is None, reason="needs the Inception weights")
def test_it_runs(monkeypatch, tmp_path):
    for name, value in {
        "NOTEBOOK_QUICK": "1",
        "OMP_NUM_THREADS": "1",
        "TMPDIR": str(tmp_path),
        "IPYTHONDIR": str(tmp_path / "ipython"),
        "JUPYTER_RUNTIME_DIR": str(tmp_path / "jupyter"),
    }.items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    printed = "".join(
        output.text for cell in notebook.cells for output in cell.get("outputs", []) if output.output_type == "stream"
    )
    assert "(16, 64, 64, 3) uint8" in printed
    assert "drawn: FID64" in printed


def test_it_is_stored_without_outputs():
    cells = [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in cells)
