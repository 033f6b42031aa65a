"""The teachers that a configuration names: loaded, held against the data's classes, frozen, and judged."""

import copy
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from funmatch.config import Distill, Evaluate
from funmatch.data.cache.open_cache import Cache
from funmatch.data.cache.stores import CachedSplit
from funmatch.errors import InputError
from funmatch.models.class_map import SAME_NAMES, ClassMap, map_classes, read_class_map
from funmatch.models.classifier import Classifier, check_side, fingerprint, function_of
from funmatch.models.ensemble import EnsembleMember, TeacherEnsemble
from funmatch.models.inference.frozen import SMALL_NETWORK, AllowedModes, Frozen, InferenceMode, freeze
from funmatch.models.inference.native_layers import native_group_norms
from funmatch.models.load import load
from funmatch.ops.native import norms
from funmatch.runtime import devices
from funmatch.runtime.log import info, info_notes
from funmatch.runtime.measured import Measurement
from funmatch.runtime.text import percent
from funmatch.training import scoring
from funmatch.training.student.build import Modules

CHECKED = 256  # images of the first batch, at most, on which a form is held against the plain teacher
FORM_SHAPE = {f"{field.name}?": field.type for field in fields(InferenceMode)}
"""A form that was written down, perhaps before it had all of its fields."""
BELOW_CARD_WARNING = 0.1  # of accuracy, from which a teacher is loudly doubted


@dataclass(frozen=True)
class LoadedTeacher:
    """A teacher that was loaded, in training's plain form.

    Attributes:
        make: gives it again.
        classifier: itself.
        digest: of its weights and of the classes that are asked of it.
        function: digest of what else it computes.
        picks: which of its classes are asked, None for all.
        side: of its views, pixels; 0 where it is to be the student's.
        share: its weight among all.
    """

    load_again: Callable[[], Classifier]
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
        """Classes that are asked of it."""
        return self.classifier.num_classes if self.class_map is None else len(self.class_map)


def wanted_classes(config: Distill | Evaluate, cache: Cache) -> tuple[str, ...] | None:
    """The classes that are asked of teachers with others, or None where each is asked its own.

    They are those of the images; of images without labels, those that the map speaks of.
    """
    if config.classes is None:
        return None
    if cache.classes and not cache.unnamed:
        return cache.classes
    if config.classes == SAME_NAMES:
        raise InputError(f"{cache.name} has no names of classes, so {SAME_NAMES} finds none; give a map.json")
    return tuple(read_class_map(Path(config.classes)))


def load_teachers(config: Distill | Evaluate, cache: Cache, side: int | None, given: Modules) -> list[LoadedTeacher]:
    """Loads the teachers that a configuration names.

    Args:
        side: of the student's views, if it is known: that of the teachers where nobody said another.

    Raises:
        InputError: one cannot be loaded, does not know a class, or answers another number than the first.
    """
    wanted = wanted_classes(config, cache)
    names = config.teacher
    sides = config.teacher_side or (None,)
    shares = config.teacher_share or (1.0,) * len(names)
    files = config.teacher_weights or ("none",) * len(names)
    found = []
    for number, (name, file, share) in enumerate(zip(names, files, shares, strict=True)):
        own = sides[number % len(sides)]

        def make(name: str = name, file: str = file, own: int | None = own or side) -> Classifier:
            weights = None if file.lower() == "none" else Path(file)
            if name in given:
                return load(copy.deepcopy(given[name]), side=own)
            return load(name, weights=weights, options=config.teacher_kwargs, pretrained=True, side=own)

        classifier = make()
        info_notes(name, classifier.notes)
        picks = map_classes(classifier, wanted, config.classes) if wanted and config.classes else None
        digest = fingerprint(classifier.net)
        if picks:
            digest += "-" + hashlib.blake2b(json.dumps(picks).encode(), digest_size=8).hexdigest()
        seen = own or side or 0
        found.append(LoadedTeacher(make, classifier, digest, function_of(classifier), picks, seen, share / sum(shares)))
    _agree(found, trust_order=config.trust_class_order)
    return found


