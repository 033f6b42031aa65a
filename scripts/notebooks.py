"""Writes `notebooks/*.ipynb` from the .py files beside them, without outputs and with reproducible bytes.

python scripts/notebooks.py
"""

from pathlib import Path
from typing import Any

import jupytext
import nbformat

FOLDER = Path(__file__).parent.parent / "notebooks"
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def generated(text: str) -> str:
    """The notebook of a text in jupytext's percent format."""
    notebook: Any = jupytext.reads(text, fmt="py:percent")
    notebook.metadata = nbformat.NotebookNode(kernelspec=KERNEL, language_info={"name": "python"})
    for number, cell in enumerate(notebook.cells, 1):
        cell.id = f"cell-{number:02}"  # jupytext draws them anew each time
    nbformat.validate(notebook)
    return nbformat.writes(notebook) + "\n"


if __name__ == "__main__":
    for path in sorted(FOLDER.glob("*.py")):
        path.with_suffix(".ipynb").write_text(generated(path.read_text()))
