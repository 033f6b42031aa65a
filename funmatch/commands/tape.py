"""Inspects a tape of teacher logits: its contents, its integrity, and whether the teacher still gives them."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from funmatch import config
from funmatch.config import Distill
from funmatch.errors import InputError, WorkFailed
from funmatch.models.ensemble import TeacherEnsemble
from funmatch.reports.result import Result
from funmatch.runtime import devices
from funmatch.runtime.log import ProgressBar, print_table
from funmatch.runtime.text import format_bytes, percent
from funmatch.training import datasets, distill
from funmatch.training.teachers import loading, prepared, tape
from funmatch.training.teachers.source import views_by_side
from funmatch.training.teachers.tape import Tape

CLOSE_KL = 1e-3
"""KL in nats up to which logits differ only by the rounding of another machine."""
CLOSE_ERROR = 0.01
"""Relative error up to which features do."""


def run(options: config.Tape) -> Result:
    """Inspects a tape.

    Returns:
        `tape`, `steps` (number of complete ones), `ranges` (the first ten ranges of them), `rows`, `damaged`, `bytes`,
        `layout`, `asked` (the options of its views), `teacher`, `data`; of features `rounding` (relative error, mean
        and largest, on the first batch); with `recompute` also `recomputed` (number of
        steps), `equal` (share of numbers), `kl` (nats), `agreement`, of features `error` (relative, the mean).

    Raises:
        InputError: the folder holds no tape, or no complete step to recompute.
    """
    found = tape.find_tape(options.folder)
    rows, damaged, whole = found.counts()
    summary: dict[str, Any] = {
        "tape": str(found.folder),
        "steps": sum(map(len, whole)),
        # Ten at most: a tape of interrupted runs may have thousands.
        "ranges": [[each.start, each.stop] for each in whole[:10]],
        "rows": rows,
        "damaged": damaged,
        "bytes": found.size,
        "layout": found.header["layout"],
        "asked": found.header["asked"],
        "teacher": found.header["run"]["teacher"],
        "data": found.header["run"]["data"],
    }
    summary |= {"rounding": found.header["rounding"]} if "rounding" in found.header else {}
    if options.recompute:
        if not whole:
            raise InputError(f"{found.folder} holds no complete step, so no logits can be recomputed")
        summary |= _recomputed(found, [step for each in whole for step in each], options.recompute)
    found.close()
    return Result(found.folder, summary)


def check_sound(summary: dict[str, Any]) -> None:
    """Raises `WorkFailed` if rows are damaged, or the teacher's logits differ now."""
    # Exit code 1, so that a script can rely on a tape that was checked.
    if summary["damaged"]:
        raise WorkFailed(
            f"{summary['damaged']:,} rows of {summary['tape']} are damaged; runs recompute them, "
            "and a run that records to this tape repairs them"
        )
    if (summary.get("kl") or 0) > CLOSE_KL:
        raise WorkFailed(
            f"the teacher's logits now differ from those in {summary['tape']}: KL {summary['kl']:.2g} nats, "
            f"agreement {percent(summary['agreement'])}"
        )
    if summary.get("error", 0) > CLOSE_ERROR:
        raise WorkFailed(
            f"the teacher's features now differ from those in {summary['tape']}: relative error {summary['error']:.2g}"
        )