def _agree(called: Sequence[LoadedTeacher], *, trust_order: bool) -> None:
    """Raises `InputError` unless all teachers are asked the same classes, as far as they know their names."""
    named = [one for one in called if one.classifier.card.classes and not one.class_map]
    for other in called[1:]:
        if other.num_classes != called[0].num_classes:
            raise InputError(
                f"the teachers' classes clash: {called[0].name} answers {called[0].num_classes}, {other.name} "
                f"{other.num_classes}; say by --classes which of their classes are asked"
            )
    for other in named[1:]:
        if other.classifier.card.classes != named[0].classifier.card.classes and not trust_order:
            raise InputError(
                f"the classes of {named[0].name} and {other.name} are not the same in order; say --classes same-names "
                "or --classes map.json, or --trust-class-order if only the names differ"
            )


PROVENANCE = {"teacher": "digest", "teacher_function": "function"}
"""What a run records of its teachers, and compares when it is resumed: fact to attribute."""


def provenance(loaded: Sequence[LoadedTeacher]) -> dict[str, str]:
    """What a run records of its teachers."""
    return {name: "+".join(getattr(one, part) for one in loaded) for name, part in PROVENANCE.items()}


def ensemble_fp32(called: Sequence[LoadedTeacher], combine: str) -> TeacherEnsemble:
    """The teachers in fp32, as they were loaded."""
    return TeacherEnsemble(
        [EnsembleMember(Frozen(one.classifier), one.side, one.share, one.class_map) for one in called], combine
    )


def freeze_fastest(
    called: Sequence[LoadedTeacher], views: dict[int, Tensor], config: Distill, remembered: list[dict[str, Any]] | None
) -> tuple[TeacherEnsemble, list[dict[str, Any]]]:
    """The teachers, each frozen in the fastest form that answers the first batch as the plain one does.

    Args:
        views: of the first batch by side, (n, 3, side, side), on the device.
        remembered: what this function returned when the run began, if it is resumed: the same forms are taken, since
            other arithmetic would give other bits.

    Returns:
        the teachers, and for each a record: its form, and how that answers beside the plain one.
    """
    records, members = [], []
    for number, one in enumerate(called):
        shown = views[one.side][: config.teacher_batch if config.compiles else config.teacher_batch or CHECKED]
        check_side(one.classifier, one.side)
        if remembered:
            record = remembered[number]
            form = InferenceMode(**record["form"])
            if form.native and (why := norms.why_unavailable()):
                told = f"teacher {one.name} was computed by our own kernels, which cannot be had now ({why})"
                info(f"WARNING: {told}; the run will not end with the same bits")
            frozen = Frozen(one.load_again().to(shown.device), form)
            frozen(shown)  # compiles it for batches of this size, where it is compiled
        else:
            frozen, record = _frozen(one, shown, config)
        records.append(record)
        members.append(EnsembleMember(frozen, one.side, one.share, one.class_map))
    return TeacherEnsemble(members, config.combine, config.teacher_batch), records


def _frozen(one: LoadedTeacher, shown: Tensor, config: Distill) -> tuple[Frozen, dict[str, Any]]:
    precisions = devices.teacher_precisions(config.teacher_precision, shown.device)
    wish = AllowedModes(precisions, config.compiles, _by_our_kernels(one, shown, config))
    measured = _measurement(one, shown, wish)
    frozen, tried = freeze(one.load_again, shown, replace(wish, first=_known_form(measured, wish)))
    for check in tried[:-1]:
        info(f"teacher {one.name} is not computed as {check}")
    taken = tried[-1]
    if not taken.good:
        info(f"WARNING: teacher {one.name} is computed as told, though it is not the same: {taken}")
    else:
        info(f"teacher {one.name} is computed as {taken}")
    measured.write(asdict(taken.form))
    return frozen, {
        "form": asdict(taken.form),
        "beside_fp32": {"kl": taken.kl, "agreement": taken.agreement, "pictures": taken.images},
    }


def _by_our_kernels(one: LoadedTeacher, shown: Tensor, config: Distill) -> bool:
    """Whether our own kernels are to compute a teacher's GroupNorms, and can."""
    wanted = (
        config.compile == "native" and shown.device.type == "cpu" and one.classifier.count_parameters() >= SMALL_NETWORK
    )
    if not wanted or not any(native_group_norms(one.classifier.net)):
        return False
    if why := norms.why_unavailable():
        info(f"teacher {one.name} is not computed by our own kernels: {why}")
    return not why


