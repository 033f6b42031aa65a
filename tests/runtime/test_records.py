"""Folders with a record (created once, compared, locked) and JSON files that may be damaged."""

import json
import os
import random
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from funmatch.errors import InputError
from funmatch.runtime.disk import files, json_files, locks, records
from funmatch.runtime.disk.json_files import Damaged, NewerFormat, parse_json, read_json, read_record
from funmatch.runtime.disk.records import RecordFolder
from funmatch.runtime.measured import Measurement, code_stamp

SHAPE = {"verb": str, "options": {"lr": float, "steps?": int | None}, "classes": list[str], "rows?": [{"n": int}]}
VALID = {"verb": "train", "options": {"lr": 1, "steps": None}, "classes": ["cat"], "rows": [{"n": 1}, {"n": 2}]}


def differences(recorded: dict[str, Any], now: Any) -> list[str]:
    return records.list_differences(recorded["options"], now["options"], "in the job")


def record_folder(path: Path, **more: Any) -> RecordFolder:
    return RecordFolder(path, "job.json", "job", {"options": dict}, **more)


def test_of_values_with_entries_those_that_differ_are_named():
    then, now = ({"options": {"answers": {"classes": each, "grid": [1, 1]}}} for each in (0, 3))
    assert differences(then, now) == ["answers.classes: 0 in the job, 3 now"]
    assert differences(then, then) == []
    assert differences(then, {"options": {}}) == ["answers: {'classes': 0, 'grid': [1, 1]} in the job, not set now"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"verb": 3}, "'verb' is 3"),
        ({"verb": None}, "'verb' is null"),
        ({"options": []}, "'options' is not an object"),
        ({"options": {}}, "'lr' is missing"),
        ({"options": {"lr": True}}, "'lr' is true"),
        ({"options": {"lr": "1"}}, "'lr' is \"1\""),
        ({"options": {"lr": 10**30}}, "'lr' is 1000000"),
        ({"options": {"lr": float("nan")}}, "'lr' is NaN"),
        ({"options": {"lr": 0, "steps": 1.5}}, r"'steps' is 1\.5"),
        ({"classes": {"cat": 1}}, "'classes' is not a list"),
        ({"classes": ["cat", 2]}, "'classes' is 2"),
        ({"rows": [{"n": 1}, {}]}, "'n' is missing"),
    ],
)
def test_wrong_types_are_named(change, message):
    assert parse_json(json.dumps(VALID), SHAPE) == VALID
    with pytest.raises(ValueError, match=message):
        parse_json(json.dumps(VALID | change), SHAPE)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "[" * 100_000, '{"a":' * 100_000, "[" * 900 + "]" * 900, "1" * 20_000, "\xff", "\0"],
)
def test_invalid_json_is_damaged(tmp_path, text):
    path = tmp_path / "job.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(Damaged, match=r"job\.json is damaged"):
        read_json(path, dict)


@pytest.mark.slow
def test_mutated_files_are_read_or_damaged(tmp_path):
    """Changed bytes and values raise only the documented errors, and whatever is read has the expected types."""
    rng, path, text = random.Random(0), tmp_path / "job.json", json.dumps(VALID).encode()
    values = (None, True, -1, 1e308, 10**40, "x", [], {}, [[[]]], {"format": "1"}, float("inf"))
    for number in range(3000):
        if number % 2:
            content = bytearray(text)
            for _ in range(rng.randint(1, 3)):
                content[rng.randrange(len(content))] = rng.randrange(256)
        else:
            changed = json.loads(text)
            part = rng.choice([changed, changed["options"], changed["rows"][0]])
            part[rng.choice([*part, "format", "extra"])] = rng.choice(values)
            content = json.dumps(changed).encode()
        path.write_bytes(content)
        try:
            record = read_record(path, SHAPE, 1, "choose another --out", closed=True)
        except (Damaged, NewerFormat):
            continue
        assert json_files.misfit(record, SHAPE) is None
        assert record.keys() <= {"verb", "options", "classes", "rows", "format"}


