"""Writes a template of a configuration file."""

from funmatch.commands.verbs import find_verb
from funmatch.config import Config
from funmatch.config.options import Options
from funmatch.config.sources.template import template
from funmatch.errors import InputError, unknown
from funmatch.reports.result import Result


def run(config: Config) -> Result:
    """Writes the template.

    Returns:
        `command`, and `template`, its text.

    Raises:
        InputError: there is no such command, or it has no options.
    """
    verb = " ".join(config.command)
    return Result(None, {"command": verb, "template": template(verb, _table(config.command))})


def show(result: Result) -> None:
    """Prints the template, ready to be redirected into a file."""
    # Not by rich, which would wrap long lines and break the file.
    print(result.metrics["template"])


def _table(words: tuple[str, ...]) -> type[Options]:
    verb = find_verb(words[0])
    if verb.subjects:
        known = ", ".join(verb.subjects)
        # The options of tune and plan are not complete without the command that follows.
        if len(words) != 2:
            raise InputError(f"{words[0]} is followed by a command: {known}; e.g. funmatch config {words[0]} distill")
        if words[1] not in verb.subjects:
            raise unknown("command", words[1], verb.subjects)
        return verb.subjects[words[1]]
    if len(words) > 1:
        raise InputError(f"one command is wanted, got {' '.join(words)}")
    return verb.table
