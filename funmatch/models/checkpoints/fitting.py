"""Finds the weights of a network among the tensors of a checkpoint, under whatever keys and prefix they were saved."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from funmatch.errors import InputError, some_of
from funmatch.models.checkpoints.checkpoint import KEY, Checkpoint, Entry
from funmatch.models.checkpoints.torch_files import HOW_TO_SAVE
from funmatch.models.weights import COUNTER, Lazily

WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Parts of names that torch inserts for compiled, sharded and checkpointed modules, anywhere."""
BESIDES = ("n_averaged", "total_ops", "total_params")
"""Tensors that tools add to a network: `AveragedModel` and thop."""
AUXILIARY = re.compile(
    r"(mask_token|decoder\w*|projector|projection(_head)?|predictor|prototypes|queue(_ptr)?|(dino|ibot)_head|"
    r"criterion|loss(_fn)?)(\.|$)"
)
"""Beginnings of names that only training without labels or a loss has, beside a network's own."""
LEAST_SHARE = 0.5  # of a network's names: with fewer, the weights are of another network altogether
AVERAGED = re.compile(r"(^|[._])(ema|swa|averaged?|momentum)([._]|$)")
"""Keys of weights that are an average of others, over steps or epochs: EMA, SWA, momentum encoders."""
OPTIONS = "--teacher-kwargs, --student-kwargs or --model-kwargs"


@dataclass(frozen=True)
class Wanted:
    """What a network needs.

    Attributes:
        what: its name, for messages.
        shapes: of its tensors, by name.
        heads: names of the modules that turn features into logits; empty where they are unknown.
        may_lack_head: whether a head of zeros may take the place of a missing one.
    """

    what: str
    shapes: Mapping[str, tuple[int, ...]]
    heads: Sequence[str] = ()
    may_lack_head: bool = False

    def is_head(self, name: str) -> bool:
        return name.startswith(tuple(f"{head}." for head in self.heads))

    @property
    def body(self) -> list[str]:
        return [name for name in self.shapes if not self.is_head(name) and not name.endswith(COUNTER)]

    @property
    def head(self) -> list[str]:
        return [name for name in self.shapes if self.is_head(name)]


@dataclass(frozen=True)
class Found:
    """Weights of a network.

    Attributes:
        state: by the network's own names; those that do not fit are in it too, for `weights.fill` to name.
        notes: sentences that a user should know.
    """

    state: Lazily[Tensor]
    notes: tuple[str, ...] = ()


def fit(checkpoint: Checkpoint, wanted: Wanted) -> Found:
    """Returns the weights of a network that a checkpoint holds.

    Raises:
        InputError: it has none, several that could be meant, or no head where one is needed.
    """
    entries = {_without(WRAPPERS, key, entry): entry for key, entry in checkpoint.entries.items()}
    hits = _hits(entries, wanted)
    if hits.total() and max(hits.values()) < len(wanted.body):
        # DataParallel around a part of the network only, as in the first VGGs.
        inner = {_without(("module",), key, entry): entry for key, entry in entries.items()}
        entries, hits = max(
            (entries, hits), (inner, _hits(inner, wanted)), key=lambda pair: max(pair[1].values(), default=0)
        )
    share = max(hits.values(), default=0) / max(len(wanted.body), 1)
    if share < 1 and checkpoint.modules:
        raise InputError(
            f"{checkpoint.where} holds a whole module ({checkpoint.modules[0]}), which only its own code can load; "
            f"{HOW_TO_SAVE}"
        )
    if share < LEAST_SHARE:
        raise _of_another(checkpoint, wanted)
    prefix, notes = _choose(checkpoint, entries, hits, wanted)
    taken = {name: f"{prefix}{name}" for name in wanted.shapes if f"{prefix}{name}" in entries}
    if wanted.head and share == 1 and not any(name in taken for name in wanted.head):
        taken |= _head_elsewhere(entries, prefix, wanted)
    return _assemble(checkpoint, entries, prefix, taken, wanted, notes + _notes_on(checkpoint, entries, taken))


