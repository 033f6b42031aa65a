"""SavedModels of BiT networks: those that TensorFlow wrote are read, anything else is rejected with a message."""

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

from funmatch.commands.networks import import_model
from funmatch.config import Import
from funmatch.data.formats.protobuf import write_fields, write_varint
from funmatch.errors import InputError
from funmatch.models.load import load
from funmatch.models.tensorflow.bundle import Entry, open_bundle, read, read_strings
from funmatch.models.tensorflow.preprocessing import AS_GIVEN
from funmatch.models.tensorflow.savedmodel import GRAPH, open_savedmodel

SAVED_MODELS = Path(__file__).parent / "savedmodels"
"""Written by `scripts/make_savedmodel.py` with TensorFlow 2.21, Keras 2.21 and 3.15; units 2, 1, 1, 1; width 2."""
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
INPUTS = {"hub": None, "student": AS_GIVEN, "keras3": AS_GIVEN, "keras3-export": None, "module": IMAGENET}
"""Mean and standard deviation that can be read; `None` where only a graph, which these lack, would show them."""
STEM = "root_block/standardized_conv2d/kernel"
VALUE = "/.ATTRIBUTES/VARIABLE_VALUE"


def written_value(name: str, shape) -> np.ndarray:
    """Values that the script wrote into the variable of this published name."""
    noise = np.random.RandomState(zlib.crc32(name.encode())).normal(size=shape) / 10
    return (noise + name.endswith("gamma")).astype(np.float32)


