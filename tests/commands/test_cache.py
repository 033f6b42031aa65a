"""`funmatch cache` says what lies there, whose it is and whether it is still needed, and removes what is chosen."""

import json
import os
import shutil
import time

import pytest
from make_images import paint

from funmatch.data.cache.inventory import list_items

DAY = 86400


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FUNMATCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def sets(tmp_path, funmatch):
    """Two data sets in the cache: of one the images are gone, of the other they are there."""
    for seed, name in enumerate(("here", "gone")):
        for i in range(4):
            paint(tmp_path / name / "train" / "ant" / f"{i}.png", 10 * seed + i)
            paint(tmp_path / name / "train" / "bee" / f"{i}.png", 100 + 10 * seed + i)
        funmatch("prepare", tmp_path / name)
    shutil.rmtree(tmp_path / "gone")


def listed(funmatch, *words):
    return json.loads(funmatch("cache", "--json", *words).stdout)


def test_an_empty_cache(funmatch):
    assert listed(funmatch)["items"] == []
    assert "0.0 kB in" in funmatch("cache").stdout


@pytest.mark.usefixtures("sets")
def test_what_lies_there_is_listed_with_its_size_and_whether_its_images_are_there(funmatch, own_cache):
    found = {each["name"].split(" ")[0]: each for each in listed(funmatch)["items"]}
    assert {name: each["missing"] for name, each in found.items()} == {"here": False, "gone": True}
    for each in found.values():
        files = [path for path in own_cache.rglob("*") if path.is_file() and each["path"] in str(path.parent)]
        assert each["bytes"] == sum(path.stat().st_size for path in files) > 0
    table = funmatch("cache").stdout
    assert "images gone" in table
    assert "today" in table


@pytest.mark.usefixtures("sets")
def test_only_what_is_gone_is_removed_and_the_other_is_opened_as_before(funmatch, tmp_path):
    found = listed(funmatch, "--missing")
    assert [each["name"].split(" ")[0] for each in found["items"] if each["removed"]] == ["gone"]
    assert found["freed"] > 0
    assert [each["name"].split(" ")[0] for each in listed(funmatch)["items"]] == ["here"]
    assert "building" not in funmatch("prepare", tmp_path / "here").stderr


@pytest.mark.usefixtures("sets")
def test_what_was_not_used_for_days_is_removed(funmatch, own_cache, tmp_path):
    for path in own_cache.rglob("*"):
        os.utime(path, times=(time.time() - 40 * DAY,) * 2)
    funmatch("data", tmp_path / "here", cwd=tmp_path)  # a use
    found = listed(funmatch, "--older-than", "30")
    assert {each["name"].split(" ")[0]: each["removed"] for each in found["items"]} == {"here": False, "gone": True}
    assert listed(funmatch, "--older-than", "30")["freed"] == 0


@pytest.mark.usefixtures("sets")
def test_everything_is_removed_and_made_again(funmatch, own_cache, tmp_path):
    (own_cache / "weights").mkdir()
    (own_cache / "weights" / "R50x1_160.npz").write_bytes(b"0" * 1000)
    assert len(list_items(own_cache)) == 3
    assert listed(funmatch, "--all")["bytes"] == 0
    assert list_items(own_cache) == []
    funmatch("prepare", tmp_path / "here")
    assert [item.name.split(" ")[0] for item in list_items(own_cache)] == ["here"]


def test_damaged_entries_lead_to_nothing(funmatch, own_cache):
    (own_cache / "known").mkdir(parents=True)
    (own_cache / "known" / "0").write_text("{")
    assert listed(funmatch)["items"] == []
