"""Images beyond the limits are refused before they are decoded, and a lack of memory is never an image's fault."""

import tarfile
import threading
import time
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from funmatch.data import decode as decode_module
from funmatch.data import limits
from funmatch.data.cache.open_cache import open_cache
from funmatch.data.cache.storing import CacheOptions
from funmatch.data.decode import decode, header
from funmatch.data.limits import Limits, OutOfMemory, count_scans
from funmatch.errors import InputError


def encoded(image: Image.Image, form: str, **options) -> bytes:
    file = BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def with_scans(copies: int) -> bytes:
    """Returns a progressive JPEG whose last scan is repeated."""
    noise = np.random.default_rng(0).integers(0, 256, (16, 16), dtype=np.uint8)
    jpeg = encoded(Image.fromarray(noise), "JPEG", progressive=True)
    last = jpeg.rindex(b"\xff\xda")
    return jpeg[:last] + jpeg[last:-2] * copies + jpeg[-2:]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for name in "ab":
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(3):
            noise = np.random.default_rng((ord(name), i)).integers(0, 256, (8, 9, 3), dtype=np.uint8)
            Image.fromarray(noise).save(tmp_path / "images" / name / f"{i}.png")
    return tmp_path / "images"


@pytest.mark.parametrize("fail", ["convert", "load", "libjpeg"])
def test_too_little_memory_is_an_error_and_is_not_recorded(images, tmp_path, monkeypatch, fail):
    expected = open_cache(str(images), cache_options=CacheOptions(home=tmp_path / "fresh"))

    def convert(self, *_):
        if self.size == (9, 8):
            raise MemoryError

    def load(_):
        raise OSError("out of memory error when reading image file")  # Pillow's own words

    def broken(_):
        raise OSError("broken data stream when reading image file")  # what libjpeg says then

    options = CacheOptions(home=tmp_path / "cache", on_bad="skip")
    with monkeypatch.context() as patch:
        if fail == "convert":
            patch.setattr(Image.Image, "convert", convert)
        else:
            patch.setattr("PIL.PngImagePlugin.PngImageFile.load", load if fail == "load" else broken)
            patch.setattr(limits, "has_memory", lambda _: fail == "load")
        with pytest.raises(OutOfMemory, match=r"a/0\.png: too little memory to decode 9 × 8 pixels") as raised:
            open_cache(str(images), cache_options=options)
    assert isinstance(raised.value, InputError)
    found = open_cache(str(images), cache_options=options)
    assert found.key == expected.key
    assert len(found.splits["train"]) == 6
    assert not found.summary["unreadable"]


def test_a_lack_of_memory_while_reading_is_not_recorded(images, tmp_path, monkeypatch):
    options = CacheOptions(home=tmp_path / "cache", on_bad="skip")
    with monkeypatch.context() as patch:
        patch.setattr(decode_module.Image, "open", lambda *_, **__: (_ for _ in ()).throw(MemoryError()))
        with pytest.raises(MemoryError):
            open_cache(str(images), cache_options=options)
    assert len(open_cache(str(images), cache_options=options).splits["train"]) == 6


def test_a_lack_of_memory_that_passes_is_not_damage(images, tmp_path, monkeypatch):
    whole = decode_module.decode
    failed = set()

    def once(data, **options):
        if data not in failed:
            failed.add(data)
            raise OSError("broken data stream when reading image file")
        return whole(data, **options)

    monkeypatch.setattr("funmatch.data.cache.build.decode", once)
    found = open_cache(str(images), cache_options=CacheOptions(home=tmp_path / "cache"))
    assert len(found.splits["train"]) == 6
    assert len(failed) == 6


def test_scans_are_limited_before_decoding(images, tmp_path):
    ordinary, many = with_scans(1), with_scans(3000)
    scans = ordinary.count(b"\xff\xda")
    assert count_scans(ordinary, 10**6) == scans
    assert count_scans(many, 10**6) == scans + 2999
    assert count_scans(encoded(Image.new("RGB", (9, 9)), "JPEG"), 10**6) == 1
    with pytest.raises(ValueError, match=r"a JPEG of 101 scans or more, which is more than --max-scans 100"):
        header(many)
    with pytest.raises(ValueError, match="--max-scans 6"):
        decode(with_scans(6), limits=Limits(scans=6))
    assert decode(with_scans(6), limits=Limits(scans=scans + 5)).shape == (16, 16, 3)
    # What follows the image counts for nothing, nor do markers inside of segments.
    thumbnail = b"\xff\xe1" + (402).to_bytes(2, "big") + b"\xff\xda" * 200
    stuffed = ordinary[:2] + thumbnail + ordinary[2:] + b"\xff\xda" * 500
    assert count_scans(stuffed, 10**6) == scans
    np.testing.assert_array_equal(decode(stuffed), decode(ordinary))
    (images / "a" / "slow.jpg").write_bytes(many)
    with pytest.raises(InputError, match=r"a/slow\.jpg: a JPEG of 101 scans or more"):
        open_cache(str(images), cache_options=CacheOptions(home=tmp_path / "cache"))
    # Another limit is looked at anew.
    raised = CacheOptions(home=tmp_path / "cache", max_scans=5000)
    assert len(open_cache(str(images), cache_options=raised).splits["train"]) == 7


