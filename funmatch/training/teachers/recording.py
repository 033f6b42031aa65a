"""Opens the teacher tape of a distillation: decides which tape it can share, what is recorded, and if there is room."""

import hashlib
import shutil
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, Literal

import torch
from torch import Tensor

from funmatch.config import Changes, Distill, options_changing
from funmatch.config.choices import STRATEGIES
from funmatch.errors import InputError
from funmatch.models.ensemble import TeacherEnsemble
from funmatch.ops.tasks.task import MULTICLASS
from funmatch.runtime import distributed, env
from funmatch.runtime.log import info
from funmatch.runtime.text import format_bytes, percent
from funmatch.training.matching import wiring
from funmatch.training.setup import TrainSetup
from funmatch.training.teachers import tape
from funmatch.training.teachers.tape import Layout, Tape

DistillSetup = TrainSetup[Distill]


def tape_key(setup: DistillSetup, teachers: TeacherEnsemble) -> dict[str, Any]:
    """Returns everything that a run's teacher logits depend on: its images, its views, and the teachers.

    The views' part is the whole `ViewSpec`, so an option that changes views cannot be left out here.
    """
    config, members = setup.config, teachers.members
    several = len(members) > 1
    # The temperature changes logits only where probabilities are summed: by the tape, or over teachers.
    tempered = config.tape_top or (several and teachers.combine != "mean-logits")
    return {
        "pictures": setup.loader.split.content,
        **setup.loader.spec.key(),
        "teacher": setup.provenance["teacher"],
        "teacher_function": setup.provenance["teacher_function"],
        "teacher_sides": [member.side for member in members],
        "teacher_classes": _digest([member.class_map for member in members]),
        "combine": [_combine_of(teachers), *(member.weight for member in members)] if several else None,
        "teacher_precision": config.teacher_precision,
        "temperature": config.temperature if tempered else None,
        "top": config.tape_top,
        # Of features alone, so that tapes of logits keep their key.
        **({"answers": asdict(teachers.layout)} if teachers.layout else {}),
    }


def _combine_of(teachers: TeacherEnsemble) -> str:
    """Returns how teachers are combined: means of probabilities are other numbers for another task."""
    if teachers.combine == "mean-logits" or teachers.task is MULTICLASS:
        return teachers.combine
    return f"{teachers.combine}, {teachers.task.name}"


def own_of_the_student(knobs: Mapping[str, Any]) -> set[str]:
    """Returns the options of a distillation that may differ between runs that share a tape.

    Args:
        knobs: options of `config.Distill`; those left out have their defaults.
    """
    own = {*Distill.model_fields} - options_changing(Distill, Changes.VIEWS | Changes.TEACHER | Changes.DATA)
    # Otherwise the student decides the image size, or the grid of the tokens.
    if knobs.get("side") and "tokens" not in (knobs.get("match") or ()):
        own.add("student")
    # One teacher may come as a string, e.g. from a study's file.
    several = not isinstance(knobs.get("teacher"), str) and len(knobs.get("teacher") or ()) > 1
    if not several or knobs.get("combine", "mean-logits") == "mean-logits":
        # Mean logits do not depend on it; other combinations sum probabilities at this temperature.
        own.add("temperature")
    return own


def shared_by(knobs: Mapping[str, Any]) -> str | None:
    """Returns a digest that is the same for distillations that can share a tape; None where nothing is shared."""
    # A run with --tape records there, and the logits of fixed teachers are cached by image.
    if knobs.get("tape") or knobs.get("tape_top") or STRATEGIES[knobs.get("strategy", "funmatch")].fixed:
        return None
    own = own_of_the_student(knobs)
    decisive = sorted((name, str(value)) for name, value in knobs.items() if name not in own)
    return hashlib.blake2b(repr(decisive).encode(), digest_size=8).hexdigest()


@contextmanager
def lock_beginning(config: Distill) -> Generator[None]:
    """Keeps other runs from beginning the same tape: the first run alone chooses the teachers' inference modes."""
    place = tape.record_folder(config.tape) if config.tape else None
    # The main process alone chooses modes, so the others need no lock.
    if place is None or not env.is_main_process() or place.has_begun:
        yield
        return
    place.check_place()
    with place.beginning():
        yield


def recorded_modes(config: Distill, device: torch.device) -> list[dict[str, Any]] | None:
    """Returns the inference modes of a tape's teachers, so that what is added to it is computed alike.

    None without a tape, or for one from another type of device, whose modes may not exist here.
    """
    if config.tape is None or not tape.record_folder(config.tape).has_begun:
        return None
    # Modes are measured per type of device: a GPU's may be slow or missing on a CPU.
    header = tape.find_tape(config.tape).header
    return header["forms"] if header["device"] == device.type else None


def layout_of(setup: DistillSetup) -> Layout:
    """Returns the format of the rows of a run's tape.

    Raises:
        InputError: `tape_top` leaves no classes to be joined.
    """
    config, classes = setup.config, setup.student.classifier.num_classes
    if answers := wiring.layout_of(setup):
        return Layout(config.batch, answers.width)
    if config.tape_top is not None and config.tape_top > classes - 2:
        raise InputError(f"tape_top ({config.tape_top}) must leave some of {classes} classes; omit it to keep all")
    return Layout(config.batch, classes, config.tape_top, config.temperature)


