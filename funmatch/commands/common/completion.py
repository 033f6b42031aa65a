"""Writes scripts that complete commands, options, choices and recipes in a shell."""

import shlex
from collections.abc import Iterator

from funmatch.commands.verbs import VERBS
from funmatch.config import TAUGHT, recipes
from funmatch.config.help import flags_of
from funmatch.config.options import Options
from funmatch.config.values import kind_of
from funmatch.errors import unknown

BASH = """\
_funmatch() {{
    local current=${{COMP_WORDS[COMP_CWORD]}} verb=${{COMP_WORDS[1]}} words=
    case "$verb ${{COMP_WORDS[COMP_CWORD-1]}}" in
        {choices}
    esac
    if [ "$COMP_CWORD" -eq 1 ]; then
        words={verbs}
    elif [ -z "$words" ]; then
        case "$verb ${{current:0:1}}" in
            {flags}
        esac
        if [ -z "$words" ] && [ "$COMP_CWORD" -eq 2 ]; then
            case "$verb" in
                {subjects}
            esac
        fi
    fi
    COMPREPLY=($(compgen -W "$words" -- "$current"))
}}
complete -o default -F _funmatch funmatch"""


def script(shell: str) -> str:
    """The script for a shell: its output is evaluated when the shell starts.

    Raises:
        InputError: there is no script for that shell.
    """
    if shell not in SHELLS:
        raise unknown("shell", shell, SHELLS)
    return SHELLS[shell]()


def _tables() -> dict[str, type[Options]]:
    """The options of each command; of one that is followed by another, those of `distill`, which has most."""
    return {name: verb.subjects.get("distill", verb.table) for name, verb in VERBS.items()}


def _subjects() -> dict[str, list[str]]:
    """What may follow a command: another command, or a recipe."""
    found = {name: [*verb.subjects, *recipes.RECIPES] for name, verb in VERBS.items() if verb.subjects}
    found |= {name: [each.name for each in recipes.RECIPES.values() if each.verb == name] for name in TAUGHT}
    return {name: words for name, words in found.items() if words} | {"config": [*VERBS], "recipes": [*recipes.RECIPES]}


def _choices(table: type[Options]) -> dict[str, tuple[str, ...]]:
    """The values of each flag that has only some."""
    kinds = {name: kind_of(field) for name, field in table.model_fields.items()}
    return {flag: kinds[name].choices for name in kinds for flag in flags_of(table, name) if kinds[name].choices}


def _bash() -> str:
    choices: dict[tuple[str, ...], list[str]] = {}
    flags = []
    for verb, table in _tables().items():
        for flag, values in _choices(table).items():
            # Grouped by values: many flags share a few sets of choices, and the script stays short.
            choices.setdefault(values, []).append(f'"{verb} {flag}"')
        every = [flag for name in table.model_fields for flag in flags_of(table, name)]
        flags.append(_case(f'"{verb} -"', every))
    cases = [_case("|".join(patterns), values) for values, patterns in choices.items()]
    subjects = [_case(verb, words) for verb, words in _subjects().items()]
    return BASH.format(
        verbs=shlex.quote(" ".join(VERBS)),
        choices=("\n" + 8 * " ").join(cases),
        flags=("\n" + 12 * " ").join(flags),
        subjects=("\n" + 16 * " ").join(subjects),
    )


def _case(pattern: str, words: list[str] | tuple[str, ...]) -> str:
    return f"{pattern}) words={shlex.quote(' '.join(words))} ;;"


def _zsh() -> str:
    # zsh reads bash's completions once this is loaded.
    return f"autoload -U +X bashcompinit && bashcompinit\n{_bash()}"


def _fish() -> str:
    return "\n".join(["complete -c funmatch -n __fish_use_subcommand -f", *_fish_lines()])


def _fish_lines() -> Iterator[str]:
    for verb, words in _subjects().items():
        yield f"complete -c funmatch -n '__fish_seen_subcommand_from {verb}' -a {shlex.quote(' '.join(words))}"
    for verb, table in _tables().items():
        summary = " ".join((table.__doc__ or "").split())
        yield f"complete -c funmatch -n __fish_use_subcommand -a {verb} -d {shlex.quote(summary)}"
        for name, field in table.model_fields.items():
            flags = [f"-s {each[1:]}" if len(each) == 2 else f"-l {each[2:]}" for each in flags_of(table, name)]
            if flags:
                kind = kind_of(field)
                # -x: only these are offered, and no files.
                values = f" -x -a {shlex.quote(' '.join(kind.choices))}" if kind.choices else ""
                summary = shlex.quote(table.description(name).partition(". ")[0])
                condition = f"'__fish_seen_subcommand_from {verb}'"
                yield f"complete -c funmatch -n {condition} {' '.join(flags)}{values} -d {summary}"


SHELLS = {"bash": _bash, "zsh": _zsh, "fish": _fish}
