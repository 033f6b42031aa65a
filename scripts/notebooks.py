"""Writes `notebooks/*.ipynb` from the .py files beside them, with reproducible bytes.

python scripts/notebooks.py          keeps the outputs of cells whose code has not changed
python scripts/notebooks.py --run    runs all cells first, with the embedded images, and saves their outputs

With the outputs a reader sees tables and plots without running anything.
"""

import base64
import os
import re
import sys
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jupytext
import nbformat
from nbclient import NotebookClient
from PIL import Image

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "notebooks"
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
COLORS = 64
"""Colours of saved images."""
HOME = "/home/me"
"""Stands in saved outputs for the folder in which the notebooks were run."""


def generated(text: str, before: Any = None) -> str:
    """The notebook of a text in jupytext's percent format.

    Args:
        text: the text.
        before: the notebook whose outputs are taken over by cells with the same code, or None.
    """
    notebook: Any = jupytext.reads(text, fmt="py:percent")
    notebook.metadata = nbformat.NotebookNode(kernelspec=KERNEL, language_info={"name": "python"})
    known = {cell.source: cell for cell in before.cells if cell.cell_type == "code"} if before else {}
    for number, cell in enumerate(notebook.cells, 1):
        cell.id = f"cell-{number:02}"  # jupytext draws them anew each time
        if cell.cell_type == "code" and cell.source in known:
            cell.outputs = known[cell.source].outputs
            cell.execution_count = known[cell.source].execution_count
    nbformat.validate(notebook)
    return nbformat.writes(notebook) + "\n"


def run(notebook: Any, folder: Path) -> None:
    """Runs all cells of a notebook in a folder, and leaves in its outputs what is the same on every machine."""
    # Its own cache, so that outputs do not depend on what was decoded before.
    places = {"PYTHONPATH": str(ROOT), "FUNMATCH_CACHE": str(folder / "cache"), "FUNMATCH_DATA": str(folder / "data")}
    client = NotebookClient(
        notebook, kernel_name="python3", timeout=1800, resources={"metadata": {"path": str(folder)}}
    )
    client.execute(env={**os.environ, **places})
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times
        if cell.cell_type == "code":
            cell.outputs = [kept for output in cell.outputs if (kept := _portable(output, folder))]


def _portable(output: Any, folder: Path) -> Any:
    """An output without this machine's paths, and without progress; None where nothing remains."""
    data = output.get("data", {})
    # Progress bars are rewritten in place: only a running notebook shows them sensibly.
    if output.output_type == "display_data" and data.keys() == {"text/plain"}:
        return None
    if output.output_type == "stream":
        output.text = re.sub(r".*\r(?!\n)", "", _without_paths(output.text, folder))
        return output if output.text.strip() else None
    # Jupyter saves images of Pillow twice.
    data.pop("image/jpeg", None)
    if "image/png" in data:
        data["image/png"] = _smaller(data["image/png"])
    for kind in data.keys() & {"text/plain", "text/html"}:
        data[kind] = _without_paths(data[kind], folder)
    return output


def _smaller(png: str) -> str:
    """An image in base64 with fewer colours, which do not show but would double the size of the repository."""
    image, small = Image.open(BytesIO(base64.b64decode(png))).convert("RGB"), BytesIO()
    image.quantize(COLORS).save(small, "PNG", optimize=True)
    return base64.b64encode(small.getvalue()).decode()


def _without_paths(text: str, folder: Path) -> str:
    return text.replace(str(folder), HOME).replace(str(ROOT), f"{HOME}/funmatch")


def main(*, running: bool) -> None:
    """Writes all notebooks; with `running`, in their order in one folder, since the later ones use earlier runs."""
    with TemporaryDirectory() as folder:
        for path in sorted(FOLDER.glob("*.py")):
            target, text = path.with_suffix(".ipynb"), path.read_text()
            before: Any = nbformat.read(target, as_version=4) if target.is_file() else None
            if running:
                before = nbformat.reads(generated(text), as_version=4)
                run(before, Path(folder))
            target.write_text(generated(text, before))


if __name__ == "__main__":
    main(running="--run" in sys.argv[1:])
