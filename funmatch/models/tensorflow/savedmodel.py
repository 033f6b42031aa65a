"""Finds the BiT network in a SavedModel of TensorFlow: which variable is which kernel.

Variables are in a bundle, together with a `TrackableObjectGraph`: the model's objects, the attributes by which they
refer to each other, and which of them are variables. How the model was saved decides how a variable is identified:

- a model of `bit_tf2.models.ResnetV2` by its attributes, such as `_blocks/0/…/_unit_a_conv/kernel`;
- a module of TensorFlow Hub by its variables' full names, `resnet/block1/unit01/a/…/kernel`;
- an export of Keras by the order of its list, if that has BiT's shapes in the order of definition.

What happens to images before the first kernel is read from the graph of operations, see `preprocessing`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from funmatch.data.formats import protobuf
from funmatch.data.formats.protobuf import Damaged
from funmatch.errors import InputError
from funmatch.models.bit import STEM, layout
from funmatch.models.tensorflow.bundle import Bundle, open_bundle, read, read_strings
from funmatch.models.tensorflow.identify import (
    PLACES,
    SAVE_AGAIN,
    UNIT,
    by_full_names,
    check_shapes,
    check_unique,
    no_network,
    some,
    unfolded,
)
from funmatch.models.tensorflow.preprocessing import (
    AS_GIVEN,
    Inputs,
    after_head,
    input_preprocessing,
    pool_padding,
    sided,
)
from funmatch.models.weights import Lazily

GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"
NETWORK = {"_root", "_blocks", "_pre_head", "_head"}

# Attributes that lead to the state of training, and to second references to what a model holds anyway.
TRAINING_STATE = {"optimizer", "_optimizer", "keras_api", "metrics", "_metrics", "compiled_metrics", "_all_variables"}


@dataclass(frozen=True)
class Node:
    """Object of the graph.

    Attributes:
        children: objects that it refers to, by attribute.
        keys: of the tensors in the bundle that are its state.
        name: of the variable, if the object is one.
        slots: objects that an optimizer keeps for a variable.
    """

    children: dict[str, int]
    keys: list[str]
    name: str | None
    slots: list[int]


Graph = list[Node]


@dataclass(frozen=True)
class Savedmodel:
    """BiT network in a SavedModel.

    Attributes:
        arrays: by the names of published checkpoints, without `resnet/`; each is read on access. Kernels are (height,
            width, in, out), `head/kernel` is (in, classes).
        inputs: mean and standard deviation of its input, for images in [0, 1]; None where they are unknown.
        is_plain: whether its graph passes images on unchanged, so that it may have been trained on any range.
        why: reason why inputs are unknown.
        notes: sentences that a user should know.
        side: of the images that the model itself makes of its input, or that alone it takes, pixels; None: any.
        pool_padding: of its first max-pool, one of `bit.STEM_TYPES`.
    """

    arrays: Mapping[str, np.ndarray]
    inputs: Inputs | None
    is_plain: bool = False
    why: str = ""
    notes: tuple[str, ...] = ()
    side: int | None = None
    pool_padding: str = "zeros"


def open_savedmodel(folder: Path) -> Savedmodel:
    """Finds the BiT network in a SavedModel, and its preprocessing.

    Raises:
        InputError: it is not a SavedModel, is damaged, or holds anything else than one complete BiT network.
    """
    if not (folder / "saved_model.pb").is_file():
        raise InputError(f"{folder} has no saved_model.pb; expected a SavedModel, a folder that TensorFlow saved")
    bundle = open_bundle(folder / "variables" / "variables")
    if GRAPH not in bundle.entries:
        raise InputError(f"{folder} has no graph of objects; expected a SavedModel of TensorFlow 2, not of 1")
    try:
        graph = _read_graph(b"".join(read_strings(bundle, GRAPH)))
    except Damaged as error:
        raise InputError(f"the graph of objects in {folder} is damaged: {error}; copy it again") from None
    preprocessing = input_preprocessing(folder, bundle)  # before weights are counted: it says which are used
    ignored = _training_keys(graph) | preprocessing.before
    if preprocessing.used is not None:
        ignored |= set(bundle.entries) - preprocessing.used  # the output does not depend on these
    weights = {key: name for key, name in _variables(graph, bundle, folder).items() if key not in ignored}
    is_alone, keys = _network_keys(graph, bundle, weights, str(folder))
    shapes = check_shapes(keys, bundle.entries, str(folder))
    # Weights left over mean that the model computes something else, which we would silently leave out.
    if left := {key for key, entry in bundle.entries.items() if entry.is_weight} - ignored - set(keys.values()):
        raise InputError(f"{folder} holds more than a BiT network: {some(left)}; {SAVE_AGAIN}")

    def read_array(name: str) -> np.ndarray:
        array = read(bundle, keys[name]).reshape(shapes[name])
        is_plain = preprocessing.is_folded and "standardized" in name
        return unfolded(array, f"{folder}: {name}") if is_plain else array

    arrays = Lazily(keys, read_array)
    if preprocessing.is_missing and is_alone:  # there is nothing around it that could change images
        return Savedmodel(arrays, AS_GIVEN, is_plain=True)
    if preprocessing.stem and keys[STEM] not in preprocessing.stem:
        return Savedmodel(arrays, None, why="its graph uses another network")
    side, notes = sided(preprocessing.size) if preprocessing.size else (None, ())
    notes += after_head(preprocessing, keys["head/kernel"], keys["head/bias"], str(folder))
    padding = pool_padding(preprocessing.graph) if preprocessing.graph else "zeros"
    return Savedmodel(arrays, preprocessing.inputs, preprocessing.is_plain, preprocessing.why, notes, side, padding)


def _read_graph(message: bytes) -> Graph:
    graph = [_read_node(part) for part in protobuf.messages(protobuf.parse(message), 1)]
    if not graph or any(not 0 <= i < len(graph) for node in graph for i in [*node.children.values(), *node.slots]):
        raise Damaged("it refers to an object that is missing")
    return graph


def _read_node(message: bytes) -> Node:
    fields = protobuf.parse(message)
    # Fields of a TrackableObject: 1 children, 2 attributes (name, full name, key), 3 slot variables.
    children = [protobuf.parse(child) for child in protobuf.messages(fields, 1)]
    attributes = [protobuf.parse(attribute) for attribute in protobuf.messages(fields, 2)]
    names = [protobuf.text(a, 2) for a in attributes if protobuf.text(a, 1) == "VARIABLE_VALUE"]
    return Node(
        children={protobuf.text(child, 2): protobuf.number(child, 1) for child in children},
        keys=[protobuf.text(attribute, 3) for attribute in attributes],
        name=names[0] if names else None,
        slots=[protobuf.number(protobuf.parse(slot), 3) for slot in protobuf.messages(fields, 3)],
    )


def _reachable(graph: Graph, skipped: set[str]) -> set[int]:
    """Returns the objects that the first one refers to, directly or not, without attributes of some names."""
    reached, waiting = {0}, [0]  # not recursive: objects refer to each other in circles
    while waiting:
        for edge, child in graph[waiting.pop()].children.items():
            if edge not in skipped and child not in reached:
                reached.add(child)
                waiting.append(child)
    return reached


def _training_keys(graph: Graph) -> set[str]:
    """Returns the keys of tensors that only an optimizer or a metric refers to."""
    model = _reachable(graph, TRAINING_STATE)
    slots = {slot for node in graph for slot in node.slots}  # no attribute refers to these
    return {key for i in (_reachable(graph, set()) - model) | slots for key in graph[i].keys}


def _variables(graph: Graph, bundle: Bundle, folder: Path) -> dict[str, str]:
    """Returns the weights' names by their keys in the bundle."""
    names = {}
    for name, key in ((node.name, key) for node in graph if node.name is not None for key in node.keys):
        if key not in bundle.entries:
            raise InputError(f"{folder}: the variable {key} is missing from its index; save the model again")
        if bundle.entries[key].is_weight:
            names[key] = name
    return names


