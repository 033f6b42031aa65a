"""Loads the teachers of a configuration, and maps their classes."""

import copy
import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from funmatch.config import Distill, Evaluate
from funmatch.data.cache.open_cache import Cache
from funmatch.errors import InputError
from funmatch.models.class_map import RULES, ClassMap, map_classes, read_class_map
from funmatch.models.classifier import Classifier, fingerprint, function_of
from funmatch.models.clip.class_texts import class_texts_of
from funmatch.models.ensemble import EnsembleMember, TeacherEnsemble
from funmatch.models.inference.features import is_headless
from funmatch.models.inference.frozen import Frozen
from funmatch.models.load import load
from funmatch.runtime.log import info_notes
from funmatch.training.evaluation.class_order import with_task
from funmatch.training.student.build import Modules


@dataclass(frozen=True)
class LoadedTeacher:
    """A teacher as it was loaded: fp32, not frozen yet.

    Attributes:
        load_again: gives it anew, or with further options of its constructor; freezing changes a network for good.
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
        InputError: one cannot be loaded, is for another task, lacks a class, or has another number of classes than the
            first, or none where logits are matched.
    """
    classes = wanted_classes(config, cache)
    names = config.teacher
    # One size may stand for all teachers, hence the remainder below.
    sides = config.teacher_side or (None,)
    shares = config.teacher_share or (1.0,) * len(names)
    files = config.teacher_weights or ("none",) * len(names)
    texts = class_texts_of(config, names, None if cache.unnamed else cache.classes)
    teachers = []
    for number, (name, file, share) in enumerate(zip(names, files, shares, strict=True)):
        own_side = sides[number % len(sides)] or side

        # Defaults bind the loop's variables now: the function is called again after the loop.
        def load_one(*more: str, name: str = name, file: str = file, side: int | None = own_side) -> Classifier:
            weights = None if file.lower() == "none" else Path(file)
            if name in given:
                # A copy, since freezing folds and casts the weights that the caller still owns.
                return with_task(load(copy.deepcopy(given[name]), side=side), cache.task, "teacher")
            options = config.teacher_kwargs + more
            loaded = load(name, weights=weights, options=options, pretrained=True, side=side, texts=texts)
            return with_task(loaded, cache.task, "teacher")

        classifier = load_one()
        # Notes of the first load only; it is loaded again, silently, for each mode that is tried.
        _show_notes(name, classifier, config)
        _check_head(name, classifier, config)
        class_map = map_classes(classifier, classes, config.classes) if classes and config.classes else None
        # Before freezing, which folds and casts the weights: the digest is that of the weights as loaded.
        digest = classifier.content or fingerprint(classifier.net)
        # Another map is another teacher: its logits stand for other classes.
        if class_map:
            digest += "-" + hashlib.blake2b(json.dumps(class_map).encode(), digest_size=8).hexdigest()
        again, function, weight = _again(classifier, load_one), function_of(classifier), share / sum(shares)
        teachers.append(LoadedTeacher(again, classifier, digest, function, class_map, own_side or 0, weight))
    if _matches_logits(config):
        _check_same_classes(teachers, trust_order=config.trust_class_order)
    return teachers


def _again(classifier: Classifier, load_one: Callable[..., Classifier]) -> Callable[..., Classifier]:
    """Returns what gives a teacher anew: a copy, or, with further options of its constructor, the file read again.

    Each mode that is tried takes a network, and reading, checking and filling one takes ten times as long as a copy.
    """

    def again(*more: str) -> Classifier:
        if not more:
            with suppress(Exception):  # a module of the user's may hold what cannot be copied
                return copy.deepcopy(classifier)
        return load_one(*more)

    return again


def _show_notes(name: str, classifier: Classifier, config: Distill | Evaluate) -> None:
    """Prints what a user should know of a teacher."""
    unknown = "its image size is not known from the file, so its views have the student's; set it with --teacher-side N"
    guessed = not (classifier.card.side_known or config.teacher_side)
    info_notes(name, [*classifier.notes, *([unknown] if guessed else [])])


def _matches_logits(config: Distill | Evaluate) -> bool:
    return not isinstance(config, Distill) or config.matches_logits


def _check_head(name: str, classifier: Classifier, config: Distill | Evaluate) -> None:
    """Raises `InputError` for a teacher without classes, where its logits are needed."""
    if _matches_logits(config) and is_headless(classifier):
        raise InputError(
            f"teacher {name} has no classes (num_classes=0), so it has no logits; to distil it pass --match features, "
            "or give it a head (funmatch head)"
        )


def read_again(teacher: LoadedTeacher, option: str) -> LoadedTeacher:
    """Returns a teacher with a further option of its constructor."""
    classifier = teacher.load_again(option)
    again = _again(classifier, partial(teacher.load_again, option))
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
