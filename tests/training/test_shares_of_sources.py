"""Several sources in fixed shares: which image is of which, batches, runs, and what is refused."""

import json
from fractions import Fraction

import numpy as np
import pytest
import torch
from make_images import FEW, paint

import funmatch
from funmatch.commands.common.ready import build
from funmatch.config import Distill, Train
from funmatch.data.cache.open_cache import open_cache
from funmatch.data.cache.storing import CacheOptions
from funmatch.data.dataset import ReadOptions, SplitSpec
from funmatch.errors import InputError
from funmatch.runtime.disk.json_files import seal
from funmatch.training.run import folder as run_folder

BASE = {"student": "fashion-mini-student", "out": "never", "steps": 3, "batch": 12, "threads": 1}
DISTILL = BASE | {"teacher": "fashion-mini-teacher"}


@pytest.fixture(name="pool")
def unlabelled_pool(tmp_path):
    for i in range(9):
        paint(tmp_path / "pool" / f"{i}.png", 500 + i, (30, 28))
    return str(tmp_path / "pool")


@pytest.fixture(name="photos")
def labelled_photos(tmp_path):
    for c, name in enumerate(("ant", "bee")):
        for i in range(10):
            paint(tmp_path / "photos" / name / f"{i}.png", 100 * c + i, (24, 26))
    return tmp_path / "photos"


def is_of_pool(split) -> np.ndarray:
    return split.index["width"] == 30


def test_images_know_their_source(photos, pool, tmp_path):
    options = CacheOptions(home=tmp_path / "home", on_bad="skip")
    (photos / "bee" / "bad.png").write_bytes((photos / "bee" / "3.png").read_bytes()[:200])
    for specs, wanted in (([str(photos), pool], (20, 9)), ([pool, str(photos)], (9, 20))):
        train = open_cache(specs, cache_options=options).splits["train"]
        assert train.sources == wanted, "the unreadable image does not count"
        owners = np.repeat([0, 1], wanted)
        assert (is_of_pool(train) == (owners == specs.index(pool))).all()
    assert open_cache(str(photos), cache_options=options).splits["train"].sources == ()


def test_validation_images_come_from_the_labelled_source(photos, pool, tmp_path):
    options = CacheOptions(home=tmp_path / "home", on_bad="skip")
    for number in range(5):
        (photos / "ant" / f"bad{number}.png").write_bytes((photos / "ant" / "3.png").read_bytes()[: 200 + number])
    held_out = ReadOptions(split_spec=SplitSpec({"val": Fraction(1, 5)}))
    for _ in range(2):  # built, and found again
        cache = open_cache([str(photos), pool], held_out, options)
        train, val = cache.splits["train"], cache.splits["val"]
        assert (sum(train.sources), train.sources[1], val.sources) == (len(train), 9, ())
        assert len(train) + len(val) == 29, "unreadable images count in no split"
        assert val.labelled
        assert not is_of_pool(val).any()
        assert (is_of_pool(train) == np.repeat([False, True], train.sources)).all()


def test_entries_of_earlier_versions_are_listed_again(photos, pool, tmp_path):
    options = CacheOptions(home=tmp_path / "home")
    open_cache([str(photos), pool], cache_options=options)
    (entry,) = (tmp_path / "home" / "known").iterdir()
    head, _, paths = entry.read_text().partition("\n")
    content = {name: value for name, value in json.loads(head).items() if name not in ("sources", "check")}
    entry.write_text(json.dumps(seal(content)) + "\n" + paths)
    assert open_cache([str(photos), pool], cache_options=options).splits["train"].sources == (20, 9)


def test_batches_hold_the_shares_of_the_sources(pool):
    setup = build(Distill.checked(**DISTILL, data=[FEW, pool], share=[3, 1], policy=["mixup=1", "mixup=0,cutmix=1"]))[0]
    loader = setup.loader
    assert loader.spec.sources == ((3, 200), (1, 9))
    assert loader.spec.key()["sources"] == [[3, 200], [1, 9]]
    found = [loader.batch_at(step) for step in range(6)]
    owners = np.stack([loader.sample(step).indices >= 200 for step in range(6)])
    assert (owners.sum(1) == 3).all()
    assert len({tuple(row) for row in owners.tolist()}) > 1, "at other places of each batch"
    assert sorted(np.concatenate([loader.sample(step).indices for step in range(3)])[owners[:3].ravel()]) == [
        *range(200, 209)
    ], "the nine images of the pool, each once"
    for batch, row in zip(found, owners, strict=True):
        assert ((batch.labels[1:] < 0).numpy() == row).all()
        assert torch.isfinite(batch.crops).all()


def test_without_shares_nothing_changes(pool):
    one = build(Distill.checked(**DISTILL, data=[FEW, pool]))[0].loader
    assert one.spec.sources == ()
    assert "sources" not in one.spec.key()
    assert one.order is None


def test_the_embedded_pool_has_the_images_of_validation_and_no_labels():
    pool, whole = open_cache("fashion-mini-pool"), open_cache("fashion-mini")
    assert (pool.classes, [*pool.splits]) == ((), ["train"])
    assert not pool.splits["train"].labelled
    assert pool.splits["train"].digests.tolist() == whole.splits["val"].digests.tolist()
    joined = open_cache(["fashion-mini", "fashion-mini-pool"]).splits
    assert {name: len(split) for name, split in joined.items()} == {"train": 700, "val": 500, "test": 2000}
    assert joined["train"].sources == (200, 500)


def test_a_student_learns_from_a_pool_beside_labelled_images(tmp_path, pool, capsys):
    options = {**DISTILL, "data": [FEW, pool], "share": [1, 1], "out": tmp_path / "run", "save_every": 2}
    result = funmatch.distill(**options, tape=tmp_path / "tape")
    output = capsys.readouterr().err
    assert "200 training images, 50.0 % of each batch" in output
    assert "pool: 9 training images, 50.0 % of each batch" in output
    assert result.figures["pictures"] == 30
    recorded = run_folder.find_run(tmp_path / "run").config
    assert recorded["knobs"]["share"] == [1.0, 1.0]
    with pytest.raises(InputError, match=r"share: \[1.0, 1.0\] in the run, \[2.0, 1.0\] now"):
        funmatch.distill(**options | {"share": [2, 1]})
    with pytest.raises(InputError, match="sources"):
        funmatch.distill(**options | {"share": [2, 1], "out": tmp_path / "other"}, tape=tmp_path / "tape")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": ["a", "b"], "share": [1]}, "share has 1 values for 2 sources of --data; give one each"),
        ({"data": ["a"], "share": [1]}, "share divides batches among several sources, and --data names one"),
        ({"data": ["a", "b"], "share": [1, 0]}, "share must be above 0, got 0.0"),
        ({"data": ["a", "b"], "share": [1, float("nan")]}, "share must be a finite number"),
        ({"data": ["a", "b"], "share": [1, 1], "sampling": "balanced"}, "give one of them"),
    ],
)
def test_mistakes_are_told(options, message):
    with pytest.raises(InputError, match=message):
        Train.checked(**BASE | options)


def test_a_source_without_training_images_has_no_share(photos, tmp_path):
    for i in range(4):
        paint(tmp_path / "held" / "test" / ("ant", "bee")[i % 2] / f"{i}.png", 900 + i)
    config = Train.checked(**BASE, data=[str(photos), str(tmp_path / "held")], share=[1, 1])
    with pytest.raises(InputError, match=r"share gives images of .*held to every batch, but it has no training images"):
        build(config)
