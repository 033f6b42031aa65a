"""Finds the BiT network in a file of Keras, `.keras` or `.h5`, without TensorFlow and without running what is in it.

A `.keras` file is a zip: `config.json` describes the layers, and `model.weights.h5` has their variables, numbered in
each layer. In an `.h5` file, variables have names; the description, if the whole model was saved, is an attribute. How
the network was built decides how a variable is identified:

- a model of `bit_tf2.models.ResnetV2` by its attributes, such as `_unit_a_conv`;
- any other by the names of its layers or variables, which are those of the published checkpoints.
"""

import re
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from funmatch.errors import InputError, first_line
from funmatch.models.bit import STEM
from funmatch.models.checkpoints import signatures
from funmatch.models.keras.config import Layer, is_container, layer_names, pool_padding
from funmatch.models.keras.hdf5 import SIGNATURE, Hdf5File, open_hdf5
from funmatch.models.keras.layers import HUB, Front, read_back, read_front
from funmatch.models.tensorflow.identify import (
    SAVE_AGAIN,
    UNIT,
    by_full_names,
    check_shapes,
    no_network,
    some,
    unfolded,
)
from funmatch.models.tensorflow.nodes import Unclear
from funmatch.models.tensorflow.preprocessing import AS_GIVEN, BORDER, Inputs, applied, as_inputs, sided, unexpected
from funmatch.models.tensorflow.savedmodel import Savedmodel
from funmatch.models.weights import Lazily
from funmatch.runtime.disk.json_files import parse_json

CONFIG, WEIGHTS = "config.json", "model.weights.h5"
MAX_CONFIG = 1 << 26  # bytes; that of an R152 has one million
PIECE = 1 << 24  # bytes read and checked at once
TRAINING_STATE = {"optimizer", "optimizer_weights", "metrics", "_metrics", "compile_metrics", "_compile_metrics"}
POOLED = {"Flatten", "Reshape", "GlobalAveragePooling2D"}  # layers that leave pooled features as they are
STEM_NUMBERED = re.compile(r"keras_layer[^/]*/vars/\d+$")

NET = r"(?P<net>(?:[^/]+/)*?)"
UNITS = re.compile(
    NET + r"(?:layers/sequential_(?P<block>[1-4])|_blocks/sequential(?:_(?P<index>[1-3]))?)"
    r"/layers/(?P<unit>[a-z0-9_]+?)(?:_(?P<number>\d{1,2}))?/(?P<part>" + "|".join(UNIT) + r")(?:/layers/[a-z0-9_]+)?"
)
ROOT = re.compile(NET + r"(?:layers/sequential|_root)(?:/layers/[a-z0-9_]+)?")
PRE_HEAD = re.compile(NET + r"(?:layers|_pre_head)/group_norm[a-z0-9_]*")


def open_keras(path: Path) -> Savedmodel:
    """Finds the BiT network in a file of Keras, and its preprocessing.

    Raises:
        InputError: it is not such a file, is damaged, or holds anything else than one complete BiT network; or h5py is
            not installed.
    """
    return find_network(*open_parts(path))


def find_network(file: Hdf5File, config: dict[str, Any] | None) -> Savedmodel:
    """Finds the BiT network among the variables of a file.

    Args:
        file: the variables.
        config: what Keras wrote about the layers; None where there are weights alone.

    Raises:
        InputError: it holds anything else than one complete BiT network.
    """
    names, where = _names(file), str(file.path)
    keys = by_full_names(names, file.arrays, where)
    if keys is None:
        raise _refusal(where, file, config, names)
    shapes = check_shapes(keys, file.arrays, where)
    front, used, why = None, set(), ""
    inputs: Inputs | None = AS_GIVEN
    try:
        front, used = _front(file, config, keys[STEM])
        inputs, is_plain = as_inputs(front.image) if front else (AS_GIVEN, True)
    except InputError:
        raise
    except (ValueError, TypeError, IndexError, KeyError, AttributeError, OverflowError) as error:
        # Of the description of the layers, which is foreign: values of types that no one thought of.
        why = str(error) if isinstance(error, Unclear) else "the description of its layers is damaged"
        inputs, is_plain = None, False
        used = {key for key in names if not names[key].endswith(("/kernel", "/bias", "/gamma", "/beta"))}
    # Weights left over mean that the model computes something else, which we would silently leave out.
    if left := set(names) - set(keys.values()) - used:
        raise InputError(f"{where} holds more than a BiT network: {some(left)}; {SAVE_AGAIN}")
    side, notes = sided(front.side) if front and front.side else (None, ())
    if front and config:
        notes += _notes(config, front.network, keys["head/kernel"], where)
    is_plain_conv = front is not None and front.network.kind == "Conv2D"

    def read(name: str) -> np.ndarray:
        array = file.read(keys[name]).reshape(shapes[name])
        return unfolded(array, f"{where}: {name}") if is_plain_conv and "standardized" in name else array

    return Savedmodel(Lazily(keys, read), inputs, is_plain, why, notes, side, pool_padding(config))


