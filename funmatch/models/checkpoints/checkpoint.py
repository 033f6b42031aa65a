"""Opens a file of weights, whatever its trainer put around them, and lists the tensors in it."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
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
INDEX = ".index.json"
FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""Files of weights in a folder, in timm's and the Hugging Face Hub's names; the first that is there is read."""


@dataclass(frozen=True)
class Entry:
    """Tensor of a checkpoint.

    Attributes:
        home: keys of the dict that holds it, each followed by a dot: "state_dict.".
        shape: of the tensor.
        identity: equal for tensors that are the same memory.
        read: reads it.
    """

    home: str
    shape: tuple[int, ...]
    identity: Any
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """Tensors of a file of weights, none of which has been read yet.

    Attributes:
        where: path, for messages.
        entries: tensors by home and name: "state_dict.fc.weight".
        keys: of the object that was saved.
        modules: classes of modules that were pickled as a whole.
    """

    where: str
    entries: dict[str, Entry]
    keys: list[str] = field(default_factory=list)
    modules: list[str] = field(default_factory=list)


def weights_in(folder: Path) -> Path | None:
    """Returns the file of weights in a folder of timm's or the Hub's layout; None if there is none."""
    return next((folder / name for name in FILES if (folder / name).is_file()), None)


def open_checkpoint(path: Path) -> Checkpoint:
    """Opens a file of `safetensors`, of `torch.save`, or the index of such files.

    Only tensors are read: what stands beside them is left alone, and nothing in a file is ever run.

    Raises:
        InputError: the file is missing or holds something else.
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
    return found


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
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    entries = {name: Entry("", shape, name, partial(read, name)) for name, shape in shapes.items()}
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
        if isinstance(value, str):
            modules.append(value)
            continue
        for key, inner in value.items():
            stored = torch_files.as_stored(inner) if isinstance(key, str) else None
            if stored and f"{home}{key}" not in entries:
                entries[f"{home}{key}"] = Entry(home, stored.shape, stored, partial(file.read, stored, key))
    root = _dict_of(file.root) or {}
    return Checkpoint(str(path), entries, [str(key) for key in root if isinstance(key, str | int)], modules)


def _dicts(value: Any, home: str, depth: int) -> Iterator[tuple[str, dict[Any, Any] | str]]:
    """Yields the dicts in a value with the keys that lead to them; for modules that were pickled, their class."""
    if isinstance(value, Described) and isinstance(value.state, dict) and "_modules" in value.state:
        yield home, value.name
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
