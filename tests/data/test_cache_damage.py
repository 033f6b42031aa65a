"""A flipped bit or a cut file of a cache is noticed before it matters."""

import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from funmatch.data.cache.open_cache import Cache, open_cache
from funmatch.data.cache.storing import CacheOptions
from funmatch.errors import InputError


@pytest.fixture
def images(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for name in "ab":
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(4):
            noise = rng.integers(0, 256, (8 + i, 9, 3), dtype=np.uint8)
            Image.fromarray(noise).save(tmp_path / "images" / name / f"{i}.png")
    return tmp_path / "images"


def flip(path: Path, seed: int) -> None:
    content = bytearray(path.read_bytes())
    bit = random.Random(seed).randrange(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def content_of(cache: Cache) -> list:
    split = cache.splits["train"]
    return [cache.key, cache.classes, split.labels(slice(None)).tolist(), *(each.tolist() for each in split.images(
        np.arange(len(split))))]  # fmt: skip


@pytest.mark.parametrize("way", ["resident", "streaming"])
def test_no_flipped_bit_of_pixels_is_used(images, tmp_path, way):
    options = CacheOptions(home=tmp_path / "cache", way=way)
    expected = content_of(open_cache(str(images), cache_options=options))
    pixels = next((tmp_path / "cache").glob("*/train.pixels"))
    whole = pixels.read_bytes()
    for seed in range(40):
        flip(pixels, seed)
        damaged = open_cache(str(images), cache_options=options)
        with pytest.raises(InputError, match=r"train\.pixels is damaged; run `funmatch prepare`"):
            content_of(damaged)
        pixels.write_bytes(whole)
    flip(pixels, 0)
    told = []
    refreshed = open_cache(str(images), cache_options=options, refresh=True, log=told.append)
    assert content_of(refreshed) == expected
    assert any("is damaged on the disk; rebuilding it" in line for line in told)


@pytest.mark.parametrize("name", ["train.index.npy", "train.digest.npy", "meta.json"])
def test_flipped_bits_of_the_index_are_told_and_mended(images, tmp_path, name):
    options = CacheOptions(home=tmp_path / "cache", way="resident")
    expected = content_of(open_cache(str(images), cache_options=options))
    path = next((tmp_path / "cache").glob(f"*/{name}"))
    for seed in range(12):
        flip(path, seed)
        told = []
        assert content_of(open_cache(str(images), cache_options=options, log=told.append)) == expected
        assert any("is damaged on the disk; rebuilding it" in line for line in told)


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("known/*", "listing the data set again"),
        ("surveys/*.rows", "reading the images again"),
        ("surveys/*.reasons", "reading the images again"),
        ("surveys/*.check", "reading the images again"),
    ],
)
def test_flipped_bits_of_the_ledger_and_of_scans_are_told_and_mended(images, tmp_path, pattern, words):
    (images / "a" / "9.png").write_bytes(b"no image")
    options = CacheOptions(home=tmp_path / "cache", way="resident", on_bad="skip")
    first = open_cache(str(images), cache_options=options)
    (path,) = (tmp_path / "cache").glob(pattern)
    whole = path.read_bytes()
    line = whole.find(b"\n") if pattern == "known/*" else len(whole)
    for seed in range(50 if pattern == "known/*" else 15):
        bit = random.Random(seed).randrange(8 * line)
        path.write_bytes(whole[: bit // 8] + bytes([whole[bit // 8] ^ 1 << bit % 8]) + whole[bit // 8 + 1 :])
        if pattern != "known/*":
            # A known data set is opened without its scan.
            next((tmp_path / "cache" / "known").iterdir()).unlink()
        told = []
        again = open_cache(str(images), cache_options=options, log=told.append)
        assert content_of(again) == content_of(first)
        assert again.summary == first.summary
        assert any(words in each for each in told), (seed, told)
        assert path.read_bytes() == whole


def test_ledger_entries_and_scans_without_checksums_are_read(images, tmp_path):
    options = CacheOptions(home=tmp_path / "cache", way="resident")
    first = open_cache(str(images), cache_options=options)
    (check,) = (tmp_path / "cache" / "surveys").glob("*.check")
    check.unlink()
    (ledger,) = (tmp_path / "cache" / "known").iterdir()
    line, rest = ledger.read_bytes().split(b"\n", 1)
    entry = json.loads(line)
    del entry["checksum"]
    ledger.write_bytes(json.dumps(entry).encode() + b"\n" + rest)
    told = []
    assert content_of(open_cache(str(images), cache_options=options, log=told.append)) == content_of(first)
    ledger.unlink()
    assert content_of(open_cache(str(images), cache_options=options, log=told.append)) == content_of(first)
    assert not [each for each in told if "damaged" in each]
    assert check.exists()


def test_a_pixels_file_that_is_cut_under_a_process_is_an_error(images, tmp_path):
    options = CacheOptions(home=tmp_path / "cache", way="resident")
    cache = open_cache(str(images), cache_options=options)
    content_of(cache)
    os.truncate(next((tmp_path / "cache").glob("*/train.pixels")), 5)
    with pytest.raises(InputError, match=r"train\.pixels is damaged"):
        cache.splits["train"].image(3)


def test_each_image_is_compared_once(images, tmp_path, monkeypatch):
    split = open_cache(str(images), cache_options=CacheOptions(home=tmp_path / "cache", way="resident")).splits["train"]
    compared = []
    crc32 = __import__("zlib").crc32
    monkeypatch.setattr("zlib.crc32", lambda data: compared.append(len(data)) or crc32(data))
    split.images(np.array([1, 2]))
    split.read_boxes(np.array([2, 3]), np.array([[0, 0, 2, 2]] * 2))
    assert len(compared) == 3
    split.subset(np.array([3, 0])).images(np.array([0, 1]))
    assert len(compared) == 4
    split.images(np.arange(8))
    split.images(np.arange(8))
    assert sum(compared) == sum(8 + i for i in range(4)) * 2 * 27
