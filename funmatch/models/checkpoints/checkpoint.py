"""Opens a file of weights, whatever its trainer put around them, and lists the tensors in it."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from funmatch.errors import InputError, first_line
from funmatch.models.checkpoints import signatures, torch_files
from funmatch.models.checkpoints.pickled import Described
from funmatch.runtime.disk.json_files import parse_json

MAX_DEPTH = 3  # of dicts around a state dict
MAX_PREFIXES = 4  # of networks in one state dict, for messages
MAX_LIST = 16  # entries of a list that may be state dicts: those of an optimizer are more
INDEX = ".index.json"
FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""Files of weights in a folder, in timm's and the Hugging Face Hub's names; the first that is there is read."""
KEY = "weights_key"
"""Argument of a network, beside those of its constructor, that chooses among the weights of its file."""
TYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Types of safetensors whose names are not those of torch in small letters."""


@dataclass(frozen=True)
class Entry:
    """Tensor of a checkpoint.

    Attributes:
        home: keys of the dict that holds it, each followed by a dot: "state_dict.".
        shape, dtype: of the tensor; the type by the end of torch's name, "float16".
        identity: equal for tensors that are the same memory.
        read: reads it.
    """

    home: str
    shape: tuple[int, ...]
    dtype: str
    identity: Any
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """Tensors of a file of weights, none of which has been read yet.

    Attributes:
        where: path, for messages.
        entries: tensors by home and name: "state_dict.fc.weight".
        keys: of the object that was saved.
        modules: classes of modules that were pickled as a whole; their tensors are among the entries.
    """

    where: str
    entries: dict[str, Entry]
    keys: list[str] = field(default_factory=list)
    modules: list[str] = field(default_factory=list)


def weights_in(folder: Path) -> Path | None:
    """Returns the file of weights in a folder of timm's or the Hub's layout; None if there is none."""
    return next((folder / name for name in FILES if (folder / name).is_file()), None)


def open_checkpoint(path: Path, key: Any = None) -> Checkpoint:
    """Opens a file of `safetensors`, of `torch.save`, or the index of such files.

    Only tensors are read: what stands beside them is left alone, and nothing in a file is ever run.

    Args:
        path: of the file.
        key: under which the tensors are to stand, or several joined by dots, "teacher.backbone"; None takes all.

    Raises:
        InputError: the file is missing or holds something else, or nothing under the key.
    """
    if path.parts and path.parts[0] in ("http:", "https:"):
        raise InputError(f"{path} is an address; download the file and pass its path")
    if not path.is_file():
        raise InputError(f"there is no weights file {path}{_about_folder(path) if path.is_dir() else ''}")
    try:
        found = _open_index(path) if path.name.endswith(INDEX) else _open(path)
    except InputError:
        raise
    except Exception as error:  # each format fails in many ways of its own
        if what := signatures.describe(path):
            raise InputError(f"{path} is {what}") from None
        raise InputError(
            f"{path} is not a state dict in .safetensors or .pt format, or is damaged ({first_line(error)})"
        ) from error
    if not found.entries and not found.modules:
        held = f"it has the keys {_listed(found.keys)}" if found.keys else "it holds no dict"
        raise InputError(f"{path} is not a state dict; expected a dict of tensors by name, but {held}")
    return found if key is None else _under(found, key)


def _under(checkpoint: Checkpoint, key: Any) -> Checkpoint:
    """Returns a checkpoint with only those tensors that stand under a key; if there are none, `InputError`."""
    key = str(key).strip(".")
    entries = {name: entry for name, entry in checkpoint.entries.items() if name.startswith(f"{key}.")}
    # Or from further inside, as a prefix in the state dict.
    entries = entries or {name: entry for name, entry in checkpoint.entries.items() if f".{key}." in name}
    if not key or not entries:
        raise InputError(f"{checkpoint.where} has no weights under {KEY}={key}; it has {_listed(_keys_in(checkpoint))}")
    return replace(checkpoint, entries=entries)


def _keys_in(checkpoint: Checkpoint) -> list[str]:
    """Returns the keys that weights may be chosen by: those of dicts, and few prefixes within one."""
    found: dict[str, None] = {}
    for home in dict.fromkeys(entry.home for entry in checkpoint.entries.values()):
        names = [name.removeprefix(home) for name, entry in checkpoint.entries.items() if entry.home == home]
        prefixes = dict.fromkeys(name.partition(".")[0] for name in names if "." in name)
        # More are the modules of a network.
        inner = [f"{home}{prefix}" for prefix in prefixes] if len(prefixes) <= MAX_PREFIXES else []
        found |= dict.fromkeys([*([home.rstrip(".")] if home else []), *inner])
    return [*found]


def _open(path: Path) -> Checkpoint:
    # By the first bytes, because people rename files.
    with open(path, "rb") as file:
        start = file.read(9)
    if start.startswith(b"PK") and (opened := torch_files.open_zip(path)):
        return _listing(path, opened)
    # A safetensors file begins with the length of its header in JSON.
    if start[8:9] == b"{":
        return _open_safetensors(path)
    if signatures.describe(path):
        raise ValueError("not weights")
    return _listing(path, torch_files.open_legacy(path))


def _open_safetensors(path: Path) -> Checkpoint:
    def read(name: str) -> Tensor:
        # Opened for each tensor, because pages of a mapped file count as memory until the file is closed.
        with safe_open(path, "pt") as file:
            return file.get_tensor(name).clone()

    with safe_open(path, "pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        about = {name: (tuple(each.get_shape()), each.get_dtype()) for name, each in slices.items()}
    entries = {
        name: Entry("", shape, TYPES.get(kind, kind.lower()), name, partial(read, name))
        for name, (shape, kind) in about.items()
    }
    return Checkpoint(str(path), entries, list(entries))


def _open_index(path: Path) -> Checkpoint:
    """Opens the files of weights that an index names; they are in its folder."""
    places = parse_json(path.read_bytes(), {"weight_map": dict[str, str]})["weight_map"]
    # A name, not a path: an index must not lead out of its folder.
    shards = {name: open_checkpoint(path.parent / Path(name).name) for name in dict.fromkeys(places.values())}
    entries = {name: shards[shard].entries[name] for name, shard in places.items() if name in shards[shard].entries}
    if missing := [name for name in places if name not in entries]:
        raise InputError(f"{path} lists {_listed(missing)}, which the files beside it do not have")
    return Checkpoint(str(path), entries, list(entries))


def _listing(path: Path, file: torch_files.TorchFile) -> Checkpoint:
    """Lists the tensors in the dicts of a file of `torch.save`."""
    entries: dict[str, Entry] = {}
    modules: list[str] = []
    for home, value in _dicts(file.root, "", 0):
        if isinstance(value, Described):
            modules.append(value.name)
            value = module_state(value)
        for key, inner in value.items():
            stored = torch_files.as_stored(inner) if isinstance(key, str) else None
            if stored and f"{home}{key}" not in entries:
                kind = str(stored.dtype).removeprefix("torch.")
                entries[f"{home}{key}"] = Entry(home, stored.shape, kind, stored, partial(file.read, stored, key))
    root = _dict_of(file.root) or {}
    return Checkpoint(str(path), entries, [str(key) for key in root if isinstance(key, str | int)], modules)


def module_state(module: Described, prefix: str = "") -> dict[str, Any]:
    """Returns the state dict of a module that was pickled as a whole, as torch makes it from the same attributes."""
    state: dict[str, Any] = module.state
    hidden = state.get("_non_persistent_buffers_set", ())
    # As protocol 2 writes a set: a call with the list of its elements.
    hidden = hidden.args[0] if isinstance(hidden, Described) and hidden.args else hidden
    own = {**state.get("_parameters", {}), **state.get("_buffers", {})}
    found = {f"{prefix}{name}": tensor for name, tensor in own.items() if name not in hidden}
    for name, child in state["_modules"].items():
        if _is_module(child):
            found |= module_state(child, f"{prefix}{name}.")
    return found


def _is_module(value: Any) -> bool:
    return isinstance(value, Described) and isinstance(value.state, dict) and "_modules" in value.state


def _dicts(value: Any, home: str, depth: int) -> Iterator[tuple[str, dict[Any, Any] | Described]]:
    """Yields the dicts in a value, and the modules that were pickled, with the keys that lead to them."""
    if _is_module(value):
        yield home, value
        return
    found = _dict_of(value)
    if found is None or depth > MAX_DEPTH:
        return
    yield home, found
    for key, inner in found.items():
        if torch_files.as_stored(inner) is None:
            yield from _dicts(inner, f"{home}{key}.", depth + 1)


def _dict_of(value: Any) -> dict[Any, Any] | None:
    """Returns the entries of a dict, or of an object that is one; else its attributes."""
    if isinstance(value, Described):
        return value.entries or (value.state if isinstance(value.state, dict) else None)
    if isinstance(value, list | tuple) and len(value) <= MAX_LIST:
        return {str(number): inner for number, inner in enumerate(value)}
    return value if isinstance(value, dict) else None


def _about_folder(folder: Path) -> str:
    """Returns what to say of a folder where a file was expected."""
    if found := weights_in(folder):
        return f": it is a folder; pass {found}"
    names = sorted(path.name for path in folder.iterdir())
    if ".metadata" in names and any(name.endswith(".distcp") for name in names):
        return (
            ": it is a folder of torch.distributed.checkpoint; join its files first: "
            "python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER weights.pth"
        )
    if "zero_to_fp32.py" in names or any(re.fullmatch(r"global_step\d+", name) for name in names):
        return ": it is a folder of DeepSpeed; join its files first: python zero_to_fp32.py . weights.pth"
    return ": it is a folder"


def _listed(names: list[str]) -> str:
    return ", ".join(names[:6]) + (", …" if len(names) > 6 else "") or "none"
