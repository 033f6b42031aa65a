"""Fits a head to the features of a frozen backbone, and writes both as an ordinary model."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from funmatch.config import Head
from funmatch.data.cache.open_cache import Cache
from funmatch.data.readers.class_notes import first_of
from funmatch.errors import InputError
from funmatch.models.classifier import Classifier, timm_config
from funmatch.models.heads.headed import HEADED, architecture_behind, attach, put_behind
from funmatch.models.inference.outputs import is_close
from funmatch.models.load import load
from funmatch.models.names import GIVEN, LOCAL
from funmatch.ops.tasks.task import task_of
from funmatch.runtime import devices, env
from funmatch.runtime.functions import OWN
from funmatch.runtime.log import info
from funmatch.training import datasets
from funmatch.training.defaults import absolute_paths
from funmatch.training.evaluation import scoring
from funmatch.training.heads import folder
from funmatch.training.heads.choose import FittedHead, Labelled, fit_head
from funmatch.training.heads.features import FrozenBackbone
from funmatch.training.student.export import export_student
from funmatch.training.student.trained_model import TrainedModel, open_described_model

WEIGHTS = "model.safetensors"
CHECKED = 8
"""Training images on which the model that was written is compared with the head."""


def run(config: Head, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Fits a head, unless that is done; the same again goes on where it was stopped.

    Args:
        given: modules from Python, by the names that stand for them.

    Returns:
        what `result.json` holds: the metrics of `scoring.score`; `split`, `pictures`, `held_out_of`; `kind`, `chosen`,
        `tried` (of each value `top1`, or `map`, and `nll` on the validation images); `train`, `features` (number),
        `classes`; `parameters`, `model`, `out`, `seconds` and of these `seconds_features` and `seconds_fit`.

    Raises:
        InputError: the images have no labels, the backbone has no features, or the folder holds something else.
    """
    config.check()
    if env.world_size() > 1:
        raise InputError("head computes in a single process; start it without torchrun")
    # Before loading and decoding, so that a wrong --device or --out does not cost a download.
    device = devices.pick_device(config.device)
    record = folder.record_folder(config.out)
    record.check_place()
    cache, config = open_labelled(config)
    trained = open_described_model(config, config.model, given)
    if not config.is_linear:
        # Before the features of all images are computed for nothing.
        architecture_behind(trained.classifier)
    precision = devices.resolve_precision(config.precision, device)
    view = scoring.eval_view_of(trained.preprocessing, config.batch, device, precision)
    backbone = FrozenBackbone(trained, view)
    facts = {"data": cache.key, "backbone": backbone.digest}
    config = config.model_copy(update=absolute_paths(config) | config.resolved)
    with record.opened(folder.record_for(config, facts), folder.compare):
        if result := folder.finished_result(record.folder):
            info(f"{record.folder} is finished; nothing to do")
            return result
        return _Work(config, cache, trained, backbone).carry_out()


def open_labelled(config: Head) -> tuple[Cache, Head]:
    """Opens the images, and holds some of the training images out where there is no validation split.

    Raises:
        InputError: training or validation images have no labels, or not all classes have training images.
    """
    cache = datasets.open_data_set(config, config.data)
    if "train" not in cache.splits:
        raise InputError(f"{cache.name} has no training split; its splits: {', '.join(cache.splits)}")
    if config.val is None and "val" not in cache.splits:
        cache, config = datasets.hold_out(config, cache, lambda each: datasets.open_data_set(each, each.data))
    if "val" not in cache.splits and len(config.tried) != 1:
        one = {"linear": "one value of --C, or ", "knn": "one value of --neighbours, or "}.get(config.kind, "")
        raise InputError(
            f"{cache.name} has no validation images, by which a head is chosen; pass {one}--val 10% to hold some out"
        )
    for split in (cache.splits[name] for name in ("train", "val") if name in cache.splits):
        if not split.labelled:
            missing = int((split.labels(slice(None)) < 0).sum())
            raise InputError(
                f"{missing:,} of {len(split):,} {split.name} images of {cache.name} have no labels, to which a head is "
                "fitted; sort them into folders of classes, train/<class>/*.jpg"
            )
    counts = cache.splits["train"].class_counts(len(cache.classes))
    if len(cache.classes) < 2:
        raise InputError(f"all images of {cache.name} are of one class, {cache.classes[0]}; a head needs at least two")
    if lost := [name for name, count in zip(cache.classes, counts.tolist(), strict=True) if not count]:
        held_out = " (all of them were held out: pass another --val-seed or a smaller --val)" if config.val else ""
        found = f"{len(lost):,} of {len(cache.classes):,} classes of {cache.name} have no training images{held_out}"
        # Votes and means of several classes an image say of each class by itself that it is hardly ever there.
        if config.task != "multilabel" or config.kind == "linear":
            raise InputError(f"{found}: {first_of(lost)}; add some, or remove the classes")
        info(f"WARNING: {found}: {first_of(lost)}; all images get the same low probability of them")
    return cache, config


