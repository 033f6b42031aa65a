"""SavedModels of BiT networks: what TensorFlow wrote is read, and anything else is refused in words."""

import shutil
import struct
import subprocess
import sys
import zlib
from contextlib import suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import timm
import torch

from funmatch.commands import models
from funmatch.config import Import
from funmatch.data.formats.protobuf import write_fields, write_varint
from funmatch.errors import InputError
from funmatch.models.load import load
from funmatch.models.tensorflow.bundle import Entry, open_bundle, read, read_strings
from funmatch.models.tensorflow.preprocessing import AS_GIVEN
from funmatch.models.tensorflow.savedmodel import GRAPH, open_savedmodel

WRITTEN = Path(__file__).parent / "savedmodels"
"""What `scripts/make_savedmodel.py` wrote with TensorFlow 2.21, Keras 2.21 and 3.15; units 2, 1, 1, 1; width 2."""
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SEEN = {"hub": None, "student": AS_GIVEN, "keras3": AS_GIVEN, "keras3-export": None, "module": IMAGENET}
"""What can be told of the images they see: of a network that is the whole model even without a graph."""
STEM = "root_block/standardized_conv2d/kernel"
VALUE = "/.ATTRIBUTES/VARIABLE_VALUE"


def value(name: str, shape) -> np.ndarray:
    """What the script put into the variable of a published name."""
    noise = np.random.RandomState(zlib.crc32(name.encode())).normal(size=shape) / 10
    return (noise + name.endswith("gamma")).astype(np.float32)


