"""Turns figures into SVG text, and loads the templates of pages."""

import re
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from functools import cache
from io import BytesIO

import matplotlib
from jinja2 import Environment, PackageLoader, Template, select_autoescape
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

INK, PAPER, GRID = "#1f2328", "#ffffff", "#d0d7de"
COLORS = ("#1f6feb", "#d1570a", "#1a7f37", "#8250df", "#bf3989", "#57606a", "#0a7d91", "#9a6700")
"""Colours of lines; `templates/style.html` has those of a dark page."""
GREY = COLORS[5]
"""Colour of references, such as the teacher."""
VARIABLES = {INK: "ink", PAPER: "paper", GRID: "line"} | {color: f"c{i}" for i, color in enumerate(COLORS)}
"""The variable of `templates/style.html` that stands for each colour on a page."""
LONGEST = 40
"""Characters of a legend's entry; longer names would not fit the width."""
STYLE = {
    # Text stays text, so that a page can be searched; a fixed salt makes the same curves the same bytes.
    "svg.fonttype": "none",
    "svg.hashsalt": "funmatch",
    "font.family": ["sans-serif"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "legend.frameon": False,
    # Never plain black, which matplotlib does not write down: a page could not tell it from a missing colour.
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
}
"""matplotlib's settings for all plots."""


@contextmanager
def drawing() -> Generator[None]:
    """Gives the figures of the block the style of all plots."""
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        # The page's reader has fonts for letters of names that matplotlib's own font lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


@cache  # compiling one takes as long as filling it in
def load_template(name: str) -> Template:
    """Loads a template of `reports/templates`, which escapes its values; its filters are `themed` and `unbroken`."""
    loader = PackageLoader("funmatch.reports", "templates")
    # Escaped, since names of folders and classes go into pages.
    environment = Environment(loader=loader, autoescape=select_autoescape(), trim_blocks=True)
    environment.filters["themed"] = themed
    environment.filters["unbroken"] = unbroken
    return environment.get_template(name)


def unbroken(text: str) -> str:
    """Keeps percent signs on the line of their number."""
    return text.replace(" %", "\N{NO-BREAK SPACE}%")


def themed(svg: str) -> str:
    """Replaces a plot's colours by the page's variables, so that it follows a light or dark theme.

    Only for pages: files and notebooks show a plot without the page's style, on white.
    """
    # Only in `style` attributes: a colour may also be part of a run's name.
    names = re.compile("|".join(VARIABLES))

    def variables(style: re.Match[str]) -> str:
        return names.sub(lambda color: f"var(--{VARIABLES[color[0]]})", style[0])

    return re.sub(r'style="[^"<>]*"', variables, svg)


def to_svg(figure: Figure) -> str:
    """The text of an SVG element; call it inside the figure's style context, which decides how text is written."""
    canvas, text = FigureCanvasSVG(figure), BytesIO()
    # Laid out here and then no more: `savefig` would draw the whole figure once more to lay it out.
    if layout := figure.get_layout_engine():
        layout.execute(figure)
        figure.set_layout_engine("none")
    # Without date and creator, the same figure is the same text.
    canvas.print_svg(text, metadata={"Date": None, "Creator": None})
    svg = text.getvalue().decode()
    # HTML takes the element alone, without the XML declaration and the document type before it.
    return svg[svg.index("<svg") :]


def plain_label(text: str, longest: int = LONGEST) -> str:
    """Shortens text for a plot, on one line, and escapes what matplotlib would hide (_) or typeset (dollar signs)."""
    text = " ".join(text.split())
    # The middle goes: names of runs often differ at their ends.
    text = text if len(text) <= longest else f"{text[: longest // 2 - 1]}…{text[-longest // 2 :]}"
    # A space without width: matplotlib leaves labels that begin with an underscore out of the legend.
    return "\u200b" + text.encode(errors="replace").decode().replace("$", r"\$")
