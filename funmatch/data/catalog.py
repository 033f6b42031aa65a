"""The data sets that have a name."""

import json
from collections.abc import Callable
from pathlib import Path

from funmatch.data.sources import Mosaic, Source, open_folder
from funmatch.errors import InputError, unknown

EMBEDDED = Path(__file__).parent.parent / "embedded"


def fashion_mini() -> Source:
    """2,700 pictures of Fashion-MNIST (Zalando SE, MIT licence): 200 for training, 500 for validation, 2,000 for test.

    The training pictures are the first 20 of each class in Fashion-MNIST's training set. Validation and test are the
    first 50 and the next 200 of each class in its *test* set, none of which the embedded teacher has seen.
    """
    classes = json.loads((EMBEDDED / "fashion-mini" / "classes.json").read_text())
    return Mosaic(EMBEDDED / "fashion-mini", "fashion-mini", tuple(classes), 28)


CATALOG: dict[str, Callable[[], Source]] = {"fashion-mini": fashion_mini}


def open_source(spec: str) -> Source:
    """The data set that a person named: one of `CATALOG`, or a folder (see `sources.open_folder`)."""
    if spec in CATALOG:
        return CATALOG[spec]()
    path = Path(spec).expanduser()
    if path.exists():
        return open_folder(path)
    if "/" in spec or spec.startswith((".", "~")):
        raise InputError(f"no folder {spec}; wanted a folder of pictures, or one of: {', '.join(CATALOG)}")
    raise unknown("data set", spec, CATALOG, hint=f"and there is no folder {spec!r} here")