def published(units, width: int, classes: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a network, as checkpoints of BiT were published."""
    found = {STEM: (7, 7, 3, width), "head/kernel": (32 * width, classes), "head/bias": (classes,)}
    norms = {"": 32 * width}
    into = width
    for b, count in enumerate(units):
        middle = width * 2**b
        for u in range(1, count + 1):
            unit = f"block{b + 1}/unit{u:02}"
            norms |= {f"{unit}/a/": into, f"{unit}/b/": middle, f"{unit}/c/": middle}
            found[f"{unit}/a/standardized_conv2d/kernel"] = (1, 1, into, middle)
            found[f"{unit}/b/standardized_conv2d/kernel"] = (3, 3, middle, middle)
            found[f"{unit}/c/standardized_conv2d/kernel"] = (1, 1, middle, 4 * middle)
            if u == 1:
                found[f"{unit}/a/proj/standardized_conv2d/kernel"] = (1, 1, into, 4 * middle)
            into = 4 * middle
    return found | {f"{place}group_norm/{leaf}": (n,) for place, n in norms.items() for leaf in ("gamma", "beta")}


@pytest.mark.parametrize(("name", "inputs"), SEEN.items())
def test_every_variable_is_found(name, inputs):
    saved = open_savedmodel(WRITTEN / name)
    assert saved.inputs == inputs
    assert saved.is_plain == (inputs is AS_GIVEN)
    assert saved.why == ("" if inputs else "its saved_model.pb holds no graph")
    units = (1, 1, 1, 1) if name == "module" else (2, 1, 1, 1)
    assert {name: array.shape for name, array in saved.arrays.items()} == published(units, 2, 3)
    for name, array in saved.arrays.items():
        np.testing.assert_array_equal(array, value(name, array.shape), name)


# A writer of bundles, in which everything can be wrong.


def masked(data: bytes) -> int:
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def number(field: int, n: int) -> bytes:
    return write_varint(field << 3) + write_varint(n)


def table(rows: dict[bytes, bytes], *, blocks: int = 1, compression: int = 0) -> bytes:
    """A table of LevelDB: keys share what they can with the last one, from the start of each block on."""
    keys = sorted(rows)
    size = -(-len(keys) // blocks)
    content, index = b"", {}

    def add(entries: dict[bytes, bytes]) -> bytes:
        nonlocal content
        block, last = b"", b""
        for key, held in entries.items():
            shared = next(
                (i for i, (a, b) in enumerate(zip(key, last, strict=False)) if a != b), min(len(key), len(last))
            )
            block += b"".join(map(write_varint, (shared, len(key) - shared, len(held)))) + key[shared:] + held
            last = key
        block += struct.pack("<II", 0, 1)
        place = write_varint(len(content)) + write_varint(len(block))
        block += bytes([compression])
        content += block + struct.pack("<I", masked(block))
        return place

    for start in range(0, len(keys), size):
        part = keys[start : start + size]
        index[part[-1]] = add({key: rows[key] for key in part})
    places = add({}) + add(index)
    return content + places.ljust(40, b"\0") + bytes.fromhex("57fb808b247547db")


def proto(entry: Entry, more: bytes = b"") -> bytes:
    shape = b"".join(write_fields(2, number(1, n)) for n in entry.shape)
    numbers = number(1, entry.kind) + write_fields(2, shape) + number(3, entry.shard) + number(4, entry.offset)
    checksum = write_varint(6 << 3 | 5) + struct.pack("<I", entry.checksum)
    return numbers + number(5, entry.size) + checksum + more


def header(shards: int = 1, more: bytes = b"") -> bytes:
    return number(1, shards) + write_fields(3, number(1, 1)) + more


def strings(values: list[bytes]) -> tuple[bytes, int]:
    """Strings as they lie in a bundle, and their checksum."""
    lengths = b"".join(struct.pack("<I", len(value)) for value in values)
    check = struct.pack("<I", masked(lengths))
    return b"".join(write_varint(len(v)) for v in values) + check + b"".join(values), masked(
        lengths + check + b"".join(values)
    )


def write_bundle(
    prefix: Path, tensors: dict[str, tuple[int, np.ndarray | list[bytes]]], shards: int = 1, **form
) -> None:
    """Tensors as (TensorFlow's number of their kind, values) by name, dealt out to shards."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    contents = [b""] * shards
    rows = {b"": header(shards)}
    for i, (name, (kind, values)) in enumerate(tensors.items()):
        shard = i % shards
        if isinstance(values, list):
            data, checksum = strings(values)
            shape: tuple[int, ...] = (len(values),)
        else:
            data, shape = values.tobytes(), values.shape
            checksum = masked(data)
        rows[name.encode()] = proto(Entry(kind, shape, shard, len(contents[shard]), len(data), checksum))
        contents[shard] += data
    prefix.with_name(f"{prefix.name}.index").write_bytes(table(rows, **form))
    for i, content in enumerate(contents):
        prefix.with_name(f"{prefix.name}.data-{i:05}-of-{shards:05}").write_bytes(content)


def test_kinds_blocks_and_shards_of_a_bundle(tmp_path):
    rng = np.random.default_rng(0)
    dtypes = {
        1: "f4",
        2: "f8",
        3: "i4",
        4: "u1",
        5: "i2",
        6: "i1",
        9: "i8",
        10: "?",
        17: "u2",
        19: "f2",
        22: "u4",
        23: "u8",
    }
    tensors = {
        f"model/a{kind}/{'x' * kind}": (kind, rng.integers(0, 99, (3, kind)).astype(d)) for kind, d in dtypes.items()
    }
    single = rng.normal(size=(4, 5)).astype(np.float32)
    tensors["brain"] = (14, (single.view(np.uint32) >> 16).astype(np.uint16))
    tensors["nothing"] = (1, np.zeros((0, 4), np.float32))
    tensors["one"] = (1, np.float32(7).reshape(()))
    tensors["words"] = (7, [b"", b"a", b"b" * 300])
    write_bundle(tmp_path / "v", tensors, shards=3, blocks=4)
    bundle = open_bundle(tmp_path / "v")
    assert set(bundle.entries) == set(tensors)
    for name, (kind, values) in tensors.items():
        if kind in dtypes:
            assert read(bundle, name).dtype == values.dtype
            np.testing.assert_array_equal(read(bundle, name), values)
    np.testing.assert_allclose(read(bundle, "brain"), single, rtol=2**-7)
    assert read_strings(bundle, "words") == [b"", b"a", b"b" * 300]
    for wrong, asked in ((read, "words"), (read_strings, "one")):
        with pytest.raises(InputError, match=f"{asked} is of TensorFlow's kind"):
            wrong(bundle, asked)


def test_a_long_tensor_is_checked_piece_by_piece(tmp_path, monkeypatch):
    monkeypatch.setattr("funmatch.models.tensorflow.bundle.PIECE", 1000)
    values = np.arange(12_345, dtype=np.float32)
    write_bundle(tmp_path / "v", {"a": (3, values[:7].astype("i4")), "b": (1, values)})
    np.testing.assert_array_equal(read(open_bundle(tmp_path / "v"), "b"), values)


FORMS = {
    "compressed with Snappy": {"rows": lambda rows: rows, "compression": 1},
    "compressed with method 3": {"rows": lambda rows: rows, "compression": 3},
    "big-endian machine": {"rows": lambda rows: rows | {b"": header(more=number(2, 1))}},
    "a newer format": {"rows": lambda rows: rows | {b"": header(more=write_fields(3, number(2, 2)))}},
    "it lists 0 files of values": {"rows": lambda rows: {key: row for key, row in rows.items() if key}},
    "data-00000-of-00002 is missing": {"rows": lambda rows: rows | {b"": header(2)}},
    "a is stored in slices": {"rows": lambda rows: rows | {b"a": rows[b"a"] + write_fields(7, b"")}},
    "a has an impossible shape": {"rows": lambda rows: rows | {b"a": proto(Entry(1, (1 << 50,), 0, 0, 4, 0))}},
    "a has 8 bytes, which does not match": {"rows": lambda rows: rows | {b"a": proto(Entry(1, (3,), 0, 0, 8, 0))}},
    "a ends at byte 12": {"rows": lambda rows: rows | {b"a": proto(Entry(1, (2,), 0, 4, 8, 0))}},
    "a is in file 7 of 1": {"rows": lambda rows: rows | {b"a": proto(Entry(1, (2,), 7, 0, 8, 0))}},
    "a number is cut off": {"rows": lambda rows: rows | {b"a": b"\x80"}},
}


@pytest.mark.parametrize("message", FORMS)
def test_forms_of_an_index_that_are_not_read(tmp_path, message):
    form = dict(FORMS[message])
    rows = form.pop("rows")({b"": header(), b"a": proto(Entry(1, (2,), 0, 0, 8, masked(bytes(8))))})
    (tmp_path / "v.index").write_bytes(table(rows, **form))
    (tmp_path / "v.data-00000-of-00001").write_bytes(bytes(8))
    with pytest.raises(InputError, match=message):
        open_bundle(tmp_path / "v")


@pytest.fixture(name="copy")
def copy_of_a_savedmodel(tmp_path):
    def copied(name: str) -> Path:
        return Path(shutil.copytree(WRITTEN / name, tmp_path / name))

    return copied


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 0x10
    path.write_bytes(content)


INDEX, DATA = "variables/variables.index", "variables/variables.data-00000-of-00001"


def test_damage_and_what_is_missing(copy, tmp_path):
    def refused(change, message: str) -> None:
        folder = copy("student")
        change(folder)
        with pytest.raises(InputError, match=message):
            open_savedmodel(folder)
        shutil.rmtree(folder)

    refused(lambda folder: flip(folder / INDEX, 100), "checksum of the block at byte 0 is wrong")
    refused(lambda folder: flip(folder / INDEX, -1), "lacks the end of a table")
    refused(lambda folder: (folder / INDEX).write_bytes(b""), "lacks the end of a table")
    refused(lambda folder: (folder / INDEX).write_bytes((folder / INDEX).read_bytes()[40:]), "damaged")
    refused(lambda folder: (folder / INDEX).unlink(), r"cannot read .*variables\.index \(No such file")
    refused(lambda folder: (folder / DATA).unlink(), "data-00000-of-00001 is missing")
    refused(lambda folder: (folder / DATA).write_bytes((folder / DATA).read_bytes()[:-1]), "cut off")
    refused(lambda folder: (folder / "saved_model.pb").unlink(), r"has no saved_model\.pb; expected a SavedModel")
    bundle = open_bundle(WRITTEN / "student" / "variables" / "variables")
    graph = bundle.entries[GRAPH]
    refused(lambda folder: flip(folder / DATA, graph.offset), "checksum of the lengths")
    refused(lambda folder: flip(folder / DATA, graph.offset + graph.size - 1), f"checksum of {GRAPH} is wrong")
    for path in (tmp_path / "nothing", WRITTEN / "student" / INDEX, WRITTEN):
        with pytest.raises(InputError, match=r"has no saved_model\.pb"):
            open_savedmodel(path)


def test_variables_are_read_one_at_a_time(copy):
    folder = copy("keras3")
    entry = open_bundle(folder / "variables" / "variables").entries[f"_head/bias{VALUE}"]
    flip(folder / DATA, entry.offset)
    saved = open_savedmodel(folder)
    assert len(saved.arrays["head/kernel"]) == 64
    with pytest.raises(InputError, match=r"checksum of _head/bias.* is wrong"):
        saved.arrays["head/bias"]
    with pytest.raises(KeyError):
        saved.arrays["head"]
    (folder / DATA).unlink()
    with pytest.raises(InputError, match="cannot read"):
        saved.arrays["head/kernel"]


def test_any_flipped_byte_is_noticed(copy):
    folder = copy("keras3")
    wanted = {name: array.tobytes() for name, array in open_savedmodel(folder).arrays.items()}
    rng = np.random.default_rng(0)
    for i in range(200):
        path = folder / (INDEX, DATA)[i % 2]
        content = path.read_bytes()
        at = int(rng.integers(len(content)))
        path.write_bytes(content[:at] + bytes([content[at] ^ int(rng.integers(1, 256))]) + content[at + 1 :])
        with suppress(InputError):
            # What nobody needs may differ: padding of the footer, and tensors beside the network.
            assert {name: array.tobytes() for name, array in open_savedmodel(folder).arrays.items()} == wanted
        path.write_bytes(content)


def rewrite(folder: Path, change) -> None:
    """Changes the entries of an index, whose checksums are right again."""
    prefix = folder / "variables" / "variables"
    entries = change(open_bundle(prefix).entries)
    rows = {name.encode(): proto(entry) for name, entry in entries.items()}
    (folder / INDEX).write_bytes(table({b"": header(), **rows}))


def without(entries, name: str):
    return {key: entry for key, entry in entries.items() if key != name}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("keras3", lambda e: without(e, f"_head/bias{VALUE}"), "_head/bias.* is missing from its index"),
        (
            "keras3",
            lambda e: e | {"more": e[f"_head/bias{VALUE}"]},
            "holds more than a BiT network: more;.* alone with",
        ),
        ("keras3", lambda e: without(e, GRAPH), "no graph of objects; expected a SavedModel of TensorFlow 2"),
        (
            "keras3",
            lambda e: e | {f"_head/_kernel{VALUE}": replace(e[f"_head/_kernel{VALUE}"], shape=(3, 64))},
            r"head/kernel has shape \(3, 64\), expected \(64, 3\)",
        ),
        (
            "keras3",
            lambda e: e | {f"_head/bias{VALUE}": replace(e[f"_head/bias{VALUE}"], kind=3)},
            "head/bias is not of floats",
        ),
        (
            "keras3-export",
            lambda e: e | {f"variables/9{VALUE}": replace(e[f"variables/9{VALUE}"], shape=(1, 1, 4, 4))},
            "no recognizable BiT network.* in TensorFlow, load the model and save",
        ),
        ("student", lambda e: {k: replace(v, kind=8) if "optimizer" in k else v for k, v in e.items()}, None),
    ],
)
def test_what_is_missing_left_over_or_of_another_shape(copy, name, change, message):
    folder = copy(name)
    rewrite(folder, change)
    if message is None:
        assert open_savedmodel(folder).inputs == SEEN[name], "kinds of states of training are of no matter"
        return
    with pytest.raises(InputError, match=message):
        open_savedmodel(folder)