def _notes_on(checkpoint: Checkpoint, entries: Mapping[str, Entry], taken: Mapping[str, str]) -> tuple[str, ...]:
    """Returns notes on what was read that was not simply a state dict of numbers of 32 bits."""
    notes: tuple[str, ...] = ()
    if checkpoint.modules:
        notes += (f"{checkpoint.where} holds a whole module ({checkpoint.modules[0]}); its tensors are read, no code",)
    types = {entries[key].dtype for key in taken.values()}
    if narrow := sorted(kind for kind in types if kind.startswith(("float", "bfloat")) and kind != "float32"):
        notes += (f"{checkpoint.where}: weights of {' and '.join(narrow)}, used as float32",)
    return notes


def _assemble(
    checkpoint: Checkpoint,
    entries: Mapping[str, Entry],
    prefix: str,
    taken: dict[str, str],
    wanted: Wanted,
    notes: tuple[str, ...],
) -> Found:
    """Returns the weights that were taken, with those under the same prefix that no network of this kind has."""
    homes = {entries[key].home for key in taken.values()}
    used = set(taken.values())
    rest = [key for key, entry in entries.items() if key not in used and entry.home in homes]
    complete = all(name in taken for name in wanted.body)
    headless = complete and bool(wanted.head) and not any(name in taken for name in wanted.head)
    if headless and not wanted.may_lack_head:
        beside = f", but {', '.join(rest[:3])}" if rest else ""
        raise InputError(
            f"{checkpoint.where} has weights without a head for {wanted.what} (no {wanted.head[0]}{beside}), so it "
            "cannot classify; only a student can start from it"
        )
    # Under the same prefix, other names mean another architecture: its weights would fit without being right.
    drops_head = headless or not wanted.head
    other = {
        key.removeprefix(prefix): key
        for key in rest
        if key.startswith(prefix)
        and key.rpartition(".")[2] not in BESIDES
        and not AUXILIARY.match(key.removeprefix(prefix))
        and not (drops_head and wanted.is_head(key.removeprefix(prefix)))
    }
    left = [key.removeprefix(entries[key].home) for key in rest if key not in set(other.values())]
    if left:
        notes += (f"{checkpoint.where}: left out {some_of(left, 3)}, not part of {wanted.what}",)
    zeros = {}
    if headless:
        zeros = {name: wanted.shapes[name] for name in wanted.head}
        notes += (f"{checkpoint.where} has weights without a head; the head of {wanted.what} starts at zero",)

    keys = {**taken, **other}

    def read(name: str) -> Tensor:
        if name in zeros:
            return torch.zeros(zeros[name])
        entry, shape = entries[keys[name]], wanted.shapes.get(name, ())
        # A 1 × 1 convolution that was saved as a linear layer, or the other way round.
        same = len(entry.shape) != len(shape) and _without_ones(entry.shape) == _without_ones(shape)
        return entry.read().reshape(entry.shape[0], *shape[1:]) if same and name in taken else entry.read()

    return Found(Lazily([*keys, *zeros], read), notes)


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the inputs and the size of a kernel; nothing for a size of 1."""
    return tuple(shape[1:2]) + tuple(size for size in shape[2:] if size != 1)


def _choose(
    checkpoint: Checkpoint, entries: Mapping[str, Entry], hits: Counter[str], wanted: Wanted
) -> tuple[str, tuple[str, ...]]:
    """Returns the prefix of the weights that fit best, and notes on others that fit as well.

    Raises:
        InputError: several fit, and none is plainly meant.
    """
    best = max(hits.values())
    # Shapes tell networks of one family apart, such as a small student and its large teacher.
    rank = {
        prefix: sum(
            entries[f"{prefix}{name}"].shape != wanted.shapes[name]
            for name in wanted.body
            if f"{prefix}{name}" in entries
        )
        for prefix, count in hits.items()
        if count == best
    }
    fitting = [prefix for prefix in rank if rank[prefix] == min(rank.values())]
    with_head = [prefix for prefix in fitting if all(f"{prefix}{name}" in entries for name in wanted.head)]
    different: dict[tuple, str] = {}
    for prefix in with_head or fitting:
        different.setdefault(tuple(_identity(entries, prefix, name) for name in wanted.shapes), prefix)
    plain = [prefix for prefix in different.values() if not AVERAGED.search(prefix)]
    averaged = [prefix for prefix in different.values() if AVERAGED.search(prefix)]
    if len(plain or averaged) > 1:
        names = ", ".join(repr(prefix.rstrip(".")) for prefix in plain or averaged)
        raise InputError(
            f"{checkpoint.where} has several weights that fit {wanted.what}, under {names}; choose with "
            f"{KEY}={(plain or averaged)[-1].rstrip('.')} in {OPTIONS}"
        )
    chosen = (plain or averaged)[0]
    note = f"{checkpoint.where}: using the weights "
    note += f"under {chosen.rstrip('.')!r}" if chosen else "that are not averaged"
    if plain and averaged:
        other = averaged[0].rstrip(".")
        note += f", not the EMA weights under {other!r} ({KEY}={other} in {OPTIONS} takes those)"
    return chosen, (note,) if chosen or averaged else ()


def _identity(entries: Mapping[str, Entry], prefix: str, name: str) -> object:
    entry = entries.get(f"{prefix}{name}")
    return entry and entry.identity


def _hits(entries: Mapping[str, Entry], wanted: Wanted) -> Counter[str]:
    """Counts the names of a network's body under each prefix."""
    body = set(wanted.body)
    hits: Counter[str] = Counter()
    for key in entries:
        dots = [0, *(match.end() for match in re.finditer(r"\.", key))]
        hits.update(key[:dot] for dot in dots if key[dot:] in body)
    return hits


