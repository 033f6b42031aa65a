"""A distillation and the teacher tape: whose answers it holds, what is recorded, and what a full disk means."""

import hashlib
from collections import deque
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from funmatch.config import Distill
from funmatch.config.choices import STRATEGIES
from funmatch.data.batch import Batch
from funmatch.errors import InputError
from funmatch.models.ensemble import TeacherEnsemble
from funmatch.ops.sampling import SAMPLING_VERSION
from funmatch.runtime import distributed, env, transfers
from funmatch.runtime.files import file_lock, try_lock_file
from funmatch.runtime.log import info
from funmatch.runtime.text import format_bytes, percent
from funmatch.training.setup import TrainSetup
from funmatch.training.teachers import tape
from funmatch.training.teachers.tape import Layout, Tape

STUDENTS_OWN = {
    "student_weights", "student_kwargs", "drop_rate", "drop_path", "ema", "steps", "epochs", "label_smoothing",
    "optimizer", "optimizer_kwargs", "momentum", "momentum_dtype", "lr", "schedule", "cooldown_steps", "cooldown_shape",
    "decay_steps", "decay_factors", "weight_decay", "warmup_steps", "clip_norm", "freeze_until", "micro_batch",
    "grad_checkpointing", "teacher_batch", "patience", "keep", "workers", "threads", "log_every", "eval_every",
    "save_every", "distance", "standardise", "label_weight", "t_squared", "teacher_ahead", "precision", "eval_data",
    "out",
}  # fmt: skip
"""Knobs that change nothing of what teachers are shown and say."""
BEHIND = 2
"""Steps after which answers of an accelerator are fetched: by then they are there, and nobody waits."""


def tape_key(lesson: TrainSetup, teachers: TeacherEnsemble) -> dict[str, Any]:
    """All that the answers of a run's teachers to its views depend on."""
    config, loader = lesson.config, lesson.loader
    assert isinstance(config, Distill)
    several = len(teachers.members) > 1
    digest = hashlib.blake2b(loader.split.digests.tobytes(), digest_size=16).hexdigest()
    mixing = loader.mixing
    return {
        "pictures": digest,
        "draws": SAMPLING_VERSION,
        "seed": loader.seed,
        "batch": loader.batch,
        "side": loader.side,
        "crop": loader.crop,
        "resize": loader.resize if loader.crop in ("mild", "squash") else None,
        "min_area": loader.min_area if loader.crop == "inception" else None,
        "mixup": [mixing.a, mixing.per_image, mixing.take_max, mixing.lam],
        "cutmix": loader.cutmix,
        "randaugment": loader.randaugment,
        "teacher_sees": "its own view" if loader.own_teacher_view else "the student's",
        "teacher": lesson.provenance["teacher"],
        "teacher_function": lesson.provenance["teacher_function"],
        "teacher_sides": [member.side for member in teachers.members],
        "teacher_classes": _digest([member.class_map for member in teachers.members]),
        "combine": [teachers.combine, *(member.weight for member in teachers.members)] if several else None,
        "teacher_precision": config.teacher_precision,
        "temperature": config.temperature
        if config.tape_top or (several and teachers.combine != "mean-logits")
        else None,
        "top": config.tape_top,
    }


def own_of_the_student(knobs: Mapping[str, Any]) -> set[str]:
    """Knobs of a distillation that can be others without its tape being another.

    Args:
        knobs: of `config.Distill`, as far as they are given.
    """
    own = set(STUDENTS_OWN)
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
    folder = config.tape.expanduser() if config.tape else None
    if folder is None or not env.is_main_process() or folder.is_file() or (folder / tape.HEADER).is_file():
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with file_lock(folder / ".begin"):
            yield
    except BaseException:
        if {each.name for each in folder.iterdir()} <= {".begin"}:  # nothing came of it, so nothing is left of it
            (folder / ".begin").unlink(missing_ok=True)
            with suppress(OSError):
                folder.rmdir()
        raise


def recorded_modes(config: Distill, device: torch.device) -> list[dict[str, Any]] | None:
    """The forms in which the teachers of a tape are computed, so that what is added to it is computed alike."""
    if config.tape is None or not (config.tape.expanduser() / tape.HEADER).is_file():
        return None
    header = tape.find_tape(config.tape).header
    return header["forms"] if header["device"] == device.type else None


def layout_of(lesson: TrainSetup) -> Layout:
    """The rows of a run's tape."""
    config, classes = lesson.config, lesson.student.num_classes
    assert isinstance(config, Distill)
    if config.tape_top is not None and config.tape_top > classes - 2:
        raise InputError(f"tape_top ({config.tape_top}) must leave some of {classes} classes; leave it out to keep all")
    return Layout(config.batch, classes, config.tape_top, config.temperature)


