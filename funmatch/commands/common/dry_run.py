"""Describes a run without starting it: options and where they come from, images, networks and length."""

from collections.abc import Mapping
from typing import Any

from funmatch.commands.common.ready import build
from funmatch.config import Group, Train
from funmatch.config.sources.layers import DEFAULT
from funmatch.reports.result import Result
from funmatch.runtime.log import print_line, print_table
from funmatch.training.student.build import Modules


def run(config: Train, modules: Modules, sources: Mapping[str, str]) -> Result:
    """Makes a run ready as it would be, except for its folder, and trains nothing.

    Args:
        modules: modules from Python, by the names that stand for them.
        sources: option to where its value comes from; others have their default.

    Returns:
        `options` (for each its `value`, resolved, and its `source`), `splits` (images in each), `classes`,
        `parameters` (`student`, and `teachers` in their order), `steps`, `epochs`, `run` (the folder it would have).

    Raises:
        InputError: whatever is wrong with the run that can be known before it begins.
    """
    # Made ready in full, not only parsed: defaults that depend on images and networks are known only then.
    setup, loaded = build(config, modules)
    teachers = [one.classifier.count_parameters() for one in loaded]
    images = len(setup.cache.splits["train"])
    return Result(
        None,
        {
            "run": str(config.out),
            "options": _options(config, setup.config, sources),
            "splits": {name: len(split) for name, split in setup.cache.splits.items()},
            # The student may have the teacher's classes instead of the data's.
            "classes": len(setup.class_names or setup.cache.classes),
            "parameters": {"student": setup.student.classifier.count_parameters(), "teachers": teachers},
            "steps": setup.loop.steps,
            # From the steps, which are whole: the epochs that were set are rounded to them.
            "epochs": setup.loop.steps * setup.config.batch / images,
        },
    )


def _options(config: Train, resolved: Train, sources: Mapping[str, str]) -> dict[str, Any]:
    """Each option with its value and its source; one that stands in another's place (epochs for steps) as set."""
    before, after = config.model_dump(mode="json"), resolved.model_dump(mode="json")
    return {
        name: {
            # Resolving epochs to steps empties them; the user still finds what was set.
            "value": before[name] if value is None else value,
            "source": sources.get(name, DEFAULT),
        }
        for name, value in after.items()
    }


def show(result: Result, table: type[Train]) -> None:
    """Prints a dry run."""
    metrics, options = result.metrics, result.metrics["options"]
    # In the order of --help, under whose headings users know the options.
    names = sorted(options, key=lambda name: list(Group).index(table.opt(name).group))
    rows = [[name, _written(options[name]["value"]), options[name]["source"]] for name in names]
    print_table(f"{metrics['run']}, as it would run", ["option", "value", "from"], rows)
    splits = ", ".join(f"{count:,} {name}" for name, count in metrics["splits"].items())
    print_line(f"images: {splits}; {metrics['classes']:,} classes")
    teachers = "".join(f", teacher {count:,}" for count in metrics["parameters"]["teachers"])
    print_line(f"parameters: student {metrics['parameters']['student']:,}{teachers}")
    print_line(f"length: {metrics['steps']:,} steps, {metrics['epochs']:,.4g} epochs")
    print_line("nothing was trained or written; without --dry-run the run begins")


def _written(value: Any) -> str:
    """A value as a table shows it."""
    # JSON has turned the tuples into lists.
    if value is None or value == []:
        return "–"
    if isinstance(value, list):
        return " ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
