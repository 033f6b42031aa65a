"""Opens a model to evaluate or use it: a run's student, finished or not, or any model that can be named."""

import copy
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from funmatch.config import Images, Train
from funmatch.config.choices import RESAMPLED_BEFORE, EvalResample
from funmatch.config.finished.model import FinishedModel
from funmatch.errors import InputError
from funmatch.models import timm_models
from funmatch.models.class_map import class_names
from funmatch.models.classifier import TRAINING_ONLY, Classifier, check_side
from funmatch.models.clip.class_texts import ClassTexts, class_texts_of
from funmatch.models.load import load
from funmatch.ops.view_spec import Preprocessing
from funmatch.runtime.log import info, info_notes
from funmatch.training.evaluation import scoring
from funmatch.training.run import checkpoint
from funmatch.training.run import folder as run_folder
from funmatch.training.student.quantization import CHILD


@dataclass(frozen=True)
class TrainedModel:
    """A classifier, and how it sees images.

    Attributes:
        name: as the user gave it.
        classifier: in evaluation mode, on the CPU.
        preprocessing: from an image to what the classifier takes.
        run: the run that it is the student of, or None.
        step: of its weights, where it is a run's.
        knobs: the run's resolved options; empty where there is no run.
    """

    name: str
    classifier: Classifier
    preprocessing: Preprocessing
    run: run_folder.Run | None = None
    step: int | None = None
    knobs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def class_names(self) -> tuple[str, ...]:
        """A name for each output: its own; ImageNet's word for it; else its number."""
        if self.classifier.card.classes:
            return self.classifier.card.classes
        known = class_names(self.classifier)
        if known is None:
            return tuple(map(str, range(self.classifier.num_classes)))
        words = [names[1] if len(names) > 1 else names[0] for names in known]
        # Two of ImageNet's classes are called crane, and two maillot.
        return tuple(
            word if words.count(word) == 1 else f"{word} ({names[0]})" for word, names in zip(words, known, strict=True)
        )

    @property
    def cap(self) -> int:
        """Short side in pixels to which larger images are scaled first: as when the run was evaluated."""
        return self.knobs.get("cap") or Images.model_fields["cap"].default


def open_trained_model(
    name: str,
    *,
    weights: Path | None = None,
    model_kwargs: tuple[str, ...] = (),
    side: int | None = None,
    eval_resize: int | None = None,
    eval_resample: EvalResample | None = None,
    given: Mapping[str, Any] | None = None,
    texts: ClassTexts | None = None,
) -> TrainedModel:
    """Opens the student of a run, or any other model.

    Args:
        name: folder of a run, or any model name; of a run that is not finished, the newest checkpoint is taken.
        weights: file of weights for a timm name.
        model_kwargs: `key=value` arguments of the constructor.
        side: image size, pixels; None: the run's, or the model's own.
        eval_resize: short side before the central crop, pixels; None: the run's, or the model's own.
        eval_resample: how images are resized; None: as in the run, or as the model's card says.
        given: modules from Python, by the names that stand for them.
        texts: the classes of a network of image and text.

    Raises:
        InputError: there is no such model, it does not take images of this size, or no checkpoint can be read.
    """
    given = given or {}
    run = None if name in given else find_run(name)
    knobs: Mapping[str, Any] = run.config["knobs"] if run else {}
    if run and run.result is None and not run.student.is_dir():
        if weights or model_kwargs:
            raise InputError(f"{name} is a run, which has weights of its own; leave out --weights and --model-kwargs")
        model, step = _from_checkpoint(run, side)
    else:
        # A copy: loading may change the module's head or side, and the caller still owns it.
        module = copy.deepcopy(given.get(name, name))
        model = load(module, weights=weights, options=model_kwargs, pretrained=True, side=side, texts=texts)
        step = (run.result or {}).get("step") if run else None
    info_notes(name, model.notes)
    preprocessing = _preprocessing(model, knobs, side, eval_resize, eval_resample)
    check_side(model, preprocessing.side)
    return TrainedModel(name, model.eval(), preprocessing, run, step, knobs)


def open_described_model(
    config: FinishedModel, name: str, given: Mapping[str, Any] | None = None, texts: ClassTexts | None = None
) -> TrainedModel:
    """Opens a model as the options of a command describe it; arguments and errors as of `open_trained_model`."""
    return open_trained_model(
        name, weights=config.weights, model_kwargs=config.model_kwargs, side=config.side,
        eval_resize=config.eval_resize, eval_resample=config.eval_resample, given=given,
        texts=texts or class_texts_of(config, [name]),
    )  # fmt: skip


