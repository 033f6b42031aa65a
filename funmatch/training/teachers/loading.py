"""Loads the teachers of a configuration, maps their classes, and freezes each in its fastest inference mode."""

import copy
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from funmatch.config import Distill, Evaluate
from funmatch.data.cache.open_cache import Cache
from funmatch.errors import InputError
from funmatch.models.class_map import RULES, ClassMap, map_classes, read_class_map
from funmatch.models.classifier import Classifier, check_side, fingerprint, function_of
from funmatch.models.ensemble import EnsembleMember, TeacherEnsemble
from funmatch.models.inference.answers import Layout
from funmatch.models.inference.features import is_headless
from funmatch.models.inference.frozen import SMALL_NETWORK, Frozen, freeze
from funmatch.models.inference.modes import AllowedModes, InferenceMode
from funmatch.models.inference.native_layers import native_group_norms
from funmatch.models.load import load
from funmatch.ops.native import norms
from funmatch.runtime import devices
from funmatch.runtime.log import info, info_notes
from funmatch.runtime.measured import Measurement
from funmatch.training.student.build import Modules

COMPARED_IMAGES = 256
"""Images of the first batch, at most, on which an inference mode is compared with plain fp32."""
MODE_SHAPE = {f"{field.name}?": field.type for field in fields(InferenceMode)}
"""Shape of a recorded inference mode; earlier versions did not have all of its fields."""


@dataclass(frozen=True)
class LoadedTeacher:
    """A teacher as it was loaded: fp32, not frozen yet.

    Attributes:
        load_again: loads it anew, with further options of its constructor; freezing changes a network for good.
        classifier: the network.
        digest: of its weights and of the mapped classes.
        function: digest of everything else that decides its outputs: architecture and normalisation.
        class_map: its classes for each class of the data, or None for its own.
        side: image size of its views, pixels; 0 for the student's.
        share: its weight in the ensemble; all weights add up to 1.
    """

    load_again: Callable[..., Classifier]
    classifier: Classifier
    digest: str
    function: str
    class_map: ClassMap | None
    side: int
    share: float

    @property
    def name(self) -> str:
        return self.classifier.card.name

    @property
    def num_classes(self) -> int:
        """Number of classes after the mapping."""
        return self.classifier.num_classes if self.class_map is None else len(self.class_map)


def wanted_classes(config: Distill | Evaluate, cache: Cache) -> tuple[str, ...] | None:
    """Returns the classes that `--classes` maps teachers to, or None where each keeps its own.

    They are the data's; where the data has no labels, those that the map file lists.

    Raises:
        InputError: classes are to be matched by name, but the data has no names.
    """
    if config.classes is None:
        return None
    if cache.classes and not cache.unnamed:
        return cache.classes
    if config.classes in RULES:
        raise InputError(f"{cache.name} has no class names for --classes {config.classes} to match; pass a map.json")
    return tuple(read_class_map(Path(config.classes)))