def published(units, width: int, classes: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a network's variables in the published BiT checkpoints."""
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
    return found | {f"{position}group_norm/{leaf}": (n,) for position, n in norms.items() for leaf in ("gamma", "beta")}


@pytest.mark.parametrize(("name", "inputs"), INPUTS.items())
def test_every_variable_is_read_under_its_published_name(name, inputs):
    saved = open_savedmodel(SAVED_MODELS / name)
    assert saved.inputs == inputs
    assert saved.is_plain == (inputs is AS_GIVEN)
    assert saved.why == ("" if inputs else "its saved_model.pb holds no graph")
    units = (1, 1, 1, 1) if name == "module" else (2, 1, 1, 1)
    assert {name: array.shape for name, array in saved.arrays.items()} == published(units, 2, 3)
    for name, array in saved.arrays.items():
        np.testing.assert_array_equal(array, written_value(name, array.shape), name)


# Writes bundles, valid and invalid ones.


def masked_crc(data: bytes) -> int:
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def number(field: int, n: int) -> bytes:
    return write_varint(field << 3) + write_varint(n)


def encode_table(rows: dict[bytes, bytes], *, blocks: int = 1, compression: int = 0) -> bytes:
    """A LevelDB table: within a block, each key stores only what differs from the one before it."""
    keys = sorted(rows)
    size = -(-len(keys) // blocks)
    content, index = b"", {}

    def add(entries: dict[bytes, bytes]) -> bytes:
        nonlocal content
        block, last = b"", b""
        for key, row in entries.items():
            shared = next(
                (i for i, (a, b) in enumerate(zip(key, last, strict=False)) if a != b), min(len(key), len(last))
            )
            block += b"".join(map(write_varint, (shared, len(key) - shared, len(row)))) + key[shared:] + row
            last = key
        block += struct.pack("<II", 0, 1)
        position = write_varint(len(content)) + write_varint(len(block))
        block += bytes([compression])
        content += block + struct.pack("<I", masked_crc(block))
        return position

    for start in range(0, len(keys), size):
        part = keys[start : start + size]
        index[part[-1]] = add({key: rows[key] for key in part})
    footer = add({}) + add(index)
    return content + footer.ljust(40, b"\0") + bytes.fromhex("57fb808b247547db")


def encode_entry(entry: Entry, more: bytes = b"") -> bytes:
    shape = b"".join(write_fields(2, number(1, n)) for n in entry.shape)
    numbers = number(1, entry.kind) + write_fields(2, shape) + number(3, entry.shard) + number(4, entry.offset)
    checksum = write_varint(6 << 3 | 5) + struct.pack("<I", entry.checksum)
    return numbers + number(5, entry.size) + checksum + more


def header(shards: int = 1, more: bytes = b"") -> bytes:
    return number(1, shards) + write_fields(3, number(1, 1)) + more


def encode_strings(values: list[bytes]) -> tuple[bytes, int]:
    """Strings as a bundle stores them, and their checksum."""
    lengths = b"".join(struct.pack("<I", len(written_value)) for written_value in values)
    check = struct.pack("<I", masked_crc(lengths))
    return b"".join(write_varint(len(v)) for v in values) + check + b"".join(values), masked_crc(
        lengths + check + b"".join(values)
    )


def write_bundle(
    prefix: Path, tensors: dict[str, tuple[int, np.ndarray | list[bytes]]], shards: int = 1, **form
) -> None:
    """Write tensors, given as (TensorFlow's type number, values) by name, to the shards in turn."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    contents = [b""] * shards
    rows = {b"": header(shards)}
    for i, (name, (kind, values)) in enumerate(tensors.items()):
        shard = i % shards
        if isinstance(values, list):
            data, checksum = encode_strings(values)
            shape: tuple[int, ...] = (len(values),)
        else:
            data, shape = values.tobytes(), values.shape
            checksum = masked_crc(data)
        rows[name.encode()] = encode_entry(Entry(kind, shape, shard, len(contents[shard]), len(data), checksum))
        contents[shard] += data
    prefix.with_name(f"{prefix.name}.index").write_bytes(encode_table(rows, **form))
    for i, content in enumerate(contents):
        prefix.with_name(f"{prefix.name}.data-{i:05}-of-{shards:05}").write_bytes(content)


def test_bundle_of_all_types_blocks_and_shards_is_read(tmp_path):
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
    for reader, tensor in ((read, "words"), (read_strings, "one")):
        with pytest.raises(InputError, match=f"{tensor} is of TensorFlow's kind"):
            reader(bundle, tensor)


def test_long_tensors_are_read_in_pieces(tmp_path, monkeypatch):
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
    "a has an impossible shape": {"rows": lambda rows: rows | {b"a": encode_entry(Entry(1, (1 << 50,), 0, 0, 4, 0))}},
    "a has 8 bytes, which does not match": {
        "rows": lambda rows: rows | {b"a": encode_entry(Entry(1, (3,), 0, 0, 8, 0))}
    },
    "a ends at byte 12": {"rows": lambda rows: rows | {b"a": encode_entry(Entry(1, (2,), 0, 4, 8, 0))}},
    "a is in file 7 of 1": {"rows": lambda rows: rows | {b"a": encode_entry(Entry(1, (2,), 7, 0, 8, 0))}},
    "a number is cut off": {"rows": lambda rows: rows | {b"a": b"\x80"}},
}


@pytest.mark.parametrize("message", FORMS)
def test_unsupported_index_forms_are_rejected(tmp_path, message):
    form = dict(FORMS[message])
    rows = form.pop("rows")({b"": header(), b"a": encode_entry(Entry(1, (2,), 0, 0, 8, masked_crc(bytes(8))))})
    (tmp_path / "v.index").write_bytes(encode_table(rows, **form))
    (tmp_path / "v.data-00000-of-00001").write_bytes(bytes(8))
    with pytest.raises(InputError, match=message):
        open_bundle(tmp_path / "v")


@pytest.fixture(name="copy")
def copy_savedmodel(tmp_path):
    def copy(name: str) -> Path:
        return Path(shutil.copytree(SAVED_MODELS / name, tmp_path / name))

    return copy


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 0x10
    path.write_bytes(content)


INDEX, DATA = "variables/variables.index", "variables/variables.data-00000-of-00001"


def test_damaged_and_missing_files_are_rejected(copy, tmp_path):
    def assert_refused(change, message: str) -> None:
        folder = copy("student")
        change(folder)
        with pytest.raises(InputError, match=message):
            open_savedmodel(folder)
        shutil.rmtree(folder)

    assert_refused(lambda folder: flip(folder / INDEX, 100), "checksum of the block at byte 0 is wrong")
    assert_refused(lambda folder: flip(folder / INDEX, -1), "lacks the end of a table")
    assert_refused(lambda folder: (folder / INDEX).write_bytes(b""), "lacks the end of a table")
    assert_refused(lambda folder: (folder / INDEX).write_bytes((folder / INDEX).read_bytes()[40:]), "damaged")
    assert_refused(lambda folder: (folder / INDEX).unlink(), r"cannot read .*variables\.index \(No such file")
    assert_refused(lambda folder: (folder / DATA).unlink(), "data-00000-of-00001 is missing")
    assert_refused(lambda folder: (folder / DATA).write_bytes((folder / DATA).read_bytes()[:-1]), "cut off")
    assert_refused(
        lambda folder: (folder / "saved_model.pb").unlink(), r"has no saved_model\.pb; expected a SavedModel"
    )
    bundle = open_bundle(SAVED_MODELS / "student" / "variables" / "variables")
    graph = bundle.entries[GRAPH]
    assert_refused(lambda folder: flip(folder / DATA, graph.offset), "checksum of the lengths")
    assert_refused(lambda folder: flip(folder / DATA, graph.offset + graph.size - 1), f"checksum of {GRAPH} is wrong")
    for path in (tmp_path / "nothing", SAVED_MODELS / "student" / INDEX, SAVED_MODELS):
        with pytest.raises(InputError, match=r"has no saved_model\.pb"):
            open_savedmodel(path)


def test_variables_are_read_lazily(copy):
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


def test_flipped_byte_never_changes_a_variable(copy):
    folder = copy("keras3")
    expected = {name: array.tobytes() for name, array in open_savedmodel(folder).arrays.items()}
    rng = np.random.default_rng(0)
    for i in range(200):
        path = folder / (INDEX, DATA)[i % 2]
        content = path.read_bytes()
        at = int(rng.integers(len(content)))
        path.write_bytes(content[:at] + bytes([content[at] ^ int(rng.integers(1, 256))]) + content[at + 1 :])
        with suppress(InputError):
            # A flip in unused bytes changes nothing: padding of the footer, and tensors that are not of the network.
            assert {name: array.tobytes() for name, array in open_savedmodel(folder).arrays.items()} == expected
        path.write_bytes(content)


def rewrite(folder: Path, change) -> None:
    """Change the entries of an index and write it with valid checksums."""
    prefix = folder / "variables" / "variables"
    entries = change(open_bundle(prefix).entries)
    rows = {name.encode(): encode_entry(entry) for name, entry in entries.items()}
    (folder / INDEX).write_bytes(encode_table({b"": header(), **rows}))


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
def test_missing_extra_and_misshapen_variables_are_rejected(copy, name, change, message):
    folder = copy(name)
    rewrite(folder, change)
    if message is None:
        assert open_savedmodel(folder).inputs == INPUTS[name], "types of optimizer variables are not checked"
        return
    with pytest.raises(InputError, match=message):
        open_savedmodel(folder)


# Writes object graphs, valid and invalid ones.


class Objects:
    """Builds a graph of objects, each with its children by attribute, and the tensors they hold."""

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
        """Variables of a network under a prefix, without its head."""
        shapes = published((2, 1, 1, 1), 2, 3)
        names = [name for name in shapes if not name.startswith("head") and name != skip]
        return {str(i): self.variable(prefix + rename(n), written_value(n, shapes[n])) for i, n in enumerate(names)}

    def head(self, name: str = "dense", rows: int = 64) -> dict[str, int]:
        kernel, bias = written_value("head/kernel", (rows, 3)), written_value("head/bias", (3,))
        return {"kernel": self.variable(f"{name}/kernel", kernel), "bias": self.variable(f"{name}/bias", bias)}

    def save(self, folder: Path, children: dict[str, int], message: bytes | None = None) -> Path:
        self.add(children)
        self.nodes[0] = self.nodes.pop()
        graph = b"".join(write_fields(1, node) for node in self.nodes) if message is None else message
        write_bundle(folder / "variables" / "variables", {**self.tensors, GRAPH: (7, [graph])})
        (folder / "saved_model.pb").touch()
        return folder


@pytest.mark.parametrize("prefix", ["resnet/", "my_bi_t_model/keras_layer/resnet/", "bit/"])
def test_network_is_found_under_any_name_among_other_objects(tmp_path, prefix):
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
        np.testing.assert_array_equal(saved.arrays[name], written_value(name, shape))


@pytest.mark.parametrize(("prefix", "head"), [("resnet/", "resnet/head/dense"), ("", "dense")])
def test_unknown_input_range_is_an_error(tmp_path, prefix, head):
    """A network with the variable names of TensorFlow Hub's modules may or may not rescale its inputs."""
    objects = Objects()
    children = {"body": objects.add(objects.network(prefix)), "head": objects.add(objects.head(head))}
    folder = objects.save(tmp_path / "m", children)
    assert open_savedmodel(folder).inputs is None
    with pytest.raises(
        InputError, match=r"images that it was trained on are unknown: .* holds no graph.*--inputs 0\.\.1.*-1\.\.1"
    ):
        load(f"savedmodel:{folder}")


def test_incomplete_and_ambiguous_modules_are_rejected(tmp_path):
    def assert_refused(message: str, prefix: str = "resnet/", head: str = "dense", rows: int = 64, **options) -> None:
        objects = Objects()
        children = {"body": objects.add(objects.network(prefix, options.pop("skip", "")))}
        if head:
            children["head"] = objects.add(objects.head(head, rows))
        for name in options.pop("more", []):
            children[name] = objects.variable(name, np.ones((2, 2), np.float32))
        folder = objects.save(tmp_path / str(len(list(tmp_path.iterdir()))), children)
        with pytest.raises(InputError, match=message):
            open_savedmodel(folder)

    assert_refused("block1/unit02/b/group_norm/beta is missing", skip="block1/unit02/b/group_norm/beta")
    assert_refused("block3/unit01/a/proj/standard.* is missing", skip="block3/unit01/a/proj/standardized_conv2d/kernel")
    assert_refused("head/bias is missing, head/kernel is missing", head="")
    assert_refused("no recognizable BiT network", skip=STEM)
    assert_refused(r"head/kernel has shape \(32, 3\), expected \(64, 3\)", rows=32)
    assert_refused("two variables for head/kernel", more=["resnet/block1/unit01/se/kernel"])
    assert_refused("two variables for head/kernel", more=["another/kernel"])
    assert_refused("holds more than a BiT network", more=["embedding"])
    assert_refused("holds 2 BiT networks, a/, b/; expected one", prefix="a/", more=[f"b/{STEM}"])


def test_incomplete_and_ambiguous_keras_networks_are_rejected(tmp_path):
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
    """A Keras export: a list of variables named only gamma, beta, kernel and bias."""
    objects = Objects()
    shapes = published((2, 1, 1, 1), 2, 3)
    nodes = [objects.variable(f"net/{name.split('/')[-1]}", written_value(name, shapes[name])) for name in order]
    children = {"variables": objects.add({str(i): node for i, node in enumerate(nodes)})}
    return objects.save(folder, children | {"non_trainable_variables": objects.add()})


def test_keras_export_is_read_in_its_own_order_only(tmp_path):
    order = list(open_savedmodel(SAVED_MODELS / "keras3-export").arrays)
    saved = open_savedmodel(export(tmp_path / "known", order))
    assert saved.inputs is None
    np.testing.assert_array_equal(
        saved.arrays["block1/unit02/c/group_norm/beta"], written_value("block1/unit02/c/group_norm/beta", 2)
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


@pytest.mark.slow
def test_damaged_object_graph_never_crashes_the_reader(tmp_path):
    """Bytes are changed before the checksums are computed, so the checksums do not catch the damage."""
    rng = np.random.default_rng(0)
    for name in INPUTS.keys() - {"module"}:
        folder = Path(shutil.copytree(SAVED_MODELS / name, tmp_path / name))
        bundle = open_bundle(folder / "variables" / "variables")
        graph = read_strings(bundle, GRAPH)[0]
        data = (folder / DATA).read_bytes()
        for _ in range(60):
            changed = bytearray(graph)
            for at in rng.integers(0, len(graph), rng.integers(1, 4)):
                changed[at] = rng.integers(256)
            content, checksum = encode_strings([bytes(changed)])
            entry = Entry(7, (), 0, len(data), len(content), checksum)
            (folder / DATA).write_bytes(data + content)
            rows = {key.encode(): encode_entry(e) for key, e in bundle.entries.items()} | {
                GRAPH.encode(): encode_entry(entry)
            }
            (folder / INDEX).write_bytes(encode_table({b"": header(), **rows}))
            with suppress(InputError):
                saved = open_savedmodel(folder)
                assert {name: array.shape for name, array in saved.arrays.items()} == published((2, 1, 1, 1), 2, 3)


# Against TensorFlow.


@pytest.fixture(name="make_model", scope="module")
def models_from_tensorflow(tmp_path_factory):
    """Make SavedModels in a process of its own, because Keras 2 and 3 cannot be imported together."""
    for module in ("tensorflow", "tf_keras", "keras", "tensorflow_hub"):
        if find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    script = Path(__file__).parent.parent.parent / "scripts" / "make_savedmodel.py"

    def make(*words: str) -> Path:
        folder = tmp_path_factory.mktemp("made") / "m"
        command = [sys.executable, "-W", "ignore", str(script), str(folder), *words]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-3000:]
        return folder

    return make


@torch.inference_mode()
def difference(folder: Path) -> float:
    """Largest difference of our logits from TensorFlow's, relative to the largest logit."""
    with np.load(folder.with_name(f"{folder.name}.npz")) as arrays:
        images, logits = torch.from_numpy(arrays["images"]).permute(0, 3, 1, 2), arrays["logits"]
    # A file of Keras has no code of a module, nor its graph.
    of_module = folder.name == "hub-functional.h5"
    model = load(f"savedmodel:{folder}", inputs=((0.5,) * 3, (0.5,) * 3) if of_module else None).eval()
    ours = model(images)
    # Keras serves a model for the size of the images that it was first called with.
    notes = [note for note in model.notes if f"for images of {model.card.side} × {model.card.side} pixels" not in note]
    assert model.card.side_known == (len(notes) < len(model.notes))
    if "softmax" in folder.name:
        assert notes == ["the original model applies Softmax to the logits of its head; they are used unchanged here"]
        ours = ours.softmax(1)
    else:
        assert bool(notes) == of_module
    ours = ours.numpy()
    assert np.abs(logits - logits[:1]).max() > 0.1 * np.abs(logits).max(), "images differ"
    return float(np.abs(ours - logits).max() / np.abs(logits).max())


@pytest.mark.slow
def test_logits_equal_tensorflows(make_model, capsys):
    folder = make_model("--units", "2", "1", "1", "1", "--width", "32", "--groups", "32", "--classes", "7")
    variants = sorted(path.stem for path in folder.glob("*.npz"))
    assert len(variants) == 34
    differences = {variant: difference(folder / variant) for variant in variants}
    assert max(differences.values()) < 1e-4, differences
    import_model.import_model(Import(model=f"{folder}/hub-softmax", out=folder / "ours"))
    output = capsys.readouterr().err
    assert "the original model applies Softmax" in output
    assert "timm has no network of this size; only funmatch can load this folder" in output


@pytest.mark.slow
def test_r50x1_is_imported_and_loads_in_timm(make_model):
    form = ("--units", "3", "4", "6", "3", "--width", "64", "--groups", "32", "--classes", "37", "--side", "128")
    folder = make_model(*form, "--ways", "student")
    assert load(f"savedmodel:{folder}/student").count_parameters() == 23_576_165
    assert difference(folder / "student") < 1e-4
    found = import_model.import_model(Import(model=f"{folder}/student", out=folder / "ours", side=128)).metrics
    assert (found["architecture"], found["mean"], found["std"]) == ("resnetv2_50x1_bit", [0.0] * 3, [1.0] * 3)
    net = timm.create_model(f"local-dir:{folder}/ours", pretrained=True).eval()
    with np.load(folder / "student.npz") as arrays, torch.inference_mode():
        logits = net(torch.from_numpy(arrays["images"]).permute(0, 3, 1, 2)).numpy()
        assert np.abs(logits - arrays["logits"]).max() < 1e-3 * np.abs(arrays["logits"]).max()


@pytest.mark.slow
def test_bundles_written_by_tensorflow_are_read(tmp_path):
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tf = pytest.importorskip("tensorflow")
    rng = np.random.default_rng(0)
    dtypes = ("float32", "float64", "float16", "bfloat16", "int8", "int16", "int32", "int64", "uint8", "uint16", "bool")
    tensors = {f"a/{name}": tf.cast(tf.constant(rng.integers(0, 9, (3, 5))), name) for name in dtypes}
    # Enough names for an index of many blocks, and shards that were written separately.
    tensors |= {f"many/{i:05}/{'x' * 200}": tf.constant(np.float32(i)) for i in range(4000)}
    tensors["words"] = tf.constant([b"", b"word", b"w" * 1000])
    names = list(tensors)
    parts = [str(tmp_path / f"part{i}") for i in range(3)]
    for i, part in enumerate(parts):
        own_names = names[i::3]
        tf.raw_ops.SaveV2(
            prefix=part,
            tensor_names=own_names,
            shape_and_slices=[""] * len(own_names),
            tensors=[tensors[name] for name in own_names],
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
