"""Images that are held out for validation share the decoded images of the whole training split."""

import json
import shutil
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from make_images import paint

from funmatch.data.cache import build, cuts
from funmatch.data.cache.check import is_complete
from funmatch.data.cache.inventory import list_items
from funmatch.data.cache.open_cache import open_cache, scan_dataset
from funmatch.data.cache.storing import CacheOptions
from funmatch.data.dataset import ORDER, ReadOptions, SplitSpec, untracked
from funmatch.data.readers.open import open_dataset
from funmatch.errors import InputError


@pytest.fixture
def images(tmp_path) -> Path:
    for c, name in enumerate(("ant", "bee")):
        for i in range(20):
            paint(tmp_path / "images" / "train" / name / f"{i:02}.png", 100 * c + i, (20 + i, 24))
        for i in range(3):
            paint(tmp_path / "images" / "test" / name / f"{i}.png", 7000 + 100 * c + i)
    return tmp_path / "images"


@pytest.fixture
def options(tmp_path) -> CacheOptions:
    return CacheOptions(home=tmp_path / "home", decoder="pillow")


def held_out(share, seed: int = 0) -> ReadOptions:
    return ReadOptions(split_spec=SplitSpec({"val": share}, seed))


def earlier_cache(images, options, share):
    """Build a cache as earlier versions did: with the split made before the images are decoded."""
    dataset, scanned = scan_dataset(open_dataset(str(images), held_out(share)), options, untracked)
    return build.build(dataset, scanned, options, options.home, untracked, lambda _: None)


def contents(cache) -> dict[str, list]:
    return {
        name: [(split.image(i).numpy().tobytes(), int(split.labels([i])), split.digests[i].tobytes())
               for i in range(len(split))]
        for name, split in cache.splits.items()
    }  # fmt: skip


def test_all_choices_share_one_decoded_copy(images, options, monkeypatch):
    decoded, fill = [], build._fill
    monkeypatch.setattr(build, "_fill", lambda *args: decoded.append(1) or fill(*args))
    whole = open_cache(str(images), cache_options=options)
    parts = [open_cache(str(images), each, options) for each in (held_out(4), held_out(Fraction(1, 2)), held_out(4, 1))]
    assert {cache.folder for cache in parts} == {whole.folder}
    assert len(decoded) == 1
    assert len({cache.key for cache in (whole, *parts)}) == 4
    for cache in parts:
        assert sorted(contents(cache)["train"] + contents(cache)["val"]) == sorted(contents(whole)["train"])
        assert contents(cache)["test"] == contents(whole)["test"]
        assert list(cache.splits) == ["train", "val", "test"]
        assert cache.summary["splits"]["val"]["pictures"] == len(cache.splits["val"])


@pytest.mark.parametrize("way", ["resident", "streaming"])
def test_it_is_the_same_data_as_a_cache_of_earlier_versions(images, options, tmp_path, way):
    options = CacheOptions(home=options.home, decoder="pillow", way=way)
    cache = open_cache(str(images), held_out(Fraction(1, 10)), options)
    other = CacheOptions(home=tmp_path / "other", decoder="pillow", way=way)
    folder = earlier_cache(images, other, Fraction(1, 10))
    earlier = open_cache(str(images), held_out(Fraction(1, 10)), other)
    assert earlier.folder == folder, "it is used and not decoded again"
    assert cache.folder.name != folder.name
    # Runs record the key, and views depend on the order of the images.
    assert cache.key == earlier.key == json.loads((folder / "meta.json").read_text())["content"]
    assert contents(cache) == contents(earlier)
    assert cache.summary == earlier.summary


def test_a_choice_that_is_damaged_or_gone_is_made_again(images, options):
    first = open_cache(str(images), held_out(4), options)
    (path,) = (first.folder / "cuts").iterdir()
    sound = path.read_bytes()
    for damaged in (sound[:10] + bytes([1 - sound[10] % 2]) + sound[11:], sound[:20], b"", None):
        path.unlink() if damaged is None else path.write_bytes(damaged)
        assert contents(open_cache(str(images), held_out(4), options)) == contents(first)
        assert path.read_bytes() == sound


def test_an_entry_is_no_cache_to_an_earlier_version(images, options):
    open_cache(str(images), held_out(4), options)
    (ledger,) = (options.home / "known").iterdir()
    # It would train on the held-out images if it took the folder for its own.
    assert not is_complete(Path(json.loads(ledger.read_bytes().split(b"\n")[0])["folder"]))


def test_unreadable_images_are_left_out_of_their_splits(images, options):
    whole = open_cache(str(images), held_out(10), options)
    names = {"train": whole.summary["splits"]["train"]["pictures"], "val": 10}
    assert names == {"train": 30, "val": 10}
    for path in sorted(images.glob("train/*/*.png"))[::3]:
        path.write_bytes(b"not an image" + path.name.encode() + path.parent.name.encode())
    skipping = CacheOptions(home=options.home, decoder="pillow", on_bad="skip")
    cache = open_cache(str(images), held_out(10), skipping)
    bad = cache.summary["unreadable"]
    assert sorted(name for name, _ in bad) == [
        str(each.relative_to(images)) for each in sorted(images.glob("train/*/*.png"))[::3]
    ]
    counts = {name: about["pictures"] for name, about in cache.summary["splits"].items()}
    assert counts == {name: len(split) for name, split in cache.splits.items()}
    assert counts["train"] + counts["val"] == 40 - len(bad)
    with pytest.raises(InputError, match="14 unreadable images"):
        open_cache(str(images), held_out(10), options)


def test_a_choice_of_unreadable_images_alone_is_an_error(images, options, monkeypatch):
    path = images / "train" / "ant" / "05.png"
    path.write_bytes(path.read_bytes()[:60])
    skipping = CacheOptions(home=options.home, decoder="pillow", on_bad="skip")
    numbers = np.zeros(40, np.uint8)
    numbers[5] = ORDER.index("val")
    monkeypatch.setattr(cuts, "choose_splits", lambda *_: numbers)
    with pytest.raises(InputError, match=r"(?s)1 unreadable image in images.*train/ant/05\.png"):
        open_cache(str(images), held_out(1), skipping)


def test_room_that_an_interrupted_build_has_taken_is_not_wanted_again(images, options, monkeypatch):
    finish = build._finish

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "_finish", interrupt)
    with pytest.raises(KeyboardInterrupt):
        open_cache(str(images), cache_options=options)
    monkeypatch.setattr(build, "_finish", finish)
    # All images are there already; not one of them would fit a second time.
    usage = shutil.disk_usage(options.home)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=build.FREE_BYTES))
    assert len(open_cache(str(images), cache_options=options).splits["train"]) == 40
    (images / "train" / "ant" / "new.png").write_bytes((images / "train" / "bee" / "00.png").read_bytes())
    with pytest.raises(InputError, match="more than it may take"):
        open_cache(str(images), cache_options=options)


def test_a_choice_is_part_of_the_caches_item(images, options):
    cache = open_cache(str(images), held_out(4), options)
    open_cache(str(images), held_out(5), options)
    (item,) = list_items(options.home)
    assert (item.name, item.path, item.missing) == (f"images ({images})", cache.folder, False)
    assert len(item.entries) == 2
    assert item.bytes == sum(path.stat().st_size for path in cache.folder.rglob("*") if path.is_file())


def test_numbers_beyond_the_splits_are_damage(tmp_path):
    path = cuts.write_cut(tmp_path, "key", np.array([0, 1, 9], np.uint8))
    with pytest.raises(InputError, match="is damaged"):
        cuts.read_cut(path, 3)