def _measurement(one: LoadedTeacher, shown: Tensor, wish: AllowedModes) -> Measurement:
    """Which form of a teacher is the fastest, under all that decides it."""
    key = repr((one.digest, one.function, shown.shape, wish, devices.machine_signature(shown.device)))
    key = key.replace("AllowedModes(", "Wish(")  # its first name, so that what was measured under it stays known
    return Measurement("forms", key, "this teacher")


def _known_form(measured: Measurement, wish: AllowedModes) -> InferenceMode | None:
    """The form that was taken on this machine before: so that two runs alike are computed alike."""
    known = measured.read(FORM_SHAPE)
    form = (
        InferenceMode(**{name: value for name, value in known.items() if f"{name}?" in FORM_SHAPE}) if known else None
    )
    return form if form and form.is_allowed(wish) else None


def predict(teachers: TeacherEnsemble, split: CachedSplit, view: scoring.EvalView) -> tuple[Tensor, list[Tensor]]:
    """What all teachers say together of a split's images, and what each says: (n, classes) float32 on the CPU."""
    each = [scoring.predict(Picked(member), split, seen_by(member, view)) for member in teachers.members]
    return teachers.combine_logits(each), each


def seen_by(member: EnsembleMember, view: scoring.EvalView) -> scoring.EvalView:
    """How a teacher sees images that are judged on: as the student does, at its own side."""
    if member.side == view.side:
        return view
    return replace(
        view, side=member.side, short_side=scoring.default_eval_resize(member.side, member.frozen.classifier.card)
    )


class Picked(nn.Module):
    """A classifier that answers what is asked."""

    def __init__(self, member: EnsembleMember) -> None:
        super().__init__()
        self.member, self.frozen = member, member.frozen

    def forward(self, views: Tensor) -> Tensor:
        return self.member.logits(views)


def check_teachers(
    teachers: TeacherEnsemble, together: Tensor, each: list[Tensor], split: CachedSplit, config: Distill
) -> None:
    """Says how good the teachers are, and refuses those that are near chance: nearly always a wrong head.

    Args:
        together, each: logits of the split, as `answers` gives them.

    Raises:
        InputError: answers are not finite, or near chance unless `allow_weak_teacher`.
    """
    several = len(each) > 1
    for member, logits in [*zip(teachers.members, each, strict=True), *([(None, together)] if several else [])]:
        name = member.name if member else "all teachers together"
        if not logits.isfinite().all():
            raise InputError(f"teacher {name} answers with values that are not finite; its weights are damaged")
        figures = scoring.score(logits, split)
        if figures["balanced"] is None or figures["top1"] is None:
            continue
        info(f"teacher {name}: top-1 {percent(figures['top1'])} on {len(split)} images of {split.name}")
        promised = member.frozen.classifier.card.top1 if member else None
        if promised is not None and figures["top1"] < promised - BELOW_CARD_WARNING:
            info(
                f"WARNING: teacher {name} is right on {percent(figures['top1'])} here, but its own card says "
                f"{percent(promised)}: are these its images, its classes in order, its side (--teacher-side)?"
            )
        check_above_chance(name, figures["balanced"], logits, split, config)


def check_above_chance(name: str, right: float, logits: Tensor, split: CachedSplit, config: Distill) -> None:
    present = len(split.labels(slice(None)).unique())
    needed = chance_threshold(present if present > 1 else logits.shape[-1], len(split))
    if right < needed and not config.allow_weak_teacher:
        raise InputError(
            f"teacher {name} is near chance: {percent(right)} a class on {split.name}, wanted at least "
            f"{percent(needed)}. "
            "Nearly always its head is not for these classes, or its normalisation or its side is another "
            "(--teacher-side). To go on all the same: --allow-weak-teacher"
        )


def chance_threshold(classes: int, images: int) -> float:
    """The mean accuracy a class below which a classifier is taken to guess.

    Two standard deviations of a guess, or a tenth of the way to being right (a chance's worth of it, where that is
    less), whichever is more; but never beyond the middle between guessing and being right.
    """
    chance = 1 / classes
    deviation = math.sqrt(chance * (1 - chance) / images)
    return min(chance + max(2 * deviation, min(chance, 0.1) * (1 - chance)), (1 + chance) / 2)
