"""Opens files of `torch.save`, in its zip format or the one before, and reads single tensors from them on access."""

import math
import os
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from funmatch.errors import InputError, first_line
from funmatch.models.checkpoints.pickled import Described, Global, read_pickle

MAGIC = 0x1950A86A20F9469CFC6C  # the first object in files of the old format
STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "UntypedStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "QInt8Storage": torch.qint8,
    "QUInt8Storage": torch.quint8,
    "QInt32Storage": torch.qint32,
}
HOW_TO_SAVE = "where it was made, save its tensors alone: torch.save(model.state_dict(), 'weights.pth')"


@dataclass(frozen=True)
class Storage:
    """Memory of one or more tensors: its key in the file, type, and first element for a view of the old format."""

    key: str
    dtype: torch.dtype
    start: int = 0


@dataclass(frozen=True)
class Stored:
    """Tensor in a file.

    Attributes:
        storage: its memory, or an array of NumPy.
        dtype, shape, strides: of the tensor.
        start: of its first element in the storage, elements.
        kind: what it is instead of a dense tensor of numbers; empty for such.
    """

    storage: Any
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...] = ()
    start: int = 0
    kind: str = ""


@dataclass(frozen=True)
class TorchFile:
    """Content of a file of `torch.save`.

    Attributes:
        root: the object that was saved; see `pickled.read_pickle`. Its tensors are `Stored`.
        read: reads one of them, whose name is for messages.
    """

    root: Any
    read: Callable[[Stored, str], Tensor]


def open_zip(path: Path) -> TorchFile | None:
    """Opens a file in the zip format; None if it is another zip."""
    with zipfile.ZipFile(path) as archive:
        records = {info.filename: info for info in archive.infolist()}
        main = next((name for name in records if name.count("/") == 1 and name.endswith("/data.pkl")), None)
        if main is None:
            return None
        folder = main.removesuffix("data.pkl")
        if f"{folder}constants.pkl" in records:
            raise InputError(
                f"{path} is a TorchScript program, which is not run; save the tensors in it: "
                "torch.save(torch.jit.load(path).state_dict(), 'weights.pth')"
            )
        if f"{folder}byteorder" in records and archive.read(f"{folder}byteorder") != b"little":
            raise InputError(f"{path} was saved on a big-endian machine; {HOW_TO_SAVE} on another")
        root = read_pickle(BytesIO(archive.read(main)), MAKERS, _storage)
        places = {name.removeprefix(f"{folder}data/"): info for name, info in records.items()}
    return TorchFile(
        root, lambda stored, name: _read(f"{path}: {name}", path, stored, partial(_place_in_zip, path, places))
    )


def open_legacy(path: Path) -> TorchFile:
    """Opens a file of the format before zip, or a plain pickle, whose arrays of NumPy are read."""
    storages: dict[str, Storage] = {}

    def storage(reference: Any) -> Any:
        found = _storage(reference)
        if isinstance(found, Storage):
            storages.setdefault(found.key, found)
        return found

    with open(path, "rb") as file:
        root = read_pickle(file, MAKERS)
        if root != MAGIC:
            return TorchFile(root, lambda stored, name: _read(f"{path}: {name}", path, stored, lambda *_: (0, 0)))
        _, system = read_pickle(file, MAKERS), read_pickle(file, MAKERS)
        if not system.get("little_endian", True):
            raise InputError(f"{path} was saved on a big-endian machine; {HOW_TO_SAVE} on another")
        root, keys = read_pickle(file, MAKERS, storage), read_pickle(file, MAKERS)
        places, end = {}, path.stat().st_size
        for key in keys:
            # Each storage is preceded by its number of elements.
            count = struct.unpack("<q", file.read(8))[0] if file.tell() + 8 <= end else -1
            size = count * storages[key].dtype.itemsize
            if count < 0 or file.tell() + size > end:
                raise InputError(f"{path} is incomplete: it ends before its last tensor; download or copy it again")
            places[key] = (file.tell(), size)
            file.seek(size, os.SEEK_CUR)
    return TorchFile(root, lambda stored, name: _read(f"{path}: {name}", path, stored, lambda _, key: places[key]))


def as_stored(value: Any) -> Stored | None:
    """Returns a tensor of a file, also if it is an array of NumPy; None for anything else."""
    if isinstance(value, Stored):
        return value
    if not isinstance(value, Described):
        return None
    if value.name.endswith("multiarray._reconstruct") and isinstance(value.state, tuple) and len(value.state) == 5:
        _, shape, dtype, fortran, data = value.state
    elif value.name.endswith("numeric._frombuffer") and len(value.args) == 4:
        data, dtype, shape, order = value.args
        fortran = order == "F"
    else:
        return None
    code = dtype.args[0] if isinstance(dtype, Described) and dtype.args else None
    # Objects in an array would be pickles, and other kinds are not numbers.
    if not isinstance(data, bytes | bytearray) or not isinstance(code, str) or code[:1] not in "fiub":
        return None
    order = dtype.state[1] if isinstance(dtype.state, tuple) and dtype.state[1:2] in (("<",), (">",)) else "<"
    array = np.frombuffer(data, np.dtype(f"{order}{code}")).reshape(shape, order="F" if fortran else "C")
    array = np.array(array, array.dtype.newbyteorder("="))
    return Stored(_Array(array), torch.from_numpy(array).dtype, tuple(array.shape))


