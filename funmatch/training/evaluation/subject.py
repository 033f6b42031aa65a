"""Opens what is evaluated: models with their preprocessing, the images, and the teachers to compare with."""

from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from funmatch.config import Changes, Evaluate
from funmatch.config.finished.model import WithImages
from funmatch.data.cache.open_cache import Cache
from funmatch.data.cache.stores import CachedSplit
from funmatch.data.readers.split_names import SPLIT_NAMES
from funmatch.errors import InputError, unknown
from funmatch.models.class_map import map_classes
from funmatch.models.classifier import check_side
from funmatch.models.clip.class_texts import OF_DATA, ClassTexts, class_texts_of
from funmatch.models.clip.names import is_clip, is_fetched
from funmatch.models.ensemble import EnsembleMember, TeacherEnsemble
from funmatch.models.inference.features import is_headless
from funmatch.models.inference.frozen import Frozen
from funmatch.models.names import HUB
from funmatch.ops.corruptions import Damage
from funmatch.runtime import devices
from funmatch.runtime.log import info
from funmatch.training import datasets
from funmatch.training.evaluation import class_order, scoring
from funmatch.training.student.trained_model import TrainedModel, info_side, open_described_model
from funmatch.training.teachers import loading, predictions

AnyImages = TypeVar("AnyImages", bound=WithImages)


@dataclass(frozen=True)
class Subject:
    """A network that is evaluated: a model, or the teachers.

    Attributes:
        name: as the user gave it.
        network: gives logits of the data's classes; or an ensemble, whose members see images at their own sizes.
        view: the preprocessing.
        parameters: number of parameters.
        trained: the model that was opened; None for teachers.
        mapped: whether its classes are mapped to the data's.
    """

    name: str
    network: nn.Module
    view: scoring.EvalView
    parameters: int
    trained: TrainedModel | None = None
    mapped: bool = False

    @property
    def label(self) -> str:
        """Its name in messages."""
        return self.name if self.trained else f"teacher {self.name}"

    def predict(self, split: CachedSplit, damage: Damage | None = None) -> Tensor:
        """Predicts the logits of a split, (n, classes) float32 on the CPU.

        Raises:
            InputError: they are not finite.
        """
        view = replace(self.view, damage=damage)
        if isinstance(self.network, TeacherEnsemble):
            logits, _ = predictions.predict(self.network, split, view)
        else:
            logits = scoring.predict(self.network, split, view)
        check_finite(self.label, logits, split)
        return logits


def check_finite(name: str, logits: Tensor, split: CachedSplit) -> None:
    """Raises `InputError` unless all logits give probabilities: −∞ stands for 0, but a row needs a finite number."""
    # NaN fails both comparisons: it would count as a class of its own, and no metric would show it.
    valid = (logits < torch.inf).all(-1) & (logits.amax(-1) > -torch.inf)
    if bad := int((~valid).sum()):
        raise InputError(
            f"{name} has outputs that are not finite for {bad:,} of {len(split):,} images of {split.name}; its weights "
            "are damaged, or the run has diverged"
        )


@dataclass(frozen=True)
class Opened:
    """Everything that an evaluation needs.

    Attributes:
        subjects: the model, and those that it is compared with.
        teachers: its teachers, or None.
        cache: the images.
        split: those to evaluate on.
        data: the names of their sources.
        val: what the images' validation split was held out by; None where the data has one of its own, or none.
    """

    subjects: list[Subject]
    teachers: Subject | None
    cache: Cache
    split: CachedSplit
    data: tuple[str, ...]
    val: str | None


def open_all(config: Evaluate, given: loading.Modules) -> Opened:
    """Opens models, images and teachers, and checks that their classes fit.

    Raises:
        InputError: one cannot be opened, or their classes differ.
    """
    # Before loading, so that a wrong --device does not cost a download.
    device = devices.pick_device(config.device)
    names = (config.model, *config.others)
    # Those that are to tell the data's classes apart come after the data, which alone has their names.
    later = {name for name in names if is_clip(name) and config.classes_from == OF_DATA}
    opened = {name: _open_model(config, name, given) for name in names if name not in later}
    first = opened.get(config.model)
    config = with_own_task(config, first)
    knobs, run = (dict(first.knobs), first.run) if first else ({}, None)
    cache, training, evaluation = datasets.open_evaluation_data(
        config, config.model, run.config["verb"] if run else "", knobs
    )
    texts = class_texts_of(config, later, None if cache.unnamed else cache.classes)
    opened |= {name: _open_model(config, name, given, texts) for name in names if name in later}
    models = [opened[name] for name in names]
    subjects = [_subject(config, each, cache, device) for each in models]
    teachers = open_teachers(config, knobs, cache, subjects[0].view, given)
    split = pick_split(cache, config.split, with_teacher=teachers is not None)
    if config.split == "auto" and (note := scoring.describe_unlabelled_test(cache, split)):
        info(note)
    return Opened(
        subjects,
        teachers,
        cache,
        split,
        training if split.name == "train" else evaluation,
        config.val or (None if config.data else knobs.get("val")),
    )


def with_own_task(config: AnyImages, model: TrainedModel | None) -> AnyImages:
    """Returns the options with the task that a model was trained for, unless they name one.

    Args:
        model: None where its classes are made of names, each image having one.
    """
    task = config.task or (model and (model.knobs.get("task") or model.classifier.card.task)) or "multiclass"
    return config.model_copy(update={"task": task})


