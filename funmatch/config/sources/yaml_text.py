"""Reads YAML by the safe loader as people mean it: `3e-3` is a number, and a key that stands twice is an error."""

import re
from typing import Any

import yaml


# A class of our own, so that resolvers are not added for other users of PyYAML in this process.
class _Loader(yaml.SafeLoader):
    """The safe loader, which makes plain values only."""


# YAML 1.1 wants a dot in numbers with an exponent, and takes 3e-3 for text.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def load(text: str) -> tuple[dict[str, Any], dict[str, int]]:
    """The values of a mapping, and the line of each key.

    Raises:
        ValueError: it is not YAML, or not a mapping of names; the message has line and column.
    """
    try:
        # The tree first: `yaml.load` keeps the last of two equal keys in silence, and knows no lines.
        node = yaml.compose(text, Loader=_Loader)
        if node is None:
            return {}, {}
        if not isinstance(node, yaml.MappingNode):
            raise ValueError("it does not hold options by their names")
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if key.value in lines:
                raise ValueError(f"{key.value} stands on line {lines[key.value]} and again on line {line}")
            lines[key.value] = line
        values = yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" (at line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise ValueError(f"{error.problem or error.context}{where}") from None
    except yaml.YAMLError as error:
        raise ValueError(str(error).splitlines()[0]) from None
    # As text: YAML reads the keys `on` and `1` as a truth value and a number.
    return {str(key): value for key, value in values.items()}, lines
