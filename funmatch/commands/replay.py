"""Takes a step of a run again, and shows where a loss, gradient or weight is not finite."""

from dataclasses import asdict
from typing import Any

from funmatch.config.tools import Replay
from funmatch.reports.result import Result
from funmatch.runtime.log import print_table
from funmatch.training.replay import replay
from funmatch.training.run.folder import finite

SHOWN = 10
"""Parameters and images that are listed, at most."""


def run(options: Replay) -> Result:
    """Takes a step again.

    Returns:
        the attributes of `Replayed`; None stands for a number that is not finite.

    Raises:
        InputError: the folder is no run, the run has no such step, or its images or teacher have changed.
    """
    found = replay(options.folder, options.step)
    return Result(options.folder, finite(asdict(found)))


def show(result: Result) -> None:
    """Prints the step."""
    step = result.metrics
    rows = [
        ["reached from", f"the checkpoint of step {step['start']:,}" if step["start"] else "the first weights"],
        ["learning rate", f"{step['lr']:.4g}"],
        *([name, _number(value)] for name, value in step["losses"].items()),
        ["gradient norm", _number(step["gradient_norm"])],
        ["weights that are not finite", _listed(step["weights"])],
        ["first output that is not finite", step["forward"] or "none"],
        ["gradients that are not finite", _listed(step["backward"])],
        ["images", _listed([each["image"] for each in step["images"]])],
    ]
    for who in ("teacher", "student"):
        bad = [each["image"] for each in step["images"] if not each.get(f"{who}_finite", True)]
        rows.append([f"{who}'s logits that are not finite", _listed(bad)])
    print_table(f"step {step['step']:,} of {result.folder}", ["", ""], rows)


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.6g}"


def _listed(names: list[Any]) -> str:
    more = f" and {len(names) - SHOWN:,} others" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more if names else "none"