def _open_model(config: Evaluate, name: str, given: loading.Modules, texts: ClassTexts | None = None) -> TrainedModel:
    # The options that describe one model describe the first; --side is for all.
    own = config if name == config.model else config.model_copy(update={"weights": None, "model_kwargs": ()})
    trained = open_described_model(own, name, given, texts)
    if not (config.side or trained.knobs.get("side")):
        words = ["--weights", str(own.weights)] if own.weights else []
        info_side(trained.classifier, [name, *words, *(["--data", *config.data] if config.data else [])])
    return trained


def _subject(config: Evaluate, trained: TrainedModel, cache: Cache, device: torch.device) -> Subject:
    """Returns a model as it is predicted, with its classes mapped to the data's where that is requested."""
    model = class_order.with_task(trained.classifier.to(device), cache.task, "model")
    parameters, classes = model.count_parameters(), loading.wanted_classes(config, cache)
    class_map = map_classes(model, classes, config.classes) if classes and config.classes else None
    # A headless model has embeddings, and no classes that could differ.
    if class_map is None and not is_headless(trained.classifier):
        class_order.check_classes(model, cache, trust_order=config.trust_class_order)
    precision = devices.resolve_precision(config.precision, device)
    view = scoring.eval_view_of(trained.preprocessing, config.batch, device, precision)
    view = replace(view, flip=config.tta == "flip")
    # Mapped classes are evaluated alone, as a teacher's would be.
    member = EnsembleMember(Frozen(model), view.side, class_map=class_map) if class_map else None
    network = predictions.MemberAnswers(member) if member else model
    return Subject(trained.name, network, view, parameters, trained, class_map is not None)


def pick_split(cache: Cache, name: str, *, with_teacher: bool) -> CachedSplit:
    """Returns the named split; `auto` is test, else validation, else training.

    Args:
        name: of the split, or `auto`.
        with_teacher: whether a teacher's answers are compared with; without one, `auto` needs labels.

    Raises:
        InputError: there is none of this name.
    """
    # Test first: the best weights may have been chosen on the validation images.
    if name == "auto":
        splits = [cache.splits[name] for name in ("test", "val", "train") if name in cache.splits]
        # Not the training images, which would look better than they are.
        measured = [split for split in splits if with_teacher or (split.labelled and split.name != "train")]
        return (measured or splits)[0]
    name = SPLIT_NAMES.get(name, name)
    if name not in cache.splits:
        raise unknown("split", name, cache.splits)
    return cache.splits[name]


def open_teachers(
    config: Evaluate, knobs: dict[str, Any], cache: Cache, view: scoring.EvalView, given: loading.Modules
) -> Subject | None:
    """Opens the teachers to compare with: as given, else the run's; None where there are none, or no longer.

    Args:
        knobs: of the run; empty where there is none.
        view: the preprocessing of the model that is compared with them.
    """
    teachers = _load_teachers(config, knobs, cache, view.side, given)
    if teachers is None:
        return None
    # Before predicting: a wrong image size is then an error by name, not one from inside a layer.
    for member in teachers.members:
        check_side(member.frozen.classifier, member.side)
    return Subject(teachers.name, teachers.to(view.device), view, teachers.count_parameters())


def _load_teachers(
    config: Evaluate, knobs: dict[str, Any], cache: Cache, side: int, given: loading.Modules
) -> TeacherEnsemble | None:
    """Returns the teachers to compare with: as given, else the run's; None where there are none, or no longer."""
    if config.teacher:
        return loading.ensemble_fp32(loading.load_teachers(config, cache, side, given), config.combine)
    if not knobs.get("teacher"):
        return None
    # Those options of the run that say which function its teachers are.
    of_teachers = Evaluate.where(lambda opt: opt.changes == Changes.TEACHER)
    of_run = Evaluate(model=config.model, **{name: knobs[name] for name in of_teachers if name in knobs})
    # A stranger's run may name any model there, and whoever evaluates it has not typed that name.
    if hub := [name for name in of_run.teacher or () if name.startswith(HUB) or is_fetched(name)]:
        info(
            f"the record of {config.model} names {', '.join(hub)} as its teacher, which is fetched from the Hugging "
            "Face Hub unless it is on this machine; set HF_HUB_OFFLINE=1 to fetch nothing"
        )
    try:
        return loading.ensemble_fp32(loading.load_teachers(of_run, cache, side, given), of_run.combine)
    except InputError as error:
        # A teacher may have been moved since; accuracy needs none.
        info(f"evaluating without the run's teacher: {error}")
        return None


def check_same_classes(first: Subject, other: Subject, counts: tuple[int, int]) -> None:
    """Raises `InputError` unless two networks have as many outputs, and the same class names as far as they have any.

    Args:
        counts: their numbers of outputs.
    """
    if counts[0] != counts[1]:
        raise InputError(
            f"{other.label} has {counts[1]} outputs, but {first.label} has {counts[0]}; pass --classes to map them"
        )
    names = [each.trained.classifier.card.classes for each in (first, other) if each.trained and not each.mapped]
    if len(names) == 2 and names[0] and names[1] and names[0] != names[1]:
        raise InputError(
            f"{first.name} and {other.name} have different classes, so their predictions cannot be compared; pass "
            "images whose classes are those of both, or --classes to map them"
        )
