"""Writes the picture of a planned run: schedule, mixing, crops and first views, in one file or one file each."""

import base64
import re
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib
from PIL import Image

from funmatch.reports.html import STYLE, to_svg
from funmatch.reports.images import stacked, tiled, to_image
from funmatch.reports.plan import draws, plots, views
from funmatch.runtime.disk.files import disk_errors, write_atomically
from funmatch.training.setup import TrainSetup

SVG_INCH = 96
"""Units of an SVG without a unit, CSS pixels, per inch."""


def draw(setup: TrainSetup[Any]) -> Image.Image:
    """Draws the whole picture of a run that is set up, for a file or a notebook."""
    panels, sheet = _parts(setup)
    with matplotlib.rc_context(STYLE):
        plotted = [to_image(panel.figure, panel.heading) for panel in panels]
    return stacked([tiled(plotted, _columns(sheet, plotted[0].width)), sheet])


def write(setup: TrainSetup[Any], place: Path) -> list[Path]:
    """Writes the picture of a run that is set up.

    Args:
        place: a file, .png or .svg; else a folder, which gets a file for each part.

    Returns:
        the files.
    """
    place = place.expanduser()
    files: Mapping[Path, bytes]
    if place.is_dir() or not place.suffix:
        files = {place / name: content for name, content in _separate(setup).items()}
    elif place.suffix.lower() == ".svg":
        files = {place: _svg(setup).encode()}
    else:
        files = {place: _png(draw(setup))}
    for path, content in files.items():
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, content)
    return [*files]


def _parts(setup: TrainSetup[Any]) -> tuple[list[plots.Panel], Image.Image]:
    """Returns the plots, and the sheet of first views."""
    drawn = draws.collect(setup.loader, setup.loop.steps)
    with matplotlib.rc_context(STYLE):
        panels = plots.build_panels(setup, drawn)
    return panels, views.draw_sheet(views.first_views(setup))


def _columns(sheet: Image.Image, width: float) -> int:
    """Returns how many plots of a width stand side by side above a sheet: two, or four above a wide one."""
    return 4 if sheet.width >= 4 * width else 2


def _separate(setup: TrainSetup[Any]) -> dict[str, bytes]:
    """Returns the content of each file of a folder."""
    panels, sheet = _parts(setup)
    return {f"{panel.name}.svg": _panel_svg(panel).encode() for panel in panels} | {"views.png": _png(sheet)}


def _panel_svg(panel: plots.Panel) -> str:
    with matplotlib.rc_context(STYLE):
        panel.figure.suptitle(panel.heading, fontsize=10)
        return to_svg(panel.figure)


def _svg(setup: TrainSetup[Any]) -> str:
    """Returns the picture as SVG: the plots as they are, and the views, which are pixels, as an image."""
    panels, sheet = _parts(setup)
    width, height = (SVG_INCH * inches for inches in plots.SIZE)
    columns = _columns(sheet, width)
    rows = -(-len(panels) // columns)
    nested = [
        re.sub("<svg ", f'<svg x="{i % columns * width:g}" y="{i // columns * height:g}" ', _panel_svg(panel), count=1)
        for i, panel in enumerate(panels)
    ]
    whole = max(columns * width, sheet.width), rows * height + sheet.height
    size = f'width="{whole[0]:g}" height="{whole[1]:g}" viewBox="0 0 {whole[0]:g} {whole[1]:g}"'
    png = base64.b64encode(_png(sheet)).decode()
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" {size}>',
            '<rect width="100%" height="100%" fill="white"/>',
            *nested,
            # Pixels stay squares at every zoom: smoothed views would be other views.
            f'<image y="{rows * height:g}" width="{sheet.width}" height="{sheet.height}" '
            f'style="image-rendering:pixelated" xlink:href="data:image/png;base64,{png}"/>',
            "</svg>\n",
        ]
    )


def _png(image: Image.Image) -> bytes:
    content = BytesIO()
    image.save(content, "PNG")
    return content.getvalue()
