"""Reads the options with which training goes on from a finished run: `funmatch distill RUN --quantize 8`."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from funmatch.config import TAUGHT, recipes
from funmatch.config.distill import Distill
from funmatch.config.metadata import Inherit
from funmatch.config.options import replaced_by
from funmatch.config.sources.files import read_options
from funmatch.errors import InputError
from funmatch.runtime.disk.json_files import RUN_FORMAT, RUN_RECORD, RUN_SHAPE, read_record

SHORTER, GENTLER = 10, 10
"""How many times shorter such a run is by default, and how many times smaller its learning rate."""


def names_run(word: str) -> bool:
    """Returns whether the first word of `distill` names a run, and not a recipe: it is a path."""
    return word not in recipes.RECIPES and ("/" in word or "\\" in word or Path(word).expanduser().is_dir())


def continued_options(folder: Path, names: Collection[str]) -> dict[str, Any]:
    """Returns the options of a distillation that goes on from the student of a finished run.

    Data, views, teachers and all else are the run's; a run without a teacher becomes its own. By default it is a tenth
    as long, and its learning rate a tenth of the run's, falling along half a cosine.

    Args:
        names: the options that the user sets.

    Raises:
        InputError: the folder is not a finished run, or `quantize` is not among the names.
    """
    path = folder.expanduser()
    if not (path / RUN_RECORD).is_file():
        raise InputError(f"there is no run in {folder}; `funmatch distill RUN --quantize 8` takes the folder of one")
    record = read_record(path / RUN_RECORD, RUN_SHAPE, RUN_FORMAT, "choose another run")
    if "quantize" not in names:
        raise InputError(
            f"{folder} is a run; pass --quantize 8 to train its student further for INT8, or --student {folder} with "
            "--data and --teacher to train it anew"
        )
    if not (path / "student").is_dir():
        raise InputError(f"the run in {folder} is not finished; finish it first, so that it has a student")
    verb = record["verb"]
    run = read_options(path / RUN_RECORD, TAUGHT[verb], verb)
    inherited = {Inherit.ALWAYS, Inherit.WITH_TEACHER} if verb == "distill" else {Inherit.ALWAYS}
    names_of_run = Distill.where(lambda opt: opt.inherited in inherited)
    found = {name: value for name, value in run.items() if name in names_of_run}
    # A network that was trained on labels is matched as it is in fp32: no labels are used here.
    teacher = {} if verb == "distill" else {"teacher": (str(folder),)}
    length = {"steps": max(1, (run.get("steps") or SHORTER) // SHORTER)}
    values = found | teacher | length | {
        "student": str(folder), "lr": (run.get("lr") or 0.0) / GENTLER or None, "schedule": "cosine",
    }  # fmt: skip
    dropped = {*names, *replaced_by(Distill, names)}
    return {name: value for name, value in values.items() if name not in dropped}
