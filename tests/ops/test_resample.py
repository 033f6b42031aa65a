"""Crops cut all at once, against those that are cut one by one; the kernel as Triton's interpreter runs it."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from funmatch.ops import resample
from funmatch.ops.crops import central_view, crop_of_resized_flip, crop_resize_flip
from funmatch.ops.sampling import box_sampler

SIZES = np.array([[31, 23], [64, 64], [8, 90], [200, 130], [1, 1], [2, 300], [375, 500]])
CLOSE = 0.01 / 255


@pytest.fixture(name="images", scope="module")
def noise():
    rng = np.random.default_rng(0)
    return [torch.from_numpy(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in SIZES]


@pytest.fixture(name="flat", scope="module")
def in_one_piece(images):
    return torch.cat([image.reshape(-1) for image in images])


def starts():
    lengths = 3 * SIZES.prod(1)
    return np.cumsum(lengths) - lengths


def seen(flat, looks, side):
    return resample.sample_by_gather(flat, torch.from_numpy(looks.corners), torch.from_numpy(looks.axes), side)


def drawn(crop, side, seed=0):
    rng = np.random.default_rng(seed)
    boxes = box_sampler(crop, side=side, resize=side * 5 // 4)(rng, *SIZES.T)
    return boxes, rng.random(len(SIZES)) < 0.5


@pytest.mark.parametrize("side", [1, 7, 32])
@pytest.mark.parametrize("crop", ["inception", "whole"])
def test_crops_that_are_cut_alone(images, flat, crop, side):
    for seed in range(5):
        boxes, flips = drawn(crop, side, seed)
        found = seen(flat, resample.crop_then_resize(starts(), SIZES.T, boxes, side).flipped(flips, side), side)
        torch.testing.assert_close(found, crop_resize_flip(images, boxes, flips, side), atol=CLOSE, rtol=0)
        assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("side", [1, 7, 32])
@pytest.mark.parametrize("crop", ["mild", "squash"])
def test_crops_of_resized_images(images, flat, crop, side):
    for seed in range(5):
        boxes, flips = drawn(crop, side, seed)
        found = seen(flat, resample.resize_then_crop(starts(), SIZES.T, boxes, side).flipped(flips, side), side)
        torch.testing.assert_close(found, crop_of_resized_flip(images, boxes, flips, side), atol=CLOSE, rtol=0)


@pytest.mark.parametrize("squash", [False, True])
def test_evaluation_views(images, flat, squash):
    found = seen(flat, resample.central_grid(starts(), SIZES.T, 40, 32, squash=squash), 32)
    expected = torch.stack([central_view(image, 40, 32, squash=squash) for image in images])
    torch.testing.assert_close(found, expected, atol=CLOSE, rtol=0)


def test_beyond_two_gigabytes_places_are_still_exact():
    looks = resample.crop_then_resize(
        np.array([3 * 2**40]), np.array([[4000], [6000]]), np.array([[3999, 5999, 1, 1]]), 2
    )
    assert looks.corners.tolist() == [[3 * 2**40 + 3 * (3999 * 6000 + 5999), 18000]]


INTERPRETED = """
import sys, numpy as np, torch
from funmatch.ops import resample
from funmatch.ops.native.triton_crops import sample
given = torch.load(sys.argv[1], weights_only=True)
for corners, axes, side, expected in given["looks"]:
    found = sample(given["flat"], corners, axes, side)
    assert found.is_contiguous(memory_format=torch.channels_last), found.stride()
    torch.testing.assert_close(found, expected, atol=0.01 / 255, rtol=0)
print(len(given["looks"]), "alike")
"""


def test_the_kernel_computes_the_same(flat, tmp_path):
    pytest.importorskip("triton")
    looks = []
    for side in (1, 7, 32):
        for crop, cut in (("inception", resample.crop_then_resize), ("mild", resample.resize_then_crop)):
            boxes, flips = drawn(crop, side)
            found = cut(starts(), SIZES.T, boxes, side).flipped(flips, side)
            given = torch.from_numpy(found.corners), torch.from_numpy(found.axes).float()  # as a device gets them
            looks.append((*given, side, seen(flat, found, side)))
    torch.save({"flat": flat, "looks": looks}, tmp_path / "looks.pt")
    words = [sys.executable, "-W", "ignore", "-c", INTERPRETED, str(tmp_path / "looks.pt")]
    done = subprocess.run(words, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.stdout == "6 alike\n", done.stderr
