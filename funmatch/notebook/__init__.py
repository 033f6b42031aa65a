"""Supports notebooks: paths on Kaggle and Colab, stopping before a session ends, and tables and plots for cells."""

from funmatch.notebook.cells import (
    about,
    curves,
    facts,
    figures,
    judged,
    planned,
    samples,
    search_plots,
    searched,
    views,
)
from funmatch.notebook.choices import Choice, choose
from funmatch.notebook.hosts import Place, bring_runs, host_of_this, place

__all__ = [
    "Choice", "Place", "about", "bring_runs", "choose", "curves", "facts", "figures", "host_of_this", "judged", "place",
    "planned", "samples", "search_plots", "searched", "views",
]  # fmt: skip
