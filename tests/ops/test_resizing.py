"""Evaluation views by other filters are those of Pillow, of timm's transform and of torchvision, to the bit."""

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from funmatch.models.classifier import crop_fraction
from funmatch.ops.crops import central_view
from funmatch.ops.resizing import libraries

SHAPES = [(64, 64), (90, 131), (200, 75), (47, 300), (33, 34)]


@pytest.fixture(name="images", scope="module")
def noise():
    rng = np.random.default_rng(0)
    return [torch.from_numpy(rng.integers(0, 256, (*shape, 3), dtype=np.uint8)) for shape in SHAPES]


@pytest.mark.parametrize("method", ["nearest", "lanczos", "box", "hamming"])
@pytest.mark.parametrize("mode", ["center", "squash"])
@pytest.mark.parametrize(("side", "short_side"), [(32, 40), (56, 56), (31, 35), (96, 110)])
def test_pillows_filters_are_those_of_timms_transform(images, method, mode, side, short_side):
    # Half of 56 pixels, or a multiple of them, lies exactly between two pixels of the box.
    transform = create_transform(
        (3, side, side), interpolation=method, crop_mode=mode, crop_pct=crop_fraction(side, short_side),
        mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0),
    )  # fmt: skip
    for image in images:
        found = central_view(image, short_side, side, squash=mode == "squash", method=method)
        assert torch.equal(found, transform(Image.fromarray(image.numpy())))


@pytest.mark.parametrize("name", ["nearest", "bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("squash", [False, True])
def test_torchvisions_filters_are_torchvisions(images, name, squash):
    mode = InterpolationMode.NEAREST_EXACT if name == "nearest" else InterpolationMode(name)
    for image in images:
        found = central_view(image, 40, 32, squash=squash, method=f"torchvision-{name}", floor=True)
        planes = functional.resize(image.permute(2, 0, 1), [40, 40] if squash else [40], mode)
        top, left = ((length - 32) // 2 for length in planes.shape[1:])
        assert torch.equal(found, planes[:, top : top + 32, left : left + 32] / 255)


@pytest.mark.parametrize("method", ["nearest", "lanczos", "box", "hamming", "torchvision-bilinear"])
def test_of_strips_only_the_middle_is_resized(method, monkeypatch):
    strip = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (11, 900, 3), dtype=np.uint8))
    whole = central_view(strip, 40, 32, method=method)
    monkeypatch.setattr(libraries, "MOST_PIXELS", 40 * 400)
    # Places are the same up to rounding, which decides between neighbours where there is no blending.
    differs = (255 * (central_view(strip, 40, 32, method=method) - whole)).abs() > 1.01
    assert differs.double().mean() < (0.1 if method in ("nearest", "box") else 1e-9)
