"""Chooses recipes, options and names of runs for the images of the notebooks."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from funmatch.config.data import VALIDATION_SHARE
from funmatch.data.readers.catalog import CATALOG
from funmatch.data.readers.open import open_dataset, resolve_spec
from funmatch.runtime.addresses import allow

EMBEDDED = "fashion-mini"
WITH_RECIPES = ("pet37", "flowers102", "food101")
"""Data sets with recipes for a teacher and a student; the first one's are used for other images."""
LONGEST = 40
"""Characters of a folder's name in the names of runs."""
SMALL = {"side": 32, "eval_resize": 32, "batch": 32, "threads": 1}
"""Options for the embedded images, for which the recipes' networks are too large and would have to be downloaded."""
EMBEDDED_TEACHER = {
    **SMALL, "student": "fashion-mini-teacher", "resize": 36, "steps": 60, "micro_batch": None,
    "decay_steps": (40,), "decay_factors": (0.1,), "eval_every": 10, "log_every": 5,
}  # fmt: skip
EMBEDDED_STUDENT = {
    **SMALL, "student": "fashion-mini-student", "steps": 2000, "lr": 8e-3, "weight_decay": 1e-4, "warmup_steps": 200,
    "eval_every": 200,
}  # fmt: skip


@dataclass(frozen=True)
class Choice:
    """The images of a notebook.

    Attributes:
        data: the source, as `--data` takes it.
        name: its name in those of runs and shards.
        recipes: the data set whose recipes are used.
        images: options for reading the images.
        teacher, student: options that replace those of the recipes.
        side: size of the images in shards, pixels.
    """

    data: str
    name: str
    recipes: str
    images: dict[str, Any] = field(default_factory=dict)
    teacher: dict[str, Any] = field(default_factory=dict)
    student: dict[str, Any] = field(default_factory=dict)
    side: int = 384

    @property
    def is_own(self) -> bool:
        """Whether these are the user's own images, rather than a data set of the catalog."""
        return self.data not in CATALOG


def choose(data: str | Path) -> Choice:
    """Chooses recipes and options for a data set of the catalog, or for images of the user's own.

    Raises:
        InputError: the user's own images are missing, or none of them can be found.
    """
    data = str(data)
    if data == EMBEDDED:
        return Choice(data, data, WITH_RECIPES[0], teacher=EMBEDDED_TEACHER, student=EMBEDDED_STUDENT, side=32)
    if data in CATALOG:
        return Choice(data, data, data if data in WITH_RECIPES else WITH_RECIPES[0])
    allow(data)
    # Absolute, since a later cell may change the folder.
    spec = resolve_spec(data)
    # In every notebook the same images: the student must not be validated on images that its teacher was trained on.
    held_out = {} if "val" in open_dataset(spec).splits else {"val": VALIDATION_SHARE}
    return Choice(spec, _name_of(spec), WITH_RECIPES[0], held_out)


def _name_of(spec: str) -> str:
    """Returns a name for runs: the last part of a path or pattern, in letters that every file system takes."""
    last = re.split(r"[/:]", spec.partition("*")[0].rstrip("/"))[-1]
    name = re.sub(r"[^\w.-]+", "-", last)[-LONGEST:].strip(".-") or "images"
    # Not that of a data set, whose runs may lie in the same folder.
    return f"own-{name}" if name in CATALOG else name
