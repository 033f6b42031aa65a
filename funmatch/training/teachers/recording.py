"""A distillation and the teacher tape: whose answers it holds, what is recorded, and what a full disk means."""

import hashlib
import shutil
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from funmatch.config import Changes, Distill, options_changing
from funmatch.config.choices import STRATEGIES
from funmatch.errors import InputError
from funmatch.models.ensemble import TeacherEnsemble
from funmatch.runtime import distributed, env
from funmatch.runtime.log import info
from funmatch.runtime.text import format_bytes, percent
from funmatch.training.setup import TrainSetup
from funmatch.training.teachers import tape
from funmatch.training.teachers.tape import Layout, Tape

DistillSetup = TrainSetup[Distill]


def tape_key(setup: DistillSetup, teachers: TeacherEnsemble) -> dict[str, Any]:
    """All that the teachers' logits of a run depend on: its images, its views, and the teachers themselves.

    The views' part is the whole `ViewSpec`: an option that changes views cannot be left out here.
    """
    config, members = setup.config, teachers.members
    several = len(members) > 1
    # The temperature changes logits only where they are summed up: by the tape, or over teachers' probabilities.
    tempered = config.tape_top or (several and teachers.combine != "mean-logits")
    return {
        "pictures": hashlib.blake2b(setup.loader.split.digests.tobytes(), digest_size=16).hexdigest(),
        **setup.loader.spec.key(),
        "teacher": setup.provenance["teacher"],
        "teacher_function": setup.provenance["teacher_function"],
        "teacher_sides": [member.side for member in members],
        "teacher_classes": _digest([member.class_map for member in members]),
        "combine": [teachers.combine, *(member.weight for member in members)] if several else None,
        "teacher_precision": config.teacher_precision,
        "temperature": config.temperature if tempered else None,
        "top": config.tape_top,
    }


def own_of_the_student(knobs: Mapping[str, Any]) -> set[str]:
    """Knobs of a distillation that can be others without its tape being another.

    Args:
        knobs: of `config.Distill`, as far as they are given.
    """
    own = {*Distill.model_fields} - options_changing(Distill, Changes.VIEWS | Changes.TEACHER | Changes.DATA)
    if knobs.get("side"):
        own.add("student")  # else it decides the side of the views
    several = not isinstance(knobs.get("teacher"), str) and len(knobs.get("teacher") or ()) > 1
    if not several or knobs.get("combine", "mean-logits") == "mean-logits":
        own.add("temperature")
    return own


def shared_by(knobs: Mapping[str, Any]) -> str | None:
    """A name for the tape that a distillation can share with all others that give the same name; None if with none."""
    if knobs.get("tape") or knobs.get("tape_top") or STRATEGIES[knobs.get("strategy", "funmatch")].fixed:
        return None
    own = own_of_the_student(knobs)
    decides = sorted((name, str(value)) for name, value in knobs.items() if name not in own)
    return hashlib.blake2b(repr(decides).encode(), digest_size=8).hexdigest()


@contextmanager
def lock_beginning(config: Distill) -> Generator[None]:
    """Keeps other runs from beginning the same tape, so that the first alone decides how its teacher is computed."""
    place = tape.record_folder(config.tape) if config.tape else None
    if place is None or not env.is_main_process() or place.has_begun:
        yield
        return
    place.check_place()
    with place.beginning():
        yield


def recorded_modes(config: Distill, device: torch.device) -> list[dict[str, Any]] | None:
    """The forms in which the teachers of a tape are computed, so that what is added to it is computed alike."""
    if config.tape is None or not tape.record_folder(config.tape).has_begun:
        return None
    header = tape.find_tape(config.tape).header
    return header["forms"] if header["device"] == device.type else None


