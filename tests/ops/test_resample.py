"""Crops resampled all at once against single crops; the Triton kernel runs in Triton's interpreter."""

import itertools
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from funmatch.models.classifier import crop_fraction
from funmatch.ops import grids, resample
from funmatch.ops.crops import central_view, crop_of_resized_flip, crop_resize_flip
from funmatch.ops.sampling import box_sampler

SIZES = np.array([[31, 23], [64, 64], [8, 90], [200, 130], [1, 1], [2, 300], [375, 500]])
CLOSE = 0.01 / 255


@pytest.fixture(name="images", scope="module")
def noise():
    # One after another in one block of memory, as in the cache.
    block = torch.from_numpy(np.random.default_rng(0).integers(0, 256, int(3 * SIZES.prod(1).sum()), dtype=np.uint8))
    parts = block.split((3 * SIZES.prod(1)).tolist())
    return [part.view(*size, 3) for part, size in zip(parts, SIZES.tolist(), strict=True)]


@pytest.fixture(name="flat", scope="module")
def flat_pixels(images):
    return torch.cat([image.reshape(-1) for image in images])


def starts():
    lengths = 3 * SIZES.prod(1)
    return np.cumsum(lengths) - lengths


def sample_crops(crop, side, seed=0):
    rng = np.random.default_rng(seed)
    boxes = box_sampler(crop, side=side, resize=side * 5 // 4)(rng, *SIZES.T)
    return boxes, rng.random(len(SIZES)) < 0.5


METHODS = pytest.mark.parametrize("method", ["tf", "antialias", "bicubic", "area"])


@METHODS
@pytest.mark.parametrize("side", [1, 7, 32])
@pytest.mark.parametrize("crop", ["inception", "whole"])
def test_gathered_crops_equal_single_crops(images, flat, crop, side, method):
    for seed in range(2):
        boxes, flips = sample_crops(crop, side, seed)
        found = resample.sample_by_torch(
            flat, grids.crop_then_resize(starts(), SIZES.T, boxes, side).flipped(flips, side), side, method
        )
        for native in (True, False):
            expected = crop_resize_flip(images, boxes, flips, side, native=native, method=method)
            torch.testing.assert_close(found, expected, atol=CLOSE, rtol=0)
        assert found.is_contiguous(memory_format=torch.channels_last)


@METHODS
@pytest.mark.parametrize("side", [1, 7, 32])
@pytest.mark.parametrize("crop", ["mild", "squash"])
def test_gathered_crops_of_resized_images_equal_single_ones(images, flat, crop, side, method):
    for seed in range(2):
        boxes, flips = sample_crops(crop, side, seed)
        found = resample.sample_by_torch(
            flat, grids.resize_then_crop(starts(), SIZES.T, boxes, side).flipped(flips, side), side, method
        )
        for native in (True, False):
            expected = crop_of_resized_flip(images, boxes, flips, side, native=native, method=method)
            torch.testing.assert_close(found, expected, atol=CLOSE, rtol=0)


@METHODS
@pytest.mark.parametrize("squash", [False, True])
def test_gathered_evaluation_views_equal_single_ones(images, flat, squash, method):
    grid = grids.central_grid(starts(), SIZES.T, 40, 32, squash=squash, method=method)
    expected = torch.stack([central_view(image, 40, 32, squash=squash, method=method) for image in images])
    torch.testing.assert_close(resample.sample_by_torch(flat, grid, 32, method), expected, atol=CLOSE, rtol=0)


PILLOW = {"antialias": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("method", PILLOW)
def test_antialiased_crops_are_those_of_pillow(images, method, native):
    boxes, flips = sample_crops("inception", 24)
    found = crop_resize_flip(images, boxes, flips, 24, native=native, method=method)
    for view, image, (top, left, height, width), flip in zip(found, images, boxes, flips, strict=True):
        crop = Image.fromarray(image[top : top + height, left : left + width].numpy())
        # Rows first: which of the two passes comes first depends on the version of Pillow.
        expected = np.asarray(crop.resize((24, int(height)), PILLOW[method]).resize((24, 24), PILLOW[method]))
        expected = expected[:, ::-1] if flip else expected
        assert np.array_equal((view * 255).round().permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("method", PILLOW)
@pytest.mark.parametrize("mode", ["center", "squash"])
@pytest.mark.parametrize(("side", "short_side"), [(32, 40), (48, 48), (31, 35), (96, 110)])
def test_antialiased_evaluation_views_are_those_of_timms_transform(images, method, mode, side, short_side):
    interpolation = {"antialias": "bilinear", "bicubic": "bicubic"}[method]
    transform = create_transform(
        (3, side, side), interpolation=interpolation, crop_mode=mode, crop_pct=crop_fraction(side, short_side),
        mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0),
    )  # fmt: skip
    for image in images:
        found = central_view(image, short_side, side, squash=mode == "squash", method=method)
        expected = transform(Image.fromarray(image.numpy()))
        # Where the aspect changes, newer versions of Pillow resize columns first if that is cheaper.
        torch.testing.assert_close(found, expected, atol=CLOSE if mode == "center" else 0.05, rtol=0)


def mean_of_areas(image: np.ndarray, size: int, axis: int) -> np.ndarray:
    """Resizes one axis by area: differences of the integral over pixels, which is linear within each, at new edges."""
    old = image.shape[axis]
    integral = np.insert(np.cumsum(image.astype(np.float64), axis), 0, 0, axis)
    edges = np.arange(size + 1) * (old / size)
    at_edges = np.apply_along_axis(lambda each: np.interp(edges, np.arange(old + 1), each), axis, integral)
    return np.diff(at_edges, axis=axis) * (size / old)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize(("side", "short_side"), [(32, 40), (31, 35), (96, 110)])
def test_evaluation_views_by_area_are_means_of_areas(images, side, short_side, native, monkeypatch):
    if not native:
        monkeypatch.setattr(resample, "why_unavailable", lambda: "not now")
    for image in images:
        height, width = (max(side, round(each * (short_side / min(image.shape[:2])))) for each in image.shape[:2])
        top, left = (height - side) // 2, (width - side) // 2
        expected = mean_of_areas(mean_of_areas(image.numpy(), height, 0), width, 1)
        expected = expected[top : top + side, left : left + side]
        found = central_view(image, short_side, side, method="area").permute(1, 2, 0).numpy() * 255
        assert np.abs(found - expected).max() < 0.01


@pytest.mark.parametrize("side", range(1, 700, 3))
def test_timm_takes_the_short_side_from_the_crop_fraction(side):
    for short_side in {side, side + 1, side + 32, side * 5 // 4, side * 8 // 7}:
        assert math.floor(side / crop_fraction(side, short_side)) == short_side


def test_offsets_beyond_32_bits_are_exact():
    size, box = np.array([[4000], [6000]]), np.array([[3999, 5999, 1, 1]])
    grid = grids.crop_then_resize(np.array([3 * 2**40]), size, box, 2)
    assert grid.corners.tolist() == [[3 * 2**40 + 3 * (3999 * 6000 + 5999), 18000]]


INTERPRETED = """
import sys, numpy as np, torch
from funmatch.ops.grids import SamplingGrid
from funmatch.ops.native.triton_crops import sample
saved = torch.load(sys.argv[1], weights_only=True)
for corners, axes, *how, expected in saved["cases"]:
    found = sample(saved["flat"], SamplingGrid(corners.numpy(), axes.numpy()), *how)
    assert found.is_contiguous(memory_format=torch.channels_last), found.stride()
    difference = (found - expected).abs() * 255
    # With antialias, a sum in float32 may fall on the other side of the edge between two bytes.
    assert difference.max() < (0.02 if how[1] in ("tf", "area") else 1.01)
    assert (difference > 0.02).double().mean() < 0.03
print(len(saved["cases"]), "equal")
"""


@pytest.mark.slow
def test_triton_kernel_equals_torch(flat, tmp_path):
    pytest.importorskip("triton")
    cases = []
    # The interpreter loops in Python, over as many pixels as the largest step reaches: with antialias, small images.
    filters = ("antialias", 3, (24,)), ("bicubic", 2, (24,)), ("area", 2, (24,))
    for method, count, sides in (("tf", len(SIZES), (1, 7, 32)), *filters):
        crops = [("inception", grids.crop_then_resize), ("mild", grids.resize_then_crop)]
        for side, (crop, make_grid) in itertools.product(sides, crops):
            boxes, flips = (each[:count] for each in sample_crops(crop, side))
            grid = make_grid(starts()[:count], SIZES[:count].T, boxes, side).flipped(flips, side)
            tensors = torch.from_numpy(grid.corners), torch.from_numpy(grid.axes)
            cases.append((*tensors, side, method, resample.sample_by_torch(flat, grid, side, method)))
    torch.save({"flat": flat, "cases": cases}, tmp_path / "cases.pt")
    # A process of its own: Triton reads TRITON_INTERPRET when it is imported.
    argv = [sys.executable, "-W", "ignore", "-c", INTERPRETED, str(tmp_path / "cases.pt")]
    result = subprocess.run(argv, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert result.stdout == "12 equal\n", result.stderr
