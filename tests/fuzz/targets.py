"""The readers that are fuzzed: for each, undamaged files and what reads them."""

import json
import random
import shutil
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from unittest.mock import patch

import numpy as np

from funmatch import config
from funmatch.argv import parse_options
from funmatch.commands import tape as tape_command
from funmatch.commands.study import results, spec
from funmatch.commands.tune import search
from funmatch.config.sources.files import read_options
from funmatch.data.dataset import read_class_file
from funmatch.data.readers.open import open_dataset
from funmatch.data.remote.archives import unpack
from funmatch.errors import InputError
from funmatch.models import bit
from funmatch.models.checkpoints.checkpoint import open_checkpoint
from funmatch.models.class_map import read_class_map
from funmatch.models.keras import hdf5, network
from funmatch.models.load import load
from funmatch.models.tensorflow.savedmodel import open_savedmodel
from funmatch.reports import run_page, run_tables
from funmatch.runtime.disk.checksums import MANIFEST, verify_folder, write_manifest
from funmatch.training.run import folder as run_folder
from funmatch.training.run.state import read_state

from . import seeds
from .harness import Case, Target
from .mutations import Mutation, mutate_bytes, mutate_json, mutate_lines

TESTS = Path(__file__).parent.parent
WORDS = (
    "1", "0", "-1", "1e99", "nan", "inf", "", " ", "none", "auto", "kl", "\x1b[31m", "9" * 40, "a=b", "[1,2]",
    "../x", "~nobody/x", "--", "-", "true", "cpu", "8h", "subprocess:getoutput",
)  # fmt: skip
TEXTS = (
    '"x"', "1", "-1", "1e400", "nan", "true", "[1, 2]", '["a"]', "{ a = 1 }", '"\\u001b[31m"', "1979-05-27", "9" * 30,
)  # fmt: skip
"""Values in TOML."""
TABLES = (config.Distill, config.Train, config.Evaluate, config.Prepare, config.Tape, config.Report)


def _file(path: Path, mutate: Mutation, read: Callable[[Path], object]) -> Case:
    """A case that damages one file and reads it."""
    whole = path.read_bytes()

    def run(rng: random.Random) -> None:
        path.write_bytes(mutate(whole, rng))
        read(path)

    return run


def _unpack(path: Path) -> None:
    shutil.rmtree(path.parent / "unpacked", ignore_errors=True)
    unpack(path, path.parent / "unpacked" / "x.0", "https://host/x")


def _made(path: Path, make: Callable[[random.Random], bytes], read: Callable[[Path], object]) -> Case:
    """A case that writes an odd file and reads it."""

    def run(rng: random.Random) -> None:
        path.write_bytes(make(rng))
        read(path)

    return run


def _begin(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def _read_shard(path: Path) -> None:
    found = open_dataset(f"{'wds' if path.suffix == '.tar' else 'tfrecord'}:{path}")
    for name, split in found.splits.items():
        for i in range(min(len(split), 3)):
            found.read(name, i)


def _read_npz(path: Path) -> None:
    _, _, state, _ = bit.read_npz(path)
    for name in {"stem.conv.weight", "norm.weight", "norm.bias"} & {*state}:
        np.asarray(state[name])


def _read_weights(path: Path) -> None:
    for entry in open_checkpoint(path).entries.values():
        entry.read()


def _odd_safetensors(rng: random.Random) -> bytes:
    whole = seeds.safetensors_file()
    header = int.from_bytes(whole[:8], "little")
    if rng.random() < 0.5:
        return mutate_bytes(whole, rng)
    changed = mutate_json(whole[8 : 8 + header], rng)
    return len(changed).to_bytes(8, "little") + changed + whole[8 + header :]


def savedmodel(folder: Path) -> Case:
    """Damages one file of a SavedModel."""
    place = Path(shutil.copytree(TESTS / "models" / "savedmodels" / "student", folder / "model"))
    files = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}

    def run(rng: random.Random) -> None:
        path = rng.choice(sorted(files))
        path.write_bytes(mutate_bytes(files[path], rng))
        try:
            found = open_savedmodel(place)
            for name in found.arrays:
                _ = found.arrays[name]
        finally:
            path.write_bytes(files[path])

    return run