# Object graphs in which everything can be wrong.


class Objects:
    """A graph of objects and its tensors; each object is given with its children by attribute."""

    def __init__(self) -> None:
        self.nodes: list[bytes] = [b""]
        self.tensors: dict[str, tuple[int, np.ndarray | list[bytes]]] = {}

    def add(self, children: dict[str, int] | None = None, more: bytes = b"") -> int:
        edges = [write_fields(1, number(1, i) + write_fields(2, name.encode())) for name, i in (children or {}).items()]
        self.nodes.append(b"".join(edges) + more)
        return len(self.nodes) - 1

    def variable(self, name: str, values: np.ndarray, kind: int = 1) -> int:
        key = f"v{len(self.tensors)}"
        self.tensors[key] = (kind, values)
        texts = ((1, "VARIABLE_VALUE"), (2, name), (3, key))
        return self.add(more=write_fields(2, b"".join(write_fields(field, text.encode()) for field, text in texts)))

    def network(self, prefix: str, skip: str = "", rename=lambda name: name) -> dict[str, int]:
        """The variables of a network, named under a prefix, heads excluded."""
        shapes = published((2, 1, 1, 1), 2, 3)
        names = [name for name in shapes if not name.startswith("head") and name != skip]
        return {str(i): self.variable(prefix + rename(n), value(n, shapes[n])) for i, n in enumerate(names)}

    def head(self, name: str = "dense", rows: int = 64) -> dict[str, int]:
        kernel, bias = value("head/kernel", (rows, 3)), value("head/bias", (3,))
        return {"kernel": self.variable(f"{name}/kernel", kernel), "bias": self.variable(f"{name}/bias", bias)}

    def save(self, folder: Path, children: dict[str, int], message: bytes | None = None) -> Path:
        self.add(children)
        self.nodes[0] = self.nodes.pop()
        graph = b"".join(write_fields(1, node) for node in self.nodes) if message is None else message
        write_bundle(folder / "variables" / "variables", {**self.tensors, GRAPH: (7, [graph])})
        (folder / "saved_model.pb").touch()
        return folder


