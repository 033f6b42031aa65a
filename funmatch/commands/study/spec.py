"""Study files: a plain list of runs in TOML, read and checked as a whole before any of them begins."""

import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from itertools import product
from pathlib import Path
from typing import Any

from funmatch.commands.study.figure_spec import problems as figure_problems
from funmatch.config import TAUGHT
from funmatch.config.options import replaced_by
from funmatch.errors import InputError, unknown

REFERENCE = "run:"
"""Begins the value of a knob that stands for another run of the study, by its name: its folder is meant."""
PLACEHOLDER = re.compile(r"\{[^{}]*\}")
KEYS = ("title", "question", "note", "verb", "seeds", "common", "run", "figure")
ENTRY_KEYS = ("name", "group", "verb", "seeds", "each", "shown")


@dataclass(frozen=True)
class RunSpec:
    """A run of a study.

    Attributes:
        name: what it shares with the runs of other seeds.
        group: the line of a figure to which it belongs.
        seed: of the run.
        verb: train, finetune or distill.
        knobs: as the verb's table takes them, but for `out` and `seed`; some may refer to other runs.
        shown: whether it is in the table and the figures, or only there for others.
        needs: places of the runs that come first.
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
        """The name of its folder."""
        return _place(self.name, self.seed)


@dataclass(frozen=True)
class StudySpec:
    """A study file that was checked.

    Attributes:
        title, question, note: for people.
        figures: what is drawn; see `figures.KINDS`.
        entries: its runs.
        text: of the file.
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
    said: Mapping[str, Any] | None = None,
) -> StudySpec:
    """A study from its text.

    Args:
        where: what to call it in messages.
        seeds: instead of those that the file says.
        only: patterns of names; other runs are left out, unless these need them.
        said: knobs that every run takes instead of its own.

    Raises:
        InputError: every problem, a line each.
    """
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{where} is no TOML: {error}") from None
    found = [str(unknown("key", key, KEYS)) for key in table if key not in KEYS]
    found += [f"{key} is missing" for key in ("title", "run") if not table.get(key)]
    shapes = {"run": "[[run]]", "figure": "[[figure]]", "common": "[common]", "seeds": "a list"}
    for key, what in shapes.items():
        kind = dict if key == "common" else list
        value = table.get(key, kind())
        rows = value if key in ("run", "figure") and isinstance(value, list) else []
        if not isinstance(value, kind) or not all(isinstance(row, dict) for row in rows):
            found.append(f"{key} must be {what}")
    if found:
        raise _refused(where, found)
    entries = list(_entries(table, seeds, dict(said or {}), found))
    figures = tuple(table.get("figure", ()))
    for number, figure in enumerate(figures, 1):
        found += [f"figure {number}: {problem}" for problem in figure_problems(figure)]
    found += _problems(entries, dict(table.get("common", {})), dict(said or {}))
    if not found and only:
        names = ", ".join(dict.fromkeys(each.name for each in entries))
        entries = _chosen(entries, only)
        found += [] if entries else [f"no run is called {', '.join(only)}; there are {names}"]
    if found:
        raise _refused(where, found)
    words = [str(table.get(key, "")) for key in ("title", "question", "note")]
    return StudySpec(words[0], words[1], words[2], figures, tuple(entries), text)