def keras_config(folder: Path) -> Case:
    """Changes what a file of Keras says about its layers, and looks for the network."""
    file, config = network.open_parts(TESTS / "models" / "savedmodels" / "keras3.keras")
    whole = json.dumps(config).encode()

    def run(rng: random.Random) -> None:
        found = network.find_network(file, network.parse_config(folder, mutate_json(whole, rng)))
        _ = found.arrays["head/bias"]

    return run


def keras_file(folder: Path) -> Case:
    """Damages a file of Keras, of either format; checksums of a zip show nearly all damage, HDF5 has none."""
    files = [TESTS / "models" / "savedmodels" / name for name in ("hub.h5", "keras3.keras")]

    def run(rng: random.Random) -> None:
        source = files[rng.random() < 0.2]
        damaged = bytearray(mutate_bytes(source.read_bytes(), rng) if rng.random() < 0.5 else source.read_bytes())
        for _ in range(
            rng.choice((0, 1, 10)) if damaged else 0
        ):  # at the beginning are the descriptions, further back the values
            damaged[rng.randrange(min(len(damaged), 20_000))] = rng.randrange(256)
        # Some damage keeps HDF5 busy for as long as it may be.
        with patch.object(hdf5, "SECONDS", 5):
            found = network.open_keras(_begin(folder / source.name, bytes(damaged)))
        for name in found.arrays:
            _ = found.arrays[name]

    return run


def _run(name: str, mutate: Mutation, folder: Path) -> Case:
    """Damages a file of a run, and makes all texts of its page, without its plots, which take a second."""
    place = Path(shutil.copytree(TESTS / "fixtures" / "old_run", folder / "run"))

    def read(_: Path) -> None:
        run = run_folder.find_run(place)
        run_page.lead([run])
        run_page.notes(run)
        run_tables.flat(run.config)
        run_tables.settings([run])
        run_tables.rows(run)
        run_tables.teachers(run)
        run_tables.agreement_rows(run)
        run_tables.evaluation_counts(run)
        run_tables.overridden_options(run)

    return _file(place / name, mutate, read)


def pages(folder: Path) -> Case:
    """Damages some files of a run, and draws its page."""
    place = Path(shutil.copytree(TESTS / "fixtures" / "old_run", folder / "run"))
    whole = {name: (place / name).read_bytes() for name in ("config.json", "metrics.jsonl", "result.json")}

    def run(rng: random.Random) -> None:
        for name, content in whole.items():
            mutate = mutate_lines if name.endswith("l") else mutate_json
            (place / name).write_bytes(mutate(content, rng) if rng.random() < 0.5 else content)
        run_page.write_page(config.Report(runs=(place,)))

    return run


def tape(folder: Path) -> Case:
    """Damages the header of a tape, and inspects it."""
    place = Path(shutil.copytree(TESTS / "fixtures" / "old_tape", folder / "tape"))

    def read(_: Path) -> None:
        tape_command.show(tape_command.run(config.Tape.checked(folder=place)))

    return _file(place / "tape.json", mutate_json, read)


def study(folder: Path) -> Case:
    """Damages the text of a study, or gives its keys other values."""
    text = seeds.study()

    def run(rng: random.Random) -> None:
        bytewise = rng.random() < 0.5
        damaged = mutate_bytes(text.encode(), rng).decode(errors="replace") if bytewise else _odd_toml(text, rng)
        spec.parse(damaged, str(folder))
        spec.read_spec(damaged, str(folder))

    return run


