"""Estimates time, memory and disk space of a run on this machine: FLOPs are counted, and a few real steps measured."""

import resource
import time
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from funmatch.commands import rank_teachers
from funmatch.commands.common.ready import build, prepared
from funmatch.config import Distill, Plan, Train
from funmatch.config.choices import STRATEGIES
from funmatch.config.search import PlanDistill
from funmatch.data.cache.stores import CachedSplit
from funmatch.data.loader import Batch
from funmatch.data.prefetch import prefetch
from funmatch.errors import InputError
from funmatch.reports import run_page  # noqa: F401  (a run draws a page at its end, so the time of this import is part of the estimate)
from funmatch.reports.plan import picture
from funmatch.reports.result import Result
from funmatch.runtime import devices, env, transfers
from funmatch.runtime.disk.partials import scratch_folder
from funmatch.runtime.log import info, print_table
from funmatch.runtime.text import duration, format_bytes, percent
from funmatch.training import profiling
from funmatch.training.evaluation import scoring
from funmatch.training.loop import fit
from funmatch.training.objective import Objective
from funmatch.training.run import checkpoint, intervals
from funmatch.training.run.state import TrainState
from funmatch.training.setup import TrainSetup
from funmatch.training.student.acceleration import accelerate_student
from funmatch.training.teachers import recording
from funmatch.training.teachers.tape import HEADER

WARM, TIMED = 3, 20
"""Warm-up steps, and steps that are measured."""
MEASURED_IMAGES = 512
"""Maximum number of images on which evaluation is measured."""


@dataclass(frozen=True)
class Parts:
    """Durations of the parts of a run, in seconds.

    Attributes:
        begin: start-up: imports, data, evaluating teachers, compiling networks.
        step: one training step.
        evaluation: one evaluation on validation images and training views.
        save: one checkpoint.
        end: the final evaluation and export of the student.
    """

    begin: float
    step: float
    evaluation: float
    save: float
    end: float

    def of_run(self, config: Train) -> dict[str, float]:
        """Computes the duration of a complete run in seconds, by part."""
        steps = config.steps or 1
        return {
            "begin": self.begin,
            "steps": steps * self.step,
            "evaluations": intervals.evaluations_until(config, steps) * self.evaluation,
            "checkpoints": intervals.saves_of(config) * self.save,
            "end": self.end,
        }


def run(config: Train) -> Result:
    """Estimates a run; see `measure`. This process's start-up time counts, since the run will need it too."""
    if isinstance(config, PlanDistill) and config.teachers:
        return Result(None, rank_teachers.rank(config))
    plot = config.plot if isinstance(config, Plan) else None
    return Result(None, measure(config, loading=env.seconds_since_start(), plot=plot))


def measure(config: Train, *, loading: float = 0.0, plot: Path | None = None) -> dict[str, Any]:
    """Sets a run up, trains a few steps, and discards them.

    Args:
        loading: start-up time of this process in seconds, which the run will need too.
        plot: file or folder in which the run is drawn.

    Returns:
        `seconds` (of the whole run, and its `parts`), `hours`, `steps`, `step_ms`, `images_per_second`, `gflop` (of one
        step, by part), `of_peak` (share of the device's measured peak), `memory_bytes` (peak),
        `disk_bytes` (`pictures`, `run`, `tape`), `device`, `precision`, `compile`;
        `plot` (paths of the pictures), if they were drawn.
    """
    # Here too, since Python calls this without the command line.
    if env.world_size() > 1:
        raise InputError("plan runs in a single process; start it without torchrun")
    began = time.monotonic() - loading
    with prepared(*build(without_new_tape(config))) as (setup, objective):
        drawing = time.monotonic()
        # Before anything is measured, which takes long for large networks.
        drawn = {"plot": [str(path) for path in picture.write(setup, plot)]} if plot else {}
        for path in drawn.get("plot", ()):
            info(f"drew {path}")
        # The time of drawing is not part of the run's start-up.
        began += time.monotonic() - drawing
        steps = setup.loop.steps
        info(f"measuring {min(steps, WARM + TIMED)} steps of {steps:,} on {setup.loop.device}")
        return forecast(setup, objective, began) | drawn


def without_new_tape(config: Train) -> Train:
    """Returns the options without a tape that would have to be created: an estimate writes nothing."""
    if isinstance(config, Distill) and config.tape and not (config.tape.expanduser() / HEADER).is_file():
        return config.model_copy(update={"tape": None, "tape_full": "stop"})
    return config


def forecast(setup: TrainSetup[Any], objective: Objective, began: float) -> dict[str, Any]:
    """Measures the parts of a run that is set up.

    Args:
        began: `time.monotonic()` at the start of the process.
    """
    config, loop = setup.config, setup.loop
    # So that the peak below is that of a run, not of what building it has left.
    devices.empty_cache(loop.device)
    # As the run does, before its first step: compiled networks are what is measured.
    accelerate_student(setup.student.classifier, loop, config, config.side or 0, setup.provenance["kernels"])
    begin = time.monotonic() - began
    step = seconds_a_step(setup, objective)
    evaluation, end = seconds_to_evaluate(setup, objective)
    save, size = seconds_to_save(setup)
    whole = Parts(begin, step, evaluation, save, end).of_run(config)
    used = profiling.arithmetic(setup, objective.teachers)
    gflop = sum(used["gflop"].values()) if "student" in used["gflop"] else None
    seconds = sum(whole.values())
    return {
        "run": str(config.out),
        "steps": loop.steps,
        "step_ms": 1e3 * step,
        "images_per_second": config.batch / step,
        "seconds": seconds,
        "hours": seconds / 3600,
        "parts": whole,
        "gflop": gflop,
        "of_peak": None if gflop is None else gflop / step / used["peak_gflops"],
        # On a CPU, the peak of this process; Linux counts it in units of 1,024 bytes.
        "memory_bytes": devices.peak_memory(loop.device) or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "disk_bytes": {
            "pictures": sum(path.stat().st_size for path in setup.cache.folder.rglob("*") if path.is_file()),
            "run": checkpoint.KEPT * size + 2 * parameter_bytes(setup),
            "tape": tape_bytes(setup),
        },
        "device": str(loop.device),
        "precision": loop.precision,
        "compile": config.compile,
    }