def read_spec(text: str, where: str) -> StudySpec:
    """What a study file says for people, without its runs: enough to draw what came of them."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{where} is no TOML: {error}") from None
    words = [str(table.get(key, "")) for key in ("title", "question", "note")]
    figures = [figure for figure in table.get("figure", ()) if not figure_problems(figure)]
    return StudySpec(words[0], words[1], words[2], tuple(figures), (), text)


def _refused(where: str, found: list[str]) -> InputError:
    return InputError(f"the study {where} cannot be run:\n  " + "\n  ".join(dict.fromkeys(found)))


def _entries(
    table: dict[str, Any], seeds: tuple[int, ...], said: dict[str, Any], found: list[str]
) -> Iterator[RunSpec]:
    """The runs that a file lists; what is wrong with a line of it goes to `found`."""
    common, verb = table.get("common", {}), table.get("verb", "distill")
    verbs = [run.get("verb", verb) for run in table["run"]]
    known = {knob for name, each in TAUGHT.items() if name in verbs for knob in each.model_fields}
    known = known or {knob for each in TAUGHT.values() for knob in each.model_fields}  # no verb is one: told below
    names = [str(run.get("name")) for run in table["run"]]
    of_one = {key: (key.rpartition(".")[0], key.rpartition(".")[2]) for key in said if "." in key}
    found += [str(unknown("run in --set", name, names)) for name, _ in of_one.values() if name not in names]
    told = [*common, *(of_one[key][1] if key in of_one else key for key in said)]
    found += [str(unknown("knob in [common] or --set", knob, known)) for knob in told if knob not in known]
    for number, run in enumerate(table["run"], 1):
        own = run.get("verb", verb)
        each, name = run.get("each", {}), run.get("name")
        if not isinstance(own, str) or own not in TAUGHT:
            found.append(f"run {number}: {unknown('verb', str(own), TAUGHT)}")
            continue
        if not isinstance(name, str) or not name:
            found.append(f"run {number} has no name")
            continue
        if not isinstance(each, dict) or not all(isinstance(values, list) and values for values in each.values()):
            found.append(f"{name}: each must give a list for every knob, e.g. each = {{ epochs = [100, 300] }}")
            continue
        own_seeds = run.get("seeds", table.get("seeds", [0]))
        if not isinstance(own_seeds, list) or not own_seeds:
            found.append(f"{name}: seeds must be a list, of one or more, got {own_seeds!r}")
            continue
        if odd := [part for part in PLACEHOLDER.findall(name) if part[1:-1] not in each]:
            told = ", ".join(map(str, each)) or "nothing"
            found.append(f"{name}: {', '.join(odd)} stands for nothing; each gives {told}")
            continue
        shared = {knob: value for knob, value in common.items() if knob in TAUGHT[own].model_fields}
        over = {knob: value for knob, value in said.items() if knob in TAUGHT[own].model_fields}
        over |= {knob: said[key] for key, (of, knob) in of_one.items() if of == name}
        found += [f"{name}: --set {knob} would make runs alike that differ in it" for knob in each if knob in over]
        knobs = {key: value for key, value in run.items() if key not in ENTRY_KEYS}
        for values in product(*each.values()):
            chosen = dict(zip(each, values, strict=True))
            full = _named(name, chosen)
            whole = _over(_over(shared, knobs | chosen, own), over, own)
            for seed in seeds if seeds and "seeds" not in run else own_seeds:
                group = str(run.get("group", name if each else full))
                yield RunSpec(full, group, seed, own, whole, bool(run.get("shown", True)))


def _over(knobs: Mapping[str, Any], said: Mapping[str, Any], verb: str) -> dict[str, Any]:
    """Knobs with others in their place, and without what goes with those that these replace."""
    silent = replaced_by(TAUGHT[verb], said)
    return {knob: value for knob, value in knobs.items() if knob not in silent} | dict(said)


def _named(name: str, chosen: Mapping[str, Any]) -> str:
    """The name of one of several runs: with its values in the place of {knob}, or behind it."""
    full = name
    for knob, value in chosen.items():
        full = full.replace(f"{{{knob}}}", str(value))
    return full if full != name or not chosen else " ".join([name, *(f"{knob} {v}" for knob, v in chosen.items())])


def _problems(entries: list[RunSpec], common: dict[str, Any], said: dict[str, Any]) -> list[str]:
    """What is wrong with the runs, each by itself and together; fills in what they need."""
    found, places = [], [entry.place for entry in entries]
    found += [f"{place}: two runs have this name" for place in sorted({p for p in places if places.count(p) > 1})]
    for number, entry in enumerate(entries):
        if type(entry.seed) is not int or entry.seed < 0:
            found.append(f"{entry.name}: a seed is a whole number from 0 on, got {entry.seed!r}")
        fixed = TAUGHT[entry.verb].where(lambda opt: not opt.study)
        kept = fixed & {*entry.knobs, *common, *said}
        found += [f"{entry.name}: {knob} is decided by the study" for knob in sorted(kept)]
        knobs = {knob: value for knob, value in entry.knobs.items() if knob not in fixed}
        try:
            table = TAUGHT[entry.verb].checked(**knobs, out="out", seed=0)
            knobs = {knob: getattr(table, knob) for knob in knobs}
        except InputError as error:
            found.append(f"{entry.name}: {error}")
        found += [
            f"{entry.name}: {knob} {word} begins with a dash, as options do; a path can begin with ./"
            for knob, value in knobs.items()
            for word in (value if isinstance(value, tuple) else (value,))
            if isinstance(word, str) and word.startswith("-")
        ]
        needs = []
        for name in _references(entry.knobs):
            others = [each for each in entries if each.name == name]
            alike = next((each for each in others if each.seed == entry.seed), others[0] if others else None)
            if alike is None or alike.name == entry.name:
                found.append(f"{entry.name}: {REFERENCE}{name} is no other run of the study")
            else:
                needs.append(alike.place)
        entries[number] = replace(entry, knobs=knobs, needs=tuple(needs))
    return found + _circles(entries)


def _references(knobs: Mapping[str, Any]) -> list[str]:
    """Names of the runs to which knobs refer."""
    values = [each for value in knobs.values() for each in (value if isinstance(value, list | tuple) else [value])]
    return [str(value).removeprefix(REFERENCE) for value in values if _refers(value)]


def _refers(value: Any) -> bool:
    return isinstance(value, str | Path) and str(value).startswith(REFERENCE)


def _circles(entries: list[RunSpec]) -> list[str]:
    done: set[str] = set()
    left = list(entries)
    while ready := [entry for entry in left if done.issuperset(entry.needs)]:
        done |= {entry.place for entry in ready}
        left = [entry for entry in left if entry.place not in done]
    return [f"{entry.name}: the runs that it needs need it" for entry in left]


def _chosen(entries: list[RunSpec], only: tuple[str, ...]) -> list[RunSpec]:
    """The runs whose names fit a pattern, and those that they need."""
    wanted = {each.place for each in entries if any(fnmatch(each.name, pattern) for pattern in only)}
    while more := {need for each in entries if each.place in wanted for need in each.needs} - wanted:
        wanted |= more
    return [entry for entry in entries if entry.place in wanted]


def _place(name: str, seed: int) -> str:
    safe = "".join(sign if sign.isalnum() or sign in "._-" else "-" for sign in name)
    return f"{safe}-seed-{seed}"


def resolve_references(entry: RunSpec, folder: Path) -> dict[str, Any]:
    """The knobs of a run with the folders of the runs that it needs in the place of their names."""
    names = dict(zip(_references(entry.knobs), entry.needs, strict=True))

    def told(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(told, value))
        return str(folder / names[str(value).removeprefix(REFERENCE)]) if _refers(value) else value

    return {knob: told(value) for knob, value in entry.knobs.items()}
