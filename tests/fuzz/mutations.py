"""Damages files: bits, cuts, splices, and values of other types and sizes in JSON."""

import copy
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

HUGE = 2**63
ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, HUGE, -HUGE, 10**19, 10**40, 1e-9, 1e308, float("nan"), float("inf"), "", "0", "nan",
    "\x00", "\x1b[31m", "\u202e", "<script>", "../../x", "/etc/passwd", "subprocess:getoutput", "x" * 300, [], {}, [[]],
    [None], [0], {"": None}, {"a": {"b": []}},
)  # fmt: skip
"""Values that stand where others are expected."""
INTERESTING = (
    b"\x00",
    b"\xff",
    b"\xff" * 8,
    b"\x7f" + b"\xff" * 7,
    b"[" * 200,
    b"\n",
    b'"',
    b"-1",
    b"99999999999999999999",
)
"""Bytes that are pasted in."""


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """Returns bytes with one to four of: a flipped bit, a changed byte, a cut, a removed, doubled or inserted part."""
    content = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = rng.randrange(len(content)) if content else 0
        size = rng.choice((1, 2, 4, 8, 64, 512))
        kind = rng.randrange(7)
        if kind <= 1 and content:
            content[at] ^= 1 << rng.randrange(8)
        elif kind == 2 and content:
            content[at] = rng.randrange(256)
        elif kind == 3:
            del content[at:]
        elif kind == 4:
            del content[at : at + size]
        elif kind == 5:
            content[at:at] = content[(start := rng.randrange(len(content) + 1)) : start + size]
        else:
            piece = rng.choice(INTERESTING)
            content[at : at + rng.choice((0, len(piece)))] = piece
    return bytes(content)


def mutate_json(text: bytes, rng: random.Random) -> bytes:
    """Returns JSON with other types, keys or nesting; now and then with damaged bytes."""
    if rng.random() < 0.15:
        return mutate_bytes(text, rng)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):  # damaged before
        return mutate_bytes(text, rng)
    try:
        return json.dumps(change_tree(value, rng)).encode()
    except RecursionError:  # nested several times: deeper than `json` and `copy` can follow, so written by hand
        return b"[" * 5000 + text + b"]" * 5000


def mutate_lines(text: bytes, rng: random.Random) -> bytes:
    """Returns lines of JSON of which some are changed, doubled or in another order."""
    lines = text.splitlines()
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(lines))
        lines[at] = mutate_json(lines[at], rng) if lines[at][:1] == b"{" else mutate_bytes(lines[at], rng)
        if rng.random() < 0.2:
            lines.insert(rng.randrange(len(lines)), rng.choice(lines))
    return b"\n".join(lines) + rng.choice((b"\n", b""))


def change_tree(value: Any, rng: random.Random) -> Any:
    """Returns a tree of JSON's values with one to three of its places changed."""
    root = [copy.deepcopy(value)]
    for _ in range(rng.choice((1, 1, 2, 3))):
        places = list(_places(root))
        home, key = rng.choice(places)
        kind = rng.randrange(8)
        if kind <= 3:
            home[key] = copy.deepcopy(rng.choice(ODD))
        elif kind == 4:
            home[key] = nested(home[key], rng)
        elif kind == 5 and len(places) > 1:
            other, place = rng.choice(places)
            home[key] = copy.deepcopy(other[place])
        elif home is not root and isinstance(home, dict):
            kept = home.pop(key)
            if kind == 6:
                home[_other_key(key, rng)] = kept
        elif isinstance(home[key], int | float) and not isinstance(home[key], bool):
            home[key] = rng.choice((-home[key], home[key] + 1, str(home[key]), [home[key]]))
        elif isinstance(home[key], str):
            home[key] = rng.choice((home[key][:-1], home[key] + "\x1b", home[key].upper(), [home[key]]))
    return root[0]


def nested(value: Any, rng: random.Random) -> Any:
    """Returns a value inside many lists or objects."""
    for _ in range(rng.choice((1, 2, 70, 300))):
        value = [value] if rng.random() < 0.5 else {"a": value}
    return value


def _other_key(key: str, rng: random.Random) -> str:
    return rng.choice((key.upper(), key[:-1], f"{key}x", "", "\x1b", "__class__"))


def _places(value: Any, most: int = 2000) -> Iterator[tuple[Any, Any]]:
    """Yields the containers and keys of all values in a tree."""
    level = [value]
    while level and most > 0:
        found = level.pop()
        for key in list(found) if isinstance(found, dict) else range(len(found)):
            most -= 1
            yield found, key
            if isinstance(found[key], dict | list):
                level.append(found[key])


Mutation = Callable[[bytes, random.Random], bytes]
