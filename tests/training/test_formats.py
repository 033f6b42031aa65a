"""Files that were damaged, or that a newer version wrote: one sentence and exit code 2, or made again; no traceback."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from make_images import FEW

from funmatch.commands.study import results as study_results
from funmatch.commands.study.spec import RunSpec, parse, read_spec
from funmatch.commands.tune import summary
from funmatch.data.cache import check
from funmatch.data.cache.ledger import ENTRY
from funmatch.errors import InputError
from funmatch.models import class_map
from funmatch.models.origins import folders
from funmatch.models.origins.find import find_origin
from funmatch.reports import run_tables, study_page, tune_page
from funmatch.runtime.disk.json_files import Damaged, parse_json, seal
from funmatch.training.run import checkpoint, compare, state
from funmatch.training.run import folder as run_folder
from funmatch.training.teachers import tape

FIXTURES = Path(__file__).parent.parent / "fixtures"
NEWER = "was written by a newer funmatch (format 99; this version reads format "
STUDY = """title = "a study"
verb = "train"
[common]
data = "fashion-mini"
student = "fashion-mini-student"
steps = 1
[[run]]
name = "a"
"""
TRIALS = [
    {
        "number": i, "state": "complete", "knobs": {"lr": 0.1 * (i + 1), "optimizer": "sgd"}, "value": 0.5 + 0.1 * i,
        "spread": None, "scores": [0.5], "metric": "top1", "seconds": 3.0, "error": None, "runs": [f"trials/{i}/0"],
    }
    for i in range(3)
]  # fmt: skip
SUMMARY = {
    "study": "search", "verb": "train", "recipe": None, "score": "top1", "trials": TRIALS, "best": 2, "value": 0.7,
    "spread": None, "knobs": TRIALS[2]["knobs"], "best_run": "trials/2/0", "sampler": "tpe", "executions": 1,
    "space": {
        "lr": {"choices": [], "low": 0.1, "high": 1.0, "log": True, "whole": False},
        "optimizer": {"choices": ["sgd", "adamw"], "low": 0.0, "high": 0.0, "log": False, "whole": False},
    },
    "said": True, "importance": {"lr": 1.0}, "command": "funmatch train", "cut": None, "storage": "journal.log",
    "name": "search", "tested": [2], "seen": {"val": 3},
    "test": {"pictures": 5, "top1": 0.5, "top1_spread": None, "agreement": None, "agreement_spread": None},
}  # fmt: skip
VALUES = (
    None, True, -1, 0.5, -1e308, 10**40, float("nan"), float("inf"), "", "x", "\ud800", [], {}, [[]], [None], ["x"],
    {"x": 1}, "9" * 50,
)  # fmt: skip
INSERTED = (b"[" * 100_000, b'{"a":' * 100_000, b"[" * 900 + b"]" * 900, b"1" * 20_000, b"\0", b"\xff")


@pytest.fixture
def old_run(tmp_path) -> Path:
    return Path(shutil.copytree(FIXTURES / "old_run", tmp_path / "run"))


@pytest.fixture
def old_cache(tmp_path, monkeypatch) -> Path:
    """A copy of the resident cache, and the images beside it."""
    monkeypatch.setenv("FUNMATCH_CACHE", str(tmp_path / "cache"))
    shutil.copytree(FIXTURES / "old_cache" / "images", tmp_path / "images")
    shutil.copytree(FIXTURES / "old_cache" / "cache", tmp_path / "cache")
    return next((tmp_path / "cache").glob("*-resident"))


def renumber(path: Path, **changes: Any) -> None:
    """Gives a record the format of a version yet to come, or other changes."""
    (path.parent / "checksums.json").unlink(missing_ok=True)
    path.write_text(json.dumps(seal(json.loads(path.read_text()) | (changes or {"format": 99}))))


def assert_refused(done: Any, words: str = NEWER) -> None:
    lines = [line for line in done.stderr.splitlines() if line.startswith("funmatch: ")]
    assert done.returncode == 2
    assert len(lines) == 1
    assert words in lines[0]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["config.json", "result.json"])
def test_newer_record_of_a_run_is_refused(old_run, funmatch, name):
    renumber(old_run / name)
    assert_refused(funmatch("report", old_run, check=None))


def test_unknown_key_of_a_run_is_named(old_run, funmatch):
    renumber(old_run / "config.json", colour="red")
    assert_refused(funmatch("report", old_run, check=None), "config.json is damaged (unknown key 'colour')")


def test_newer_checkpoint_is_refused_and_an_unknown_key_is_damage(tmp_path, funmatch, finished_run):
    words = {
        "data": FEW,
        "student": "fashion-mini-student",
        "steps": 2,
        "batch": 8,
        "eval_every": 2,
        "save_every": 2,
    }
    run = finished_run(tmp_path / "run", "train", device="cpu", compile="off", **words)
    command = ["train", "--device", "cpu", "--compile", "off", "--out", run.folder]
    command += [word for name, value in words.items() for word in (f"--{name.replace('_', '-')}", value)]
    (run.folder / "result.json").unlink()
    (newest,) = (run.folder / "checkpoints").glob("step-*")
    sound = (newest / "state.json").read_text()
    renumber(newest / "state.json")
    assert_refused(funmatch(*command, check=None))
    (newest / "state.json").write_text(sound)
    renumber(newest / "state.json", colour="red")
    assert_refused(funmatch(*command, check=None), "no checkpoint in")


def test_newer_tape_is_refused(tmp_path, funmatch):
    folder = Path(shutil.copytree(FIXTURES / "old_tape", tmp_path / "tape"))
    renumber(folder / "tape.json")
    assert_refused(funmatch("tape", folder, check=None))


def test_newer_cache_is_refused_and_a_damaged_one_is_built_again(tmp_path, funmatch, old_cache):
    command = ("prepare", tmp_path / "images", "--decoder", "pillow", "--pixels", "resident")
    sound = {path.name: path.read_bytes() for path in old_cache.iterdir()}
    renumber(old_cache / "meta.json")
    assert_refused(funmatch(*command, check=None))
    (old_cache / "meta.json").write_bytes(sound["meta.json"])
    # The header, which numpy evaluates; a row; and the ledger that prepare writes.
    for name, place in (("train.index.npy", 20), ("train.index.npy", 150), ("train.digest.npy", 3), ("meta.json", 2)):
        content = bytearray(sound[name])
        content[place] ^= 64
        (old_cache / name).write_bytes(content)
        assert "is damaged on the disk; rebuilding it" in funmatch(*command).stderr
        assert (old_cache / "train.pixels").read_bytes() == sound["train.pixels"]
        assert (old_cache / "train.index.npy").read_bytes() == sound["train.index.npy"]
    for ledger in (tmp_path / "cache" / "known").iterdir():
        ledger.write_bytes(ledger.read_bytes().replace(b"contradictory", b"contradistory"))
    funmatch("data", tmp_path / "images", "--decoder", "pillow", "--pixels", "resident")


def test_new_cache_notices_any_changed_bit_of_its_index(tmp_path, funmatch, monkeypatch):
    monkeypatch.setenv("FUNMATCH_CACHE", str(tmp_path / "new"))
    funmatch("prepare", FIXTURES / "old_cache" / "images", "--decoder", "pillow", "--pixels", "resident")
    (folder,) = (tmp_path / "new").glob("*-resident")
    path, rng = folder / "train.index.npy", random.Random(0)
    sound = path.read_bytes()
    assert check.is_complete(folder)
    for _ in range(100):
        content = bytearray(sound)
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        assert not check.is_complete(folder)


@pytest.mark.parametrize("name", ["study.json", "result.json"])
def test_newer_search_is_refused(tmp_path, funmatch, name):
    pytest.importorskip("optuna")
    folder = tmp_path / "search"
    folder.mkdir()
    record = {
        "verb": "train", "knobs": {}, "space": {}, "search": {}, "storage": "s", "name": "n", "data": "d", "id": "i",
    }  # fmt: skip
    (folder / "study.json").write_text(json.dumps(seal(record)))
    (folder / "result.json").write_text(json.dumps(SUMMARY))
    renumber(folder / name)
    options = ("--data", "fashion-mini", "--student", "fashion-mini-student", "--steps", "1")
    assert_refused(funmatch("tune", "train", *options, "--space", "lr=0.1,0.2", "--out", folder, check=None))


def test_newer_study_is_refused(tmp_path, funmatch):
    folder = tmp_path / "study"
    folder.mkdir()
    (folder / "study.toml").write_text(STUDY)
    (folder / "plan.json").write_text('{"format": 99}')
    assert_refused(funmatch("study", folder / "study.toml", "--out", folder, check=None))
    (folder / "plan.json").unlink()
    (folder / "results.jsonl").write_text('{"format": 99}\n')
    assert_refused(funmatch("study", "a", "--draw", "--out", folder, check=None))


def test_report_says_how_many_lines_are_damaged(old_run, funmatch):
    path = old_run / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "[" * 5000, *lines[1:3], "1" * 20_000, *lines[3:], ""]))
    assert f"{path}: 2 damaged lines are left out" in funmatch("report", old_run).stderr
    assert "2 damaged lines of metrics.jsonl in run were left out" in (old_run / "report.html").read_text()


def places(value: Any) -> list[tuple[Any, Any]]:
    """All items of nested lists and objects, as (container, key)."""
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [place for key in keys for place in ((value, key), *places(value[key]))]


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Cuts a file off, flips bits, inserts what is nested too deep, or changes, removes or adds a value."""
    kind, changed = rng.randrange(7), bytearray(content)
    if kind == 0:
        return content[: rng.randrange(len(content))]
    if kind == 1:
        for _ in range(rng.randint(1, 3)):
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        return bytes(changed)
    if kind == 2:
        place = rng.randrange(len(content))
        return content[:place] + rng.choice(INSERTED) + content[place:]
    value = json.loads(content)
    container, key = rng.choice(places(value))
    if kind == 3:
        del container[key]
    elif kind == 4:
        value[rng.choice(["format", "extra", "*", "step?"])] = rng.choice(VALUES)
    else:
        container[key] = rng.choice(VALUES)
    return json.dumps(value).encode()


