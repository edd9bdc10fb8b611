"""Tests that every notebook runs from top to bottom in a new kernel, in its own folder."""

from __future__ import annotations

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient

FOLDER = ROOT / "notebooks"
NAMES = sorted(path.name for path in FOLDER.glob("*.ipynb"))


def test_they_are_all_here():
    assert [name[:3] for name in NAMES] == ["01_", "02_", "03_", "04_"]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_it_runs(name):
    notebook = nbformat.read(FOLDER / name, 4)
    stored = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert stored and not any(output.output_type == "error" for output in stored)  # the outputs that a reader sees
    resources = {"metadata": {"path": str(FOLDER)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
    assert not any(output.output_type == "error" for cell in notebook.cells for output in cell.get("outputs", []))
