"""Reads class names, and makes of them the texts that stand for each class."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from funmatch.config.teaching import ByText
from funmatch.errors import InputError, first_line, some_of
from funmatch.models.clip.names import is_clip
from funmatch.models.clip.templates import PLACE, read_templates
from funmatch.runtime.disk.files import read_lines
from funmatch.runtime.disk.json_files import parse_json

OF_DATA = "data"
"""The word for the data's own class names."""


@dataclass(frozen=True)
class ClassTexts:
    """The classes of a network, and the texts that stand for each.

    Attributes:
        names: of the classes.
        texts: for each class its sentences, at least one.
        source: where the names come from, for messages.
    """

    names: tuple[str, ...]
    texts: tuple[tuple[str, ...], ...]
    source: str

    @property
    def all_texts(self) -> list[str]:
        """The texts of all classes, one class after another."""
        return [text for texts in self.texts for text in texts]


def class_texts_of(config: ByText, names: Iterable[str | None], data: Sequence[str] | None = None) -> ClassTexts | None:
    """Returns the classes that options give to networks of image and text; None where there are none.

    Args:
        names: of models.
        data: class names of the data, where it has any.

    Raises:
        InputError: as of `read_class_texts`.
    """
    if config.classes_from is None or not any(map(is_clip, names)):
        return None
    return read_class_texts(config.classes_from, config.templates, data)


def read_class_texts(classes_from: str, templates: str | None = None, data: Sequence[str] | None = None) -> ClassTexts:
    """Reads class names, and puts them into sentences.

    Args:
        classes_from: a text file with a name a line; a JSON file with a list of names, or an object of descriptions by
            name; or `data`.
        templates: see `read_templates`; None is openai-80, or none for descriptions, which are sentences themselves.
        data: class names of the data, where it has any.

    Raises:
        InputError: a file cannot be read, there are fewer than two names, or one stands twice.
    """
    if classes_from == OF_DATA:
        if not data:
            raise InputError(f"--classes-from {OF_DATA} needs images whose classes have names; pass a file with names")
        described, source = {name: (_spoken(name),) for name in data}, "the data"
    else:
        described, source = read_names(Path(classes_from).expanduser()), classes_from
    are_sentences = any(texts != (_spoken(name),) for name, texts in described.items())
    sentences = read_templates(templates or ("none" if are_sentences else "openai-80"))
    if len(described) < 2:
        raise InputError(f"{source} has {len(described) or 'no'} class names; a classifier needs at least two")
    texts = {name: tuple(each.replace(PLACE, text) for text in found for each in sentences)
             for name, found in described.items()}  # fmt: skip
    if twice := [names for names in _with_equal_texts(texts) if len(names) > 1]:
        raise InputError(
            f"{source}: {' and '.join(twice[0])} would be read as the same text, so no image could be told apart by "
            "them; name them otherwise, or describe them in a JSON file"
        )
    return ClassTexts(tuple(texts), tuple(texts.values()), source)


def _spoken(name: str) -> str:
    """Returns a class name as a text: folders have underscores where words have spaces."""
    return " ".join(name.replace("_", " ").split())


def _with_equal_texts(texts: Mapping[str, tuple[str, ...]]) -> list[list[str]]:
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, each in texts.items():
        groups.setdefault(each, []).append(name)
    return [*groups.values()]


def read_names(path: Path) -> dict[str, tuple[str, ...]]:
    """Reads a file of names; returns the descriptions of each, its name where it has no other."""
    if path.suffix.lower() == ".json":
        found = _from_json(path)
    else:
        found = [(line, (_spoken(line),)) for line in read_lines(path, "the class names")]
    if not found:
        raise InputError(f"{path} is empty; write a class name a line")
    if repeated := [name for name, count in Counter(name for name, _ in found).items() if count > 1]:
        raise InputError(f"{path} has {some_of([*map(repr, repeated)], 3)} more than once; give each class one line")
    return dict(found)


def _from_json(path: Path) -> list[tuple[str, tuple[str, ...]]]:
    try:
        values = parse_json(path.read_bytes())
    except OSError as error:
        raise InputError(f"cannot read the class names in {path}: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: {first_line(error)}") from None
    if isinstance(values, list) and all(isinstance(each, str) and each.strip() for each in values):
        return [(each.strip(), (_spoken(each),)) for each in values]
    if not isinstance(values, dict):
        raise InputError(f'{path} holds no class names; expected ["name", …] or {{"name": ["description", …], …}}')
    found = []
    for name, texts in values.items():
        texts = [texts] if isinstance(texts, str) else texts
        if not (isinstance(texts, list) and texts and all(isinstance(each, str) and each.strip() for each in texts)):
            raise InputError(f"{path}: {name!r} has {texts!r}; expected a description, or a list of descriptions")
        found.append((name, tuple(" ".join(each.split()) for each in texts)))
    return found