def layout_of(setup: DistillSetup) -> Layout:
    """The rows of a run's tape."""
    config, classes = setup.config, setup.student.classifier.num_classes
    if config.tape_top is not None and config.tape_top > classes - 2:
        raise InputError(f"tape_top ({config.tape_top}) must leave some of {classes} classes; leave it out to keep all")
    return Layout(config.batch, classes, config.tape_top, config.temperature)


def rounding(config: Distill) -> str | None:
    """What a run that uses a tape does to its teachers' answers, live or not."""
    if config.tape is None:
        return None
    return "fp16" if config.tape_top is None else f"fp16, the first {config.tape_top} classes and the rest as one"


def begin_tape(setup: DistillSetup, teachers: TeacherEnsemble) -> Tape:
    """The run's tape, new if it is not there yet."""
    place, layout = setup.config.tape, layout_of(setup)
    assert place is not None
    return distributed.main_process_first(
        lambda: tape.open_tape(place, layout, tape_key(setup, teachers), _about(setup))
    )


@contextmanager
def open_tape(setup: DistillSetup, teachers: TeacherEnsemble) -> Generator[Tape | None]:
    """The run's tape while the block runs; None where it has none."""
    config = setup.config
    if config.tape is None:
        yield None
        return
    found = begin_tape(setup, teachers)
    lock = tape.record_folder(found.folder).try_lock() if env.is_main_process() else None
    try:
        found.recording = distributed.broadcast_from_main(lambda: lock is not None)
        if env.is_main_process():
            _report_beginning(found, setup.loop.steps, config.tape_full)
        yield found
    finally:
        found.close()
        if lock:
            lock.close()


def _report_beginning(found: Tape, steps: int, full: Literal["stop", "go-on"]) -> None:
    """Says what a tape will take and what it gives; without room for it, an `InputError`, or nothing is recorded."""
    size, have = found.layout.bytes_of(steps), found.size
    if not found.recording:
        info(f"tape {found.folder}: another run records it; this one takes from it what is there, and what comes")
        return
    try:
        _check_space(found, steps)
    except InputError as error:
        if full == "stop":
            raise
        found.recording = False
        info(f"WARNING: {error}; the run goes on, and records nothing")
        return
    if have < size:
        has = f", {format_bytes(have)} of it are there" if have else ""
        info(f"tape {found.folder}: {format_bytes(size)} for {steps:,} steps{has}; what the teacher says is recorded")
    else:
        info(f"tape {found.folder}: {format_bytes(size)}; it holds what the teacher says in {steps:,} steps")


def _check_space(found: Tape, steps: int) -> None:
    """Raises `InputError` unless the disk has room for all that will be recorded."""
    have = found.path.stat().st_blocks * 512 if found.path.is_file() else 0
    wanted = found.layout.bytes_of(steps) - have
    free = shutil.disk_usage(found.folder).free
    if wanted > free:
        raise InputError(
            f"the tape of {steps:,} steps takes {format_bytes(wanted)} more in {found.folder}, where "
            f"{format_bytes(free)} are free; choose another --tape, keep fewer classes (--tape-top), or leave it out"
        )


def report_dropped_mass(told: Tensor, config: Distill) -> None:
    """Says how much of the teachers' probability a tape of some classes does not tell apart."""
    assert config.tape_top is not None
    rest = tape.dropped_mass(told, config.tape_top, config.temperature)
    info(
        f"tape: the first {config.tape_top} of {told.shape[-1]:,} classes hold {percent(1 - rest)} of the teacher's "
        f"probability at T = {config.temperature:g}; how the student shares out the other {percent(rest)} is lost"
    )


def _about(setup: DistillSetup) -> dict[str, Any]:
    """What a tape keeps beside, to be shown and to be computed again."""
    return {
        "device": setup.loop.device.type,
        "forms": setup.provenance["teacher_forms"],
        "run": setup.config.model_dump(mode="json"),
        "versions": {"torch": torch.__version__},
    }


def _digest(value: Any) -> str | None:
    return hashlib.blake2b(repr(value).encode(), digest_size=12).hexdigest() if any(value) else None