def load_teachers(config: Distill | Evaluate, cache: Cache, side: int | None, given: Modules) -> list[LoadedTeacher]:
    """Loads the teachers of a configuration.

    Args:
        cache: the data, for its class names.
        side: the student's image size, which is the default of the teachers'; None if it is not resolved yet.
        given: modules from Python, by the names that stand for them.

    Raises:
        InputError: one cannot be loaded, lacks a class, or has another number of classes than the first, or none where
            logits are matched.
    """
    classes = wanted_classes(config, cache)
    matches_logits = not isinstance(config, Distill) or config.matches_logits
    names = config.teacher
    # One size may stand for all teachers, hence the remainder below.
    sides = config.teacher_side or (None,)
    shares = config.teacher_share or (1.0,) * len(names)
    files = config.teacher_weights or ("none",) * len(names)
    teachers = []
    for number, (name, file, share) in enumerate(zip(names, files, shares, strict=True)):
        own_side = sides[number % len(sides)] or side

        # Defaults bind the loop's variables now: the function is called again after the loop.
        def load_one(*more: str, name: str = name, file: str = file, side: int | None = own_side) -> Classifier:
            weights = None if file.lower() == "none" else Path(file)
            if name in given:
                # A copy, since freezing folds and casts the weights that the caller still owns.
                return load(copy.deepcopy(given[name]), side=side)
            options = config.teacher_kwargs + more
            return load(name, weights=weights, options=options, pretrained=True, side=side)

        classifier = load_one()
        # Notes of the first load only; it is loaded again, silently, for each mode that is tried.
        unknown = (
            "its image size is not known from the file, so its views have the student's; set it with --teacher-side N"
        )
        guessed = not (classifier.card.side_known or config.teacher_side)
        info_notes(name, [*classifier.notes, *([unknown] if guessed else [])])
        if matches_logits and is_headless(classifier):
            raise InputError(
                f"teacher {name} has no classes (num_classes=0), so there are no logits to match; pass --match "
                "features, or give it a head (funmatch head)"
            )
        class_map = map_classes(classifier, classes, config.classes) if classes and config.classes else None
        # Before freezing, which folds and casts the weights: the digest is that of the weights as loaded.
        digest = fingerprint(classifier.net)
        # Another map is another teacher: its logits stand for other classes.
        if class_map:
            digest += "-" + hashlib.blake2b(json.dumps(class_map).encode(), digest_size=8).hexdigest()
        function, view_side = function_of(classifier), own_side or 0
        teachers.append(
            LoadedTeacher(load_one, classifier, digest, function, class_map, view_side, share / sum(shares))
        )
    if matches_logits:
        _check_same_classes(teachers, trust_order=config.trust_class_order)
    return teachers


def read_again(teacher: LoadedTeacher, option: str) -> LoadedTeacher:
    """Returns a teacher with a further option of its constructor."""
    again = partial(teacher.load_again, option)
    classifier = again()
    return replace(teacher, load_again=again, classifier=classifier, function=function_of(classifier))


def _check_same_classes(teachers: Sequence[LoadedTeacher], *, trust_order: bool) -> None:
    """Raises `InputError` unless all teachers have the same classes in the same order, as far as these have names."""
    for other in teachers[1:]:
        first = teachers[0]
        if other.num_classes != first.num_classes:
            raise InputError(
                f"teachers disagree on the number of classes: {first.name} has {first.num_classes}, {other.name} has "
                f"{other.num_classes}; pass --classes to map them"
            )
    # Mapped teachers are in the map's order by construction.
    named = [teacher for teacher in teachers if teacher.classifier.card.classes and not teacher.class_map]
    for other in named[1:]:
        # Without this check, combined logits would mix different classes and nobody would notice.
        if other.classifier.card.classes != named[0].classifier.card.classes and not trust_order:
            raise InputError(
                f"the classes of {named[0].name} and {other.name} are not the same in order; pass --classes same-names "
                "or --classes map.json, or --trust-class-order if only the names differ"
            )


PROVENANCE = {"teacher": "digest", "teacher_function": "function"}
"""Facts that a run records of its teachers and compares when it resumes, and their attributes here."""


def provenance(teachers: Sequence[LoadedTeacher]) -> dict[str, str]:
    """Returns the facts that a run records of its teachers."""
    return {fact: "+".join(getattr(teacher, name) for teacher in teachers) for fact, name in PROVENANCE.items()}


def ensemble_fp32(teachers: Sequence[LoadedTeacher], combine: str) -> TeacherEnsemble:
    """Returns the teachers as they were loaded, in plain fp32."""
    return TeacherEnsemble([member(teacher, Frozen(teacher.classifier)) for teacher in teachers], combine)


def member(teacher: LoadedTeacher, frozen: Frozen) -> EnsembleMember:
    """Returns a teacher as a member of an ensemble."""
    return EnsembleMember(frozen, teacher.side, teacher.share, teacher.class_map)


