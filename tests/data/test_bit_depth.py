"""Warnings about images of more than 8 bits that do not use their range."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from funmatch.data.cache.open_cache import open_cache


def warnings_of(folder, *arrays, ending="png"):
    folder.mkdir()
    for i, array in enumerate(arrays):
        Image.fromarray(array).save(folder / f"{i}.{ending}")
    lines = []
    open_cache(str(folder), log=lines.append)
    return [line for line in lines if line.startswith("WARNING: ")]


def ramp(low, high, kind):
    return np.linspace(low, high, 64).reshape(8, 8).astype(kind)


def test_twelve_bits_in_sixteen_are_a_warning(tmp_path):
    (line,) = warnings_of(tmp_path / "a", ramp(0, 4095, np.uint16), ramp(0, 3000, np.uint16))
    assert "the largest value seen is 4,095 of 65,535, so pixels are read as 0 … 15 of 255" in line
    assert not warnings_of(tmp_path / "b", ramp(0, 40_000, np.uint16), ramp(0, 3000, np.uint16))
    assert not warnings_of(tmp_path / "c", ramp(0, 100, np.uint8))


def test_twelve_bits_in_colour_png(tmp_path):
    """Pillow reads 16-bit colour as 8 bits, so the file is written here by hand."""

    def chunk(kind, content):
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    rows = b"".join(b"\0" + struct.pack(">24H", *range(4000, 4072, 3)) for _ in range(8))
    head = struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "0.png").write_bytes(png)
    lines = []
    open_cache(str(tmp_path / "a"), log=lines.append)
    assert any("16-bit images use little of their range" in line for line in lines)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ([ramp(0, 190_000, np.int32)], "32-bit images have values up to 190,000"),
        ([ramp(0, 2000, np.int32)], "largest value seen is 2,000 of 65,535"),
        ([ramp(-1000, 30_000, np.int32)], "values below 0 are black, and the smallest value seen is -1,000"),
        ([ramp(0, 4095, np.float32)], "all above 255 are white"),
        ([ramp(0, 2.5, np.float32)], "the largest value seen is 2.5"),
        ([ramp(0, 1, np.float32), ramp(0, 200, np.float32)], "bring them to one scale"),
    ],
)
def test_other_ranges(tmp_path, arrays, message):
    (line,) = warnings_of(tmp_path / "a", *arrays, ending="tif")
    assert message in line


def test_floats_of_usual_scales_are_fine(tmp_path):
    assert not warnings_of(tmp_path / "a", ramp(0, 1, np.float32), ramp(0, 0.5, np.float32), ending="tif")
    assert not warnings_of(tmp_path / "b", ramp(0, 255, np.float32), ending="tif")