def rounding(config: Distill) -> str | None:
    """Returns how a run with a tape rounds its teachers' logits, recorded or replayed; None without a tape."""
    if config.tape is None:
        return None
    return "fp16" if config.tape_top is None else f"fp16, the first {config.tape_top} classes and the rest as one"


def begin_tape(setup: DistillSetup, teachers: TeacherEnsemble, first: Tensor | None = None) -> Tape:
    """Opens the run's tape, and creates it if there is none yet.

    Args:
        first: the teachers' answers to the first batch, by which a new tape says how it rounds features.
    """
    # The layout depends on the student's classes, which equal the teacher's by now.
    place, layout = setup.config.tape, layout_of(setup)
    assert place is not None
    about = _about(setup)
    if teachers.layout and first is not None and not tape.record_folder(place).has_begun:
        about |= {"rounding": rounding_error(first[:, teachers.layout.classes :])}
    # The main process writes the header, the others then compare theirs with it.
    return distributed.main_process_first(lambda: tape.open_tape(place, layout, tape_key(setup, teachers), about))


def rounding_error(features: Tensor) -> dict[str, float]:
    """Measures how half precision rounds features, (n, d): mean and largest relative error of an image's; says it."""
    error = (features.half().float() - features).norm(dim=1) / features.norm(dim=1).clamp(min=1e-12)
    found = {"mean": error.mean().item(), "max": error.max().item()}
    info(f"tape: half precision changes features by {found['mean']:.1e} of their length, by {found['max']:.1e} at most")
    return found


@contextmanager
def open_tape(setup: DistillSetup, teachers: TeacherEnsemble) -> Generator[Tape | None]:
    """Yields the run's tape, or None where it has none; records for as long as the block runs.

    Raises:
        InputError: the tape holds something else, or the disk has no room for it.
    """
    config = setup.config
    if config.tape is None:
        yield None
        return
    run_tape = begin_tape(setup, teachers)
    # One run records; others that hold the tape at the same time only read.
    lock = tape.record_folder(run_tape.folder).try_lock() if env.is_main_process() else None
    try:
        # All processes record or none: each writes its own rows of a step.
        run_tape.recording = distributed.broadcast_from_main(lambda: lock is not None)
        if env.is_main_process():
            _report_beginning(run_tape, setup.loop.steps, config.tape_full)
        yield run_tape
    finally:
        run_tape.close()
        # After `close`, so that the next writer finds all rows on the disk.
        if lock:
            lock.close()


def _report_beginning(run_tape: Tape, steps: int, full: Literal["stop", "go-on"]) -> None:
    """Reports the size of a tape, and whether it is recorded or replayed.

    Without room on the disk it raises `InputError`, or turns recording off where `full` says so.
    """
    size, recorded = run_tape.layout.bytes_of(steps), run_tape.size
    if not run_tape.recording:
        info(
            f"tape {run_tape.folder}: another run is recording this tape; reading what it has written so far and as it "
            "grows"
        )
        return
    try:
        _check_space(run_tape, steps)
    except InputError as error:
        # Before the first step, not after hours of training on a full disk.
        if full == "stop":
            raise
        run_tape.recording = False
        info(f"WARNING: {error}; continuing without recording")
        return
    if recorded < size:
        done = f", {format_bytes(recorded)} of it recorded before" if recorded else ""
        info(f"tape {run_tape.folder}: recording the teacher's logits of {steps:,} steps ({format_bytes(size)}{done})")
    else:
        info(f"tape {run_tape.folder}: replaying the teacher's logits of {steps:,} steps ({format_bytes(size)})")


def _check_space(run_tape: Tape, steps: int) -> None:
    """Raises `InputError` unless the disk has room for all that will be recorded."""
    # Blocks, not the file's length: rows that are not written yet may be holes, which take no space.
    recorded = run_tape.path.stat().st_blocks * 512 if run_tape.path.is_file() else 0
    needed = run_tape.layout.bytes_of(steps) - recorded
    free = shutil.disk_usage(run_tape.folder).free
    if needed > free:
        raise InputError(
            f"the tape of {steps:,} steps needs {format_bytes(needed)} more in {run_tape.folder}, where "
            f"{format_bytes(free)} are free; choose another --tape, keep fewer classes (--tape-top), or omit --tape"
        )


def report_dropped_mass(logits: Tensor, config: Distill) -> None:
    """Reports the probability of the classes that a tape with `tape_top` joins into one.

    Args:
        logits: the teachers' on the first batch, (n, classes).
    """
    assert config.tape_top is not None
    # Of the first batch alone: an estimate that costs nothing, before hours are recorded.
    rest = tape.dropped_mass(logits, config.tape_top, config.temperature)
    info(
        f"tape: the first {config.tape_top} of {logits.shape[-1]:,} classes hold {percent(1 - rest)} of the teacher's "
        f"probability at T = {config.temperature:g}; the split of the other {percent(rest)} is not distilled"
    )


def _about(setup: DistillSetup) -> dict[str, Any]:
    """Returns what a tape's header holds besides its key: how to show it, and how to compute it again."""
    # Not compared: another run may add rows on another device, or with another version of PyTorch.
    return {
        "device": setup.loop.device.type,
        "forms": setup.provenance["teacher_forms"],
        "run": setup.config.model_dump(mode="json"),
        "versions": {"torch": torch.__version__},
    }


def _digest(value: Any) -> str | None:
    # Tapes hold it in their key, so another spelling would make recorded ones unusable.
    return hashlib.blake2b(repr(value).encode(), digest_size=12).hexdigest() if any(value) else None
