"""Parses study files, a list of runs in TOML, and checks them as a whole before any run starts."""

import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from itertools import product
from pathlib import Path
from typing import Any

from funmatch.commands.common.preflight import function_problems
from funmatch.commands.study.figure_spec import problems as figure_problems
from funmatch.config import TAUGHT
from funmatch.config.options import replaced_by
from funmatch.errors import InputError, first_line, unknown

REFERENCE = "run:"
"""Prefix of option values that name another run of the study; its run folder is used."""
PLACEHOLDER = re.compile(r"\{[^{}]*\}")
KEYS = ("title", "question", "note", "verb", "seeds", "common", "run", "figure")
ENTRY_KEYS = ("name", "group", "verb", "seeds", "each", "shown")


@dataclass(frozen=True)
class RunSpec:
    """One run of a study.

    Attributes:
        name: its name, shared by the runs of all seeds.
        group: its line in plots.
        seed: its random seed.
        verb: train, finetune or distill.
        knobs: its options, except `out` and `seed`; values may refer to other runs.
        shown: whether tables and plots show it; others only prepare weights or teachers.
        needs: folder names of the runs that it depends on.
    """

    name: str
    group: str
    seed: int
    verb: str
    knobs: Mapping[str, Any]
    shown: bool = True
    needs: tuple[str, ...] = ()

    @property
    def place(self) -> str:
        """The name of its run folder."""
        return _place(self.name, self.seed)


@dataclass(frozen=True)
class StudySpec:
    """A checked study file.

    Attributes:
        title, question, note: texts of its page.
        figures: its plots; see `figure_spec.KINDS`.
        entries: its runs.
        text: the text of the file.
    """

    title: str
    question: str
    note: str
    figures: tuple[dict[str, Any], ...]
    entries: tuple[RunSpec, ...]
    text: str


def parse(
    text: str,
    where: str,
    seeds: tuple[int, ...] = (),
    only: tuple[str, ...] = (),
    overrides: Mapping[str, Any] | None = None,
) -> StudySpec:
    """Parses the text of a study file.

    Args:
        where: its name in messages.
        seeds: replace the seeds of the file.
        only: patterns of run names; other runs are left out, unless these depend on them.
        overrides: options that replace those of every run, or of one run as `run.option`.

    Raises:
        InputError: all problems of the file, one per line.
    """
    table = _parse_toml(text, where)
    # Unknown keys are errors: an option outside [common] and [[run]] would be ignored in silence.
    found = [str(unknown("key", key, KEYS)) for key in table if key not in KEYS]
    found += [f"{key} is missing" for key in ("title", "run") if not table.get(key)]
    shapes = {"run": "[[run]]", "figure": "[[figure]]", "common": "[common]", "seeds": "a list"}
    for key, what in shapes.items():
        kind = dict if key == "common" else list
        value = table.get(key, kind())
        rows = value if key in ("run", "figure") and isinstance(value, list) else []
        if not isinstance(value, kind) or not all(isinstance(row, dict) for row in rows):
            found.append(f"{key} must be {what}")
    # Without these the runs cannot be read at all, so later problems would only repeat them.
    if found:
        raise _refused(where, found)
    # A list at once: the generator appends to `found`, which is read below.
    entries = list(_entries(table, seeds, dict(overrides or {}), found))
    figures = tuple(table.get("figure", ()))
    for number, figure in enumerate(figures, 1):
        found += [f"figure {number}: {problem}" for problem in figure_problems(figure)]
    found += _problems(entries, dict(table.get("common", {})), dict(overrides or {}))
    # Selected after all checks: a file is valid or not, whatever part of it is run.
    if not found and only:
        names = ", ".join(dict.fromkeys(each.name for each in entries))
        entries = _select(entries, only)
        found += [] if entries else [f"no run is named {', '.join(only)}; known: {names}"]
    if found:
        raise _refused(where, found)
    words = [str(table.get(key, "")) for key in ("title", "question", "note")]
    return StudySpec(words[0], words[1], words[2], figures, tuple(entries), text)


def read_spec(text: str, where: str) -> StudySpec:
    """Reads the texts and plots of a study file without its runs: enough to draw its results."""
    table = _parse_toml(text, where)
    words = [str(table.get(key, "")) for key in ("title", "question", "note")]
    # A study of an earlier version may have plots that are no longer known: the others are still drawn.
    figures = [figure for figure in table.get("figure", ()) if not figure_problems(figure)]
    return StudySpec(words[0], words[1], words[2], tuple(figures), (), text)