@pytest.mark.parametrize("prefix", ["resnet/", "my_bi_t_model/keras_layer/resnet/", "bit/"])
def test_a_module_of_any_name_and_what_lies_beside_it(tmp_path, prefix):
    objects = Objects()
    numbered = iter(range(1, 99))
    net = objects.network(prefix, rename=lambda name: name.replace("2d/k", f"2d_{next(numbered)}/k") + ":0")
    slot = objects.variable("momentum", np.ones(5, np.float32))
    training = {"m": objects.variable("resnet/m", np.ones(4, np.float32)), "0": net["0"]}
    children = {
        "optimizer": objects.add(
            training, more=write_fields(3, number(1, net["1"]) + write_fields(2, b"m") + number(3, slot))
        ),
        "head": objects.add(objects.head("my_bi_t_model/dense_4")),
        "bit_model": objects.add({"variables": objects.add(net)}),
        "loss": objects.add({"total": objects.variable("total", np.ones((), np.float32))}),
        "save_counter": objects.variable("save_counter", np.ones((), np.int64), 9),
        "seeds": objects.variable("seeds", np.ones(2, np.uint32), 22),
    }
    saved = open_savedmodel(objects.save(tmp_path / "m", children))
    assert saved.inputs is None
    for name, shape in published((2, 1, 1, 1), 2, 3).items():
        np.testing.assert_array_equal(saved.arrays[name], value(name, shape))