def attack(path: Path, read: Callable[[], object], tries: int = 120) -> None:
    """Damages a file again and again, or a line of it: whoever reads it must give a result or an `InputError`."""
    rng, sound = random.Random(0), path.read_bytes()
    for _ in range(tries):
        lines = sound.splitlines() if path.suffix == ".jsonl" else [sound]
        number = rng.randrange(len(lines))
        lines[number] = damaged(lines[number], rng)
        path.write_bytes(b"\n".join(lines) + b"\n")
        try:
            read()
        except InputError:
            continue
    path.write_bytes(sound)
    read()


@pytest.mark.parametrize("name", ["config.json", "result.json", "metrics.jsonl"])
def test_damaged_run_is_shown_or_refused(old_run, name):
    def show() -> None:
        run = run_folder.find_run(old_run)
        compare.differences(run.config, run_folder.record_of("distill", {"steps": 8}, {"data": "x"}))
        run.metrics.count_damaged()
        for part in (run_tables.rows, run_tables.teachers, run_tables.agreement_rows, run_tables.evaluation_counts):
            part(run)
        json.dumps([run_tables.overridden_options(run), run_tables.flat(run.config)]).encode()

    attack(old_run / name, show)


def test_damaged_records_are_refused(tmp_path, old_run, old_cache):
    newest = old_run / "checkpoints" / "step-000000008"
    attack(newest / "state.json", lambda: state.read_state(newest / "state.json"))
    attack(newest / "state.json", lambda: checkpoint.go_back(old_run / "checkpoints", 8))
    folder = Path(shutil.copytree(FIXTURES / "old_tape", tmp_path / "tape"))
    attack(folder / "tape.json", lambda: tape.find_tape(folder).counts(), 60)
    attack(old_cache / "meta.json", lambda: check.is_complete(old_cache))
    config = old_run / "student" / "config.json"
    attack(config, lambda: find_origin(str(old_run), {}, weights=None, side=None, inputs=None), 60)
    attack(config, lambda: folders._read_card(config))
    names = tmp_path / "map.json"
    names.write_text('{"cat": "tabby", "dog": ["n02085620", 152]}')
    attack(names, lambda: class_map.read_class_map(names))