def _read(what: str, path: Path, stored: Stored, place: Callable[[BinaryIO, str], tuple[int, int] | bytes]) -> Tensor:
    """Reads one tensor; `place` returns the offset and size of a storage in bytes, or its content."""
    if stored.kind:
        raise InputError(f"{what} is {stored.kind}; expected a dense tensor of numbers")
    if isinstance(stored.storage, _Array):
        return torch.from_numpy(stored.storage.array)
    if not math.prod(stored.shape):
        return torch.empty(stored.shape, dtype=stored.dtype)
    span = 1 + sum((size - 1) * stride for size, stride in zip(stored.shape, stored.strides, strict=True))
    first, count = stored.start * stored.dtype.itemsize, span * stored.dtype.itemsize
    first += stored.storage.start * stored.storage.dtype.itemsize
    with open(path, "rb") as file:
        found = place(file, stored.storage.key)
        size = len(found) if isinstance(found, bytes) else found[1]
        if first < 0 or first + count > size or min(stored.strides, default=0) < 0:
            raise InputError(f"{what} lies outside its storage; the file is damaged")
        if isinstance(found, bytes):
            memory = torch.frombuffer(bytearray(found[first : first + count]), dtype=torch.uint8)
        else:
            memory = torch.empty(count, dtype=torch.uint8)
            file.seek(found[0] + first)
            if file.readinto(memory.numpy().data) != count:
                raise InputError(f"{what} is incomplete, as the file ends before; download or copy it again")
    return memory.view(stored.dtype).as_strided(stored.shape, stored.strides)


def _place_in_zip(path: Path, places: dict[str, zipfile.ZipInfo], file: BinaryIO, key: str) -> tuple[int, int] | bytes:
    """Returns where a storage lies in the file, or its content if that is compressed."""
    try:
        info = places[key]
        if info.compress_type != zipfile.ZIP_STORED:
            with zipfile.ZipFile(path) as archive:
                return archive.read(info)
        # Not by `ZipFile.open`: torch can be told to leave out the checksums that it compares.
        file.seek(info.header_offset)
        name, extra = struct.unpack("<26xHH", file.read(30))
    except Exception as error:  # a damaged zip fails in many ways
        raise InputError(f"{path} is damaged ({first_line(error)}); download or copy it again") from None
    return info.header_offset + 30 + name + extra, info.file_size


@dataclass(eq=False)
class _Array:
    """Array of NumPy; equal only to itself."""

    array: np.ndarray


def _storage(reference: Any) -> Any:
    """Returns what stands for a persistent reference."""
    if isinstance(reference, tuple) and len(reference) >= 5 and reference[0] == "storage":
        kind = str(getattr(reference[1], "name", "")).rpartition(".")[2]
        view = reference[5] if len(reference) > 5 else None
        return Storage(str(reference[2]), STORAGES[kind], view[1] if view else 0)
    # The old format refers to the class of a module, with its source.
    return reference[1] if isinstance(reference, tuple) and reference[:1] == ("module",) else reference


def _tensor(storage: Any, start: int, shape: tuple, strides: tuple, *more: Any) -> Stored:
    if not isinstance(storage, Storage):
        return _other("saved by pickle alone, as a program; save it with torch.save")
    # From version 2, `more` is requires_grad, hooks, and then whether a lazy sign or conjugation is on.
    flags = more[2] if len(more) > 2 else None
    kind = "negated or conjugated lazily" if isinstance(flags, dict) and any(flags.values()) else ""
    return Stored(storage, storage.dtype, tuple(shape), tuple(strides), start, kind)


def _tensor_v3(storage: Any, start: int, shape: tuple, strides: tuple, _: Any, __: Any, dtype: Global, *more: Any):
    found = getattr(torch, dtype.name.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"unknown type {dtype.name}")
    return replace(_tensor(storage, start, shape, strides, None, None, *more), dtype=found)


def _other(kind: str, *_: Any) -> Stored:
    return Stored(None, torch.float32, (), kind=kind)


def _subclass(make: Any, _: Any, args: tuple, *__: Any) -> Any:
    return MAKERS[make.name](*args) if getattr(make, "name", None) in MAKERS else _other("of a class of its own")


MAKERS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": lambda data, *_: data,
    "torch._utils._rebuild_device_tensor_from_numpy": lambda data, *_: data,
    "torch._tensor._rebuild_from_type_v2": _subclass,
    "torch._utils._rebuild_qtensor": partial(_other, "quantized"),
    "torch._utils._rebuild_sparse_tensor": partial(_other, "sparse"),
    "torch._utils._rebuild_nested_tensor": partial(_other, "nested"),
    "torch._utils._rebuild_wrapper_subclass": partial(_other, "of a class of its own"),
    "torch._utils._rebuild_meta_tensor_no_storage": partial(_other, "without values (on the device meta)"),
    # Python 3 writes bytes so in pickles that Python 2 could read, and torch chooses such.
    "_codecs.encode": lambda text, *_: text.encode("latin-1"),
}