def freeze_fastest(
    teachers: Sequence[LoadedTeacher],
    views: dict[int, Tensor],
    config: Distill,
    recorded: list[dict[str, Any]] | None,
    layout: Layout | None = None,
) -> tuple[TeacherEnsemble, list[dict[str, Any]]]:
    """Freezes each teacher in the fastest inference mode whose outputs on the first batch match plain fp32.

    Args:
        views: of the first batch by side, (n, 3, side, side), on the device.
        recorded: the records that this function returned when the run began, if it resumes. The same modes are used
            again, since other arithmetic would not be bitwise the same.
        layout: of their answers, where these are more than logits.

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
        # A compiled network is specialised to its batch size, so it is compiled for the one that training uses.
        size = config.teacher_batch if config.compiles else config.teacher_batch or COMPARED_IMAGES
        sample = views[teacher.side][:size]
        # Before freezing: after it, a wrong image size would look like a failed inference mode.
        check_side(teacher.classifier, teacher.side)
        # Without a check: the run has used this mode from its first step.
        if recorded:
            record = recorded[number]
            mode = mode_of(record["form"])
            if mode.native and (why := norms.why_unavailable()):
                info(
                    f"WARNING: this run was started with native CPU kernels for teacher {teacher.name}, which are "
                    f"unavailable now ({why}); results will not be bitwise identical"
                )
            frozen = Frozen(teacher.load_again().to(sample.device), mode)
            frozen(sample)  # compiles it for batches of this size, where it is compiled
        else:
            frozen, record = _freeze_one(teacher, sample, config)
        records.append(record)
        members.append(member(teacher, frozen))
    return TeacherEnsemble(members, config.combine, config.teacher_batch, layout), records


def mode_of(form: Mapping[str, Any]) -> InferenceMode:
    """Returns a recorded inference mode, without fields that only later versions have."""
    return InferenceMode(**{name: value for name, value in form.items() if f"{name}?" in MODE_SHAPE})


def _freeze_one(teacher: LoadedTeacher, sample: Tensor, config: Distill) -> tuple[Frozen, dict[str, Any]]:
    precisions = devices.teacher_precisions(config.teacher_precision, sample.device)
    allowed = AllowedModes(precisions, config.compiles, _uses_native_norms(teacher, sample, config))
    measured = _measurement(teacher, sample, allowed)
    frozen, tried = freeze(teacher.load_again, sample, replace(allowed, first=_measured_mode(measured, allowed)))
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
    measured.write(asdict(chosen.mode))
    return frozen, {
        "form": asdict(chosen.mode),
        "beside_fp32": chosen.record | {"pictures": chosen.images},
    }


def _uses_native_norms(teacher: LoadedTeacher, sample: Tensor, config: Distill) -> bool:
    """Returns whether native kernels compute a teacher's GroupNorms: requested, worthwhile and available."""
    # A small network gains too little to be worth another rounding.
    large = teacher.classifier.count_parameters() >= SMALL_NETWORK
    if config.compile != "native" or sample.device.type != "cpu" or not large:
        return False
    if not any(native_group_norms(teacher.classifier.net)):
        return False
    if why := norms.why_unavailable():
        info(f"teacher {teacher.name}: native CPU kernels unavailable ({why}); using slower PyTorch kernels")
    return not why


def _measurement(teacher: LoadedTeacher, sample: Tensor, allowed: AllowedModes) -> Measurement:
    """Returns the place where a teacher's fastest mode is remembered, under everything that decides it."""
    # With what is read of it where that is more than logits: features may need another mode.
    read = () if teacher.classifier.readout is None else (teacher.classifier.readout,)
    machine = devices.machine_signature(sample.device)
    key = repr((teacher.digest, teacher.function, sample.shape, allowed, machine, *read))
    key = key.replace("AllowedModes(", "Wish(")  # the class's earlier name: measurements made under it stay valid
    return Measurement("forms", key, "this teacher")


def _measured_mode(measured: Measurement, allowed: AllowedModes) -> InferenceMode | None:
    """Returns the mode chosen on this machine before, if it is valid: equal runs must compute alike."""
    record = measured.read(MODE_SHAPE)
    if not record:
        return None
    mode = mode_of(record)
    # Another --teacher-precision or --compile may not allow what was the fastest then.
    return mode if mode.is_allowed(allowed) else None
