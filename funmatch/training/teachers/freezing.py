"""Freezes each teacher in its fastest inference mode, measured once on a machine, or in the one that was recorded."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from itertools import pairwise
from typing import Any

from torch import Tensor

from funmatch.config import Distill
from funmatch.config.choices import STRATEGIES
from funmatch.errors import InputError
from funmatch.models.classifier import check_side, libraries_of
from funmatch.models.ensemble import TeacherEnsemble
from funmatch.models.inference.answers import Layout
from funmatch.models.inference.fp32_layers import UnknownLayers
from funmatch.models.inference.frozen import SMALL_NETWORK, Frozen, freeze
from funmatch.models.inference.modes import AllowedModes, InferenceMode
from funmatch.models.inference.native import packed as packed_layers
from funmatch.models.inference.native.layers import native_group_norms
from funmatch.models.inference.parity import NUMBERS_SHAPE, ParityCheck
from funmatch.models.inference.reference import FurtherViews
from funmatch.models.inference.sensitive import modes_with_fp32_layers
from funmatch.ops.native import library, norms
from funmatch.runtime import devices
from funmatch.runtime.chunks import even_chunks
from funmatch.runtime.log import info
from funmatch.runtime.measured import Measurement
from funmatch.training.teachers.loading import LoadedTeacher, member

NATIVE = "native"
COMPARED_IMAGES = 256
"""Images, at most, on which an inference mode is compared with plain fp32 at once."""
MODE_SHAPE = {f"{field.name}?": field.type for field in fields(InferenceMode)} | {"fp32_layers?": list[str]}
"""Shape of a recorded inference mode; earlier versions did not have all of its fields."""


def freeze_fastest(
    teachers: Sequence[LoadedTeacher],
    views: dict[int, Tensor],
    config: Distill,
    recorded: list[dict[str, Any]] | None,
    layout: Layout | None = None,
    further: Callable[[int, int], FurtherViews | None] = lambda side, size: None,  # noqa: ARG005
) -> tuple[TeacherEnsemble, list[dict[str, Any]]]:
    """Freezes each teacher in the fastest inference mode whose outputs on a run's first views match plain fp32.

    Args:
        views: of the first batch by side, (n, 3, side, side), on the device.
        recorded: the records that this function returned when the run began, if it resumes. The same modes are used
            again, since other arithmetic would not be bitwise the same.
        layout: of their answers, where these are more than logits.
        further: the views that follow those of the first batch, by side, as many at a time; see `freeze`.

    Returns:
        the teachers, and a record of each: its mode, and how far its outputs are from plain fp32.
    """
    if recorded and len(recorded) != len(teachers):
        raise InputError(
            f"the record of this run has the inference modes of {len(recorded)} teachers, not of {len(teachers)}, so "
            "it is damaged; choose another --out"
        )
    records, members = [], []
    for number, teacher in enumerate(teachers):
        record = recorded[number] if recorded else None
        batches = batches_of(config, len(views[teacher.side]), record)
        sample = views[teacher.side][: batches[0]]
        # Before freezing: after it, a wrong image size would look like a failed inference mode.
        check_side(teacher.classifier, teacher.side)
        if record:
            frozen = _freeze_as_recorded(teacher, sample, record)
        else:
            frozen, record = _freeze_one(teacher, sample, config, further(teacher.side, len(sample)))
            record |= {"batches": batches} if frozen.mode.compiled else {}
        frozen.compile_for(sample, batches)
        records.append(record)
        members.append(member(teacher, frozen))
    return TeacherEnsemble(members, config.combine, config.teacher_batch, layout), records


def batches_of(config: Distill, count: int, record: Mapping[str, Any] | None = None) -> list[int]:
    """Returns the sizes of the batches that a teacher is shown in training, the largest first.

    A compiled network is specialised to its batch size, so it is compiled for these.

    Args:
        count: images of this process in a step.
        record: of the teacher, if the run resumes: it was compiled for the sizes that it names.
    """
    if record and "batches" in record:
        return record["batches"]
    if not config.compiles:
        return [min(count, config.teacher_batch or COMPARED_IMAGES)]
    # Runs of earlier versions compiled it for one size, which pieces of a batch did not have, and are to stay the same.
    if record:
        return [min(count, config.teacher_batch or count)]
    # Pieces of a batch are the student's; ahead of it and once for all, the teacher sees it whole.
    whole = config.teacher_ahead or STRATEGIES[config.strategy].fixed
    pieces = even_chunks(count, None if whole else config.micro_batch)
    chunks = [even_chunks(stop - start, config.teacher_batch) for start, stop in pairwise(pieces)]
    return sorted({stop - start for bounds in chunks for start, stop in pairwise(bounds)}, reverse=True)


def _freeze_as_recorded(teacher: LoadedTeacher, sample: Tensor, record: Mapping[str, Any]) -> Frozen:
    # Without a check: the run has used this mode from its first step.
    mode = mode_of(record["form"])
    if mode.native and (why := norms.why_unavailable()):
        info(
            f"WARNING: this run was started with native CPU kernels for teacher {teacher.name}, which are "
            f"unavailable now ({why}); results will not be bitwise identical"
        )
    try:
        return Frozen(teacher.load_again().to(sample.device), mode)
    except UnknownLayers as error:
        raise InputError(
            f"the record of this run keeps layers of teacher {teacher.name} in fp32, but {error}, so the record is "
            "damaged; choose another --out"
        ) from None


def mode_of(form: Mapping[str, Any]) -> InferenceMode:
    """Returns a recorded inference mode, without fields that only later versions have."""
    known = {name: value for name, value in form.items() if f"{name}?" in MODE_SHAPE}
    return InferenceMode(**known | {"fp32_layers": tuple(form.get("fp32_layers", ()))})


def _freeze_one(
    teacher: LoadedTeacher, sample: Tensor, config: Distill, further: FurtherViews | None
) -> tuple[Frozen, dict[str, Any]]:
    precisions = devices.teacher_precisions(config.teacher_precision, sample.device)
    packed = config.compile == NATIVE and sample.device.type == "cpu" and packed_layers.is_available()
    native = _uses_native_norms(teacher, sample, config)
    allowed = AllowedModes(precisions, config.compiles, native, packed, sums=packed)
    measured = _measurement(teacher, sample, allowed, "first batch" if further is None else "several batches")
    allowed = replace(allowed, first=_measured_mode(measured, allowed))
    # A search for the layers that carry the error takes seconds, which a short run does not regain.
    variants = modes_with_fp32_layers if further and config.teacher_precision == "auto" else None
    key = _judged_by(teacher, measured, sample, further)
    frozen, tried = _freeze_as_judged(teacher, sample, allowed.first, key) or freeze(
        teacher.load_again, sample, allowed, further, variants
    )
    # Every rejected mode is reported, so that a slow teacher can be explained.
    for check in tried[:-1]:
        info(f"teacher {teacher.name}: rejected {check}")
    chosen = tried[-1]
    # Only a precision that was requested is used in spite of a failed check.
    if not chosen.good:
        info(
            f"WARNING: teacher {teacher.name}: using the requested precision although its outputs differ from fp32: "
            f"{chosen}"
        )
    else:
        info(f"teacher {teacher.name}: using {chosen}")
    # Even if it was measured before: a mode that failed this time is replaced.
    measured.write(chosen.mode.record)
    if key and chosen.good:
        _judgement(key, chosen.mode).write(chosen.numbers)
    return frozen, {
        "form": chosen.mode.record,
        "beside_fp32": chosen.record | {"pictures": chosen.images},
    }


def _freeze_as_judged(
    teacher: LoadedTeacher, sample: Tensor, mode: InferenceMode | None, key: str
) -> tuple[Frozen, list[ParityCheck]] | None:
    """Freezes a teacher in a mode that an earlier run judged on the very same views; None if there was none.

    Args:
        key: of teacher, machine and views, as `_judged_by` returns it.
    """
    numbers = _judgement(key, mode).read(NUMBERS_SHAPE) if key and mode else None
    if not mode or not numbers or not (check := ParityCheck(mode, **numbers)).good:
        return None
    return Frozen(teacher.load_again().to(sample.device), mode), [check]


def _judgement(key: str, mode: InferenceMode) -> Measurement:
    """Returns the place where it is remembered how far a mode is from plain fp32 on a run's views."""
    kernels = library.identity() if mode.native else ""
    return Measurement("judgements", repr((key, mode.record, kernels)), "how far this teacher is from fp32")