def seconds_a_step(setup: TrainSetup[Any], objective: Objective) -> float:
    """Measures the mean duration of a step over `TIMED` steps of the run, with views prepared in parallel."""
    loop, student = setup.loop, setup.student
    steps = min(loop.steps, WARM + TIMED)
    finish = objective.ahead or partial(Batch.pin_memory, device=loop.device)
    batches = prefetch(objective.batches, 0, steps, workers=setup.workers, finish=finish)
    scaler = devices.loss_scaler(loop.device, loop.precision)
    # At least one step is measured, also of a run that is shorter than the warm-up.
    warm, start = min(WARM, steps - 1), time.perf_counter()
    # The threads of `prefetch` would otherwise go on making views while evaluation is measured.
    with closing(batches):
        for number, _ in fit(loop, student.classifier, student.optimizer, scaler, batches, objective.loss):
            if student.ema:
                student.ema.update(student.classifier, number)
            # Kernels run asynchronously on a GPU: without waiting, warm-up steps would end inside the measured time.
            if number == warm:
                devices.synchronize(loop.device)
                start = time.perf_counter()
        devices.synchronize(loop.device)
    return (time.perf_counter() - start) / (steps - warm)


def seconds_to_evaluate(setup: TrainSetup[Any], objective: Objective) -> tuple[float, float]:
    """Estimates the seconds of an evaluation during training, and of the final one."""
    validation, test = setup.evaluation.validation, setup.evaluation.test
    each = seconds_an_image(setup, validation)
    networks = 1 + (setup.config.ema is not None)
    began = time.perf_counter()
    if objective.logits:
        student, view = setup.student.classifier, setup.evaluation.view
        scoring.answer_training_views(objective.logits, student, objective.batches, 0, view)
    views = time.perf_counter() - began
    # The teacher is evaluated on test images only if they are not those of the start.
    at_end = networks + (objective.teachers is not None and test.name != validation.name)
    return networks * each * len(validation) + views, at_end * each * len(test)


def seconds_an_image(setup: TrainSetup[Any], split: CachedSplit) -> float:
    """Measures the student's evaluation time in seconds per image on part of a split."""
    student, view = setup.student.classifier, setup.evaluation.view
    some = split.subset(torch.arange(min(MEASURED_IMAGES, len(split))).numpy())
    # The first call compiles kernels, which a run pays once and not for each image.
    scoring.predict(student, some.subset(torch.arange(min(len(some), 8)).numpy()), view)
    began = time.perf_counter()
    scoring.score(scoring.predict(student, some, view), some)
    return (time.perf_counter() - began) / len(some)


def seconds_to_save(setup: TrainSetup[Any]) -> tuple[float, int]:
    """Measures the seconds and bytes of a checkpoint on the disk of the run folder."""
    place = setup.config.out.expanduser().absolute()
    # The run folder may not exist yet; its closest existing parent is on the same disk.
    while not place.is_dir():
        place = place.parent
    student = setup.student
    # On the disk of the run, since disks differ in speed.
    with scratch_folder(place, "funmatch-plan") as folder:
        began = time.perf_counter()
        tensors = transfers.snapshot(checkpoint.tensors_of(student.classifier.net, student.optimizer, student.others))
        checkpoint.save(folder, tensors, TrainState(step=1))
        took = time.perf_counter() - began
        return took, sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def parameter_bytes(setup: TrainSetup[Any]) -> int:
    """Computes the size of the exported student in bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in setup.student.classifier.net.state_dict().values())


def tape_bytes(setup: TrainSetup[Any]) -> int | None:
    """Computes the size in bytes of the tape that a run could record; None if its strategy records none."""
    if not isinstance(setup.config, Distill) or STRATEGIES[setup.config.strategy].fixed:
        return None
    return recording.layout_of(setup).bytes_of(setup.loop.steps)


def show(result: Result) -> None:
    """Prints the estimate of a run, or its candidate teachers."""
    estimate = result.metrics
    if "teachers" in estimate:
        rank_teachers.show(estimate)
        return
    parts = estimate["parts"]
    # Parts of less than a second do not matter to an estimate.
    times = ", ".join(f"{name} {duration(seconds)}" for name, seconds in parts.items() if seconds >= 1)
    disk = estimate["disk_bytes"]
    tape = "" if disk["tape"] is None else f"; a tape of the teacher's logits {format_bytes(disk['tape'])}"
    peak = "" if estimate["of_peak"] is None else f", {percent(estimate['of_peak'])} of the measured peak"
    how = f"{estimate['device']}, {estimate['precision']}, compile {estimate['compile']}"
    rows = [
        ["time", f"{duration(estimate['seconds'])} ({estimate['hours']:,.2f} hours on {how})"],
        ["parts", times],
        ["step", f"{estimate['step_ms']:,.1f} ms, {estimate['images_per_second']:,.1f} images/s{peak}"],
        ["length", f"{estimate['steps']:,} steps"],
        ["memory", f"{format_bytes(estimate['memory_bytes'])} at peak"],
        ["disk", f"run {format_bytes(disk['run'])}, images {format_bytes(disk['pictures'])} (already there){tape}"],
    ]
    print_table(f"estimate for {estimate['run']}", ["", ""], rows)
