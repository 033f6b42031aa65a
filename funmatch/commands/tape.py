"""A teacher tape looked through: what it holds, whether it is sound, and whether the teacher still says so."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from funmatch import config
from funmatch.config import Distill
from funmatch.errors import InputError, WorkFailed
from funmatch.ops import metrics
from funmatch.reports.result import Result
from funmatch.runtime import devices
from funmatch.runtime.log import ProgressBar, print_table
from funmatch.runtime.text import format_bytes, percent
from funmatch.training import distill
from funmatch.training.teachers import tape
from funmatch.training.teachers.tape import Tape

ALIKE = 1e-3
"""KL, in nats, up to which answers are the same but for the arithmetic of another machine."""


def run(asked: config.Tape) -> Result:
    """Looks through a tape.

    Returns:
        `tape`, `steps` (there whole), `longest` (the first range of them), `rows`, `damaged`, `bytes`, `asked`,
        `layout`; with `recompute` also `recomputed` (steps), `equal` (share of logits), `kl`, `agreement`.

    Raises:
        InputError: there is no tape.
    """
    found = tape.find_tape(asked.folder)
    rows, damaged, whole = found.counts()
    figures: dict[str, Any] = {
        "tape": str(found.folder),
        "steps": sum(map(len, whole)),
        "ranges": [[each.start, each.stop] for each in whole[:10]],
        "rows": rows,
        "damaged": damaged,
        "bytes": found.size,
        "layout": found.header["layout"],
        "asked": found.header["asked"],
        "teacher": found.header["run"]["teacher"],
        "data": found.header["run"]["data"],
    }
    if asked.recompute:
        if not whole:
            raise InputError(f"{found.folder} holds no whole step, so there is nothing to compute again")
        figures |= _recomputed(found, [step for each in whole for step in each], asked.recompute)
    found.close()
    return Result(found.folder, figures)


def check_sound(figures: dict[str, Any]) -> None:
    """Raises `WorkFailed` where rows are damaged, or the teacher says something else now."""
    if figures["damaged"]:
        raise WorkFailed(
            f"{figures['damaged']:,} rows of {figures['tape']} are damaged; runs compute these again, "
            "and those that record put them right"
        )
    if figures.get("kl", 0) > ALIKE:
        raise WorkFailed(
            f"the teacher now says something else than {figures['tape']} holds: KL {figures['kl']:.2g} nats, "
            f"agreement {percent(figures['agreement'])}"
        )


def show(result: Result) -> None:
    """Prints what a tape holds.

    Raises:
        WorkFailed: the tape is not sound.
    """
    figures = result.metrics
    layout, asked = figures["layout"], figures["asked"]
    first = ", ".join(f"{start:,} … {stop - 1:,}" for start, stop in figures["ranges"])
    kept = (
        f"{layout['classes']:,} classes" if layout["top"] is None else f"first {layout['top']} of {layout['classes']:,}"
    )
    rows = [
        ["teacher", " + ".join(Path(name).name for name in figures["teacher"])],
        ["pictures", ", ".join(figures["data"])],
        ["draws", f"seed {asked['seed']}, batch {asked['batch']}, {asked['crop']} crops of {asked['side']} px"],
        ["a row", f"{kept}, half precision"],
        ["steps", f"{figures['steps']:,} ({first})" if first else "none"],
        ["rows", f"{figures['rows']:,} sound, {figures['damaged']:,} damaged"],
        ["size", format_bytes(figures["bytes"])],
    ]
    if "recomputed" in figures:
        told = f"{percent(figures['equal'])} of logits equal, KL {figures['kl']:.1e}, agreement"
        rows.append([f"{figures['recomputed']} steps computed again", f"{told} {percent(figures['agreement'])}"])
    print_table(figures["tape"], ["", ""], rows)
    check_sound(figures)


@torch.inference_mode()
def _recomputed(found: Tape, steps: list[int], count: int) -> dict[str, Any]:
    """How the teacher's answers to some steps, evenly spread, compare with those of the tape."""
    knobs = {name: value for name, value in found.header["run"].items() if name in Distill.model_fields}
    asked = Distill.checked(**knobs | {"tape": None, "tape_top": None})
    cache, loaded = distill.open_inputs(asked)
    setup = distill.build_distill_setup(asked, cache, loaded)
    device = setup.loop.device
    same = found.header["device"] == device.type
    setup, teachers, _ = distill.freeze_for_run(setup, loaded, found.header["forms"] if same else None)
    chosen = [steps[i] for i in sorted({round(i) for i in np.linspace(0, len(steps) - 1, min(count, len(steps)))})]
    layout, told, now = found.layout, [], []
    with ProgressBar("teacher", len(chosen)) as bar:
        for number, step in enumerate(chosen, 1):
            batch = setup.loader.batch_at(step).to(device)
            views, _ = distill.views_by_side(batch, setup.loader.teacher_sides)
            with devices.autocast(device, "fp32"):
                answers = teachers(views, asked.temperature)
            kept = found.read(step, 0, layout.batch)
            if kept is None:
                raise InputError(f"step {step} of {found.folder} was damaged meanwhile; start the same command again")
            now.append(layout.unpacked(*layout.packed(answers)).cpu())
            told.append(kept)
            bar.update(number)
    there, again = torch.cat(told), torch.cat(now)
    figures = metrics.summarize(metrics.per_image(again, None, there))
    equal = (there == again).double().mean().item()
    return {
        "recomputed": len(chosen), "equal": equal, "kl": figures["kl"], "agreement": figures["agreement"],
    }  # fmt: skip
