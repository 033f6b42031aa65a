"""Preprocessing read from the graph of a SavedModel, with small hand-written graphs, many of them damaged."""

import shutil
import struct
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from funmatch.data.formats.protobuf import write_fields, write_varint
from funmatch.errors import InputError
from funmatch.models.origins.bit_files import keras_origin
from funmatch.models.tensorflow.bundle import Bundle, Entry
from funmatch.models.tensorflow.preprocessing import AS_GIVEN, after_head, input_preprocessing
from funmatch.models.tensorflow.savedmodel import open_savedmodel

MODULE = Path(__file__).parent / "savedmodels" / "module"
ENTRIES = {key: Entry(1, shape, 0, 0, 4, 0) for key, shape in {"stem": (7, 7, 3, 2), "k": (2, 5), "b": (5,)}.items()}
TF_FLOAT, TF_UINT8, TF_INT32 = 1, 4, 3


def number(field: int, n: int) -> bytes:
    return write_varint(field << 3) + write_varint(n)


def text(field: int, value: str) -> bytes:
    return write_fields(field, value.encode())


def pair(field: int, key: str, value: bytes) -> bytes:
    return write_fields(field, text(1, key) + write_fields(2, value))


def node(name: str, op: str, *inputs: str, **attributes: bytes) -> bytes:
    input_fields = b"".join(text(3, each) for each in inputs)
    return (
        text(1, name) + text(2, op) + input_fields + b"".join(pair(5, key, value) for key, value in attributes.items())
    )


def const(name: str, values) -> bytes:
    array = np.asarray(values, None if np.asarray(values).dtype.kind == "i" else np.float32)
    array = array.astype(np.int32) if array.dtype.kind == "i" else array
    shape = b"".join(write_fields(2, number(1, n)) for n in array.shape)
    kind = TF_INT32 if array.dtype == np.int32 else TF_FLOAT
    return node(
        name,
        "Const",
        value=write_fields(8, number(1, kind) + write_fields(2, shape) + write_fields(4, array.tobytes())),
    )


def call(name: str, function: str, *inputs: str) -> bytes:
    return node(name, "StatefulPartitionedCall", *inputs, f=write_fields(10, text(1, function)))


def function(name: str, arguments: list[str], results: dict[str, str], nodes: list[bytes]) -> bytes:
    signature = text(1, name) + b"".join(write_fields(2, text(1, each)) for each in arguments)
    signature += b"".join(write_fields(3, text(1, each)) for each in results)
    body = b"".join(write_fields(3, each) for each in nodes)
    return (
        write_fields(1, signature)
        + body
        + b"".join(write_fields(4, text(1, k) + text(2, v)) for k, v in results.items())
    )


def ints(values: list[int]) -> bytes:
    return write_fields(1, write_fields(3, b"".join(map(write_varint, values))))


def network(
    x: str, *, border: int = 3, padding: bytes = b"VALID", strides: tuple[int, ...] = (1, 2, 2, 1)
) -> list[bytes]:
    """The nodes of a network of a single kernel and a head, in a function whose image is an output of this name."""
    return [
        const("border", np.array([[0, 0], [border, border], [border, border], [0, 0]])),
        node("Pad", "Pad", x, "border:output:0"),
        node("kernel", "ReadVariableOp", "stem"),
        const("tiny", 1e-10),
        node("standardized", "Mul", "kernel:value:0", "tiny:output:0"),
        node(
            "Conv2D",
            "Conv2D",
            "Pad:output:0",
            "standardized:z:0",
            padding=write_fields(2, padding),
            strides=ints(list(strides)),
        ),
        node("Relu", "Relu", "Conv2D:output:0"),
        const("axes", np.array([1, 2])),
        node("Mean", "Mean", "Relu:activations:0", "axes:output:0"),
        node("k/read", "ReadVariableOp", "k"),
        node("MatMul", "MatMul", "Mean:output:0", "k/read:value:0"),
        node("b/read", "ReadVariableOp", "b"),
        node("BiasAdd", "BiasAdd", "MatMul:product:0", "b/read:value:0"),
    ]


VARIABLES = list(ENTRIES)


