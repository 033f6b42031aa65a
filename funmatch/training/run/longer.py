"""Tells whether a run was still improving when it ended, and gives the commands that train for longer."""

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from funmatch.runtime import env
from funmatch.runtime.text import percent

LAST = 0.2
"""Share of a run whose evaluations are compared with those before."""
LONGER = 2
"""How many times as long the run is that is proposed."""
FROM_PYTHON = "python:"
"""Begins the names of networks that were given from Python, which a command line cannot name."""


def improvement(evaluations: Sequence[Mapping[str, Any]], images: int) -> tuple[str, float, float] | None:
    """Returns by what a run was still improving, if it was.

    A run was if its best evaluation of the last fifth is better than the best one before by more than the standard
    error of a share of so many images, √(p · (1 − p) / n). The measure is top-1, or mAP, where there are labels, of
    features that of nearest neighbours, else agreement with the teacher.

    Args:
        evaluations: the `eval` records of the run, or of its part with a constant learning rate: a cool-down improves
            every run, and says nothing about a longer one.
        images: number of images of the validation split.

    Returns:
        the name of the measure, its best value before the last fifth and in it; None if the run was not improving, or
        this cannot be known.
    """
    shares = [name for name in ("top1", "map", "knn") if all(each.get(name) is not None for each in evaluations)]
    name = shares[0] if shares else "agreement"
    scores = [(each["step"], each[name]) for each in evaluations if each.get(name) is not None]
    if not scores or not images:
        return None
    split = (1 - LAST) * scores[-1][0]
    before, after = ([score for step, score in scores if (step > split) == late] for late in (False, True))
    if not before:
        return None
    best, latest = max(before), max(after)
    # Of the mean of both, with one more image right and one wrong: that none of a few is right does not make it sure.
    p = ((best + latest) / 2 * images + 1) / (images + 2)
    return (name, best, latest) if latest - best > math.sqrt(p * (1 - p) / images) else None


def ways(folder: Path, verb: str, options: Mapping[str, Any], steps: int) -> list[str]:
    """Returns how to train for longer, as lines of text and commands; none for a network that was given from Python.

    Args:
        folder: of the run, which is finished.
        options: the resolved options in its record.
        steps: the new length.
    """
    if any(FROM_PYTHON in str(options.get(name)) for name in ("student", "teacher")):
        return []
    if options.get("schedule") == "wsd":
        return [_command(folder, verb, "--steps", steps, "--out", folder)]
    rest = max(1, steps - options["steps"])
    started = ["--student", folder, "--schedule", "wsd", "--steps", rest, "--out", _new(folder, "longer")]
    again = ["--steps", steps, *_decays(options, steps), "--out", _new(folder, f"{steps}-steps")]
    return [
        "from its student, by a schedule whose runs can be extended again:",
        f"  {_command(folder, verb, *started)}",
        "or again from the beginning:",
        f"  {_command(folder, verb, *again)}",
    ]


def note(folder: Path, config: Mapping[str, Any], evaluations: Sequence[Mapping[str, Any]], until: int | None) -> str:
    """Returns what to say of a run that was still improving when it ended; empty for any other.

    Args:
        config: its record.
        evaluations: its `eval` records.
        until: the step at which its cool-down begins, or None.
    """
    # On held-out images only: a student improves on the training images by memorising them, too.
    held_out = [each for each in evaluations if each["split"] == "val" and (until is None or each["step"] <= until)]
    found = improvement(held_out, config["facts"].get("pictures", {}).get("val", 0))
    options = config["knobs"]
    commands = ways(folder, config["verb"], options, LONGER * options["steps"]) if found else []
    if not found or not commands:
        return ""
    name, before, after = found
    when = "its last fifth" if until is None else "the last fifth before its cool-down"
    lines = "\n  ".join(commands)
    return (
        f"{folder}: {name} was still improving ({percent(after)} in {when}, {percent(before)} until then); "
        f"to train it longer:\n  {lines}"
    )


def _command(folder: Path, verb: str, *words: Any) -> str:
    processes = env.world_size()
    program = f"torchrun --nproc-per-node {processes} -m funmatch" if processes > 1 else "funmatch"
    return f"{program} {verb} {shlex.join(map(str, ('--config', folder / 'config.json', *words)))}"


def _decays(options: Mapping[str, Any], steps: int) -> Iterator[str]:
    """Yields the decays of a staircase at the same shares of the new length; nothing for other schedules."""
    if options.get("decay_steps"):
        share = steps / options["steps"]
        yield from ("--decay-steps", *(str(round(step * share)) for step in options["decay_steps"]))


def _new(folder: Path, end: str) -> Path:
    """Returns the name of a folder beside a run that does not exist yet."""
    names = (folder.with_name(f"{folder.name}-{end}{number}") for number in ("", *(f"-{n}" for n in range(2, 1000))))
    return next(each for each in names if not each.exists())
