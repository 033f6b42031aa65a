"""JPEGs, and boxes of them, that the native kernel decodes are those that Pillow decodes, to the byte."""

import shutil
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from kernel_checks import build_quickly
from PIL import Image

from funmatch.data import jpeg as jpegs
from funmatch.data.decode import decode
from funmatch.data.jpeg import Box, kernel_decode, pick_decoder, pillow_decode
from funmatch.data.limits import Limits
from funmatch.ops.native import build, library

pytestmark = pytest.mark.skipif(build.find_compiler() is None, reason="there is no C++ compiler here")
MARKERS = (0x00, 0xC4, 0xD0, 0xD3, 0xD9, 0xDA, 0xFF)


@pytest.fixture(autouse=True)
def clear_kernel_caches():
    yield
    clear_caches()


def clear_caches() -> None:
    for cached in (library._load, jpegs._kernel_stands_in, jpegs._examples):
        cached.cache_clear()


def encoded(image: Image.Image, **options) -> bytes:
    file = BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


def random_image(rng: np.random.Generator) -> Image.Image:
    """An image of up to 119 pixels a side: noise, a smooth one, black and white, or a smooth one with noise."""
    height, width = (int(side) for side in rng.integers(1, 120, 2))
    shape, kind = (height, width, 3), rng.integers(4)
    if kind == 2:
        return Image.fromarray((rng.integers(0, 2, shape) * 255).astype(np.uint8))
    noise = rng.integers(0, 256, shape, dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(noise[:9, :9]).resize((width, height), Image.Resampling.BICUBIC), float)
    if kind == 3:
        smooth += rng.normal(0, rng.uniform(1, 40), shape)
    return Image.fromarray(noise if kind == 0 else smooth.clip(0, 255).astype(np.uint8))


def random_jpeg(rng: np.random.Generator) -> bytes:
    options: dict = {
        "quality": int(rng.integers(1, 101)),
        "subsampling": int(rng.integers(0, 3)),
        "optimize": bool(rng.integers(2)),
        "progressive": rng.random() < 0.05,
    }
    if rng.random() < 0.3:
        options["restart_marker_blocks"] = int(rng.integers(1, 20))
    image = random_image(rng)
    return encoded(image.convert("L") if rng.random() < 0.15 else image, **options)


def random_box(rng: np.random.Generator, jpeg: bytes) -> Box:
    with Image.open(BytesIO(jpeg)) as image:
        width, height = image.size
    top, left = int(rng.integers(height)), int(rng.integers(width))
    return top, left, int(rng.integers(1, height - top + 1)), int(rng.integers(1, width - left + 1))


def damaged(rng: np.random.Generator, jpeg: bytes) -> bytes:
    """Damages a file in one to three places: bits, bytes, what is missing or too much, markers, its header."""
    content = bytearray(jpeg)
    for _ in range(rng.integers(1, 4)):
        at = int(rng.integers(2, len(content)))
        kind = rng.integers(7)
        if kind == 0:
            content[at] = rng.integers(256)
        elif kind == 1:
            content[at] ^= 1 << rng.integers(8)
        elif kind == 2 and at > 3:
            del content[at:]
        elif kind == 3:
            del content[at : at + int(rng.integers(1, 9))]
        elif kind == 4:
            content[at:at] = rng.integers(0, 256, rng.integers(1, 9), dtype=np.uint8).tobytes()
        elif kind == 5:
            content[int(rng.integers(2, max(3, content.find(b"\xff\xda")))) % len(content)] = rng.integers(256)
        else:
            content[at:at] = bytes([0xFF, rng.choice(MARKERS)])
        if len(content) < 4:
            break
    return bytes(content)


def result(jpeg: bytes, *, kernel: bool, **options) -> tuple[bytes, tuple] | str:
    """What `decode` gives, or its error, with the kernel or without it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jpegs, "_kernel_stands_in", lambda *_: kernel)
        try:
            pixels = decode(jpeg, limits=Limits(scans=0), **options)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return pixels.tobytes(), pixels.shape


def compare(seed: int, count: int, *, damage: bool) -> int:
    """Compares so many images with Pillow's: boxes, whole and scaled; returns how many the kernel reads."""
    rng, decoded = np.random.default_rng(seed), 0
    for _ in range(count):
        whole = random_jpeg(rng)
        box = random_box(rng, whole)
        for options in ({"box": box}, {"box": random_box(rng, whole)}, {}, {"cap": int(rng.integers(1, 120))}):
            jpeg = damaged(rng, whole) if damage else whole
            expected = result(jpeg, kernel=False, **options)
            assert result(jpeg, kernel=True, **options) == expected, (seed, options, jpeg)
        decoded += kernel_decode(jpeg, box) is not None
    return decoded


@pytest.mark.parametrize(("seed", "count"), [(0, 100), pytest.param(1, 5000, marks=pytest.mark.slow)])
def test_boxes_are_those_of_whole_images(seed, count):
    assert compare(seed, count, damage=False) > count / 2, "the kernel reads most images"


def test_damaged_images_give_the_pixels_or_errors_of_pillow():
    assert compare(0, 150, damage=True) > 10, "the kernel reads some of them"


@pytest.mark.slow
def test_thousands_of_damaged_images_end_no_process():
    code = "import test_jpeg as tests; print(tests.compare(1, 4000, damage=True))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 300


