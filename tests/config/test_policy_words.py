"""Policies as words: what they may set, and how mistakes in them are told."""

import pytest

from funmatch.config import Distill, Finetune, Train
from funmatch.errors import InputError
from funmatch.ops.mixing import MixupOptions
from funmatch.training.defaults import view_spec

BASE = {"data": "fashion-mini", "student": "fashion-mini-student", "out": "run", "steps": 3}
TAUGHT = BASE | {"teacher": "fashion-mini-teacher"}
TWO = ("mixup=1", "mixup=0,randaugment=2 9")


def test_policies_have_one_spelling():
    config = Distill.checked(**TAUGHT, policy=["mixup = 1.0", " mixup=0, randaugment=2  9 ", "crop-min-area=0.30"])
    assert config.policy == (*TWO, "crop_min_area=0.3")


def test_policies_become_specs():
    options = {"mixup": 0.5, "mixup_mode": "image", "crop_min_area": 0.2, "randaugment": (1, 3), "batch": 8}
    policies = ["randaugment=off,ratio=0.5 2", "mixup=0", "mixup_lam=0.7,mixup=1,crop=inception", "crop=whole,cutmix=2"]
    config = Train.checked(**BASE, **options, policy=policies, policy_share=[2, 1, 1, 4])
    spec = view_spec(config)
    assert [share for share, _ in spec.policies] == [2, 1, 1, 4]
    first, plain, fixed, whole = (each for _, each in spec.policies)
    mixup = MixupOptions(0.5, per_image=True)
    assert (first.mixup, first.randaugment, first.ratio, first.min_area) == (mixup, None, (0.5, 2.0), 0.2)
    assert (plain.mixup.a, plain.randaugment) == (0, (1, 3))
    assert fixed.mixup == MixupOptions(1.0, per_image=True, lam=0.7)
    # What has no effect on an image with this policy is as if it was not set.
    assert (whole.crop, whole.cutmix, whole.min_area, whole.mixup) == ("whole", 2.0, 0.05, mixup)
    assert all((each.batch, each.policies) == (8, ()) for _, each in spec.policies)


@pytest.mark.parametrize("table", [Train, Finetune, Distill])
def test_a_run_without_policies_has_none(table):
    given = TAUGHT if table is Distill else BASE
    assert view_spec(table.checked(**given)).policies == ()


def test_strategies_may_be_mixed_in_part():
    config = Distill.checked(**TAUGHT, policy=TWO)
    assert [each.mixes for each in config.variants()] == [True, False]
    Distill.checked(**TAUGHT, policy=TWO, strategy="same/ic", mixup=0.0, mixup_mode="image")
    Distill.checked(**TAUGHT, policy=("crop=squash", "mixup=1"), strategy="ind/rc")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": ["mixup=1", "mixup=0,randaugmnt=2 9"]}, "unknown option of a policy 'randaugmnt'; did you mean 'r"),
        ({"policy": ["mixup=1", "seed=3"]}, "known: crop, .* randaugment; seed is an option of the whole run"),
        ({"policy": ["mixup=0,randaugment=2", "9"]}, "'9' is not key=value; quote each policy as one word"),
        ({"policy": ["mixup=1", "randaugment=2"]}, "policy 'randaugment=2': randaugment: wanted 2 whole numbers, got"),
        ({"policy": ["mixup=1", "randaugment=2 99"]}, "policy 'randaugment=2 99': randaugment takes .* 0 to 30"),
        ({"policy": ["mixup=one", "mixup=0"]}, r"mixup: wanted a number, got 'one' \(a string\)"),
        ({"policy": ["mixup=-1", "mixup=nan"]}, "mixup must be at least 0, got nan"),
        ({"policy": ["mixup=1,mixup=2", "mixup=0"]}, "mixup is set twice"),
        ({"policy": ["mixup=1"]}, "needs at least two policies"),
        ({"policy": ["mixup=1", "mixup=1.0"]}, "given twice"),
        ({"policy": ["mixup=0", "mixup=0,randaugment=2 9"]}, "without MixUp .* pass --strategy same/ic"),
        ({"policy": ["mixup=1", "crop=mild"]}, "policy 'crop=mild': crop mild contradicts strategy funmatch"),
        ({"policy": TWO, "strategy": "fix/cc"}, "mixup .* needs a teacher that gets the mixed images"),
        ({"policy": TWO, "strategy": "ind/ic"}, "randaugment changes the view that both share"),
        ({"policy": ["mixup_lam=0.3,mixup=0.5", "mixup=1"]}, "mixup 0.5 has no effect"),
        ({"policy": ["mixup_lam=0.3,mixup=0", "mixup=1"]}, "mixup_lam belongs to MixUp, which is off"),
        ({"policy": TWO, "policy_share": [1, 1, 1]}, "3 values for 2 policies; give one each"),
        ({"policy": TWO, "policy_share": [1, 0]}, "policy_share must be above 0, got 0.0"),
        ({"policy_share": [1, 1]}, "policy_share belongs to --policy"),
        ({"policy": 3}, "policy: wanted a list of strings, got 3"),
    ],
)  # fmt: skip
def test_mistakes_are_told(options, message):
    with pytest.raises(InputError, match=message):
        Distill.checked(**TAUGHT | options)


def test_crops_of_a_batch_are_cut_alike():
    with pytest.raises(
        InputError, match=r"mild crops need another resize than the run's inception .* use inception or"
    ):
        Train.checked(**BASE, policy=["crop=mild", "crop=whole"])
