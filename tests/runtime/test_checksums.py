"""Checksums find every flipped bit in records and folders, and what earlier versions wrote stays readable."""

import json
import random
import zlib

import pytest

from funmatch.runtime.disk.checksums import MANIFEST, crc_of_file, verify_folder, write_manifest
from funmatch.runtime.disk.json_files import Damaged, NewerFormat, read_record, seal

RECORD = {"format": 1, "step": 30, "name": "é\udcff", "list": [1.5, None, True], "inner": {"b": 1, "a": 2e-7}}
SHAPE = dict.fromkeys(("step", "name", "list", "inner"), object)


def test_crc_is_that_of_zlib_over_blocks(tmp_path):
    content = random.Random(0).randbytes((1 << 20) + 17)
    (tmp_path / "file").write_bytes(content)
    assert crc_of_file(tmp_path / "file") == zlib.crc32(content)


def test_every_flipped_bit_of_a_record_is_damage_or_changes_no_value(tmp_path):
    text = json.dumps(seal(RECORD)).encode()
    path = tmp_path / "record.json"
    path.write_bytes(text)
    assert read_record(path, SHAPE, 1, "advice", closed=True) == RECORD
    harmless = 0
    for bit in range(len(text) * 8):
        flipped = bytearray(text)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            found = read_record(path, SHAPE, 1, "advice")
        except Damaged:
            continue
        assert found == RECORD  # such as 2E-07 for 2e-07
        harmless += 1
    assert harmless < 10


def test_a_record_without_checksum_or_with_keys_in_another_order_is_read(tmp_path):
    path = tmp_path / "record.json"
    path.write_text(json.dumps(RECORD))
    assert read_record(path, SHAPE, 1, "advice", closed=True) == RECORD
    path.write_text(json.dumps(dict(reversed(seal(RECORD).items())), indent=3))
    assert read_record(path, SHAPE, 1, "advice", closed=True) == RECORD


def test_a_newer_record_is_told_from_a_flipped_format(tmp_path):
    path = tmp_path / "record.json"
    path.write_text(json.dumps(seal(RECORD | {"format": 2, "new": 1})))
    with pytest.raises(NewerFormat):
        read_record(path, SHAPE, 1, "advice")
    path.write_text(json.dumps(seal(RECORD) | {"format": 3}))
    with pytest.raises(Damaged, match="checksum"):
        read_record(path, SHAPE, 1, "advice")


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "folder"
    (place / "inner").mkdir(parents=True)
    (place / "a").write_bytes(b"abc")
    (place / "b").write_bytes(b"")
    write_manifest(place)
    return place


def test_a_whole_folder_verifies_and_one_without_manifest_is_left_unchecked(folder):
    listed = json.loads((folder / MANIFEST).read_text())["files"]
    assert listed == {"a": {"bytes": 3, "crc32": "352441c2"}, "b": {"bytes": 0, "crc32": "00000000"}}  # of the RFC
    (folder / "notes.txt").write_text("added later")
    verify_folder(folder)
    (folder / "a").write_bytes(b"abd")
    (folder / MANIFEST).unlink()
    verify_folder(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "a").write_bytes(b"abb"), "a does not match its checksum"),
        (lambda folder: (folder / "a").write_bytes(b"ab"), "a has 2 bytes, not the 3"),
        (lambda folder: (folder / "b").unlink(), "b is missing"),
        (lambda folder: (folder / MANIFEST).write_text("{"), "checksums.json is damaged"),
        (lambda folder: (folder / MANIFEST).write_text('{"files": {"a": 1}}'), "checksums.json is damaged"),
    ],
)
def test_damage_in_a_folder_is_named(folder, damage, message):
    damage(folder)
    with pytest.raises(Damaged, match=message):
        verify_folder(folder)


def test_every_flipped_bit_of_a_manifest_is_noticed(folder):
    text = (folder / MANIFEST).read_bytes()
    for bit in range(len(text) * 8):
        flipped = bytearray(text)
        flipped[bit // 8] ^= 1 << bit % 8
        (folder / MANIFEST).write_bytes(flipped)
        with pytest.raises(Damaged):
            verify_folder(folder)
