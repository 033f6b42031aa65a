"""Crops resampled all at once against single crops; the Triton kernel runs in Triton's interpreter."""

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
def flat_pixels(images):
    return torch.cat([image.reshape(-1) for image in images])


def starts():
    lengths = 3 * SIZES.prod(1)
    return np.cumsum(lengths) - lengths


def gather(flat, grids, side):
    return resample.sample_by_gather(flat, torch.from_numpy(grids.corners), torch.from_numpy(grids.axes), side)


def sample_crops(crop, side, seed=0):
    rng = np.random.default_rng(seed)
    boxes = box_sampler(crop, side=side, resize=side * 5 // 4)(rng, *SIZES.T)
    return boxes, rng.random(len(SIZES)) < 0.5


@pytest.mark.parametrize("side", [1, 7, 32])
@pytest.mark.parametrize("crop", ["inception", "whole"])
def test_gathered_crops_equal_single_crops(images, flat, crop, side):
    for seed in range(5):
        boxes, flips = sample_crops(crop, side, seed)
        found = gather(flat, resample.crop_then_resize(starts(), SIZES.T, boxes, side).flipped(flips, side), side)
        torch.testing.assert_close(found, crop_resize_flip(images, boxes, flips, side), atol=CLOSE, rtol=0)
        assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("side", [1, 7, 32])
@pytest.mark.parametrize("crop", ["mild", "squash"])
def test_gathered_crops_of_resized_images_equal_single_ones(images, flat, crop, side):
    for seed in range(5):
        boxes, flips = sample_crops(crop, side, seed)
        found = gather(flat, resample.resize_then_crop(starts(), SIZES.T, boxes, side).flipped(flips, side), side)
        torch.testing.assert_close(found, crop_of_resized_flip(images, boxes, flips, side), atol=CLOSE, rtol=0)


@pytest.mark.parametrize("squash", [False, True])
def test_gathered_evaluation_views_equal_single_ones(images, flat, squash):
    found = gather(flat, resample.central_grid(starts(), SIZES.T, 40, 32, squash=squash), 32)
    expected = torch.stack([central_view(image, 40, 32, squash=squash) for image in images])
    torch.testing.assert_close(found, expected, atol=CLOSE, rtol=0)


def test_offsets_beyond_32_bits_are_exact():
    grids = resample.crop_then_resize(
        np.array([3 * 2**40]), np.array([[4000], [6000]]), np.array([[3999, 5999, 1, 1]]), 2
    )
    assert grids.corners.tolist() == [[3 * 2**40 + 3 * (3999 * 6000 + 5999), 18000]]


INTERPRETED = """
import sys, numpy as np, torch
from funmatch.ops import resample
from funmatch.ops.native.triton_crops import sample
saved = torch.load(sys.argv[1], weights_only=True)
for corners, axes, side, expected in saved["grids"]:
    found = sample(saved["flat"], corners, axes, side)
    assert found.is_contiguous(memory_format=torch.channels_last), found.stride()
    torch.testing.assert_close(found, expected, atol=0.01 / 255, rtol=0)
print(len(saved["grids"]), "equal")
"""


def test_triton_kernel_equals_the_gather(flat, tmp_path):
    pytest.importorskip("triton")
    grids = []
    for side in (1, 7, 32):
        for crop, make_grid in (("inception", resample.crop_then_resize), ("mild", resample.resize_then_crop)):
            boxes, flips = sample_crops(crop, side)
            found = make_grid(starts(), SIZES.T, boxes, side).flipped(flips, side)
            tensors = (
                torch.from_numpy(found.corners),
                torch.from_numpy(found.axes).float(),
            )  # as they are moved to a device
            grids.append((*tensors, side, gather(flat, found, side)))
    torch.save({"flat": flat, "grids": grids}, tmp_path / "grids.pt")
    # A process of its own: Triton reads TRITON_INTERPRET when it is imported.
    argv = [sys.executable, "-W", "ignore", "-c", INTERPRETED, str(tmp_path / "grids.pt")]
    result = subprocess.run(argv, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert result.stdout == "6 equal\n", result.stderr
