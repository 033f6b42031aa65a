"""Turns figures into SVG text, and loads the templates of pages."""

from io import BytesIO

from jinja2 import Environment, PackageLoader, Template, select_autoescape
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure


def load_template(name: str) -> Template:
    """Loads a template of `reports/templates`, which escapes its values."""
    loader = PackageLoader("funmatch.reports", "templates")
    # Escaped, since names of folders and classes go into pages; figures are passed through `safe`.
    return Environment(loader=loader, autoescape=select_autoescape(), trim_blocks=True).get_template(name)


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
