"""Turns figures into images, and lays images out, for notebooks: viewers of saved ones may leave out HTML."""

import textwrap
from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from funmatch.reports.html import INK

DPI = 100
"""Pixels per inch of plots."""
CAPTION = 14
"""Height of a caption's letters, pixels."""
THUMBNAIL = 96
"""Pixels to which smaller views are enlarged, as far as whole factors go."""


def to_image(figure: Figure, heading: str) -> Image.Image:
    """Draws a figure with its heading as pixels."""
    # Of the figure: a panel may have several axes.
    figure.suptitle(heading, fontsize=10)
    canvas = FigureCanvasAgg(figure)
    figure.set_dpi(DPI)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def captioned(image: Image.Image, text: str) -> Image.Image:
    """Writes a caption above an image, broken into lines as wide as the image."""
    font = ImageFont.load_default(CAPTION)
    lines = textwrap.wrap(text, max(20, round(image.width / font.getlength("n"))))
    row = round(1.4 * CAPTION)
    sheet = Image.new("RGB", (image.width, row * len(lines) + CAPTION // 2 + image.height), "white")
    draw = ImageDraw.Draw(sheet)
    for number, line in enumerate(lines):
        draw.text((0, number * row), line, fill=INK, font=font)
    sheet.paste(image, (0, sheet.height - image.height))
    return sheet


def tiled(images: Sequence[Image.Image], columns: int) -> Image.Image:
    """Lays images out in rows of a number of columns, on white."""
    rows = [images[first : first + columns] for first in range(0, len(images), columns)]
    width = max(image.width for image in images)
    heights = [max(image.height for image in row) for row in rows]
    sheet = Image.new("RGB", (width * min(columns, len(images)), sum(heights)), "white")
    for number, row in enumerate(rows):
        for column, image in enumerate(row):
            sheet.paste(image, (column * width, sum(heights[:number])))
    return sheet


def stacked(images: Sequence[Image.Image]) -> Image.Image:
    """Lays images of any widths out below each other, on white."""
    sheet = Image.new("RGB", (max(each.width for each in images), sum(each.height for each in images)), "white")
    top = 0
    for image in images:
        sheet.paste(image, (0, top))
        top += image.height
    return sheet


def views_image(views: Tensor, columns: int) -> Image.Image:
    """Lays views out in rows, with each pixel of a view still to be seen; the last row may be short, on white.

    Args:
        views: (n, 3, side, side) in [0, 1].
        columns: views in a row.
    """
    pixels = (views.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).cpu().numpy()
    # Whole factors and nearest neighbours: anything else would smooth what the network is shown.
    side = views.shape[-1] * max(1, THUMBNAIL // views.shape[-1])
    each = [Image.fromarray(view).resize((side, side), Image.Resampling.NEAREST) for view in pixels]
    return tiled(each, columns)
