"""Rows as CSV, JSON lines and parquet: read back by csv, pandas, json and pyarrow, whatever the cells hold."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas
import pytest

from funmatch.errors import InputError
from funmatch.shipping.tables import Column, check_out, open_output, open_table, pick_format

COLUMNS = [Column("path", str), Column("probability", float), Column("agreement", bool)]
NASTY = [
    "plain.jpg", "a,b.jpg", 'say "x".jpg', "two\nlines", "carriage\rreturn", "both\r\n", " spaces ", "tab\tin",
    "ä 猫 🐈", "[bold]x[/bold] :smile:", "<b>&amp;</b>", "back\\slash", "sep\u2028arator\u2029\x85", "", "'quote'",
    "broken \udcff byte",
]  # fmt: skip
FORMULAS = ["=1+1", "+cmd|' /C calc'!A0", "-2", "@SUM(A1)", "\tx", "\rx"]


def write(path: Path, names: list[str], columns=COLUMNS) -> None:
    with open_table(path, pick_format(None, path), columns) as table:
        # In batches, as they come.
        for part in (names[:3], names[3:9], names[9:]):
            table.write([{"path": name, "probability": 0.1, "agreement": True} for name in part])


def as_utf8(name: str) -> str:
    return name.encode(errors="backslashreplace").decode()


def test_csv_is_read_back_by_csv_and_pandas(tmp_path):
    write(tmp_path / "t.csv", NASTY)
    content = (tmp_path / "t.csv").read_bytes()
    assert not content.startswith(b"\xef\xbb\xbf")
    content.decode()  # valid UTF-8, whatever the names hold
    with open(tmp_path / "t.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == [as_utf8(name) for name in NASTY]
    assert {(row["probability"], row["agreement"]) for row in rows} == {("0.1", "true")}
    frame = pandas.read_csv(tmp_path / "t.csv", keep_default_na=False, lineterminator=None)
    assert frame["path"].tolist() == [as_utf8(name) for name in NASTY]
    assert frame["probability"].tolist() == [0.1] * len(NASTY)
    assert frame["agreement"].all()


def test_formulas_are_harmless_in_csv_alone(tmp_path):
    for kind in ("csv", "jsonl", "parquet"):
        write(tmp_path / f"t.{kind}", FORMULAS)
    with open(tmp_path / "t.csv", newline="") as file:
        assert [row["path"] for row in csv.DictReader(file)] == [f"'{name}" for name in FORMULAS]
    lines = (tmp_path / "t.jsonl").read_text().split("\n")
    assert [json.loads(line)["path"] for line in lines if line] == FORMULAS
    assert pandas.read_parquet(tmp_path / "t.parquet")["path"].tolist() == FORMULAS


def test_json_lines_are_exact_and_one_line_each_for_every_reader(tmp_path):
    write(tmp_path / "t.jsonl", NASTY)
    text = (tmp_path / "t.jsonl").read_text()
    assert text.splitlines() == text.split("\n")[:-1]
    assert [json.loads(line)["path"] for line in text.splitlines()] == NASTY
    assert "猫" in text
    with open_table(tmp_path / "u.jsonl", "jsonl", COLUMNS) as table:
        table.write([{"path": "x", "probability": float("nan"), "agreement": None}])
    assert json.loads((tmp_path / "u.jsonl").read_text()) == {"path": "x", "probability": None, "agreement": None}


def test_parquet_holds_many_groups_of_rows(tmp_path, monkeypatch):
    from pyarrow import parquet

    monkeypatch.setattr("funmatch.shipping.tables.ROW_GROUP", 4)
    write(tmp_path / "t.parquet", NASTY)
    table = parquet.read_table(tmp_path / "t.parquet")
    assert table["path"].to_pylist() == [as_utf8(name) for name in NASTY]
    assert parquet.ParquetFile(tmp_path / "t.parquet").num_row_groups > 1
    assert [str(field.type) for field in table.schema] == ["string", "float", "bool"]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_failure_leaves_what_was_there_and_no_other_file(kind, tmp_path):
    out = tmp_path / f"t.{kind}"
    write(out, ["before"])
    before = out.read_bytes()

    def fail() -> None:
        with open_table(out, kind, COLUMNS) as table:
            table.write([{"path": "after", "probability": 0.5, "agreement": None}])
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert out.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_a_kill_leaves_no_file_under_the_name(tmp_path):
    out = tmp_path / "t.csv"
    code = (
        "import sys, time; from pathlib import Path; from funmatch.shipping.tables import Column, open_table\n"
        "with open_table(Path(sys.argv[1]), 'csv', [Column('path', str)]) as table:\n"
        "    table.write([{'path': 'x'}]); print('written', flush=True); time.sleep(60)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen([sys.executable, "-c", code, out], stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout
        assert process.stdout.readline() == b"written\n"
        process.send_signal(signal.SIGKILL)
    assert not out.exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a device that is always full")
def test_a_full_device_is_an_error_that_names_it():
    with pytest.raises(OSError, match="No space left") as error, open_output(Path("/dev/full")) as file:
        file.write(b"x" * 100_000)
    assert error.value.filename == "/dev/full"


def test_links_and_pipes_stay_what_they_are(tmp_path):
    (tmp_path / "real.csv").write_text("old")
    (tmp_path / "link.csv").symlink_to("real.csv")
    write(tmp_path / "link.csv", ["x"])
    assert (tmp_path / "link.csv").is_symlink()
    assert "x" in (tmp_path / "real.csv").read_text()
    os.mkfifo(tmp_path / "pipe.csv")
    with subprocess.Popen(["cat", tmp_path / "pipe.csv"], stdout=subprocess.PIPE, text=True) as reader:
        write(tmp_path / "pipe.csv", ["through"])
        assert reader.stdout
        assert "through" in reader.stdout.read()
    check_out(tmp_path / "pipe.csv", overwrite=False)
    with pytest.raises(InputError, match="exists; pass --overwrite"):
        check_out(tmp_path / "link.csv", overwrite=False)


def test_a_long_name_and_a_missing_folder_are_no_trouble(tmp_path):
    out = tmp_path / "new" / "folder" / ("ü" * 120 + ".csv")
    write(out, ["x"])
    assert out.stat().st_mode & 0o777 == 0o644
    assert time.time() - out.stat().st_mtime < 60