def open_parts(path: Path) -> tuple[Hdf5File, dict[str, Any] | None]:
    """Opens a file; returns its variables, and the description of its layers, None where it has weights alone."""
    try:
        with open(path, "rb") as file:
            start = file.read(len(SIGNATURE))
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror})") from None
    # By the first bytes: versions of Keras before 3 wrote HDF5 under the name .keras, too.
    if start.startswith(b"PK"):
        return _open_zip(path)
    if start != SIGNATURE:
        what = signatures.describe(path) or "neither a zip nor an HDF5 file"
        raise InputError(f"{path} is not a file of Keras, but {what}")
    file = open_hdf5(path)
    text = file.texts.get("", {}).get("model_config")
    return file, parse_config(path, text) if text else None


def _open_zip(path: Path) -> tuple[Hdf5File, dict[str, Any]]:
    try:
        with zipfile.ZipFile(path) as archive:
            held = {info.filename: info for info in archive.infolist()}
            if missing := [name for name in (CONFIG, WEIGHTS) if name not in held]:
                raise InputError(f"{path} is a zip without {' and '.join(missing)}, so it is not a file of Keras")
            # A zip can unpack to any size; Keras writes its parts as they are.
            if any(held[name].compress_type or held[name].flag_bits & 1 for name in (CONFIG, WEIGHTS)):
                raise InputError(f"{path} is compressed or encrypted, as Keras writes none; save the model again")
            if held[CONFIG].file_size > MAX_CONFIG:
                raise InputError(f"{path}: its {CONFIG} has {held[CONFIG].file_size:,} bytes, which is too much")
            text, info = archive.read(CONFIG), held[WEIGHTS]
        with open(path, "rb") as file:
            file.seek(info.header_offset)
            header = struct.unpack("<4s22xHH", file.read(30))
            start = file.tell() + header[1] + header[2]
            file.seek(start)
            found, left = 0, info.file_size
            while left and (piece := file.read(min(left, PIECE))):
                found, left = zlib.crc32(piece, found), left - len(piece)
    except InputError:
        raise
    except Exception as error:  # a damaged zip fails in many ways
        raise InputError(f"{path} is damaged: {first_line(error)}; copy it again") from None
    if header[0] != b"PK\x03\x04" or left or found != info.CRC:
        raise InputError(f"{path} is damaged: the checksum of its {WEIGHTS} differs; copy it again")
    return open_hdf5(path, start, info.file_size), parse_config(path, text)


def parse_config(path: Path, text: str | bytes) -> dict[str, Any]:
    try:
        return parse_json(text, {"class_name": str, "config": dict | list})
    except ValueError as error:
        raise InputError(f"{path}: the description of its layers is damaged ({first_line(error)})") from None


def _names(file: Hdf5File) -> dict[str, str]:
    """Returns the weights' names by their paths in the file, those of BiT as in published checkpoints."""
    weights = {
        path: array
        for path, array in file.arrays.items()
        if array.is_weight and path.split("/")[0] not in TRAINING_STATE
    }
    counts = Counter(path.rpartition("/vars/")[0] for path in weights)
    layers = [path.rpartition("/vars/")[0] for path in weights]
    nets = {found["net"] for layer in layers if (found := UNITS.fullmatch(layer))}
    names = {}
    for path, array in weights.items():
        layer, is_numbered, index = path.rpartition("/vars/")
        if is_numbered:
            place = _place(layer, nets, file.texts)
            kinds = ("gamma", "beta") if len(array.shape) == 1 and counts[layer] == 2 else ()
            first = file.arrays.get(f"{layer}/vars/0")
            if first and len(first.shape) > 1 and counts[layer] <= 2:
                kinds = ("kernel", "bias")
            name = f"{place}/{kinds[int(index)] if index in ('0', '1') and kinds else f'variable{index}'}"
        else:
            # Before the name of a variable is the group of its layer.
            parts = path.removeprefix("model_weights/").removesuffix(":0").split("/")
            name = "/".join(parts[1:] if len(parts) > 2 else parts)
        names[path] = name
    return names