@pytest.mark.parametrize("options", [{"subsampling": number} for number in range(3)] + [{"restart_marker_rows": 1}])
def test_every_box_at_the_edges_is_exact(options):
    noise = np.random.default_rng(0).integers(0, 256, (35, 37, 3), dtype=np.uint8)
    jpeg = encoded(Image.fromarray(noise), **options)
    whole = np.asarray(Image.open(BytesIO(jpeg)))
    for near in range(18):
        for box in (
            (near, near, 1, 1),
            (0, 0, near + 1, near + 1),
            (near, near, 35 - near, 37 - near),
            (near, 0, 2, 37),
        ):
            top, left, height, width = box
            found = kernel_decode(jpeg, box)
            assert found is not None
            np.testing.assert_array_equal(found, whole[top : top + height, left : left + width])


def test_unusual_images_are_left_to_pillow():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    ordinary = encoded(image)
    assert kernel_decode(ordinary, (0, 0, 40, 50)) is not None
    frame = ordinary.index(b"\xff\xc0")
    colours = ordinary[:frame] + ordinary[frame:].replace(b"\x01\x22\x00", b"\x01\x41\x00", 1)  # 4:1:1
    deep = ordinary[: frame + 4] + b"\x0c" + ordinary[frame + 5 :]
    cut = ordinary[:-2]
    for refused in (
        encoded(image, progressive=True), encoded(image.convert("CMYK")), encoded(image, keep_rgb=True),
        encoded(image.resize((4, 40)), subsampling=2), colours, deep, cut, ordinary[:100], b"", b"\xff\xd8",
        ordinary.replace(b"JFIF", b"JFIX").replace(b"\x01\x22\x00", b"\x52\x22\x00"),
    ):  # fmt: skip
        assert kernel_decode(refused, (0, 0, 4, 4)) is None


@pytest.mark.parametrize(
    "box", [(-1, 0, 4, 4), (0, -1, 4, 4), (0, 0, 0, 4), (0, 0, 41, 4), (37, 0, 4, 4), (0, 48, 4, 4), (2**62, 0, 1, 1)]
)
def test_boxes_beyond_the_image_are_refused(box):
    jpeg = encoded(Image.new("RGB", (50, 40)))
    assert kernel_decode(jpeg, box) is None


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_and_scaled_images_are_those_of_pillow(orientation):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    jpeg = encoded(image, exif=exif)
    for options in ({}, {"box": (3, 5, 20, 11)}, {"cap": 20}, {"cap": 20, "box": (3, 5, 10, 11)}, {"cap": 8}):
        assert result(jpeg, kernel=True, **options) == result(jpeg, kernel=False, **options)


@pytest.mark.parametrize("decoder", ["pillow", "torchcodec"])
def test_the_kernel_stands_in_for_decoders_of_the_same_pixels(decoder, monkeypatch):
    if decoder == "torchcodec" and pick_decoder("auto") != decoder:
        pytest.skip("torchcodec is not installed, or not for this torch")
    calls = []
    monkeypatch.setattr(jpegs, "kernel_decode", lambda *given: calls.append(given) or kernel_decode(*given))
    jpeg = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)))
    decode(jpeg, decoder=decoder)  # compares the kernel with the decoder
    calls.clear()
    whole = jpegs.torchcodec_decode(jpeg) if decoder == "torchcodec" else pillow_decode(jpeg)
    expected = whole[3:23, 5:16]
    np.testing.assert_array_equal(decode(jpeg, decoder=decoder, box=(3, 5, 20, 11)), expected)
    # Versions of torchcodec differ, and some compute other pixels.
    assert len(calls) == 1 or decoder == "torchcodec"
    grey = encoded(Image.open(BytesIO(jpeg)).convert("L"))
    np.testing.assert_array_equal(decode(grey, decoder=decoder, box=(3, 5, 20, 11)), pillow_decode(grey)[3:23, 5:16])


def test_the_kernel_is_not_used_where_a_decoder_computes_other_pixels_or_fails():
    def other(jpeg: bytes) -> np.ndarray:
        pixels = np.array(Image.open(BytesIO(jpeg)))
        pixels[50, 70] ^= 1
        return pixels

    assert "other pixels" in jpegs.why_unavailable(other, "RGB")
    assert "division" in jpegs.why_unavailable(lambda _: 1 / 0, "RGB")
    assert jpegs.why_unavailable(pillow_decode, "RGB") == ""
    assert jpegs.why_unavailable(pillow_decode, "L") == ""


def test_without_a_compiler_boxes_are_decoded_by_pillow(monkeypatch):
    jpeg = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)))
    monkeypatch.setattr(build, "find_compiler", lambda: None)
    clear_caches()
    assert "compiler" in jpegs.why_unavailable(pillow_decode, "RGB")
    np.testing.assert_array_equal(decode(jpeg, box=(3, 5, 20, 11)), pillow_decode(jpeg)[3:23, 5:16])


@pytest.mark.parametrize(
    ("name", "line", "fault"),
    [
        ("jpeg_pixels.h", "91881", "91782"),
        pytest.param("jpeg_pixels.h", "? 8 : 1", "? 9 : 1", marks=pytest.mark.slow),
        pytest.param("jpeg.cpp", "left = image.restart - 1", "left = image.restart", marks=pytest.mark.slow),
    ],
)
def test_a_miscompiled_kernel_is_not_used(tmp_path, monkeypatch, name, line, fault):
    build_quickly(monkeypatch)
    monkeypatch.setenv("FUNMATCH_CACHE", str(tmp_path / "cache"))
    copies = {path: Path(shutil.copy(path, tmp_path)) for path in (*build.SOURCES, *build.HEADERS)}
    text = (tmp_path / name).read_text()
    assert line in text
    (tmp_path / name).write_text(text.replace(line, fault))
    monkeypatch.setattr(build, "SOURCES", tuple(copies[path] for path in build.SOURCES))
    monkeypatch.setattr(build, "HEADERS", tuple(copies[path] for path in build.HEADERS))
    clear_caches()
    assert "other pixels" in jpegs.why_unavailable(pillow_decode, "RGB")