def model(
    nodes: list[bytes], output: str = "BiasAdd:output:0", kind: int = TF_FLOAT, functions: list[bytes] | None = None
) -> bytes:
    """A SavedModel that serves a function of these nodes."""
    names = write_fields(8, b"".join(text(8, key) for key in VARIABLES))
    restore = [
        node("keys", "Const", value=names),
        node("RestoreV2", "RestoreV2", "file", "keys:output:0"),
        *(node(f"set_{k}", "AssignVariableOp", k, f"RestoreV2:tensors:{i}") for i, k in enumerate(VARIABLES)),
    ]
    library = [
        function("served", ["x", *VARIABLES], {"y": output}, nodes),
        function("restore", ["file", *VARIABLES], {"done": "file"}, restore),
        *(functions or []),
    ]
    outer = [
        node("picture", "Placeholder", dtype=number(6, kind)),
        node("file", "Placeholder"),
        *(node(key, "VarHandleOp") for key in VARIABLES),
        call("call", "served", "picture", *VARIABLES),
        call("restored", "restore", "file", *VARIABLES),
    ]
    graph = b"".join(write_fields(1, each) for each in outer) + write_fields(
        2, b"".join(write_fields(1, each) for each in library)
    )
    signature = pair(2, "logits", text(1, "call:0"))
    meta = write_fields(2, graph) + write_fields(3, text(3, "restored")) + pair(5, "serving_default", signature)
    return number(1, 1) + write_fields(2, meta)


@pytest.fixture(name="preprocessing")
def preprocessing_of_graph(tmp_path):
    def preprocessing(content: bytes):
        (tmp_path / "saved_model.pb").write_bytes(content)
        return input_preprocessing(tmp_path, Bundle(ENTRIES, []))

    return preprocessing


def chain(*steps) -> list[bytes]:
    """Operations on images, in order, as (operation, constant) or (constant, operation)."""
    nodes, last = [], "x"
    for i, step in enumerate(steps):
        constants = [each for each in step if not isinstance(each, str)]
        nodes += [const(f"c{i}", each) for each in constants]
        inputs = [last, *([f"c{i}:output:0"] if constants else [])]
        op = next(each for each in step if isinstance(each, str))
        attributes = {"DstT": number(6, TF_FLOAT)} if op == "Cast" else {}
        nodes.append(node(f"n{i}", op, *(inputs if isinstance(step[0], str) else inputs[::-1]), **attributes))
        last = f"n{i}:z:0"
    return [*nodes, *network(last)]


HALF = (0.5,) * 3, (0.5,) * 3
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MEAN, STD = (np.array(each) for each in IMAGENET)
CHAINS = {
    "as given": ([], AS_GIVEN),
    "2 x - 1": ([("Mul", 2.0), ("Sub", 1.0)], HALF),
    "1 - (2 - 2 x)": ([("Mul", 2.0), (2.0, "Sub"), (1.0, "Sub")], HALF),
    "-(1 - 2 x)": ([(2.0, "Mul"), (1.0, "Sub"), ("Neg",)], HALF),
    "x / 255": ([("RealDiv", 255.0)], AS_GIVEN),
    "x / 127.5 - 1": ([("Mul", 1 / 127.5), ("AddV2", -1.0)], HALF),
    "of each channel": ([("Sub", MEAN), ("RealDiv", STD)], IMAGENET),
    "of each channel of 255": ([("Sub", (255 * MEAN)[None, None, None]), ("Mul", 1 / (255 * STD))], IMAGENET),
    "a mean of 255 alone": ([("Sub", [123.675, 116.28, 103.53])], (IMAGENET[0], (1 / 255,) * 3)),
    "resized": ([("ResizeBilinear", [128, 128]), ("Mul", 2.0), ("Sub", 1.0), ("Identity",)], HALF),
}


@pytest.mark.parametrize("name", CHAINS)
def test_arithmetic_is_read_as_mean_and_standard_deviation(preprocessing, name):
    steps, (mean, std) = CHAINS[name]
    found = preprocessing(model(chain(*steps)))
    assert not found.why
    np.testing.assert_allclose(found.inputs, [mean, std], rtol=1e-6)
    assert found.is_plain == (not steps)
    assert (found.stem, found.used, found.before) == ({"stem"}, {"stem", "k", "b"}, set())
    assert after_head(found, "k", "b", "m") == ()


def test_integer_inputs_range_to_255(preprocessing):
    found = preprocessing(model(chain(("Cast",), ("Mul", 2 / 255), ("Sub", 1.0)), kind=TF_UINT8))
    np.testing.assert_allclose(found.inputs, HALF, rtol=1e-6)
    found = preprocessing(model(chain(("Cast",)), kind=TF_UINT8))
    np.testing.assert_allclose(found.inputs, [[0] * 3, [1 / 255] * 3], rtol=1e-6)
    assert not found.is_plain