def _network_keys(graph: Graph, bundle: Bundle, weights: dict[str, str], where: str) -> tuple[bool, dict[str, str]]:
    """Returns whether the model is only the network, and the keys of its variables by their published names."""
    nets = [node for node in graph if set(node.children) >= NETWORK]
    if len(nets) > 1:
        raise InputError(f"{where} holds {len(nets)} BiT networks; expected one: {SAVE_AGAIN}")
    # In a module of the Hub (`_func`), such an object is not the whole network; names identify that one.
    if nets and not any("_func" in node.children for node in graph):
        return nets[0] is graph[0], _by_attributes(graph, nets[0], where)
    if keys := by_full_names(weights, bundle.entries, where):
        return False, keys
    return False, _by_order(graph, bundle, weights, where)


def _by_attributes(graph: Graph, net: Node, where: str) -> dict[str, str]:
    """Identifies the variables of a `bit_tf2.models.ResnetV2`."""
    tops = {"root_block/": net.children["_root"], "": net.children["_pre_head"]}
    pairs = [
        (f"{part}{PLACES.get(leaf, leaf)}", key) for part, top in tops.items() for leaf, key in _leaves(graph, top)
    ]
    for b, block in enumerate(_stack(graph, net.children["_blocks"]), 1):
        units = [graph[i].children for i in _stack(graph, block) if "_unit_a" in graph[i].children]
        for u, unit in enumerate(units, 1):
            parts = [(part, leaf) for edge, part in UNIT.items() if edge in unit for leaf in _leaves(graph, unit[edge])]
            pairs += [(f"block{b}/unit{u:02}/{part}/{PLACES.get(leaf, leaf)}", key) for part, (leaf, key) in parts]
    pairs += [(f"head/{leaf}", key) for leaf, key in _leaves(graph, net.children["_head"])]
    return check_unique(pairs, where)