def find_run(name: str) -> run_folder.Run | None:
    """Returns the run that a model's name is the folder of, if it is one."""
    path = Path(name.removeprefix("local-dir:")).expanduser()
    return run_folder.find_run(path) if run_folder.looks_like_run(path) else None


def info_side(model: Classifier, words: list[str]) -> None:
    """Says where the image size of a model is a guess, and how to compare sizes.

    Args:
        words: the rest of the command line that evaluates it, as from its data on.
    """
    if notes := model.card.side_notes:
        info_notes(model.card.name, notes)
        sizes = " ".join(map(str, sorted({128, 160, 224, model.card.side})))
        info(f"to compare sizes: for s in {sizes}; do funmatch evaluate {shlex.join(words)} --side $s; done")


def _preprocessing(
    model: Classifier,
    knobs: Mapping[str, Any],
    own_side: int | None,
    eval_resize: int | None,
    eval_resample: EvalResample | None,
) -> Preprocessing:
    """Returns how images are seen: as given, else as in the run, else as the model's card says."""
    side = own_side or knobs.get("side") or model.card.side
    # The run's resize belongs to its image size: at another one, the proportions of the crop would change.
    recorded = knobs.get("eval_resize") if side == knobs.get("side") else None
    short_side = eval_resize or recorded or scoring.default_eval_resize(side, model.card)
    # The crop would be larger than the image.
    if short_side < side:
        raise InputError(f"eval_resize ({short_side}) must be at least side ({side})")
    # Without a run, the card says whether images are squashed.
    squash = knobs["crop"] == "squash" if "crop" in knobs else model.card.squash
    # Runs were evaluated without antialias before there was a choice.
    of_run = knobs.get("eval_resample") or (RESAMPLED_BEFORE if knobs else None)
    resample = eval_resample or of_run or model.card.resample
    floor = model.card.floor and not knobs
    return Preprocessing(side=side, short_side=short_side, squash=squash, resample=resample, floor=floor)


def _from_checkpoint(run: run_folder.Run, side: int | None) -> tuple[Classifier, int]:
    """Builds the student of a run that is not finished, with the weights of its newest checkpoint, and their step."""
    knobs, facts = run.config["knobs"], run.config["facts"]
    tensors, step = checkpoint.newest_student(run.checkpoints)
    # As a finished student: plain, without the rounding of a run that trains for INT8, or a projector.
    extra = (f".{CHILD}.", f"{TRAINING_ONLY}.")
    tensors = {name: tensor for name, tensor in tensors.items() if not any(each in f".{name}" for each in extra)}
    headless = "logits" not in knobs.get("match", ("logits",))
    names = () if headless else tuple(facts.get("classes") or ())

    def build(classes: int | None) -> Classifier:
        return load(
            knobs["student"],
            weights=knobs.get("student_weights"),
            options=constructor_options(knobs),
            classes=classes,
            side=side or knobs.get("side"),
            empty=True,
        )

    model = build(0 if headless else len(names) or None)
    if not names and not headless:
        # Without names, as of a teacher that has none, the weights themselves tell how many classes there are.
        heads = (tensors.get(f"net.{head}.weight") for head in timm_models.head_names(model.net))
        if (head := next((each for each in heads if each is not None), None)) is not None:
            model = build(head.shape[0])
    try:
        _load_net(model.net, tensors)
    except RuntimeError as error:
        raise InputError(f"the checkpoint of {run.folder} does not fit {knobs['student']}: {error}") from None
    info(f"{run.folder} is not finished: using its newest checkpoint, of step {step:,}")
    model.card = replace(model.card, name=str(run.folder), classes=names or None, top1=None, task=knobs.get("task"))
    return model, step


def _load_net(net: nn.Module, tensors: Mapping[str, Any]) -> None:
    net.load_state_dict({name.removeprefix("net."): tensor for name, tensor in tensors.items()})


def constructor_options(config: Train | Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the `key=value` arguments with which a run builds its student."""
    knobs = config if isinstance(config, Mapping) else dict(config)
    rates = {"drop_rate": knobs.get("drop_rate"), "drop_path_rate": knobs.get("drop_path")}
    # `is not None`: a rate of 0 turns off what a network drops by default.
    return (*knobs["student_kwargs"], *(f"{name}={rate}" for name, rate in rates.items() if rate is not None))
