"""A view spec holds everything that decides views; its key changes with all of it except the rounding of crops."""

from dataclasses import fields, make_dataclass, replace

import pytest

from funmatch.ops.mixing import MixupOptions
from funmatch.ops.sampling import SAMPLING_VERSION
from funmatch.ops.view_spec import ViewSpec

SPEC = ViewSpec(seed=3, batch=16, side=32)
OTHERS = {
    "seed": 4,
    "batch": 32,
    "side": 48,
    "min_area": 0.2,
    "ratio": (0.75, 1.33),
    "crop": "whole",
    "resample": "antialias",
    "mixup": MixupOptions(a=0.2),
    "cutmix": 1.0,
    "randaugment": (2, 9),
    "sampling": "balanced",
    "augment": "module:function",
    "own_teacher_view": True,
    "version": SAMPLING_VERSION + 1,
    "policies": ((1, SPEC), (1, replace(SPEC, cutmix=1.0))),
    "sources": ((2, 10), (1, 7)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_every_field_changes_the_key(name):
    other = replace(SPEC, **{name: OTHERS[name]})
    assert other.key() != SPEC.key()
    assert SPEC.differences(other) == {name: (getattr(SPEC, name), OTHERS[name])}


def test_the_cases_above_cover_every_field():
    assert {each.name for each in fields(ViewSpec)} == {*OTHERS, "resize", "native"}
    mild = replace(SPEC, crop="mild", resize=40)
    assert replace(mild, resize=48).key() != mild.key()
    assert replace(mild, min_area=0.5).key() == mild.key(), "mild crops have no smallest area"


def test_crop_kernel_changes_the_spec_but_not_the_tape_key():
    other = replace(SPEC, native=False)
    assert other.key() == SPEC.key()
    assert other != SPEC
    assert SPEC.differences(other) == {"native": (True, False)}


def test_new_fields_become_part_of_the_key():
    later = make_dataclass("Later", [("blur", float, 0.0)], bases=(ViewSpec,), frozen=True)
    assert later(3, 16, 32, blur=1.0).key() != later(3, 16, 32).key()


def test_key_equals_the_one_stored_by_version_0_1_0():
    assert SPEC.key() == {
        "draws": 1, "seed": 3, "batch": 16, "side": 32, "crop": "inception", "resize": None, "min_area": 0.05,
        "mixup": [1.0, False, True, None], "cutmix": 0.0, "randaugment": None, "teacher_sees": "the student's",
    }  # fmt: skip