def test_newer_formats_are_refused_and_older_ones_read(tmp_path):
    path, shape = tmp_path / "job.json", {"a": int}
    for text, number in (('{"a": 1}', 1), ('{"format": 1, "a": 1}', 1), ('{"format": 2, "a": 1}', 2)):
        path.write_text(text)
        assert read_record(path, shape, number, "")["a"] == 1
    path.write_text('{"format": 3, "b": []}')
    with pytest.raises(NewerFormat) as error:
        read_record(path, shape, 2, "choose another --out")
    assert str(error.value) == (
        f"{tmp_path} was written by a newer funmatch (format 3; this version reads format 2); "
        "upgrade funmatch or choose another --out"
    )
    for text in ('{"format": 0, "a": 1}', '{"format": "3", "a": 1}', '{"format": true, "a": 1}', '{"a": 1, "b": 2}'):
        path.write_text(text)
        with pytest.raises(Damaged):
            read_record(path, shape, 2, "", closed=True)


def test_folder_is_created_once_and_compared_when_reopened(tmp_path):
    folder = record_folder(tmp_path / "new" / "job")
    with folder.opened({"options": {"lr": 1}}, differences) as record:
        assert record == {"format": 1, "options": {"lr": 1}}
    before = folder.path.read_bytes()
    with folder.opened({"options": {"lr": 1}}, differences) as record:
        assert record["options"] == {"lr": 1}
    with (
        pytest.raises(InputError) as error,
        folder.opened({"options": {"lr": 2, "ema": 0.9}}, differences),
    ):
        pass
    assert str(error.value) == (
        f"{folder.folder} holds a job with other options:\n"
        "  ema: not set in the job, 0.9 now\n  lr: 1 in the job, 2 now\n"
        "choose another --out, or pass the job's own values"
    )
    assert folder.path.read_bytes() == before


def test_folder_of_something_else_is_refused_and_kept(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    (tmp_path / "file").write_text("precious")
    for name in ("mine", "file"):
        with (
            pytest.raises(InputError, match="exists and is not a job; choose another --to"),
            record_folder(tmp_path / name, option="--to").opened({"options": {}}, differences),
        ):
            pass
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]
    with pytest.raises(InputError, match="not a name in UTF-8"):
        record_folder(tmp_path / os.fsdecode(b"\xff")).check_place()


def test_leftovers_of_a_killed_process_are_removed(tmp_path):
    (tmp_path / ".job.json.x1.partial").write_text("{")
    (tmp_path / ".student.partial").mkdir()
    (tmp_path / ".student.partial" / "x").touch()
    (tmp_path / ".begin").touch()
    with record_folder(tmp_path).opened({"options": {}}, differences):
        assert {path.name for path in tmp_path.iterdir()} == {"job.json", ".begin"}


def test_newer_format_is_refused_and_nothing_is_changed(tmp_path):
    (tmp_path / ".student.partial").mkdir()
    (tmp_path / "job.json").write_text('{"format": 2}')
    folder = record_folder(tmp_path)
    with (
        pytest.raises(NewerFormat, match=r"\(format 2; this version reads format 1\)"),
        folder.opened({"options": {}}, differences),
    ):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {"job.json", ".student.partial"}
    assert folder.path.read_text() == '{"format": 2}'


@pytest.mark.parametrize("when", ["while it begins", "while it runs"])
def test_failed_creation_leaves_no_folder(tmp_path, when):
    folder = record_folder(tmp_path / "job", leftovers=("log",))
    with pytest.raises(OSError, match="full"):  # noqa: PT012
        if when == "while it begins":
            with folder.beginning():
                folder.write({"options": {}})
                (folder.folder / "log").touch()
                raise OSError("full")
        with folder.opened({"options": {}}, differences):
            raise OSError("full")
    assert (tmp_path / "job").exists() == (when == "while it runs"), (
        "a complete record is kept, so that the job can be resumed"
    )