@pytest.mark.parametrize(("prefix", "head"), [("resnet/", "resnet/head/dense"), ("", "dense")])
def test_a_network_that_may_or_may_not_rescale_images(tmp_path, prefix, head):
    """What names its variables as the Hub's modules do may be either."""
    objects = Objects()
    children = {"body": objects.add(objects.network(prefix)), "head": objects.add(objects.head(head))}
    folder = objects.save(tmp_path / "m", children)
    assert open_savedmodel(folder).inputs is None
    with pytest.raises(
        InputError, match=r"images that it was trained on are unknown: .* holds no graph.*--inputs 0\.\.1.*-1\.\.1"
    ):
        load(f"savedmodel:{folder}")


def test_modules_that_are_not_read(tmp_path):
    def refused(message: str, prefix: str = "resnet/", head: str = "dense", rows: int = 64, **how) -> None:
        objects = Objects()
        children = {"body": objects.add(objects.network(prefix, how.pop("skip", "")))}
        if head:
            children["head"] = objects.add(objects.head(head, rows))
        for name in how.pop("more", []):
            children[name] = objects.variable(name, np.ones((2, 2), np.float32))
        folder = objects.save(tmp_path / str(len(list(tmp_path.iterdir()))), children)
        with pytest.raises(InputError, match=message):
            open_savedmodel(folder)

    refused("block1/unit02/b/group_norm/beta is missing", skip="block1/unit02/b/group_norm/beta")
    refused("block3/unit01/a/proj/standard.* is missing", skip="block3/unit01/a/proj/standardized_conv2d/kernel")
    refused("head/bias is missing, head/kernel is missing", head="")
    refused("no recognizable BiT network", skip=STEM)
    refused(r"head/kernel has shape \(32, 3\), expected \(64, 3\)", rows=32)
    refused("two variables for head/kernel", more=["resnet/block1/unit01/se/kernel"])
    refused("two variables for head/kernel", more=["another/kernel"])
    refused("holds more than a BiT network", more=["embedding"])
    refused("holds 2 BiT networks, a/, b/; expected one", prefix="a/", more=[f"b/{STEM}"])