def _odd_toml(text: str, rng: random.Random) -> str:
    lines = text.splitlines()
    for _ in range(rng.choice((1, 2, 3))):
        at = rng.choice([i for i, line in enumerate(lines) if " = " in line])
        lines[at] = f"{lines[at].split(' = ')[0]} = {rng.choice(TEXTS)}"
    return "\n".join(lines)


def model_config(folder: Path) -> Case:
    """Damages the `config.json` of a model, and loads the model."""
    place = Path(shutil.copytree(TESTS / "fixtures" / "old_run" / "student", folder / "student"))
    return _file(place / "config.json", mutate_json, lambda path: load(f"local-dir:{path.parent}"))


def table_paths(folder: Path) -> Case:
    """Names odd files in a table of the Hugging Face library, or damages the table."""
    import datasets
    import pyarrow
    from pyarrow import parquet

    table, image = folder / "x.parquet", _begin(folder / "x.png", seeds.png())
    names = (
        str(image), "x.png", "../secret.png", "/etc/passwd", "~/x.png", "file:///etc/passwd", "http://127.0.0.1:9/x",
        f"zip://x.png::{image}", "hf://datasets/a/b/x.png", "", ".", "\x00", "a" * 300, "x\n.png", "C:\\x", str(folder),
        "/dev/null", "/proc/self/mem",
    )  # fmt: skip
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    datasets.disable_progress_bars()
    datasets.config.HF_DATASETS_CACHE = folder / "hub"

    def run(rng: random.Random) -> None:
        cells = [{"path": rng.choice(names), "bytes": seeds.png() if rng.random() < 0.3 else None} for _ in range(3)]
        rows = {"image": cells, "label": [0, 1, 0]}
        parquet.write_table(pyarrow.table(rows, schema=features.arrow_schema), table)
        if rng.random() < 0.3:
            table.write_bytes(mutate_bytes(table.read_bytes(), rng))
        shutil.rmtree(folder / "hub", ignore_errors=True)
        found = open_dataset(f"hf:{table}")
        for name, split in found.splits.items():
            for i in range(len(split)):
                with suppress(ValueError):  # an image that cannot be read is reported with its reason
                    found.read(name, i)

    return run


def manifest(folder: Path) -> Case:
    """Damages the checksums of a checkpoint, and compares them."""
    (folder / "state.json").write_text("{}")
    write_manifest(folder)
    return _file(folder / MANIFEST, mutate_json, lambda path: verify_folder(path.parent))


def search_record(folder: Path) -> Case:
    """Damages the record of a search, and reads it."""
    record = {
        "format": 1, "verb": "distill", "knobs": {"lr": 0.1}, "space": {"lr": "0.1,0.2"}, "search": {"trials": 2},
        "storage": "journal.log", "name": "s", "data": "d", "id": "i",
    }  # fmt: skip
    path = _begin(folder / "study.json", json.dumps(record).encode())
    return _file(path, mutate_json, lambda path: search.record_folder(path.parent).read())


def command_line(_: Path) -> Case:
    """Gives options of a command odd values."""

    def run(rng: random.Random) -> None:
        table, words = rng.choice(TABLES), []
        for name in rng.choices(sorted(table.model_fields), k=rng.randrange(1, 6)):
            words += [f"--{name.replace('_', '-')}", *rng.sample(WORDS, rng.randrange(3))]
        try:
            parse_options(words, table, "funmatch", None, show=False)
        except SystemExit as ended:
            if ended.code == 2:
                raise InputError("refused by the parser") from None
            if ended.code:
                raise

    return run


def config_file(folder: Path) -> Case:
    """Gives options in a file odd values, or damages the file."""
    names = sorted(config.Distill.model_fields)
    plain = b'{"lr": 0.1, "steps": 10, "data": ["a"], "teacher": "b", "precision": "fp32"}'

    def run(rng: random.Random) -> None:
        suffix, separator = rng.choice(((".toml", " = "), (".yaml", ": "), (".json", "")))
        lines = [f"{name}{separator}{rng.choice(TEXTS)}" for name in rng.sample(names, 5)]
        text = "\n".join(lines).encode() if separator else mutate_json(plain, rng)
        path = _begin(folder / f"options{suffix}", mutate_bytes(text, rng) if rng.random() < 0.5 else text)
        read_options(path, config.Distill, "distill")

    return run