UNCLEAR = {
    r"applies Square \(n0\)": [("Square",)],
    r"applies ReverseV2 \(n1\)": [("Mul", 2.0), ("ReverseV2", [3])],
    r"applies Floor \(n0\)": [("Floor",), ("Mul", 2.0)],
    r"applies AddV2 \(n1\)": [("Pad", np.array([[0, 0], [1, 1], [1, 1], [0, 0]])), ("AddV2", 1.0)],
    r"applies Sub \(n0\)": [("Sub", np.ones((8, 8, 3)))],
    r"applies Mul \(n0\)": [("Mul", np.ones((1, 2)))],
    "differs from BiT's": [("Pad", np.array([[0, 0], [1, 1], [1, 1], [0, 0]]))],
    r"maps images x to 0\.5 · x \+ 0\.5, an unusual range": [("Mul", 0.5), ("AddV2", 0.5)],
    r"maps images x to 0\.3": [("Mul", 0.3)],
    "maps images x to -1": [(1.0, "Sub")],
    "maps images x to inf": [("RealDiv", 0.0)],
    "more than 150 operations": [("Neg",)] * 200,
}


@pytest.mark.parametrize("why", UNCLEAR)
def test_unreadable_preprocessing_is_named(preprocessing, why):
    found = preprocessing(model(chain(*UNCLEAR[why])))
    assert found.inputs is None
    with pytest.raises(AssertionError, match=why):
        raise AssertionError(found.why)


def test_other_first_convolutions_are_not_accepted(preprocessing):
    for form in ({"border": 2}, {"padding": b"SAME"}, {"strides": (1, 1, 1, 1)}, {"border": 0, "padding": b"EXPLICIT"}):
        assert "differs from BiT's" in preprocessing(model(network("x", **form))).why
    twice = [
        *network("x"),
        node("again", "Conv2D", "x", "kernel:value:0"),
        node("sum", "AddN", "again:o:0", "BiasAdd:o:0"),
    ]
    assert preprocessing(model(twice, "sum:sum:0")).why == "its graph uses a first kernel of BiT 2 times"
    assert "0 times" in preprocessing(model([], "x")).why


def test_operations_after_the_head_are_reported(preprocessing):
    soft = node("Softmax", "Softmax", "BiasAdd:output:0")
    found = preprocessing(model([*network("x"), soft], "Softmax:softmax:0"))
    assert found.inputs == AS_GIVEN
    note = "the original model applies Softmax to the logits of its head; they are used unchanged here"
    assert after_head(found, "k", "b", "m") == (note,)
    nodes = [
        *network("x"),
        const("ten", 10.0),
        node("Mul", "Mul", "ten:output:0", "BiasAdd:o:0"),
        node("S", "Sigmoid", "Mul"),
    ]
    nodes[-1] = node("S", "Sigmoid", "Mul:z:0")
    assert "applies Mul, Sigmoid to" in after_head(preprocessing(model(nodes, "S:y:0")), "k", "b", "m")[0]
    assert (
        "output is not that of its head"
        in after_head(preprocessing(model(network("x"), "Mean:output:0")), "k", "b", "m")[0]
    )
    nodes = [each for each in network("x") if not each.startswith(text(1, "MatMul"))]
    nodes += [node("L2", "Square", "Mean:output:0"), node("MatMul", "MatMul", "L2:y:0", "k/read:value:0")]
    with pytest.raises(InputError, match="m applies Square to the input of its head, which no BiT network does"):
        after_head(preprocessing(model(nodes)), "k", "b", "m")