def _judged_by(teacher: LoadedTeacher, measured: Measurement, sample: Tensor, further: FurtherViews | None) -> str:
    """Returns everything that decides how modes of a teacher are judged, as text; empty where that is not known.

    Args:
        measured: the place of the teacher's fastest mode, whose key says all of teacher and machine.
        sample, further: the views.
    """
    libraries = libraries_of(teacher.classifier)
    if further is None or not further.key or libraries is None:
        return ""
    # The first views themselves too: functions of the user's, which may have changed, are known by name alone.
    views = hashlib.blake2b(sample.cpu().numpy().tobytes()).hexdigest()
    return repr((measured.key, further.key, views, libraries))


def _uses_native_norms(teacher: LoadedTeacher, sample: Tensor, config: Distill) -> bool:
    """Returns whether native kernels compute a teacher's GroupNorms: requested, worthwhile and available."""
    # A small network gains too little to be worth another rounding.
    large = teacher.classifier.count_parameters() >= SMALL_NETWORK
    if config.compile != NATIVE or sample.device.type != "cpu" or not large:
        return False
    if not any(native_group_norms(teacher.classifier.net)):
        return False
    if why := norms.why_unavailable():
        info(f"teacher {teacher.name}: native CPU kernels unavailable ({why}); using slower PyTorch kernels")
    return not why


def _measurement(teacher: LoadedTeacher, sample: Tensor, allowed: AllowedModes, rule: str) -> Measurement:
    """Returns the place where a teacher's fastest mode is remembered, under everything that decides it.

    Args:
        rule: on what modes are judged; a few views may have refused what more of them accept.
    """
    # With what is read of it where that is more than logits: features may need another mode.
    read = () if teacher.classifier.readout is None else (teacher.classifier.readout,)
    machine = devices.machine_signature(sample.device)
    key = repr((teacher.digest, teacher.function, sample.shape, allowed, machine, rule, *read))
    return Measurement("forms", key, "this teacher")


def _measured_mode(measured: Measurement, allowed: AllowedModes) -> InferenceMode | None:
    """Returns the mode chosen on this machine before, if it is valid: equal runs must compute alike."""
    record = measured.read(MODE_SHAPE)
    if not record:
        return None
    mode = mode_of(record)
    # Another --teacher-precision or --compile may not allow what was the fastest then.
    return mode if mode.is_allowed(allowed) else None