def test_networks_of_keras_that_are_not_read(tmp_path):
    objects = Objects()
    parts = dict.fromkeys(("_root", "_blocks", "_pre_head", "_head"), objects.add())
    nets = {"student": objects.add(parts), "teacher": objects.add(parts)}
    with pytest.raises(InputError, match="holds 2 BiT networks; expected one"):
        open_savedmodel(objects.save(tmp_path / "two", nets))
    objects = Objects()
    parts = dict.fromkeys(("_root", "_blocks", "_pre_head", "_head"), objects.add())
    with pytest.raises(InputError, match="not a complete BiT network: block1/unit01/a/group_norm/beta is missing"):
        open_savedmodel(objects.save(tmp_path / "none", parts))
    objects = Objects()
    dense = {"variables": objects.add({str(i): node for i, node in enumerate(objects.head().values())})}
    with pytest.raises(InputError, match="its variables are dense/bias, dense/kernel; expected a module"):
        open_savedmodel(objects.save(tmp_path / "dense", dense))
    for nodes in ([write_fields(1, number(1, 5))], []):
        objects = Objects()
        message = b"".join(write_fields(1, node) for node in nodes)
        with pytest.raises(InputError, match=r"graph of objects in .* is damaged"):
            open_savedmodel(objects.save(tmp_path / f"graph{len(nodes)}", {}, message))


def export(folder: Path, order) -> Path:
    """An export of Keras: a list of variables that are called gamma, beta, kernel and bias, and nothing else."""
    objects = Objects()
    shapes = published((2, 1, 1, 1), 2, 3)
    nodes = [objects.variable(f"net/{name.split('/')[-1]}", value(name, shapes[name])) for name in order]
    children = {"variables": objects.add({str(i): node for i, node in enumerate(nodes)})}
    return objects.save(folder, children | {"non_trainable_variables": objects.add()})