def test_damaged_results_of_a_study_are_left_out(tmp_path, old_run):
    entry = RunSpec("a", "a", 0, "distill", {"steps": 8, "data": ["fashion-mini"]}, shown=True)
    one = study_results.result_of(entry, old_run)
    study_results.write_results(tmp_path, [one, one | {"seed": 1, "place": "b"}])

    def show() -> None:
        found = study_results.results(tmp_path)
        if found:
            study_page.columns(found), study_page.rows(found), study_page.provenance(tmp_path, found)

    attack(tmp_path / "results.jsonl", show)


def test_damaged_summary_of_a_search_is_made_again(tmp_path):
    (tmp_path / "result.json").write_text(json.dumps(SUMMARY))

    def show() -> None:
        found = summary.read_summary(tmp_path)
        parts = (tune_page.lead, tune_page.columns, tune_page.trial_rows, tune_page.best_rows)
        for part in (*parts, tune_page.evaluation_counts):
            part(found)

    attack(tmp_path / "result.json", show)
    contradicting = SUMMARY | {"best": 7}
    (tmp_path / "result.json").write_text(json.dumps(contradicting))
    with pytest.raises(Damaged, match="contradict"):
        summary.read_summary(tmp_path)


def test_damaged_study_file_is_refused():
    rng = random.Random(0)
    for number in range(100):
        changed = bytearray(STUDY.encode())
        changed[rng.randrange(len(changed))] = rng.choice(b'[]{}="#.,1a')
        text = ("a = " + "[" * 100_000, f"seeds = [{'9' * 5000}]", changed.decode())[number if number < 2 else 2]
        for read in (parse, read_spec):
            try:
                read(text, "study.toml")
            except InputError:
                continue