def _parse_toml(text: str, where: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError also of a number with more digits than Python reads
        raise InputError(f"{where} is not valid TOML: {first_line(error)}") from None


def _refused(where: str, found: list[str]) -> InputError:
    # Each problem once: those of [common] come up in every run.
    return InputError(f"the study {where} cannot be run:\n  " + "\n  ".join(dict.fromkeys(found)))


def _entries(
    table: dict[str, Any], seeds: tuple[int, ...], overrides: dict[str, Any], found: list[str]
) -> Iterator[RunSpec]:
    """Yields the runs of a file; appends the problems of its entries to `found`."""
    common, verb = table.get("common", {}), table.get("verb", "distill")
    verbs = [run.get("verb", verb) for run in table["run"]]
    known = {option for name, each in TAUGHT.items() if name in verbs for option in each.model_fields}
    # No command is valid, which is reported below: its options would only add noise.
    known = known or {option for each in TAUGHT.values() for option in each.model_fields}
    names = [str(run.get("name")) for run in table["run"]]
    of_one = {key: (key.rpartition(".")[0], key.rpartition(".")[2]) for key in overrides if "." in key}
    found += [str(unknown("run in --set", name, names)) for name, _ in of_one.values() if name not in names]
    options = [*common, *(of_one[key][1] if key in of_one else key for key in overrides)]
    found += [str(unknown("option in [common] or --set", option, known)) for option in options if option not in known]
    for number, run in enumerate(table["run"], 1):
        own = run.get("verb", verb)
        each, name = run.get("each", {}), run.get("name")
        if not isinstance(own, str) or own not in TAUGHT:
            found.append(f"run {number}: verb: {unknown('command', str(own), TAUGHT)}")
            continue
        if not isinstance(name, str) or not name:
            found.append(f"run {number} has no name")
            continue
        if not isinstance(each, dict) or not all(isinstance(values, list) and values for values in each.values()):
            found.append(f"{name}: each must give a list for every option, e.g. each = {{ epochs = [100, 300] }}")
            continue
        own_seeds = run.get("seeds", table.get("seeds", [0]))
        if not isinstance(own_seeds, list) or not own_seeds:
            found.append(f"{name}: seeds must be a list of one or more numbers, got {own_seeds!r}")
            continue
        if odd := [part for part in PLACEHOLDER.findall(name) if part[1:-1] not in each]:
            varied = ", ".join(map(str, each)) or "no options"
            found.append(f"{name}: unknown placeholder {', '.join(odd)}; each has {varied}")
            continue
        # [common] may hold options that only some of the commands have.
        shared = {option: value for option, value in common.items() if option in TAUGHT[own].model_fields}
        over = {option: value for option, value in overrides.items() if option in TAUGHT[own].model_fields}
        over |= {option: overrides[key] for key, (of, option) in of_one.items() if of == name}
        found += [f"{name}: --set {option} conflicts with each, which varies it" for option in each if option in over]
        own_values = {key: value for key, value in run.items() if key not in ENTRY_KEYS}
        for values in product(*each.values()):
            chosen = dict(zip(each, values, strict=True))
            full = _expand_name(name, chosen)
            whole = _override(_override(shared, own_values | chosen, own), over, own)
            # --seeds replace the file's seeds, not those that a run sets for itself, such as a teacher that needs one.
            for seed in seeds if seeds and "seeds" not in run else own_seeds:
                group = str(run.get("group", name if each else full))
                yield RunSpec(full, group, seed, own, whole, bool(run.get("shown", True)))


def _override(values: Mapping[str, Any], overrides: Mapping[str, Any], verb: str) -> dict[str, Any]:
    """Replaces options, and drops those that the new ones replace too, such as `steps` for `epochs`."""
    dropped = replaced_by(TAUGHT[verb], overrides)
    return {option: value for option, value in values.items() if option not in dropped} | dict(overrides)


def _expand_name(name: str, chosen: Mapping[str, Any]) -> str:
    """Names one of the runs of `each`: its values replace `{option}` in the name, or are appended to it."""
    full = name
    for option, value in chosen.items():
        full = full.replace(f"{{{option}}}", str(value))
    return full if full != name or not chosen else " ".join([name, *(f"{option} {v}" for option, v in chosen.items())])


def _problems(entries: list[RunSpec], common: dict[str, Any], overrides: dict[str, Any]) -> list[str]:
    """Checks the runs, each alone and all together; fills in `needs`."""
    found, places = [], [entry.place for entry in entries]
    # By folders, not by names: two names may differ only in signs that a folder cannot have.
    found += [f"{place}: two runs have this name" for place in sorted({p for p in places if places.count(p) > 1})]
    for number, entry in enumerate(entries):
        # Not isinstance: TOML's true is an int to Python.
        if type(entry.seed) is not int or entry.seed < 0:
            found.append(f"{entry.name}: a seed is a whole number of at least 0, got {entry.seed!r}")
        fixed = TAUGHT[entry.verb].where(lambda opt: not opt.study)
        reserved = fixed & {*entry.knobs, *common, *overrides}
        found += [f"{entry.name}: {option} is set by the study itself" for option in sorted(reserved)]
        values = {option: value for option, value in entry.knobs.items() if option not in fixed}
        try:
            # The study sets folder and seed of each run; any valid ones do for checking.
            table = TAUGHT[entry.verb].checked(**values, out="out", seed=0)
            found += [f"{entry.name}: {problem}" for problem in function_problems(table, reference=REFERENCE)]
            values = {option: getattr(table, option) for option in values}
        except InputError as error:
            found.append(f"{entry.name}: {error}")
        # Each run is started by a command line, where such a value would be read as an option.
        found += [
            f"{entry.name}: {option} {word} starts with a dash, as options do; start a path with ./"
            for option, value in values.items()
            for word in (value if isinstance(value, tuple) else (value,))
            if isinstance(word, str) and word.startswith("-")
        ]
        needs = []
        for name in _references(entry.knobs):
            # The run of the same seed if there is one: a seed covers the whole chain of runs.
            others = [each for each in entries if each.name == name]
            target = next((each for each in others if each.seed == entry.seed), others[0] if others else None)
            if target is None or target.name == entry.name:
                found.append(f"{entry.name}: {REFERENCE}{name} does not name another run of the study")
            else:
                needs.append(target.place)
        entries[number] = replace(entry, knobs=values, needs=tuple(needs))
    return found + _cycles(entries)


def _references(options: Mapping[str, Any]) -> list[str]:
    """Lists the names of the runs that options refer to."""
    values = [each for value in options.values() for each in (value if isinstance(value, list | tuple) else [value])]
    return [str(value).removeprefix(REFERENCE) for value in values if _is_reference(value)]


def _is_reference(value: Any) -> bool:
    return isinstance(value, str | Path) and str(value).startswith(REFERENCE)


def _cycles(entries: list[RunSpec]) -> list[str]:
    """Finds runs that depend on each other."""
    done: set[str] = set()
    left = list(entries)
    # What is never ready depends on itself, directly or through others.
    while ready := [entry for entry in left if done.issuperset(entry.needs)]:
        done |= {entry.place for entry in ready}
        left = [entry for entry in left if entry.place not in done]
    return [f"{entry.name}: it depends on a run that depends on it" for entry in left]


def _select(entries: list[RunSpec], only: tuple[str, ...]) -> list[RunSpec]:
    """Selects the runs whose names match a pattern, and those that they depend on."""
    wanted = {each.place for each in entries if any(fnmatch(each.name, pattern) for pattern in only)}
    # Until nothing is added: what is needed may need others.
    while more := {need for each in entries if each.place in wanted for need in each.needs} - wanted:
        wanted |= more
    return [entry for entry in entries if entry.place in wanted]


def _place(name: str, seed: int) -> str:
    # Names may hold slashes and spaces, which folder names must not.
    safe = "".join(sign if sign.isalnum() or sign in "._-" else "-" for sign in name)
    return f"{safe}-seed-{seed}"


def resolve_references(entry: RunSpec, folder: Path) -> dict[str, Any]:
    """Replaces references to other runs by their run folders in the options of a run."""
    # Both lists are in the order of the options, as `_problems` fills them.
    names = dict(zip(_references(entry.knobs), entry.needs, strict=True))

    def resolved(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(resolved, value))
        # As text: a path to a run folder is a model's name to the command.
        return str(folder / names[str(value).removeprefix(REFERENCE)]) if _is_reference(value) else value

    return {option: resolved(value) for option, value in entry.knobs.items()}
