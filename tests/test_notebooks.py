"""Every notebook runs, and ends where it says."""

import re
from pathlib import Path

import nbclient
import nbformat
import pytest

from tests.processes import HANGING

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path: Path, tmp_path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), f"{path.name} is kept without outputs; clear them"
    nbclient.NotebookClient(notebook, timeout=HANGING, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    dense, retrained = (float(value) for value in re.search(r"dense ([\d.]+)%, retrained ([\d.]+)%", printed).groups())
    assert dense >= 97
    assert retrained >= dense - 1.5
    kept = float(re.search(r"parameters kept: ([\d.]+)%", printed)[1])
    assert kept <= 50
    tried = re.findall(r"(\d+)% of the parameters: [\d.]+% right after, ([\d.]+)% retrained", printed)
    assert bool(tried) == (path.stem == "truncation_study")
    if tried:  # a study recommends the smallest of those that end within a point
        assert round(kept) == min(int(params) for params, accuracy in tried if float(accuracy) >= dense - 1)
