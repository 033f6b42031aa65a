"""Checks that a classifier's classes are those of the data, in the same order."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from funmatch.config.choices import TaskName
from funmatch.data.cache.open_cache import Cache
from funmatch.data.cache.stores import CachedSplit
from funmatch.errors import InputError
from funmatch.models.class_map import BY_NUMBER, number_order
from funmatch.models.classifier import Card, Classifier
from funmatch.ops import metrics
from funmatch.ops.tasks.task import TASKS
from funmatch.runtime.log import info
from funmatch.runtime.text import percent


def with_task(model: Classifier, task: TaskName, role: str) -> Classifier:
    """Returns a classifier whose outputs mean what the labels of the data do, and records that where it was unknown.

    Args:
        role: what the model is for, in messages: `teacher` or `model`.

    Raises:
        InputError: it was trained for the other task.
    """
    own = model.card.task or task
    if own != task:
        raise InputError(
            f"{role} {model.card.name} gives {TASKS[own].of_model}, but the data is read with {TASKS[task].of_model}; "
            f"pass --task {own}, or another {role}"
        )
    model.card = replace(model.card, task=task)
    return model


def check_classes(model: Classifier, cache: Cache, *, trust_order: bool) -> None:
    """Raises `InputError` unless the classes of a classifier are those of the data, in the same order."""
    # Without classes there is nothing that could differ.
    if not cache.classes:
        return
    name, classes = model.card.name, cache.classes
    # Classes without names are the labels that occur; the model may know more.
    if cache.unnamed and model.num_classes >= len(classes):
        return
    if model.num_classes != len(classes):
        raise InputError(
            f"{name} has {model.num_classes} outputs, but {cache.name} has {len(classes)} classes "
            f"({_first_few(classes)}). If the model knows them among others, pass --classes same-names or --classes "
            "map.json. If it shall learn them, fine-tune it first (`funmatch finetune --model …`). To train on images "
            "of other things, pass --unlabelled, or images of the teacher's classes as --eval-data"
        )
    # Equal numbers of classes in another order would give a low accuracy and no error.
    named = model.card.classes or ()
    if len(named) == len(classes) and named != classes and not trust_order:
        # Only those that differ: of a thousand classes, the equal ones are no help.
        pairs = [f"{a} ≠ {b}" for a, b in zip(named, classes, strict=True) if a != b]
        raise InputError(
            f"{name} and {cache.name} list different classes: {_first_few(pairs)}; pass --classes same-names or "
            "--classes map.json if the order or the names differ, or --trust-class-order if only the names do"
        )


def check_number_order(
    card: Card, classes: Sequence[str], logits: Tensor, split: CachedSplit, *, trust_order: bool
) -> None:
    """Reports whether a classifier without class names has classes that are numbers in another order than the data.

    Folders are sorted as text, 10 before 2; a classifier that was trained elsewhere may count. Both orders agree on
    about twice as many images as chance would give, so the check for chance does not see it.

    Args:
        classes: names of the data's classes.
        logits: of the split, (n, classes), without a class map.
        trust_order: only warns.

    Raises:
        InputError: the images clearly fit the order of the numbers better.
    """
    order = number_order(classes)
    if order is None or order == sorted(order) or card.classes or not split.labelled or logits.shape[-1] != len(order):
        return
    if card.task == "multilabel":  # no class of an image comes first
        return
    labels, predicted = split.labels(slice(None)), logits.argmax(-1)
    here, there = predicted == labels, predicted == torch.tensor(order)[labels]
    fits = (
        f"{card.name} has top-1 {percent(here.double().mean().item())} with the classes in this order "
        f"({_first_few(classes)}), and {percent(there.double().mean().item())} in the order of the numbers"
    )
    better, worse = metrics.alone_right(there, here)
    if not metrics.is_clearly_better(better, worse) or better <= 2 * worse:
        info(f"note: the classes of the data are numbers sorted as text; {fits}")
    elif trust_order:
        info(f"WARNING: {fits}; --trust-class-order keeps the order of the data")
    else:
        raise InputError(
            f"{fits}. Pass --classes {BY_NUMBER} for the order of the numbers, or --trust-class-order to keep this one"
        )


def _first_few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