def _state(folder: Path) -> Case:
    source = next((TESTS / "fixtures" / "old_run" / "checkpoints").glob("step-*/state.json"))
    return _file(Path(shutil.copy(source, folder)), mutate_json, read_state)


def _tfrecord(folder: Path) -> Case:
    return _file(_begin(folder / "train.tfrecord", seeds.records(seeds.unchanged)), mutate_bytes, _read_shard)


def _zlib(folder: Path) -> Case:
    shard = zlib.compress(seeds.records(seeds.unchanged))
    return _file(_begin(folder / "train.tfrecord", shard), mutate_bytes, _read_shard)


def _records(folder: Path) -> Case:
    def make(rng: random.Random) -> bytes:
        return seeds.records(lambda payload: mutate_bytes(payload, rng))

    return _made(folder / "train.tfrecord", make, _read_shard)


def _npz_headers(folder: Path) -> Case:
    return _made(folder / "x.npz", lambda rng: seeds.npz(lambda array: mutate_bytes(array, rng)), _read_npz)


def _results(folder: Path) -> Case:
    path = _begin(folder / results.FILE, seeds.study_results())
    return _file(path, mutate_lines, lambda path: results.results(path.parent))


MAP = b'{"cat": "tabby", "dog": ["n02085620", 152], "ant": 3}'
TARGETS = (
    Target("tfrecord", _tfrecord),
    Target("tfrecord-zlib", _zlib),
    Target("tfrecord-contents", _records),
    Target("tar", lambda folder: _file(_begin(folder / "train.tar", seeds.tar()), mutate_bytes, _read_shard)),
    Target("tar-headers", lambda folder: _made(folder / "train.tar", seeds.odd_tar, _read_shard)),
    Target("archive", lambda folder: _file(_begin(folder / "x.tar", seeds.tar()), mutate_bytes, _unpack)),
    Target("archive-zip", lambda folder: _file(_begin(folder / "x.zip", seeds.zip_of_images()), mutate_bytes, _unpack)),
    Target("archive-headers", lambda folder: _made(folder / "x.tar", seeds.odd_tar, _unpack)),
    Target("npz", lambda folder: _file(_begin(folder / "x.npz", seeds.npz()), mutate_bytes, _read_npz)),
    Target("npz-headers", _npz_headers),
    Target("safetensors", lambda folder: _made(folder / "x.safetensors", _odd_safetensors, _read_weights)),
    Target("pickle", lambda folder: _file(_begin(folder / "x.pt", seeds.torch_file()), mutate_bytes, _read_weights)),
    Target("savedmodel", savedmodel, is_fast=False),
    Target("keras-config", keras_config),
    Target("keras-file", keras_file, is_fast=False),
    Target("class-map", lambda folder: _file(_begin(folder / "map.json", MAP), mutate_json, read_class_map)),
    Target("labels", lambda folder: _file(_begin(folder / "x.txt", b"ant\nbee\ncat\n"), mutate_bytes, read_class_file)),
    Target("run-record", lambda folder: _run("config.json", mutate_json, folder)),
    Target("metrics", lambda folder: _run("metrics.jsonl", mutate_lines, folder)),
    Target("result", lambda folder: _run("result.json", mutate_json, folder)),
    Target("state", _state),
    Target("tape", tape),
    Target("study", study),
    Target("study-results", _results),
    Target("model-config", model_config, is_fast=False),
    Target("table-paths", table_paths, is_fast=False),
    Target("manifest", manifest),
    Target("search-record", search_record),
    Target("command-line", command_line, is_fast=False),
    Target("config-file", config_file),
    Target("pages", pages, is_fast=False),
)
"""Every reader of files that another person may have written."""