def rounding(config: Distill) -> str | None:
    """What a run that uses a tape does to its teachers' answers, live or not."""
    if config.tape is None:
        return None
    return "fp16" if config.tape_top is None else f"fp16, the first {config.tape_top} classes and the rest as one"


def begin_tape(lesson: TrainSetup, teachers: TeacherEnsemble) -> Tape:
    """The run's tape, new if it is not there yet."""
    config, layout = lesson.config, layout_of(lesson)
    assert isinstance(config, Distill)
    assert config.tape is not None
    place = config.tape
    return distributed.main_process_first(
        lambda: tape.open_tape(place, layout, tape_key(lesson, teachers), _about(lesson))
    )


@contextmanager
def open_tape(lesson: TrainSetup, teachers: TeacherEnsemble) -> Generator["Recorder | None"]:
    """The run's tape while the block runs; None where it has none."""
    config = lesson.config
    assert isinstance(config, Distill)
    if config.tape is None:
        yield None
        return
    found = begin_tape(lesson, teachers)
    lock = try_lock_file(found.folder / ".lock") if env.is_main_process() else None
    try:
        found.recording = distributed.broadcast_from_main(lambda: lock is not None)
        if env.is_main_process():
            _told_before(found, lesson.loop.steps, config.tape_full)
        recorder = Recorder(found, config.tape_full)
        yield recorder
        recorder.flush()
    finally:
        found.close()
        if lock:
            lock.close()


def _told_before(found: Tape, steps: int, full: Literal["stop", "go-on"]) -> None:
    """Says what a tape will take and what it gives; without room for it, an `InputError`, or nothing is recorded."""
    size, have = found.layout.bytes_of(steps), found.size
    if not found.recording:
        info(f"tape {found.folder}: another run records it; this one takes from it what is there, and what comes")
        return
    try:
        tape.check_space(found, steps)
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


def report_dropped_mass(told: Tensor, config: Distill) -> None:
    """Says how much of the teachers' probability a tape of some classes does not tell apart."""
    assert config.tape_top is not None
    rest = tape.dropped_mass(told, config.tape_top, config.temperature)
    info(
        f"tape: the first {config.tape_top} of {told.shape[-1]:,} classes hold {percent(1 - rest)} of the teacher's "
        f"probability at T = {config.temperature:g}; how the student shares out the other {percent(rest)} is lost"
    )


class Recorder:
    """Rounds what teachers say to what a tape can hold, and records it."""

    def __init__(self, found: Tape, full: Literal["stop", "go-on"]) -> None:
        self.tape, self.full = found, full
        self.waiting: deque[tuple[int, int, transfers.HostCopy]] = deque()

    def __call__(self, batch: Batch, logits: Tensor, *, record: bool = True) -> Tensor:
        """The logits (n, classes) of a batch's views as the tape gives them back."""
        half, picks = self.tape.layout.packed(logits)
        if record and self.tape.recording:
            fetched = transfers.copy_to_host(half) if picks is None else transfers.copy_to_host(half, picks)
            self.waiting.append((batch.step, batch.first_row, fetched))
            self.flush(0 if half.device.type == "cpu" else BEHIND)
        return self.tape.layout.unpacked(half, picks)

    def flush(self, behind: int = 0) -> None:
        """Writes all but the latest answers."""
        while len(self.waiting) > behind:
            step, first, fetched = self.waiting.popleft()
            half, *picks = fetched.wait()
            self.write(step, first, half, picks[0] if picks else None)

    def write(self, step: int, first: int, half: Tensor, picks: Tensor | None) -> None:
        """Records some rows; an `OSError` ends the recording, and the run unless it was told to go on without."""
        if not self.tape.recording:
            return
        try:
            self.tape.write(step, first, half, picks)
        except OSError as error:
            if self.full == "stop":
                raise
            self.tape.recording = False
            why = error.strerror or error
            info(f"WARNING: {why}; the run goes on, and the tape {self.tape.folder} ends at step {step}")


def reuse_recorded(lesson: TrainSetup, recorder: "Recorder | None") -> TrainSetup:
    """The lesson with what its tape holds."""
    return lesson if recorder is None else replace(lesson, told=recorder.tape.read)


def _about(lesson: TrainSetup) -> dict[str, Any]:
    """What a tape keeps beside, to be shown and to be computed again."""
    return {
        "device": lesson.loop.device.type,
        "forms": lesson.provenance["teacher_forms"],
        "run": lesson.config.model_dump(mode="json"),
        "versions": {"torch": torch.__version__},
    }


def _digest(value: Any) -> str | None:
    return hashlib.blake2b(repr(value).encode(), digest_size=12).hexdigest() if any(value) else None