def _place(layer: str, nets: set[str], texts: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the published name of a layer, by its place in a `ResnetV2`, or its own name where it has one."""
    if found := UNITS.fullmatch(layer):
        block = int(found["block"] or int(found["index"] or 0) + 1)
        unit, part = int(found["number"] or 0) + 1, found["part"]
        is_norm = "group_norm" in layer.rpartition(part)[2]
        kind = "group_norm" if is_norm else "standardized_conv2d"
        return f"{found['net']}block{block}/unit{unit:02}/{UNIT[part]}/{kind}"
    for pattern, name in ((ROOT, "root_block/standardized_conv2d"), (PRE_HEAD, "group_norm")):
        if (found := pattern.fullmatch(layer)) and found["net"] in nets:
            return f"{found['net']}{name}"
    parts = layer.split("/")
    own = [texts.get("/".join([*parts[: i + 1], "vars"]), {}).get("name") or part for i, part in enumerate(parts)]
    return "/".join(name for name, part in zip(own, parts, strict=True) if part != "layers")


def _front(file: Hdf5File, config: Mapping[str, Any] | None, stem: str) -> tuple[Front | None, set[str]]:
    """Returns what is before the network, and the variables that it uses; None where there is only the network.

    Raises:
        Unclear: the file does not show it.
    """
    if config is None or not is_container(config):
        found = ROOT.fullmatch(stem.rpartition("/vars/")[0])
        if (found and not found["net"]) or stem.removeprefix("model_weights/").startswith("root_block/"):
            return None, set()
        raise Unclear(
            "it holds weights alone"
            if config is None
            else f"what its class {config['class_name']} does to them is not in the file"
        )
    used: set[str] = set()

    def read(layer: Layer) -> list[np.ndarray]:
        paths = sorted(path for path, array in file.arrays.items() if array.is_weight and layer.holds(path))
        used.update(paths)
        return [file.read(path) for path in paths]

    front = read_front(config, stem, read)
    border, settings = list(front.image.border), front.network.config
    if "kernel_size" in settings:
        shape = settings.get("strides"), settings.get("padding")
        if border != [BORDER] * 4 or shape != ([2, 2], "valid"):
            raise Unclear(
                f"its first convolution differs from BiT's (padding {shape[1]}, {border}; strides {shape[0]})"
            )
    elif any(border):
        raise Unclear("its layers pad images before the network")
    return front, used


def _notes(config: Mapping[str, Any], network: Layer, head: str, where: str) -> tuple[str, ...]:
    """Returns notes about what a model does to the logits of its head.

    Raises:
        InputError: it changes the features of a module before they reach the head.
    """
    between, after = read_back(config, network, head)
    # Behind the first convolution of a network of plain layers are the others, which have BiT's names.
    if network.kind == HUB and (changed := [kind for kind in between if kind not in POOLED]):
        raise unexpected(changed[0], where)
    return applied(after)


def _refusal(where: str, file: Hdf5File, config: Mapping[str, Any] | None, names: Mapping[str, str]) -> InputError:
    """Builds the error for a file in which no BiT network was found."""
    if any(STEM_NUMBERED.search(path) and array.shape[:3] == (7, 7, 3) for path, array in file.arrays.items()):
        return InputError(
            f"{where} has the variables of a module of TensorFlow Hub by number, and not by name, so that gamma and "
            "beta cannot be told apart; in TensorFlow, load the model, save it with tf.saved_model.save(model, "
            "folder), and pass savedmodel:folder"
        )
    return no_network(where, [*names.values(), *(layer_names(config) if config else ())])
