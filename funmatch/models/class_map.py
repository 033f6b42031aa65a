"""Classes of one list found in another: a teacher that knows more than is asked, in another order or by other names."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from timm.data import ImageNetInfo
from timm.data.imagenet_info import infer_imagenet_subset
from torch import Tensor

from funmatch.errors import InputError, first_line, unknown
from funmatch.models.classifier import Classifier

SAME_NAMES = "same-names"
ClassMap = tuple[tuple[int, ...], ...]
"""For each class that is asked, the classes of the teacher that it stands for."""


def select_classes(logits: Tensor, picks: ClassMap | None) -> Tensor:
    """Logits of the classes that are asked; what a teacher gives to others is shared out among them by the softmax.

    Args:
        logits: (n, teacher's classes).
        picks: where a class stands for several, their probabilities are added: log Σ exp.

    Returns:
        (n, classes that are asked).
    """
    if picks is None:
        return logits
    if all(len(pick) == 1 for pick in picks):
        return logits[:, [pick[0] for pick in picks]]
    return torch.stack([logits[:, list(pick)].logsumexp(-1) for pick in picks], 1)


def class_names(classifier: Classifier) -> list[tuple[str, ...]] | None:
    """The names of each class: its own, or ImageNet's identifiers and words where the head is one of ImageNet's."""
    if classifier.card.classes:
        return [(name,) for name in classifier.card.classes]
    subset = infer_imagenet_subset({"num_classes": classifier.num_classes})
    if subset is None:
        return None
    info = ImageNetInfo(subset)
    names = []
    for index in range(classifier.num_classes):
        words = info.index_to_description(index).split(",")
        names.append(tuple(dict.fromkeys([info.index_to_label_name(index), *(word.strip() for word in words)])))
    return names


def read_class_map(path: Path) -> dict[str, list[str | int]]:
    """A file `{"cat": "tabby", "dog": ["n02085620", 152]}`: each class to the teacher's, by name or by number.

    Raises:
        InputError: the file is something else.
    """
    try:
        read = json.loads(path.expanduser().read_text())
    except OSError as error:
        raise InputError(f"cannot read the map of classes {path}: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path} is no JSON: {first_line(error)}") from error
    if not isinstance(read, dict) or not read:
        raise InputError(f'{path} holds no map of classes; wanted {{"our class": "the teacher\'s class", …}}')
    found = {}
    for name, theirs in read.items():
        found[name] = theirs if isinstance(theirs, list) else [theirs]
        good = found[name] and all(isinstance(one, str | int) and not isinstance(one, bool) for one in found[name])
        if not good:
            raise InputError(f"{path}: {name} stands for {theirs!r}; wanted a name, a number, or a list of these")
    return found


def map_classes(classifier: Classifier, wanted: Sequence[str], rule: str) -> ClassMap:
    """The picks for classes that are asked.

    Args:
        classifier: whose classes are looked up.
        wanted: names of the classes that are asked, in order.
        rule: `SAME_NAMES`, or the path of a map (see `read_map`), which must speak of each of them.

    Raises:
        InputError: a class is not found, or is not the only one of its name.
    """
    if rule == SAME_NAMES:
        mapped: dict[str, list[str | int]] = {name: [name] for name in wanted}
    else:
        mapped = read_class_map(Path(rule))
        missing = [name for name in wanted if name not in mapped]
        if missing:
            raise InputError(f"{rule} says nothing of {', '.join(missing[:5])}; wanted every class of the images")
        extra = [name for name in mapped if name not in wanted]
        if extra:
            raise unknown(f"class in {rule}", extra[0], wanted)
    indices = _lookup(classifier)
    return tuple(tuple(_index(classifier, one, indices) for one in mapped[name]) for name in wanted)


def _lookup(classifier: Classifier) -> dict[str, list[int]]:
    """The classes of each name, as it is written and, after a space that no name begins with, however it is written."""
    found: dict[str, list[int]] = {}
    for index, known in enumerate(class_names(classifier) or []):
        for name in {*known, *(f" {_plain(name)}" for name in known)}:
            found.setdefault(name, []).append(index)
    return found


def _index(classifier: Classifier, wanted: str | int, lookup: dict[str, list[int]]) -> int:
    count, who = classifier.num_classes, classifier.card.name
    if isinstance(wanted, int):
        if not 0 <= wanted < count:
            raise InputError(f"{who} has no class {wanted}; its classes are 0 … {count - 1}")
        return wanted
    if not lookup:
        raise InputError(f"{who} does not know the names of its {count} classes; give a map with their numbers")
    indices = lookup.get(wanted) or lookup.get(f" {_plain(wanted)}")
    if not indices:
        raise unknown(f"class of {who}", wanted, [name for name in lookup if not name.startswith(" ")])
    if len(indices) > 1:
        raise InputError(f"{who} has several classes {wanted!r}: {', '.join(map(str, indices))}; give the number")
    return indices[0]


def _plain(name: str) -> str:
    return " ".join(name.casefold().replace("_", " ").replace("-", " ").split())
