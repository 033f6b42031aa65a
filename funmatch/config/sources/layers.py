"""Decides where each option's value comes from: the command line, over a file, over a recipe, over the default."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from funmatch.config import SEARCHED, recipes
from funmatch.config.options import Options, replaced_by
from funmatch.config.sources.continued import continued_options
from funmatch.config.sources.files import read_options
from funmatch.errors import InputError

COMMAND_LINE, PYTHON, DEFAULT = "command line", "Python", "default"


@dataclass(frozen=True)
class Layers:
    """What files and recipes set.

    Attributes:
        values: option to value; those that the user sets are not among them, nor those that go with what they replace.
        sources: option to the file or the recipe that sets it.
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)

    def source_of(self, name: str, names: Collection[str], origin: str) -> str:
        """Where the value of an option comes from.

        Args:
            names: the options that the user sets.
            origin: where: the command line, or Python.
        """
        return origin if name in names else self.sources.get(name, DEFAULT)


def layers_below(
    table: type[Options],
    verb: str,
    names: Collection[str],
    config: Path | None = None,
    recipe: str | None = None,
    run: Path | None = None,
) -> Layers:
    """What the file and the recipe set below what the user sets.

    Args:
        verb: the command, or that whose runs are searched or planned.
        names: the options that the user sets.
        config: the file that the user names.
        recipe: the recipe that the user names.
        run: the finished run from which a distillation goes on.

    Raises:
        InputError: the file or the run cannot be used, the recipe does not exist, or the file follows another recipe.
    """
    own = read_options(config, table, verb) if config else {}
    # Taken out: a recipe is a layer of its own, not an option that a file sets.
    named = own.pop("recipe", None)
    if named and recipe and named != recipe:
        raise InputError(f"{config} follows the recipe {named}, but {recipe} is given beside it; a run follows one")
    # Dropped before the recipe is read: what the user's option replaces in the file must not replace anything in turn.
    dropped = {*names, *replaced_by(table, names)}
    own = {name: value for name, value in own.items() if name not in dropped}
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    if run:
        values |= continued_options(run, {*names, *own})
        sources |= dict.fromkeys(values, f"the run {run}")
    if recipe := recipe or named:
        chosen = recipes.find(recipe, verb)
        # A file's options replace a recipe's as the user's do: only one of the two is left.
        values |= chosen.over({*names, *own})
        if table in SEARCHED.values() and "out" in values:
            values["out"] = values["out"].with_name(f"tune-{recipe}")  # the recipe's own is a run's
        sources |= dict.fromkeys(values, f"recipe {recipe}")
    # The file last: it counts more than the recipe.
    return Layers(values | own, sources | dict.fromkeys(own, str(config)))