def test_an_export_is_read_in_its_own_order_alone(tmp_path):
    order = list(open_savedmodel(WRITTEN / "keras3-export").arrays)
    saved = open_savedmodel(export(tmp_path / "known", order))
    assert saved.inputs is None
    np.testing.assert_array_equal(
        saved.arrays["block1/unit02/c/group_norm/beta"], value("block1/unit02/c/group_norm/beta", 2)
    )
    rng = np.random.default_rng(0)
    for i in range(30):
        moved = list(order)
        for _ in range(i % 3 + 1):
            moved.insert(int(rng.integers(len(moved))), moved.pop(int(rng.integers(len(moved)))))
        folder = export(tmp_path / f"moved{i}", moved)
        shapes = published((2, 1, 1, 1), 2, 3)
        if [(n.split("/")[-1], shapes[n]) for n in moved] != [(n.split("/")[-1], shapes[n]) for n in order]:
            with pytest.raises(InputError, match="no recognizable BiT network"):
                open_savedmodel(folder)
    # A projection that is defined before the last kernel has its shape in the first block, but not in the next ones.
    before = list(order)
    for block in (1, 2, 3, 4):
        name = f"block{block}/unit01/a/proj/standardized_conv2d/kernel"
        before.remove(name)
        before.insert(before.index(f"block{block}/unit01/c/standardized_conv2d/kernel"), name)
    with pytest.raises(InputError, match="no recognizable BiT network"):
        open_savedmodel(export(tmp_path / "before", before))


def test_no_graph_crashes_the_reader(tmp_path):
    """Bytes are changed before checksums are taken."""
    rng = np.random.default_rng(0)
    for name in SEEN.keys() - {"module"}:
        folder = Path(shutil.copytree(WRITTEN / name, tmp_path / name))
        bundle = open_bundle(folder / "variables" / "variables")
        graph = read_strings(bundle, GRAPH)[0]
        data = (folder / DATA).read_bytes()
        for _ in range(60):
            changed = bytearray(graph)
            for at in rng.integers(0, len(graph), rng.integers(1, 4)):
                changed[at] = rng.integers(256)
            held, checksum = strings([bytes(changed)])
            entry = Entry(7, (), 0, len(data), len(held), checksum)
            (folder / DATA).write_bytes(data + held)
            rows = {key.encode(): proto(e) for key, e in bundle.entries.items()} | {GRAPH.encode(): proto(entry)}
            (folder / INDEX).write_bytes(table({b"": header(), **rows}))
            with suppress(InputError):
                saved = open_savedmodel(folder)
                assert {name: array.shape for name, array in saved.arrays.items()} == published((2, 1, 1, 1), 2, 3)


# Against TensorFlow.


@pytest.fixture(name="made", scope="module")
def made_by_tensorflow(tmp_path_factory):
    """Makes SavedModels in a process of its own, because Keras 2 and 3 each want to be the only one."""
    for module in ("tensorflow", "tf_keras", "keras", "tensorflow_hub"):
        if find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    script = Path(__file__).parent.parent.parent / "scripts" / "make_savedmodel.py"

    def make(*words: str) -> Path:
        folder = tmp_path_factory.mktemp("made") / "m"
        command = [sys.executable, "-W", "ignore", str(script), str(folder), *words]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return folder

    return make


@torch.inference_mode()
def difference(folder: Path) -> float:
    """How far our answers are from TensorFlow's, against the largest of these."""
    with np.load(folder.with_suffix(".npz")) as known:
        images, logits = torch.from_numpy(known["pictures"]).permute(0, 3, 1, 2), known["logits"]
    model = load(f"savedmodel:{folder}").eval()
    ours = model(images)
    if "softmax" in folder.name:
        assert model.notes == (
            "the original applies Softmax to the logits of its head; here they are left as they are",
        )
        ours = ours.softmax(1)
    else:
        assert not model.notes
    ours = ours.numpy()
    assert np.abs(logits - logits[:1]).max() > 0.1 * np.abs(logits).max(), "images differ"
    return float(np.abs(ours - logits).max() / np.abs(logits).max())