def _stack(graph: Graph, top: int) -> list[int]:
    """Returns the layers of a Sequential or the items of a list, in order."""
    # Versions of Keras name them differently.
    children = graph[top].children
    inner = [graph[children[edge]].children for edge in ("_layers", "layers") if edge in children]
    for pattern in (r"layer_with_weights-(\d{1,6})", r"(\d{1,6})"):
        for held in (children, *inner):
            numbered = [(int(match[1]), i) for edge, i in held.items() if (match := re.fullmatch(pattern, edge))]
            if numbered:
                return [i for _, i in sorted(numbered)]  # as numbers: as text, 10 comes before 2
    return []


def _leaves(graph: Graph, top: int) -> list[tuple[str, str]]:
    """Returns the variables of a layer, or of the layers that it stacks, as (attribute, key in the bundle)."""
    leaves = {}
    for i in (top, *_stack(graph, top)):
        for edge, child in graph[i].children.items():
            node = graph[child]
            # By key, since Keras 3 refers to one variable twice, as kernel and as _kernel.
            if node.name is not None and not edge.isdecimal():
                leaves |= dict.fromkeys(node.keys, edge.lstrip("_"))
    return [(leaf, key) for key, leaf in leaves.items()]


def _by_order(graph: Graph, bundle: Bundle, names: dict[str, str], where: str) -> dict[str, str]:
    """Identifies the variables of a Keras export, a list in the order of the model's layers."""
    children = graph[0].children
    is_export = "non_trainable_variables" in children and "keras_api" not in children
    top = children.get("variables") if is_export else None
    listed = [key for i in _stack(graph, top) for key in graph[i].keys if key in names] if top is not None else []
    shapes = [bundle.entries[key].shape for key in listed]
    if shapes and len(shapes[0]) == 4:
        units = tuple(shapes.count((3, 3, n, n)) for n in (shapes[0][-1] << block for block in range(4)))
        expected = layout(units, shapes[0][-1], shapes[-1][0])
        # Last part and shape of every variable: an order that only looks similar must not pass.
        parts = [(name.split("/")[-1], shape) for name, shape in expected.items()]
        if parts == [(names[key].split("/")[-1], shape) for key, shape in zip(listed, shapes, strict=True)]:
            return dict(zip(expected, listed, strict=True))
    raise no_network(where, names.values())
