"""Tests that every notebook runs from top to bottom in a new kernel, in its own folder."""

from __future__ import annotations

import ast

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient

FOLDER = ROOT / "notebooks"
NAMES = sorted(path.name for path in FOLDER.glob("*.ipynb"))


def test_they_are_all_here():
    assert [name[:3] for name in NAMES] == ["01_", "02_", "03_", "04_", "05_"]


@pytest.mark.parametrize("name", NAMES)
def test_its_imports_are_there(name):
    """Everything that a notebook imports exists. `make test-long` runs the notebooks."""
    code = "\n".join(cell.source for cell in nbformat.read(FOLDER / name, 4).cells if cell.cell_type == "code")
    lines = [ast.unparse(node) for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert any("pilot_jax" in line for line in lines)
    exec("\n".join(lines), {})


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_it_runs(name):
    notebook = nbformat.read(FOLDER / name, 4)
    stored = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert stored and not any(output.output_type == "error" for output in stored)  # the outputs that a reader sees
    resources = {"metadata": {"path": str(FOLDER)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
    assert not any(output.output_type == "error" for cell in notebook.cells for output in cell.get("outputs", []))
