"""Compares what is requested of a run with the record of the run that is in its folder."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from funmatch.config import TAUGHT, UNCOMPARED
from funmatch.config.metadata import Group
from funmatch.config.options import Options
from funmatch.runtime.records import list_differences

COMPARED_FACTS = {
    "data": "the data's content",
    "teacher": "the teacher's content",
    "student": "the student's content",
    "teacher_function": "the teacher's normalisation or architecture",
    "rounded": "the teacher's answers, as --tape rounds them",
}
"""Facts that are compared when a run is resumed."""


def early_differences(folder: Path, stored: dict[str, Any], verb: str, options: Options) -> list[str]:
    """Lists what differs from a run before any default is resolved, a line each.

    Only numbers and words that are not at their defaults: a record holds them as they are set.

    Args:
        folder, stored: of the run, and its record.
        verb, options: as requested.
    """
    table, requested = type(options), {}
    # Defaults are left to the full comparison: some are resolved to other values.
    for name in filter(options.moved, table.model_fields.keys() - UNCOMPARED):
        value, opt = getattr(options, name), table.opt(name)
        is_plain = isinstance(value, int | float | str) and not isinstance(value, bool) and value != "auto"
        # What is the machine's, or names something by its place, is compared by what it turns out to be.
        is_open = opt.refers or opt.content or opt.group is Group.MACHINE
        if is_plain and not is_open and stored["knobs"].get(name) is not None:
            requested[name] = value
    # How much longer such a run may become is decided with the schedule; alone it is no difference.
    longer = {name for name in requested if table.opt(name).extends and stored["knobs"].get("schedule") == "wsd"}
    now = {"verb": verb, "knobs": {**stored["knobs"], **requested}, "facts": stored["facts"]}
    kept = {name: stored["knobs"][name] for name in longer}
    return compare(folder, stored, now) if differences(stored, now | {"knobs": now["knobs"] | kept}) else []


def compare(folder: Path, then: dict[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Returns `differences`, and what to do instead where the length of the run cannot change."""
    found = differences(then, now)
    steps = [one["knobs"].get("steps") or 0 for one in (then, now)]
    if steps[0] == steps[1] or now["knobs"].get("schedule") == "wsd":
        return found
    hint = " (only runs of --schedule wsd can be extended)"
    found = [f"{line}{hint}" if line.startswith("steps:") else line for line in found]
    weights = folder / "student" / "model.safetensors"
    # Its learning rate has fallen to nothing, so more steps would be another run in any case.
    if steps[1] > steps[0] and weights.is_file():
        found.append(
            f"to train it longer, start from its student in another folder, with --student-weights {weights}, or begin "
            "again with --schedule wsd, whose runs can be extended"
        )
    return found


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Lists what differs between two records of a run, a line each.

    A run from before an option counts as trained with its default; an option that is gone is not compared.
    """
    table = TAUGHT.get(now["verb"])
    defaults = {name: field.get_default() for name, field in table.model_fields.items()} if table else {}
    found = [] if then["verb"] == now["verb"] else [f"it is a run of {then['verb']}, not {now['verb']}"]
    names = now["knobs"].keys() if table else then["knobs"].keys() | now["knobs"].keys()
    # An option may name another folder or file when the fact says that its content is the same.
    places = {name: opt.content for name, opt in table.opts() if opt.content} if table else {}
    names = names - UNCOMPARED - {name for name, fact in places.items() if _moved(name, fact, then, now)}
    before = {name: then["knobs"].get(name, defaults.get(name)) for name in names}
    found += list_differences(before, {name: now["knobs"].get(name) for name in names}, "in the run")
    # A fact that later versions added is compared only with runs that recorded it.
    facts = {"data", "teacher", "student", "rounded"} | (COMPARED_FACTS.keys() & then["facts"].keys())
    earlier, later = ({name: one["facts"].get(name) for name in facts} for one in (then, now))
    return found + list_differences(earlier, later, "in the run", COMPARED_FACTS)


def _moved(name: str, fact: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Returns whether an option names two places with the same content."""
    before, after = then["facts"].get(fact), now["facts"].get(fact)
    values = [each for one in (then, now) for each in _as_list(one["knobs"].get(name))]
    # Only what lies somewhere can move: another of timm's names is another model, even with equal weights.
    return after is not None and before == after and all(os.sep in value for value in values)


def _as_list(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [str(each) for each in values if each is not None]
