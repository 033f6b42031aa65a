"""Renders tables for notebooks: HTML there, plain text elsewhere."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape


@dataclass(frozen=True)
class Shown:
    """An output cell: HTML in notebooks, plain text elsewhere.

    Attributes:
        html: the notebook's representation.
        text: `repr`, for terminals and tests.
    """

    html: str
    text: str

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        return self.text


def show_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Shown:
    """Renders a table as HTML and as tab-separated text."""
    return Shown(html_table(columns, rows), "\n".join("\t".join(row) for row in [columns, *rows]))


def show_message(text: str) -> Shown:
    """Renders a sentence, where there is no table or plot to show yet."""
    return Shown(f"<p>{escape(text)}</p>", text)


def html_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Renders a table as HTML, with every cell escaped."""
    # Inline styles: viewers of saved notebooks remove style elements from output cells.
    head = "".join(f"<th style='text-align:left'>{escape(name)}</th>" for name in columns)
    lines = ["".join(f"<td style='text-align:left'>{escape(cell)}</td>" for cell in row) for row in rows]
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"
