"""Fixed shares, view policies drawn by them, and views that are those of runs with one policy alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from funmatch.data.cache.device_store import move_to_device
from funmatch.data.cache.open_cache import open_cache
from funmatch.data.loader import Loader
from funmatch.ops.mixing import MixupOptions, mix_views
from funmatch.ops.mixtures.policies import draw_policies, list_images
from funmatch.ops.mixtures.shares import divide, whole_shares
from funmatch.ops.view_spec import ViewSpec

OFF = MixupOptions(a=0)
SPEC = ViewSpec(5, 24, 14)
MIXED = replace(SPEC, mixup=MixupOptions(a=0.7))
PLAIN = replace(SPEC, mixup=OFF, randaugment=(2, 9))
CUT = replace(SPEC, mixup=MixupOptions(), cutmix=1.0, min_area=0.4)
WHOLE = replace(SPEC, mixup=OFF, crop="whole")


def of(*policies: tuple[int, ViewSpec], **others) -> ViewSpec:
    """A spec with policies, which all have some other values."""
    return replace(SPEC, **others, policies=tuple((share, replace(spec, **others)) for share, spec in policies))


@pytest.fixture(name="split")
def train_split(images):
    return open_cache(str(images)).splits["train"]


@pytest.mark.parametrize(
    ("given", "whole"),
    [
        ((2, 1), (2, 1)), ((4.0, 2.0), (2, 1)), ((0.5, 0.25, 0.25), (2, 1, 1)), ((0.1, 0.7), (1, 7)), ((3,), (1,)),
        ((1 / 3, 2 / 3), (1, 2)), ((0.333, 0.667), (333, 667)), ((1e-9, 1), (1, 10_000)), ((1e30, 1e30), (1, 1)),
        ((), ()),
    ],
)  # fmt: skip
def test_shares_become_whole_numbers(given, whole):
    assert whole_shares(given) == whole


@pytest.mark.parametrize("shares", [(2, 1), (1, 1, 1), (7, 2, 5), (1, 1, 1, 30), (13, 11, 7, 5, 3, 2), (97, 3), (1,)])
def test_no_group_is_ever_a_whole_place_away_from_its_share(shares):
    places = np.arange(3 * sum(shares) + 5)
    groups, numbers = divide(places, shares)
    for group, share in enumerate(shares):
        counts = (groups == group).cumsum()
        assert (np.abs(counts - (places + 1) * share / sum(shares)) < 1).all()
        # Each of the group's own places comes once, in order.
        assert numbers[groups == group].tolist() == list(range(counts[-1]))
    beyond = divide(places + 10**12, shares)  # any place is computed alone
    assert [each.tolist() for each in divide(places[3:] + 10**12, shares)] == [each[3:].tolist() for each in beyond]


def test_policies_of_a_batch_have_their_shares_and_a_stream_of_their_own():
    spec = of((1, MIXED), (2, PLAIN))
    drawn = np.stack([draw_policies(spec, step) for step in range(400)])
    assert (drawn.sum(1) == 16).all(), "two thirds of 24"
    assert draw_policies(spec, 7).tolist() == drawn[7].tolist()
    # Each image of a batch, and the one before it, draw both policies; 0.12 are five deviations of 400 draws.
    assert np.abs(drawn.mean(0) - 2 / 3).max() < 0.12
    assert abs((drawn[:, 1:] & drawn[:, :-1]).mean() - 16 / 24 * 15 / 23) < 0.02
    assert drawn[0].tolist() != draw_policies(replace(spec, seed=6), 0).tolist()
    odd = replace(of((1, MIXED), (1, PLAIN)), batch=5)
    assert [int(draw_policies(odd, step).sum()) for step in range(4)] == [2, 3, 2, 3], "what is left over comes later"
    assert draw_policies(SPEC, 3).tolist() == [0] * 24


def test_draws_stay_what_they_are():
    """Others would be other runs, and other tapes."""
    spec = of((1, MIXED), (1, PLAIN))
    assert "".join(map(str, draw_policies(spec, 0))) == "101000111010000110010111"
    # Of a generator as `sampling.step_generator` describes it: the places of two equal shares take turns.
    uniforms = np.random.Generator(np.random.Philox(np.random.SeedSequence((5, 3), spawn_key=(7,)))).random(24)
    assert draw_policies(spec, 3).tolist() == (uniforms.argsort() % 2).tolist()
    assert divide(np.arange(9), (2, 1))[0].tolist() == [0, 0, 1, 0, 0, 1, 0, 0, 1]


@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize(
    ("policies", "others"),
    [
        ([(1, MIXED), (1, PLAIN)], {}),
        ([(1, MIXED), (2, CUT), (1, WHOLE)], {"native": False}),
        ([(1, replace(MIXED, min_area=0.5)), (3, replace(MIXED, ratio=(0.5, 2.0)))], {"own_teacher_view": True}),
        ([(1, replace(PLAIN, crop="mild")), (1, replace(CUT, crop="squash"))], {"resize": 20}),
    ],
    ids=["randaugment", "three", "own", "mild"],
)
def test_each_image_has_the_view_of_a_run_with_its_policy_alone(split, policies, others, per_image):
    policies = [(share, replace(spec, mixup=replace(spec.mixup, per_image=per_image))) for share, spec in policies]
    spec = replace(of(*policies, **others), crop=policies[0][1].crop)
    alone = [Loader(split, each, teacher_sides=(10, 14)) for _, each in spec.policies]
    mixed = Loader(split, spec, teacher_sides=(10, 14))
    for step in range(2):
        drawn, batch = draw_policies(spec, step), mixed.batch_at(step)
        others_of = [each.batch_at(step) for each in alone]
        assert set(drawn) == set(range(len(policies)))
        assert batch.lam.shape == (24,)
        # Row 0 is the last image of the batch, the predecessor of its first.
        for row, policy in enumerate([drawn[-1], *drawn]):
            same = others_of[policy]
            assert torch.equal(batch.crops[row], same.crops[row])
            for mine, its in zip(batch.teacher_crops, same.teacher_crops, strict=True):
                assert (mine is None) == (its is None)
                assert mine is None or torch.equal(mine[row], its[row])
            if not row:
                continue
            weight = same.lam if isinstance(same.lam, float) else float(same.lam[row - 1])
            assert float(batch.lam[row - 1]) == pytest.approx(weight, abs=1e-7)
            if batch.cutmix_boxes is not None:
                cuts = same.cutmix_boxes
                box = torch.zeros(4) if cuts is None else cuts[row - 1 if len(cuts) > 1 else 0]
                assert torch.equal(batch.cutmix_boxes[row - 1], box)


def test_device_crops_the_same_views(split):
    host = Loader(split, of((1, MIXED), (1, PLAIN), (1, WHOLE)), teacher_sides=(10, 14))
    on_device = replace(host, split=move_to_device(split, torch.device("cpu"))[0])
    one, other = host.batch_at(2), on_device.batch_at(2)
    # A few operations of RandAugment turn small differences of rounding into larger ones, such as posterize.
    plain = torch.from_numpy(draw_policies(host.spec, 2) != 1)
    for mine, its in zip((one.crops, one.teacher_crops[0]), (other.crops, other.teacher_crops[0]), strict=True):
        torch.testing.assert_close(mine[1:][plain], its[1:][plain], atol=0.01 / 255, rtol=0)
        assert (mine - its).abs().mean() < 0.01
    assert torch.equal(one.lam, other.lam)


def test_views_are_mixed_with_the_image_before_whatever_its_policy(split):
    spec = of((1, MIXED), (1, PLAIN))
    batch = Loader(split, spec, teacher_sides=(14,)).batch_at(0)
    (teacher,), student = mix_views(batch.crops, batch.teacher_crops, batch.lam, batch.cutmix_boxes)
    assert teacher is student
    drawn = draw_policies(spec, 0)
    lam = float(batch.lam[drawn == 0][0])
    assert 0.5 <= lam < 1
    for row, policy in enumerate(drawn):
        own, before = batch.crops[row + 1], batch.crops[row]
        wanted = own if policy else lam * own + (1 - lam) * before
        assert torch.allclose(student[row], wanted, atol=1e-6)
    assert torch.equal(batch.own_weight, batch.lam)


def test_processes_and_pieces_see_the_same_views(split):
    spec = of((1, MIXED), (1, CUT), (1, PLAIN))
    whole = Loader(split, spec, teacher_sides=(10, 14))
    batch = whole.batch_at(1)
    (_, small), student = mix_views(batch.crops, batch.teacher_crops[::-1], batch.lam, batch.cutmix_boxes)
    parts = [replace(whole, rank=rank, world_size=3).batch_at(1) for rank in range(3)]
    for pieces in (parts, [piece for piece, _ in batch.pieces(7)]):
        views = [mix_views(each.crops, each.teacher_crops[::-1], each.lam, each.cutmix_boxes) for each in pieces]
        assert torch.equal(torch.cat([each for _, each in views]), student)
        assert torch.equal(torch.cat([teachers[1] for teachers, _ in views]), small)


def test_key_holds_what_differs_and_nothing_that_no_image_has():
    spec = of((1, MIXED), (2, PLAIN))
    assert spec.key()["policies"] == [
        [1, {"mixup": [0.7, False, True, None], "randaugment": None}],
        [2, {"mixup": [0, False, True, None], "randaugment": (2, 9)}],
    ]
    assert replace(spec, mixup=OFF, randaugment=(1, 1)).key() == spec.key(), "each policy sets its own"
    assert of((2, MIXED), (1, PLAIN)).key() != spec.key()
    assert of((1, PLAIN), (2, MIXED)).key() != spec.key()
    assert "policies" not in SPEC.key()
    assert spec.differences(replace(of((1, MIXED), (2, PLAIN), side=16), side=16)) == {"side": (14, 16)}


def test_images_are_listed_by_policy():
    assert list_images(("mixup=1", "mixup=0", "cutmix=1"), np.array([1, 0, 1, 1])) == (
        "mixup=1: image 2; mixup=0: images 1, 3, 4"
    )
