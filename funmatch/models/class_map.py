"""Maps the classes of the data to a teacher's, which may be more, in another order, or under other names."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from timm.data import ImageNetInfo
from timm.data.imagenet_info import infer_imagenet_subset

from funmatch.errors import InputError, first_line, unknown
from funmatch.models.classifier import Classifier
from funmatch.runtime.disk.json_files import parse_json

SAME_NAMES = "same-names"
BY_NUMBER = "by-number"
RULES = (SAME_NAMES, BY_NUMBER)
"""Ways to map classes that need no file."""

ClassMap = tuple[tuple[int, ...], ...]
"""For each class of the data the indices of the teacher's classes that it stands for."""


def class_names(classifier: Classifier) -> list[tuple[str, ...]] | None:
    """Returns the names of each class of a classifier, or None if they are unknown.

    They are its own, or ImageNet's identifiers and words if the head is one of ImageNet's.
    """
    if classifier.card.classes:
        return [(name,) for name in classifier.card.classes]
    subset = infer_imagenet_subset({"num_classes": classifier.num_classes})
    if subset is None:
        return None
    info = ImageNetInfo(subset)
    names = []
    for index in range(classifier.num_classes):
        # Synonyms are separated by commas: "tench, Tinca tinca".
        words = info.index_to_description(index).split(",")
        # Each once: a name that a class has twice would count as two classes of that name.
        names.append(tuple(dict.fromkeys([info.index_to_label_name(index), *(word.strip() for word in words)])))
    return names


def read_class_map(path: Path) -> dict[str, list[str | int]]:
    """Reads a file such as `{"cat": "tabby", "dog": ["n02085620", 152]}`.

    Args:
        path: a JSON object: each class of the data to the teacher's, by name or by index.

    Raises:
        InputError: the file cannot be read, or holds something else.
    """
    try:
        content = parse_json(path.expanduser().read_bytes())
    except OSError as error:
        raise InputError(f"cannot read the class map {path}: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: {first_line(error)}") from error
    if not isinstance(content, dict) or not content:
        raise InputError(f'{path} is not a class map; expected {{"our class": "the teacher\'s class", …}}')
    class_map = {}
    for name, theirs in content.items():
        class_map[name] = theirs if isinstance(theirs, list) else [theirs]
        # True and False are integers in Python.
        are_valid = all(isinstance(one, str | int) and not isinstance(one, bool) for one in class_map[name])
        if not (class_map[name] and are_valid):
            raise InputError(f"{path}: {name} maps to {theirs!r}; expected a name, a number, or a list of these")
    return class_map


def map_classes(classifier: Classifier, classes: Sequence[str], rule: str) -> ClassMap:
    """Finds the classes of a classifier for each class of the data.

    Args:
        classifier: the teacher.
        classes: names of the data's classes, in order.
        rule: `SAME_NAMES`; `BY_NUMBER`, the order of the numbers in their names (2 before 10); or the path of a class
            map (see `read_class_map`) that has each of them.

    Raises:
        InputError: a class is not found, or is not the only one of its name.
    """
    if rule == BY_NUMBER:
        return _map_by_number(classifier, classes)
    if rule == SAME_NAMES:
        mapped: dict[str, list[str | int]] = {name: [name] for name in classes}
    else:
        mapped = read_class_map(Path(rule))
        missing = [name for name in classes if name not in mapped]
        if missing:
            raise InputError(f"{rule} does not map {', '.join(missing[:5])}; it must map every class of the data")
        extra = [name for name in mapped if name not in classes]
        # Most likely a misspelt class, whose right name the check above has not found missing.
        if extra:
            raise unknown(f"class in {rule}", extra[0], classes)
    lookup = _ClassLookup(classifier)
    return tuple(tuple(lookup.index(one) for one in mapped[name]) for name in classes)


def number_order(classes: Sequence[str]) -> list[int] | None:
    """Returns the position of each class by the number in its name, None where they are not numbered.

    Numbered are `0`, `1`, `10` and `class 1`, `class 10`: names that differ in one number only.
    """
    found = [re.fullmatch(r"(\D*)(\d+)(\D*)", name) for name in classes]
    numbers = [int(match[2]) for match in found if match]
    around = {(match[1], match[3]) for match in found if match}
    # "01" and "1" would share a place.
    if len(numbers) < len(classes) or len(around) != 1 or len(set(numbers)) < len(numbers):
        return None
    position = {number: i for i, number in enumerate(sorted(numbers))}
    return [position[number] for number in numbers]


def _map_by_number(classifier: Classifier, classes: Sequence[str]) -> ClassMap:
    order = number_order(classes)
    if order is None:
        raise InputError(f"--classes {BY_NUMBER} needs classes that are numbers, not {', '.join(classes[:5])}")
    if classifier.num_classes != len(classes):
        raise InputError(
            f"{classifier.card.name} has {classifier.num_classes} outputs, but the data has {len(classes)} classes: "
            f"--classes {BY_NUMBER} needs as many; pass a map.json"
        )
    return tuple((position,) for position in order)


class _ClassLookup:
    """Finds a classifier's classes by name: as written first, then without regard to case, `_` and `-`."""

    def __init__(self, classifier: Classifier) -> None:
        self.name, self.count = classifier.card.name, classifier.num_classes
        names = class_names(classifier) or []
        self.exact = _indices_by_name(names)
        # In a table of its own, so that names which differ in case only stay apart if they are written exactly. A
        # set for each class, so that two spellings of its name do not count as two classes.
        self.loose = _indices_by_name({_normalize(name) for name in each} for each in names)

    def index(self, wanted: str | int) -> int:
        """Returns the index of a class given by name or by index."""
        if isinstance(wanted, int):
            if not 0 <= wanted < self.count:
                raise InputError(f"{self.name} has no class {wanted}; its classes are 0 … {self.count - 1}")
            return wanted
        # Before the look-up, whose message would list no names.
        if not self.exact:
            raise InputError(
                f"{self.name} does not know the names of its {self.count} classes; pass a map.json with their numbers"
            )
        indices = self.exact.get(wanted) or self.loose.get(_normalize(wanted))
        if not indices:
            raise unknown(f"class of {self.name}", wanted, self.exact)
        if len(indices) > 1:
            found = ", ".join(map(str, indices))
            raise InputError(f"{self.name} has several classes {wanted!r}: {found}; use the number in a map.json")
        return indices[0]


def _indices_by_name(names: Iterable[Iterable[str]]) -> dict[str, list[int]]:
    """Collects the indices of the classes that have each name."""
    indices: dict[str, list[int]] = {}
    for index, each in enumerate(names):
        for name in each:
            indices.setdefault(name, []).append(index)
    return indices


def _normalize(name: str) -> str:
    return " ".join(name.casefold().replace("_", " ").replace("-", " ").split())
