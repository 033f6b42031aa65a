"""Images of every kind decode to upright RGB as a viewer shows them, and all decoders agree."""

from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from funmatch.data import decode as decoding
from funmatch.data import jpeg as jpegs
from funmatch.data.decode import KINDS, decode, header
from funmatch.data.jpeg import pick_decoder
from funmatch.data.limits import Limits
from funmatch.errors import InputError


def encoded(image: Image.Image, form: str = "PNG", **options) -> bytes:
    file = BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def needs_torchcodec() -> None:
    if pick_decoder("auto") != "torchcodec":
        pytest.skip("torchcodec is not installed, or not for this torch")


def photograph(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth noise of several scales."""
    rng = np.random.default_rng(seed)
    layers = [
        Image.fromarray(rng.integers(0, 256, (3 * s, 4 * s, 3), dtype=np.uint8)).resize((width, height), 3)
        for s in (1, 4, 16)
    ]
    return Image.fromarray(np.mean([np.asarray(layer, float) for layer in layers], axis=0).astype(np.uint8))


def kinds(image: bytes) -> set[str]:
    found = header(image).kinds
    return {name for bit, name in enumerate(KINDS) if found >> bit & 1}


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation, form):
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :16], upright[8:, :16], upright[:8, 16:] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    stored = {
        1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a), 7: lambda a: np.rot90(a.swapaxes(0, 1), 2),
        8: lambda a: np.rot90(a, -1),
    }[orientation](upright)  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(form, {})
    image = encoded(Image.fromarray(np.ascontiguousarray(stored)), form, exif=exif, **options)
    for decoder in ("pillow", pick_decoder("auto")):
        assert np.abs(decode(image, decoder=decoder).astype(int) - upright).max() <= 3  # JPEG's loss
    assert (header(image).height, header(image).width) == (16, 32)
    assert kinds(image) == ({"turned by EXIF"} if orientation > 1 else set())


def test_image_kinds_are_detected():
    image = photograph(8, 6)
    deep = Image.fromarray(np.full((6, 8), 40_000, np.uint16))
    clear = image.copy().convert("RGBA")
    clear.putalpha(0)
    frames = [image, photograph(8, 6, 1)]
    assert kinds(encoded(image, "JPEG")) == set()
    assert kinds(encoded(image.convert("L"), "JPEG")) == {"greyscale"}
    assert kinds(encoded(image.convert("1"))) == {"greyscale"}
    assert kinds(encoded(image.quantize())) == {"palette"}
    assert kinds(encoded(clear)) == {"transparent"}
    assert kinds(encoded(image.convert("LA"))) == {"greyscale", "transparent"}
    assert kinds(encoded(image.convert("CMYK"), "JPEG")) == {"CMYK"}
    assert kinds(encoded(deep)) == {"greyscale", "16-bit"}
    assert kinds(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])) >= {"animated"}


def test_every_image_kind_becomes_rgb():
    image = photograph(40, 30)
    plain = np.asarray(image).astype(int)
    grey = np.asarray(image.convert("L")).astype(int)[:, :, None].repeat(3, axis=2)
    assert np.abs(decode(encoded(image.convert("CMYK"), "JPEG", quality=100)) - plain).mean() < 3
    assert np.abs(decode(encoded(image.quantize(256))) - plain).mean() < 12
    assert (decode(encoded(image.convert("L"))) == grey).all()
    assert (decode(encoded(Image.fromarray((grey[:, :, 0] * 257).astype(np.uint16)))) == grey).all()
    half = image.copy()
    half.putalpha(128)
    assert np.abs(decode(encoded(half)) - (plain * 128 + 255 * 127) / 255).max() <= 2, "blended over white"
    transparent = Image.new("P", (4, 4), 3)
    transparent.putpalette([0, 0, 0] * 3 + [9, 9, 9])
    assert (decode(encoded(transparent, transparency=3)) == 255).all()


def test_16_bit_colour_images():
    png = encoded(Image.new("RGB", (2, 1), (255, 0, 128)))
    assert "16-bit" not in kinds(png)
    ppm = b"P6 2 1 65535\n" + np.array([[65535, 0, 32896]] * 2, ">u2").tobytes()
    assert decode(ppm).tolist() == [[[255, 0, 128]] * 2]


@pytest.mark.parametrize("damage", [b"\xff\xe1\x00\x10Exif\x00\x00garbage!", b"\xff\xe1\x00\x08Exif\x00\x00"])
def test_damaged_exif_does_not_stop_decoding(damage):
    jpeg = encoded(photograph(8, 6), "JPEG")
    assert decode(jpeg[:2] + damage + jpeg[2:]).shape == (6, 8, 3)


def test_too_many_pixels_and_non_images_are_rejected():
    flat = encoded(Image.new("1", (5000, 4000)))
    with pytest.raises(ValueError, match=r"5,000 × 4,000 pixels are more than --max-pixels 1,000,000"):
        decode(flat, limits=Limits(pixels=10**6))
    with pytest.raises(ValueError, match="5,000 × 4,000"):
        header(flat, limits=Limits(pixels=10**6))
    assert header(flat).width == 5000
    for content in (b"", b"hello", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"\xff\xd8\xff"):
        with pytest.raises(ValueError, match=r"not an image|empty"):
            decode(content)


@pytest.mark.parametrize("decoder", ["pillow", "torchcodec"])
@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_truncated_images_are_errors(form, decoder):
    if decoder == "torchcodec":
        needs_torchcodec()
    image = encoded(photograph(120, 90), form)
    for share in (0.3, 0.6, 0.95):
        with pytest.raises(Exception, match=r"(?i)trunc|premature|end|decode|broken"):
            decode(image[: int(len(image) * share)], decoder=decoder)


JPEGS = {
    "ordinary": {}, "4:4:4": {"subsampling": 0}, "progressive": {"progressive": True}, "coarse": {"quality": 20},
    "restarts": {"restart_marker_rows": 1},
}  # fmt: skip


@pytest.mark.parametrize("options", JPEGS.values(), ids=JPEGS)
def test_torchcodec_agrees_with_pillow(options):
    needs_torchcodec()
    for seed in range(3):
        image = encoded(photograph(117, 83, seed), "JPEG", **options)
        difference = np.abs(decode(image, decoder="torchcodec").astype(int) - decode(image))
        assert difference.max() <= 2, "as the docstring of `decode` says"


@pytest.mark.parametrize("decoder", ["pillow", "torchcodec"])
@pytest.mark.parametrize("options", JPEGS.values(), ids=JPEGS)
def test_decoded_box_equals_the_box_of_the_decoded_image(options, decoder):
    if decoder == "torchcodec":
        needs_torchcodec()
    image = encoded(photograph(117, 183), "JPEG", **options)
    complete = decode(image, decoder=decoder)
    for box in [(0, 0, 183, 117), (0, 0, 1, 1), (3, 5, 17, 100), (100, 50, 83, 67), (90, 0, 92, 10), (180, 116, 1, 1)]:
        top, left, height, width = box
        expected = complete[top : top + height, left : left + width]
        assert np.array_equal(decode(image, decoder=decoder, box=box), expected)
    exif = Image.Exif()
    exif[0x0112] = 6
    image = encoded(photograph(117, 83), "JPEG", exif=exif, **options)
    assert np.array_equal(decode(image, decoder=decoder, box=(2, 3, 50, 40)), decode(image)[2:52, 3:43])


def test_scaled_jpeg_decoding_is_close_to_resizing():
    """The tolerance is the documented one: 1/255 on average."""
    for seed, (width, height) in enumerate([(1600, 1200), (1203, 1811), (900, 2700)]):
        image = photograph(width, height, seed)
        image = encoded(image, "JPEG", quality=95)
        fast = decode(image, cap=100).astype(int)
        size = decoding.cap_size((width, height), 100)
        slow = np.asarray(Image.fromarray(decode(image)).resize(size, Image.Resampling.BILINEAR)).astype(int)
        assert fast.shape == slow.shape
        assert min(fast.shape[:2]) == 100
        assert np.abs(fast - slow).mean() <= 1


def test_cap_limits_the_short_side():
    assert decoding.cap_size((640, 480), None) == (640, 480)
    assert decoding.cap_size((640, 480), 480) == (640, 480)
    assert decoding.cap_size((640, 480), 48) == (64, 48)
    assert decoding.cap_size((480, 641), 48) == (48, 64)


def test_missing_torchcodec_falls_back_or_is_an_error(monkeypatch):
    monkeypatch.setattr(jpegs, "find_spec", lambda _: None)
    assert pick_decoder("auto") == "pillow"
    monkeypatch.setattr(jpegs, "_torchcodec", lambda: 1 / 0)
    with pytest.raises(InputError, match="pip install torchcodec, or pass --decoder pillow"):
        pick_decoder("torchcodec")