@pytest.mark.parametrize("cut", range(0, 60, 7))
def test_counting_scans_ends_in_damaged_files(cut):
    jpeg = with_scans(2)
    assert count_scans(jpeg[:cut], 10) <= 10
    assert count_scans(b"\xff" * 1000 + jpeg[cut:], 10) <= 11


def test_large_images_are_decoded_one_at_a_time(monkeypatch):
    monkeypatch.setattr(limits, "LARGE", 100)
    inside, most = 0, 0
    pixels = decode_module._pixels
    both = threading.Barrier(2)

    def counted(*args):
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        threading.Event().wait(0.02)
        inside -= 1
        return pixels(*args)

    monkeypatch.setattr(decode_module, "_pixels", counted)
    png = encoded(Image.new("RGB", (20, 20)), "PNG")

    def work():
        both.wait()
        decode(png)

    threads = [threading.Thread(target=work) for _ in range(2)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert most == 1


SPARSE = (
    {},
    {"GNU_sparse_size": "x"},
    {"GNU_sparse_map": "1,2,x"},
    {"GNU_sparse_major": "1", "GNU_sparse_minor": "0"},
)


def pax(**fields: str) -> tarfile.TarInfo:
    member = tarfile.TarInfo("1.jpg")
    member.pax_headers = {name.replace("_", "."): value for name, value in fields.items()}
    return member


@pytest.mark.parametrize("cls", [b"9" * 40, b"-" + b"9" * 40, b"9" * 5000, b"x" * 201, b"\0", b"7", b"x"])
@pytest.mark.parametrize("fields", SPARSE)
def test_hostile_tars_are_one_message(tmp_path, fields, cls):
    image = encoded(Image.new("RGB", (4, 4)), "JPEG")
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        member = pax(**fields)
        member.size = len(image)
        tar.addfile(member, BytesIO(image))
        label = tarfile.TarInfo("1.cls")
        label.size = len(cls)
        tar.addfile(label, BytesIO(cls))
    if not fields and cls in (b"7", b"x"):  # the number of a class, and the name of one
        classes = open_cache(f"wds:{tmp_path}/x.tar", cache_options=CacheOptions(home=tmp_path / "c")).classes
        assert len(classes) == 8 if cls == b"7" else classes == ("x",)
        return
    with pytest.raises(InputError, match=r"x\.tar"):
        open_cache(f"wds:{tmp_path}/x.tar", cache_options=CacheOptions(home=tmp_path / "c"))


def test_a_large_image_needs_memory_that_the_machine_has(monkeypatch):
    image = encoded(Image.new("RGB", (60, 40)), "PNG")
    monkeypatch.setattr(limits, "LARGE", 1000)
    monkeypatch.setattr(limits, "available_memory", lambda: 4 * 60 * 40)
    assert decode(image).shape == (40, 60, 3)
    monkeypatch.setattr(limits, "available_memory", lambda: 4 * 60 * 40 - 1)
    with pytest.raises(OutOfMemory, match=r"60 × 40 pixels, which take up to .* GB, and 9.6e-06 GB are available"):
        decode(image)
    # A JPEG that is decoded at an eighth of its size takes a sixty-fourth.
    assert decode(encoded(Image.new("RGB", (320, 240)), "JPEG"), cap=10).shape[0] == 10


def test_what_is_available_is_the_least_of_machine_and_container(monkeypatch, tmp_path):
    assert limits.available_memory() > 1 << 20
    for name, text in (("memory.max", "5000\n"), ("memory.current", "4000\n"), ("memory.stat", "inactive_file 700\n")):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(limits, "CONTAINERS", (tmp_path, tmp_path / "none"))
    assert limits.available_memory() == 1700


def test_images_wait_while_too_many_pixels_are_being_decoded(monkeypatch):
    room, most, lock, together = limits.Room(), [0], threading.Lock(), [0]
    monkeypatch.setattr(room, "most", lambda: 250)

    def work():
        with room.taken(100):
            with lock:
                together[0] += 1
                most[0] = max(most[0], together[0])
            time.sleep(0.01)
            with lock:
                together[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most[0], room.used) == (2, 0)
    with room.taken(1000):  # alone, one of any size
        assert room.used == 1000