def test_damaged_array_is_computed_again(tmp_path):
    from funmatch.runtime.disk.parts import read_checked

    rng, path = random.Random(0), tmp_path / "answers.npy"
    np.save(path, np.arange(6, dtype=np.float32).reshape(2, 3))
    sound = path.read_bytes()
    for _ in range(200):
        content = bytearray(sound)
        content[rng.randrange(128)] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        found = read_checked(path, (2, 3))
        assert found is None or found.dtype == np.float32


def test_shape_of_all_other_keys_and_of_lists_of_a_length():
    parse_json('{"a": 1, "b": "x", "b?": "y"}', {"a": int, "*": str})
    for text in ('{"b": "x"}', '{"a": 1, "b": 2}', '{"a": 1, "b?": 2}'):
        with pytest.raises(ValueError, match=r"'a' is missing|is 2"):
            parse_json(text, {"a": int, "*": str})
    assert parse_json('[1, "x"]', (int, str)) == [1, "x"]
    with pytest.raises(ValueError, match="not a list of 2"):
        parse_json('[1, "x", 2]', (int, str))
    with pytest.raises(ValueError, match="surrogates"):
        parse_json('{"a": "\\ud800"}')
    assert parse_json('{"a": "\\udcff"}') == {"a": "\udcff"}  # a byte of a file name that is not UTF-8
    with pytest.raises(ValueError, match="missing"):
        parse_json("{}", ENTRY)
