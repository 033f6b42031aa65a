"""Compares what is requested of a run with the record of the run that is in its folder."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from funmatch.config import TAUGHT, UNCOMPARED
from funmatch.config.metadata import Changes, Group, OnResume, Opt
from funmatch.config.options import Options
from funmatch.runtime.disk.records import list_differences
from funmatch.training.run import longer

ALLOW = "allow_rounding"
COMPARED_FACTS = {
    "data": "the data's content",
    "teacher": "the teacher's content",
    "student": "the student's content",
    "teacher_function": "the teacher's normalisation or architecture",
    "rounded": "the teacher's outputs, as --tape rounds them",
}
"""Facts that are compared when a run is resumed."""
IN_RUN = "in the run"


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
        is_open = opt.refers or opt.content or (opt.group is Group.MACHINE and opt.on_resume is not OnResume.ROUNDING)
        # A default that was left open, such as all cores, stays None in a record unless it is resolved there.
        stays_open = name == "threads" and name in stored["knobs"]
        if is_plain and not is_open and (stays_open or stored["knobs"].get(name) is not None):
            requested[name] = value
    # How much longer such a run may become is decided with the schedule; alone it is no difference.
    extended = {name for name in requested if table.opt(name).extends and stored["knobs"].get("schedule") == "wsd"}
    # A finished run computes nothing more, so what would change its rounding does not matter.
    finished = (folder / "result.json").is_file() and not extended
    requested |= {ALLOW: getattr(options, ALLOW) or finished}
    now = {"verb": verb, "knobs": {**stored["knobs"], **requested}, "facts": stored["facts"]}
    kept = {name: stored["knobs"][name] for name in extended}
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
        lines = longer.ways(folder, then["verb"], then["knobs"], steps[1]) or [
            f"start from its student in another folder, with --student-weights {weights}, or begin again with "
            "--schedule wsd, whose runs can be extended"
        ]
        found += [f"to train it longer, {lines[0]}", *lines[1:]]
    return found


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Lists what differs between two records of a run, a line each.

    A run from before an option counts as trained with its default, or with what was done then; an option that is gone
    is not compared.
    """
    table = TAUGHT.get(now["verb"])
    found = [] if then["verb"] == now["verb"] else [f"it is a run of {then['verb']}, not {now['verb']}"]
    names = now["knobs"].keys() if table else then["knobs"].keys() | now["knobs"].keys()
    # An option may name another folder or file when the fact says that its content is the same.
    places = {name: opt.content for name, opt in table.opts() if opt.content} if table else {}
    names = names - UNCOMPARED - {name for name, fact in places.items() if _moved(name, fact, then, now)}
    earlier = recorded(then, table)
    before = {name: earlier.get(name) for name in names}
    after = {name: now["knobs"].get(name) for name in names}
    # A record may hold an option that is gone, which no table describes.
    meanings = {name: opt for name, opt in table.opts() if name in names} if table else {}
    rounded = {name for name, opt in meanings.items() if _only_rounds(opt, before[name], after[name])}
    found += list_differences(_pick(before, names - rounded), _pick(after, names - rounded), IN_RUN)
    if not now["knobs"].get(ALLOW):
        lines = list_differences(_pick(before, rounded), _pick(after, rounded), IN_RUN)
        found += [
            f"{line} (this changes results by rounding; pass --allow-rounding to resume with it)" for line in lines
        ]
    # A fact that later versions added is compared only with runs that recorded it.
    facts = {"data", "teacher", "student", "rounded"} | (COMPARED_FACTS.keys() & then["facts"].keys())
    earlier, later = ({name: one["facts"].get(name) for name in facts} for one in (then, now))
    return found + list_differences(earlier, later, IN_RUN, COMPARED_FACTS)


def recorded(record: Mapping[str, Any], table: type[Options] | None) -> dict[str, Any]:
    """Returns the options of a record, with what was done where it is from before an option."""
    if table is None:
        return {**record["knobs"]}
    defaults = {name: field.get_default() for name, field in table.model_fields.items()}
    # As a record has them: tuples are lists there.
    usual = {name: [*value] if isinstance(value, tuple) else value for name, value in defaults.items()}
    done = {name: opt.before for name, opt in table.opts() if opt.before is not None}
    return {**usual, **done, **record["knobs"]}


@dataclass(frozen=True)
class Change:
    """An option that has another value from a step on.

    Attributes:
        effect: what that changes, for messages; empty for nothing.
    """

    option: str
    before: Any
    after: Any
    effect: str = ""

    def __str__(self) -> str:
        before, after = ("the default" if value is None else value for value in (self.before, self.after))
        return f"{self.option} from {before} to {after}" + (f" ({self.effect})" if self.effect else "")


def accepted_changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """Lists the options with other values with which a run may resume, of two records without `differences`."""
    knobs, found = now["knobs"], []
    # To choose by other evaluations is to choose another student, though it is trained alike.
    chosen = knobs.get("keep") == "best" or knobs.get("patience")
    table = TAUGHT[now["verb"]]
    earlier = recorded(then, table)
    for name, opt in table.opts():
        before, after = earlier.get(name), knobs.get(name)
        if before == after or opt.on_resume is OnResume.UNCOMPARED:
            continue
        if opt.on_resume is OnResume.FREE:
            judged = chosen and Changes.STUDENT in opt.changes
            found.append(
                Change(name, before, after, "--keep best and --patience go by other evaluations" * bool(judged))
            )
        elif _only_rounds(opt, before, after):
            found.append(Change(name, before, after, "changes results by rounding"))
    return found


def _only_rounds(opt: Opt, before: Any, after: Any) -> bool:
    """Returns whether another value of an option changes the results of a run by rounding only."""
    if opt.on_resume is OnResume.DEVICE:
        return str(before).partition(":")[0] == str(after).partition(":")[0]
    return opt.on_resume is OnResume.ROUNDING


def _pick(options: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: options[name] for name in names}


def _moved(name: str, fact: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Returns whether an option names two places with the same content."""
    before, after = then["facts"].get(fact), now["facts"].get(fact)
    values = [each for one in (then, now) for each in _as_list(one["knobs"].get(name))]
    # Only what lies somewhere can move: another of timm's names is another model, even with equal weights.
    return after is not None and before == after and all(os.sep in value for value in values)


def _as_list(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [str(each) for each in values if each is not None]