def test_error_names_the_process_that_holds_the_lock(tmp_path):
    folder = record_folder(tmp_path)
    code = (
        "import sys, pathlib; from funmatch.runtime.disk.records import RecordFolder\n"
        "folder = RecordFolder(pathlib.Path(sys.argv[1]), 'job.json', 'job', {'options': dict})\n"
        "with folder.opened({'options': {}}, lambda then, now: []):\n"
        "    print('ready', flush=True); sys.stdin.read()\n"
    )
    # Another process, because its PID is part of the message.
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdin
    assert other.stdout
    assert other.stdout.readline() == "ready\n"
    with pytest.raises(InputError) as error, folder.opened({"options": {}}, differences):
        pass
    owner = f"another process (PID {other.pid})" if Path("/proc/locks").is_file() else "another process"
    assert str(error.value) == f"{owner} is using {tmp_path}; wait for it or choose another --out"
    other.stdin.close()
    assert other.wait() == 0
    other.stdout.close()
    with folder.opened({"options": {}}, differences):
        assert locks.lock_owner(folder.path) in (os.getpid(), None)


def test_folder_behind_a_link_is_replaced_and_the_link_kept(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "old").touch()
    (tmp_path / "student").symlink_to(tmp_path / "disk")
    with files.write_folder_atomically(tmp_path / "student") as partial:
        (partial / "new").touch()
    assert (tmp_path / "student").is_symlink()
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["new"]
    assert {path.name for path in tmp_path.iterdir()} == {"disk", "student"}


def test_arrays_are_read_or_damaged(tmp_path):
    path, rng = tmp_path / "a.npy", random.Random(0)
    files.write_array(path, np.arange(3))
    valid = path.read_bytes()
    for _ in range(500):
        content = bytearray(valid)
        content[rng.randrange(len(content) - 24)] = rng.randrange(256)  # the header only: any bytes are valid data
        path.write_bytes(content)
        with suppress(ValueError):
            files.read_array(path)


def test_the_stamp_of_code_changes_with_each_change_of_a_file(tmp_path):
    def stamp():
        code_stamp.cache_clear()
        return code_stamp(tmp_path)

    (tmp_path / "inner").mkdir()
    path = tmp_path / "inner" / "a.py"
    path.write_text("x = 1")
    os.utime(path, ns=(0, 1_000_000_000))
    found = [stamp()]
    (tmp_path / "notes.txt").write_text("no code")
    assert stamp() == found[0]
    os.utime(path, ns=(0, 2_000_000_000))
    found.append(stamp())
    path.write_text("x = 12")
    os.utime(path, ns=(0, 2_000_000_000))
    found.append(stamp())
    path.rename(tmp_path / "a.py")
    found.append(stamp())
    assert len({*found}) == 4
    code_stamp.cache_clear()
    assert code_stamp() == code_stamp()


def test_measurement_is_cached_and_a_damaged_one_ignored(tmp_path, monkeypatch):
    monkeypatch.setenv("FUNMATCH_CACHE", str(tmp_path))
    measurement = Measurement("steps", "a network on this machine", "this student")
    assert measurement.path == tmp_path / "steps" / "091a2e67662d209c39901f92.json", (
        "the file name must not change, or cached measurements are lost"
    )
    assert measurement.read({"fp32": float}) is None
    measurement.write({"fp32": 1.5})
    assert measurement.read({"fp32": float}) == {"fp32": 1.5}
    for text in ("{", "[]", '{"fp32": "1"}', "[" * 100_000):
        measurement.path.write_text(text)
        assert measurement.read({"fp32": float}) is None
    (tmp_path / "forms").write_text("in the way")
    Measurement("forms", "x", "this teacher").write({})
