"""Renders tables and plots for notebooks: HTML there, plain text elsewhere."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape


@dataclass(frozen=True)
class Shown:
    """Something to look at: HTML for notebooks, text elsewhere."""

    html: str
    text: str

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        return self.text


def show_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Shown:
    """A table as HTML and as tab-separated text."""
    return Shown(html_table(columns, rows), "\n".join("\t".join(row) for row in [columns, *rows]))


def show_message(text: str) -> Shown:
    """A sentence in the place of something that cannot be shown yet."""
    return Shown(f"<p>{escape(text)}</p>", text)


def html_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as HTML, every cell escaped."""
    head = "".join(f"<th style='text-align:left'>{escape(name)}</th>" for name in columns)
    lines = ["".join(f"<td style='text-align:left'>{escape(cell)}</td>" for cell in row) for row in rows]
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def html_panels(panels: Sequence[tuple[str, str]]) -> str:
    """Plots, (heading, SVG), beside one another where there is room."""
    each = "".join(
        f"<figure style='margin:0'><figcaption>{escape(name)}</figcaption>{svg}</figure>" for name, svg in panels
    )
    return f"<div style='display:grid;grid-template-columns:repeat(auto-fit,minmax(26em,1fr));gap:1em'>{each}</div>"