@dataclass(frozen=True)
class _Work:
    """Everything that a head is made of."""

    config: Head
    cache: Cache
    trained: TrainedModel
    backbone: FrozenBackbone

    def carry_out(self) -> dict[str, Any]:
        """Fits the head and writes it; returns its metrics."""
        config, out = self.config, self.config.out.expanduser()
        began = time.monotonic()
        splits = {name: self._labelled(name) for name in ("train", "val", "test") if self._is_used(name)}
        computed = time.monotonic()
        train = splits["train"]
        fitted = fit_head(config, train, splits.get("val"), len(self.cache.classes), self.backbone.view.device)
        fit = time.monotonic() - computed
        scores = self._scores(fitted, splits)
        self._write(fitted, scores)
        found = scores | {
            "kind": config.kind, "chosen": fitted.chosen, "tried": fitted.tried,
            "train": len(train.labels), "features": train.features.shape[-1], "classes": len(self.cache.classes),
            "parameters": self.trained.classifier.count_parameters(), "model": config.model, "out": str(out),
            "seconds": round(time.monotonic() - began, 3), "seconds_features": round(computed - began, 3),
            "seconds_fit": round(fit, 3),
        }  # fmt: skip
        return folder.finish(out, found)

    def _is_used(self, name: str) -> bool:
        """Returns whether the features of a split are needed: test images are for the figures at the end."""
        return name in self.cache.splits and (name != "test" or self.cache.splits[name].labelled)

    def _labelled(self, name: str) -> Labelled:
        split = self.cache.splits[name]
        return Labelled(self.backbone.features(self.config, self.cache, split), split.labels(slice(None)))

    def _scores(self, fitted: FittedHead, splits: Mapping[str, Labelled]) -> dict[str, Any]:
        """Scores the head on the test images, else on those of validation, by which it was chosen."""
        name = next((name for name in ("test", "val") if name in splits), None)
        if name is None:
            # Figures on the images that it was fitted to would look better than they are.
            score = task_of(self.config.task).score
            return {"top1": None, "top5": None, "ece": None, score: None, "split": "train", "pictures": 0}
        split = self.cache.splits[name]
        scores = scoring.score(fitted.logits(splits[name].features), split)
        return scores | datasets.about_images(split, self.cache, self.config.val)

    def _write(self, fitted: FittedHead, scores: Mapping[str, Any]) -> None:
        """Writes the network with the head."""
        classifier, view = self.trained.classifier.cpu(), self.backbone.view
        out, names = self.config.out.expanduser(), self.cache.classes
        task = task_of(self.config.task)
        classifier.card = replace(classifier.card, squash=view.squash, task=task.name)
        about: dict[str, object] = {"verb": "head", "top1": scores["top1"], "backbone": self.config.model}
        about |= {task.score: scores[task.score]}
        # Behind the network where its constructor cannot make the last layer of this size, which only loading shows.
        for put in (attach, put_behind):
            put(classifier, fitted.head, names, view.side)
            export_student(classifier, out / folder.NEW, view, names, about | {"head": self.config.kind})
            if self._is_whole(classifier, out / folder.NEW):
                folder.move_out(out)
                return
            if classifier.function == HEADED:
                break
        raise InputError(
            f"{self.config.model} with a head has other logits when it is loaded again; its constructor must build the "
            "same network each time"
        )

    def _is_whole(self, classifier: Classifier, written: Path) -> bool:
        """Returns whether the model that was written gives the same logits of training images."""
        function = classifier.function
        if classifier.card.name.startswith(GIVEN) and not timm_config(classifier.net):
            return True  # a module from Python: nobody but the program that built it can load it
        try:
            # A user's function is named by the user, as no file may name it.
            if function and function not in OWN:
                loaded = load(function, weights=written / WEIGHTS)
            else:
                loaded = load(f"{LOCAL}{written}")
        except InputError:
            return False
        view = replace(self.backbone.view, device=torch.device("cpu"), precision="fp32")
        some = self.cache.splits["train"].subset(np.arange(min(CHECKED, len(self.cache.splits["train"]))))
        found, expected = (scoring.predict(each, some, view) for each in (loaded, classifier))
        return is_close(found, expected)