def show(result: Result) -> None:
    """Prints the contents of a tape.

    Raises:
        WorkFailed: rows are damaged, or the teacher's logits differ.
    """
    summary = result.metrics
    layout, views = summary["layout"], summary["asked"]
    first = ", ".join(f"{start:,} … {stop - 1:,}" for start, stop in summary["ranges"])
    width = (
        f"{layout['classes']:,} classes"
        if layout["top"] is None
        else f"top {layout['top']} of {layout['classes']:,} classes"
    )
    parts = views.get("answers")
    if parts:
        tokens = f", tokens of {parts['grid'][0]} × {parts['grid'][1]}" if parts["tokens"] else ""
        width = f"{parts['classes']:,} classes, features of {' + '.join(map(str, parts['pooled']))}{tokens}"
    rows = [
        ["teacher", " + ".join(Path(name).name for name in summary["teacher"])],
        ["images", ", ".join(summary["data"])],
        ["draws", f"seed {views['seed']}, batch {views['batch']}, {views['crop']} crops of {views['side']} px"],
        ["answers" if parts else "logits", f"{width}, half precision"],
        *(
            [["rounding of features", f"{rounding['mean']:.1e} of their length, at most {rounding['max']:.1e}"]]
            if (rounding := summary.get("rounding"))
            else []
        ),
        ["steps", f"{summary['steps']:,} ({first})" if first else "none"],
        ["rows", f"{summary['rows']:,} sound, {summary['damaged']:,} damaged"],
        ["size", format_bytes(summary["bytes"])],
    ]
    if "recomputed" in summary:
        found = [f"{percent(summary['equal'])} of {'numbers' if parts else 'logits'} equal"]
        if summary["kl"] is not None:
            found.append(f"KL {summary['kl']:.1e}, agreement {percent(summary['agreement'])}")
        found += [f"error of features {summary['error']:.1e}"] if "error" in summary else []
        rows.append([f"{summary['recomputed']} steps recomputed", ", ".join(found)])
    print_table(summary["tape"], ["", ""], rows)
    # Last: the table is printed also of a tape that is damaged.
    check_sound(summary)


@torch.inference_mode()
def _recomputed(found: Tape, steps: list[int], count: int) -> dict[str, Any]:
    """Recomputes the teacher's logits of some evenly spaced steps, and compares them with the tape."""
    recorded_options = {name: value for name, value in found.header["run"].items() if name in Distill.model_fields}
    # Only options of this version: a tape of an earlier one may have others.
    settings = Distill.checked(**recorded_options | {"tape": None, "tape_top": None})
    # As recorded: nothing is held out that the tape's views were drawn from.
    cache = datasets.open_run_data(settings)
    loaded = loading.load_teachers(settings, cache, settings.side, {})
    setup = distill.build_distill_setup(settings, cache, loaded)
    device = setup.loop.device
    # The recorded inference mode holds for its device only; another kind of device chooses its own.
    same = found.header["device"] == device.type
    setup, teachers, _ = prepared.freeze_for_run(setup, loaded, found.header["forms"] if same else None)
    # Spread evenly, since a tape may have been recorded by several runs, on several machines.
    chosen = [steps[i] for i in sorted({round(i) for i in np.linspace(0, len(steps) - 1, min(count, len(steps)))})]
    layout, recorded, recomputed = found.layout, [], []
    with ProgressBar("teacher", len(chosen)) as bar:
        for number, step in enumerate(chosen, 1):
            batch = setup.loader.batch_at(step).to(device)
            views, _ = views_by_side(batch, setup.loader.teacher_sides)
            # The teachers ignore autocast, as in a run: their inference modes alone decide the precision.
            with devices.autocast(device, "fp32"):
                logits = teachers(views, settings.temperature)
            rows = found.read(step, 0, layout.batch)
            if rows is None:
                raise InputError(f"step {step} of {found.folder} was damaged during this command; rerun it")
            # Through the tape's format too, so that its rounding to half precision does not count as a difference.
            recomputed.append(layout.unpacked(*layout.packed(logits)).cpu())
            recorded.append(rows)
            bar.update(number)
    return {"recomputed": len(chosen), **_compared(torch.cat(recorded), torch.cat(recomputed), teachers)}


def _compared(before: Tensor, after: Tensor, teachers: TeacherEnsemble) -> dict[str, Any]:
    """Compares answers on a tape with the teacher's now, (n, width) each."""
    layout = teachers.layout
    classes = layout.classes if layout else before.shape[1]
    found: dict[str, Any] = {"equal": (before == after).double().mean().item(), "kl": None, "agreement": None}
    if classes:
        summary = teachers.task.measure(after[:, :classes], None, before[:, :classes])
        found |= {"kl": summary["kl"], "agreement": summary["agreement"]}
    if layout:
        one, other = before[:, classes:].double(), after[:, classes:].double()
        found["error"] = ((one - other).norm(dim=1) / one.norm(dim=1).clamp(min=1e-12)).mean().item()
    return found