def test_nested_and_circular_functions_end(preprocessing):
    def nested(depth: int, last: str) -> bytes:
        inner = [
            function(f"f{i}", ["x"], {"y": "c:output:0"}, [call("c", f"f{i + 1}" if i < depth else last, "x")])
            for i in range(depth + 1)
        ]
        double = function("double", ["x"], {"y": "m:z:0"}, [const("two", 2.0), node("m", "Mul", "x", "two:output:0")])
        return model([call("c", "f0", "x"), const("o", 1.0), *SUB], functions=[*inner, double])

    SUB = [node("s", "Sub", "c:output:0", "o:output:0"), *network("s:z:0")]
    assert preprocessing(nested(5, "double")).inputs == HALF
    assert "too deeply" in preprocessing(nested(100, "double")).why
    assert "too deeply" in preprocessing(nested(3, "f0")).why
    with pytest.raises(InputError, match="has no function nothing"):
        preprocessing(nested(3, "nothing"))
    # Each function calls the next one twice: 2^40 calls.
    doubling = [
        function(f"f{i}", ["x"], {"y": "s:z:0"}, [call("a", f"f{i + 1}", "x"), call("b", f"f{i + 1}", "x"), ADD])
        for i in range(40)
        for ADD in [node("s", "Sub", "a:output:0", "b:output:0")]
    ]
    doubling.append(function("f40", ["x"], {"y": "x"}, []))
    started = time.perf_counter()
    assert "too often" in preprocessing(model([call("c", "f0", "x"), *network("c:output:0")], functions=doubling)).why
    circle = [node("a", "Identity", "b:output:0"), node("b", "Identity", "a:output:0"), *network("a:output:0")]
    assert "in circles" in preprocessing(model(circle)).why
    loop = [node("a", "Neg", "b:output:0"), node("b", "Neg", "a:output:0"), *network("a:output:0")]
    assert preprocessing(model(loop)).inputs is None
    assert time.perf_counter() - started < 20


@pytest.mark.parametrize("output", ["²", "x", "-1", "1234567"])
def test_a_number_of_an_output_that_is_none_is_damage(preprocessing, output):
    # "²".isdigit() is true, and int("²") fails.
    inner = function("f", ["x"], {"y": "x"}, [])
    nodes = [call("c", "f", "x"), *network(f"c:output:{output}")]
    with pytest.raises(InputError, match="its graph has no c:output:"):
        preprocessing(model(nodes, functions=[inner]))


def test_missing_and_damaged_graphs(preprocessing):
    assert preprocessing(b"").why == "its saved_model.pb holds no graph"
    assert preprocessing(number(1, 1) + write_fields(2, b"")).why == "its graph serves no function"
    content = model(chain(("Mul", 2.0), ("Sub", 1.0)))
    for end in range(1, len(content), 37):
        with suppress(InputError):
            assert preprocessing(content[:end]).inputs is None
    for change, why in (
        ((b"stem", b"step"), None),
        ((b"AssignVariableOp", b"assignvariableop"), "is not one of its saved variables"),
        ((b"c0:output:0", b"cx:output:0"), None),
        ((struct.pack("<f", 2), b""), None),
    ):
        with suppress(InputError):
            found = preprocessing(content.replace(*change))
            assert why is None or why in found.why


@pytest.fixture(name="copy")
def module_copy(tmp_path):
    return Path(shutil.copytree(MODULE, tmp_path / "m"))


def test_damage_never_crashes_the_reader(copy):
    """Damage gives an error or the same inputs. A graph has no checksum, but none of these changes hits a constant."""
    path = copy / "saved_model.pb"
    content = path.read_bytes()
    expected = open_savedmodel(copy).inputs
    rng = np.random.default_rng(0)
    for i in range(120):
        changed = bytearray(content[: rng.integers(len(content))] if i % 3 == 0 else content)
        for at in rng.integers(0, len(changed), 0 if i % 3 == 0 else rng.integers(1, 4)):
            changed[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(changed)
        with suppress(InputError):
            assert open_savedmodel(copy).inputs in (None, expected)


def test_given_inputs_override_the_graph_and_are_noted(copy, monkeypatch):
    monkeypatch.setattr("funmatch.models.bit.GROUPS", 2)  # the committed network is too narrow for BiT's 32
    input_fields = keras_origin(copy, {}, HALF)
    assert (input_fields.card["mean"], input_fields.card["std"]) == HALF
    assert "using the given --inputs, though its graph has mean and std ((0.485," in input_fields.notes[0]
    from_graph = keras_origin(copy, {}, None)
    assert (from_graph.card["mean"], from_graph.card["std"], from_graph.notes) == (*IMAGENET, ())
    assert keras_origin(copy, {}, IMAGENET).notes == ()
    (copy / "saved_model.pb").write_bytes(b"")
    with pytest.raises(InputError, match=r"images that it was trained on are unknown: its saved_model\.pb holds no"):
        keras_origin(copy, {}, None)
    assert "holds no graph" in keras_origin(copy, {}, HALF).notes[0]