@pytest.mark.slow
def test_logits_are_tensorflows(made, capsys):
    folder = made("--units", "2", "1", "1", "1", "--width", "32", "--groups", "32", "--classes", "7")
    ways = sorted(path.stem for path in folder.glob("*.npz"))
    assert len(ways) == 27
    differences = {way: difference(folder / way) for way in ways}
    assert max(differences.values()) < 1e-4, differences
    models.import_model(Import(model=f"{folder}/hub-softmax", out=folder / "ours"))
    said = capsys.readouterr().err
    assert "the original applies Softmax" in said
    assert "timm has no network of this size; only funmatch can load this folder" in said


@pytest.mark.slow
def test_a_whole_r50x1(made):
    form = ("--units", "3", "4", "6", "3", "--width", "64", "--groups", "32", "--classes", "37", "--side", "128")
    folder = made(*form, "--ways", "student")
    assert load(f"savedmodel:{folder}/student").count_parameters() == 23_576_165
    assert difference(folder / "student") < 1e-4
    found = models.import_model(Import(model=f"{folder}/student", out=folder / "ours", side=128)).metrics
    assert (found["architecture"], found["mean"], found["std"]) == ("resnetv2_50x1_bit", [0.0] * 3, [1.0] * 3)
    net = timm.create_model(f"local-dir:{folder}/ours", pretrained=True).eval()
    with np.load(folder / "student.npz") as known, torch.inference_mode():
        logits = net(torch.from_numpy(known["pictures"]).permute(0, 3, 1, 2)).numpy()
        assert np.abs(logits - known["logits"]).max() < 1e-3 * np.abs(known["logits"]).max()


@pytest.mark.slow
def test_bundles_that_tensorflow_writes(tmp_path):
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tf = pytest.importorskip("tensorflow")
    rng = np.random.default_rng(0)
    dtypes = ("float32", "float64", "float16", "bfloat16", "int8", "int16", "int32", "int64", "uint8", "uint16", "bool")
    tensors = {f"a/{name}": tf.cast(tf.constant(rng.integers(0, 9, (3, 5))), name) for name in dtypes}
    # Enough names that the index has many blocks, and shards that were written apart.
    tensors |= {f"many/{i:05}/{'x' * 200}": tf.constant(np.float32(i)) for i in range(4000)}
    tensors["words"] = tf.constant([b"", b"word", b"w" * 1000])
    names = list(tensors)
    parts = [str(tmp_path / f"part{i}") for i in range(3)]
    for i, part in enumerate(parts):
        mine = names[i::3]
        tf.raw_ops.SaveV2(
            prefix=part, tensor_names=mine, shape_and_slices=[""] * len(mine), tensors=[tensors[name] for name in mine]
        )
    tf.raw_ops.MergeV2Checkpoints(
        checkpoint_prefixes=parts, destination_prefix=str(tmp_path / "whole"), delete_old_dirs=False
    )
    bundle = open_bundle(tmp_path / "whole")
    assert len(bundle.shards) == 3
    assert set(bundle.entries) == set(tensors)
    for name in names:
        if name != "words":
            np.testing.assert_array_equal(read(bundle, name), tf.cast(tensors[name], tf.float32).numpy(), name)
    assert read_strings(bundle, "words") == [b"", b"word", b"w" * 1000]
    sliced = str(tmp_path / "sliced")
    tf.raw_ops.SaveV2(prefix=sliced, tensor_names=["a"], shape_and_slices=["4 2 0,2:-"], tensors=[tf.ones([2, 2])])
    with pytest.raises(InputError, match="a is stored in slices"):
        open_bundle(Path(sliced))