def _head_elsewhere(entries: Mapping[str, Entry], prefix: str, wanted: Wanted) -> dict[str, str]:
    """Returns the tensors of a head that stands beside the backbone, as mmpretrain saves it, by the network's names."""
    beside = [key for key in entries if not key.startswith(prefix) or not prefix]
    # "fc.weight" of "head.fc.weight": what the last module is called, wherever it was put.
    ends = {name: ".".join(name.split(".")[-2:]) for name in wanted.head}
    found = {
        name: [key for key in beside if f".{key}".endswith(f".{end}") and key not in wanted.shapes]
        for name, end in ends.items()
    }
    # Averaged weights have a head of their own, in the dict that holds them.
    home = next(entry.home for key, entry in entries.items() if key.startswith(prefix))
    near = {name: [key for key in keys if entries[key].home == home] for name, keys in found.items()}
    found = near if all(near.values()) else found
    if not all(len(keys) == 1 for keys in found.values()):
        return {}
    taken = {name: keys[0] for name, keys in found.items()}
    fits = (_without_ones(entries[key].shape) == _without_ones(wanted.shapes[name]) for name, key in taken.items())
    return taken if all(fits) else {}


def _without(parts: Sequence[str], key: str, entry: Entry) -> str:
    """Returns the key of a tensor without some parts of its name; the first stays, since it may be a prefix."""
    first, *more = key.removeprefix(entry.home).split(".")
    return entry.home + ".".join([first, *(part for part in more if part not in parts)])


def _of_another(checkpoint: Checkpoint, wanted: Wanted) -> InputError:
    """Builds the error for weights of another network, with names of both."""
    homes = Counter(entry.home for entry in checkpoint.entries.values())
    home = homes.most_common(1)[0][0] if homes else ""
    names = [key.removeprefix(home) for key, entry in checkpoint.entries.items() if entry.home == home]
    under = f" under {home.rstrip('.')!r} (the file has the keys {', '.join(checkpoint.keys[:8])})" if home else ""
    return InputError(
        f"{checkpoint.where} does not fit {wanted.what}; is it of another architecture? It has "
        f"{', '.join(names[:3])}, …{under}; the network has {', '.join([*wanted.shapes][:3])}, …; weights with another "
        "library's names load in a function of your own, passed as package.module:function"
    )
