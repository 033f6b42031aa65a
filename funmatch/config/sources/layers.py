"""Decides where each option's value comes from: the command line, over a file, over a recipe, over the default."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from funmatch.config import TAUGHT, recipes
from funmatch.config.options import Options, replaced_by
from funmatch.config.sources.files import read_options
from funmatch.errors import InputError

COMMAND_LINE, PYTHON, DEFAULT = "command line", "Python", "default"


@dataclass(frozen=True)
class Layers:
    """What files and recipes set.

    Attributes:
        values: option to value; those that a person sets are not among them, nor those that go with what they replace.
        sources: option to the file or the recipe that sets it.
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)

    def source_of(self, name: str, given: Collection[str], door: str) -> str:
        """Where the value of an option comes from.

        Args:
            given: the options that a person sets.
            door: where: the command line, or Python.
        """
        return door if name in given else self.sources.get(name, DEFAULT)


def layers_below(
    table: type[Options], verb: str, given: Collection[str], config: Path | None = None, recipe: str | None = None
) -> Layers:
    """What the file and the recipe set below what a person sets.

    Args:
        verb: the command, or that whose runs are searched or planned.
        given: the options that a person sets.
        config: the file that the person names.
        recipe: the recipe that the person names.

    Raises:
        InputError: the file cannot be used, the recipe does not exist, or the file follows another recipe.
    """
    own = read_options(config, table, verb) if config else {}
    named = own.pop("recipe", None)
    if named and recipe and named != recipe:
        raise InputError(f"{config} follows the recipe {named}, but {recipe} is given beside it; a run follows one")
    silent = {*given, *replaced_by(table, given)}
    own = {name: value for name, value in own.items() if name not in silent}
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    if recipe := recipe or named:
        chosen = recipes.find(recipe, verb)
        values |= chosen.over({*given, *own})
        if table not in TAUGHT.values() and "out" in values:
            values["out"] = values["out"].with_name(f"tune-{recipe}")  # the recipe's own is a run's
        sources |= dict.fromkeys(values, f"recipe {recipe}")
    return Layers(values | own, sources | dict.fromkeys(own, str(config)))
