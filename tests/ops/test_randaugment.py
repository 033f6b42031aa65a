"""RandAugment against torchvision's, one operation at a time, and the distribution of its draws."""

import numpy as np
import pytest
import torch
from torchvision.transforms import InterpolationMode, v2

from funmatch.ops.randaugment import MAX_MAGNITUDE, OPERATIONS, apply_operations, draw_operations
from funmatch.ops.sampling import step_generator

NAMES = dict(
    zip(
        OPERATIONS,
        ["Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color", "Contrast",
         "Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize"],
        strict=True,
    )
)  # fmt: skip
TRUNCATED = {"brightness", "color", "contrast", "sharpness"}
"""On bytes, torchvision truncates the grey value and then the result, so they may differ by 2/255."""


def random_images(n: int, side: int, seed: int = 0) -> torch.Tensor:
    """Images with structure: smooth blobs with more noise from image to image, within 10 to 240."""
    coarse = torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    noise = torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(seed + 1))
    smooth = torch.nn.functional.interpolate(coarse, (side, side), mode="bilinear")
    share = torch.linspace(0, 0.5, n)[:, None, None, None]
    return ((1 - share) * smooth + share * noise).mul(230).add(10).to(torch.uint8)


def apply_torchvisions(image: torch.Tensor, name: str, magnitude: int, sign: int) -> torch.Tensor:
    """Apply the operation as torchvision's RandAugment does after drawing it."""
    grey = [0.5] * 3 if image.is_floating_point() else [127.5] * 3
    theirs = v2.RandAugment(interpolation=InterpolationMode.NEAREST, fill=grey)
    magnitudes, signed = theirs._AUGMENTATION_SPACE[NAMES[name]]
    strengths = magnitudes(MAX_MAGNITUDE + 1, *image.shape[-2:])
    strength = 0.0 if strengths is None else float(strengths[magnitude]) * (sign if signed else 1)
    return theirs._apply_image_or_video_transform(
        image, NAMES[name], strength, interpolation=theirs.interpolation, fill=theirs._fill
    )


def apply_ours(views: torch.Tensor, name: str, magnitude: float, sign: int = 1) -> torch.Tensor:
    operation = OPERATIONS[name]
    strength = operation.weakest + (operation.strongest - operation.weakest) * magnitude / MAX_MAGNITUDE
    shape = len(views), 1
    strengths = np.full(shape, strength * (sign if operation.signed else 1))
    return apply_operations(views, np.full(shape, list(OPERATIONS).index(name)), strengths)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("side", [3, 32, 57])
def test_every_operation_equals_torchvisions(name, side):
    images = random_images(6, side)
    for magnitude in (0, 1, 9, 17, 30):
        for sign in (1, -1):
            found = apply_ours(images / 255, name, magnitude, sign)
            expected = torch.stack([apply_torchvisions(image / 255, name, magnitude, sign) for image in images])
            assert (found - expected).abs().max() <= (1 / 255 if name == "posterize" else 1e-5), (magnitude, sign)
            expected = torch.stack([apply_torchvisions(image, name, magnitude, sign) for image in images]) / 255
            limit = (2 if name in TRUNCATED else 1) / 255 + 1e-6
            assert (found - expected).abs().max() <= limit, (magnitude, sign)


def test_operations_and_signs_are_torchvisions():
    assert set(NAMES.values()) == set(v2.RandAugment._AUGMENTATION_SPACE)
    assert {NAMES[name] for name, each in OPERATIONS.items() if each.signed} == {
        name for name, (_, signed) in v2.RandAugment._AUGMENTATION_SPACE.items() if signed
    }


@pytest.mark.parametrize("name", [name for name in OPERATIONS if name not in ("autocontrast", "equalize")])
def test_magnitude_0_is_the_identity(name):
    views = torch.rand(4, 3, 20, 20)
    torch.testing.assert_close(apply_ours(views, name, 0), views, rtol=0, atol=1e-6)


def test_border_is_filled_with_grey():
    views = torch.ones(1, 3, 331, 331)
    found = apply_ours(views, "translate-x", MAX_MAGNITUDE)
    assert (found[..., :149] == 0.5).all()
    assert (found[..., 151:] == 1).all()
    assert (apply_ours(views, "rotate", MAX_MAGNITUDE)[..., 0, 0] == 0.5).all()


def draw(n: int, operations: int, magnitude: float, seed: int = 0):
    return draw_operations(step_generator(seed, 0), n, operations, magnitude)


def test_operations_and_signs_are_uniform():
    ops, strengths = draw(14_000, 2, 12)
    assert ops.shape == strengths.shape == (14_000, 2)
    for column in ops.T:
        assert ((np.bincount(column, minlength=14) - 1000) ** 2 / 1000).sum() < 34.5, "13 degrees of freedom, p = 0.001"
    for index, (name, each) in enumerate(OPERATIONS.items()):
        found = strengths[ops == index]
        size = each.weakest + (each.strongest - each.weakest) * 0.4
        np.testing.assert_allclose(np.abs(found), size)
        negative = np.mean(found < 0)
        assert abs(negative - 0.5) < 3.3 * 0.5 / len(found) ** 0.5 if each.signed else negative == 0, name


def test_draws_depend_on_the_generator_only():
    for one, other in zip(draw(50, 3, 9), draw(50, 3, 9), strict=True):
        np.testing.assert_array_equal(one, other)
    assert (draw(50, 3, 9)[0] != draw(50, 3, 9, seed=1)[0]).any()
    assert [part.shape for part in draw(5, 0, 9)] == [(5, 0), (5, 0)]


@pytest.mark.parametrize("side", [8, 33])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_augmented_image_does_not_depend_on_its_batch(side, layout):
    """Any slice of a batch gives bitwise the same images; no other RNG is used and the input stays as it was."""
    views = torch.rand(40, 3, side, side).contiguous(memory_format=layout)
    before = views.clone()
    ops, strengths = draw(40, 2, 14)
    together, state = apply_operations(views, ops, strengths), torch.get_rng_state()
    for rows in (np.arange(40), np.arange(9, 20) - 10, np.array([7]), np.arange(40)[::-1].copy()):
        found = apply_operations(views[torch.from_numpy(rows % 40)], ops[rows], strengths[rows])
        assert torch.equal(found, together[torch.from_numpy(rows % 40)])
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(views, before)
    assert together.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("magnitude", [0, 9, 30])
def test_views_stay_in_0_to_1(magnitude):
    ops, strengths = draw(64, 4, magnitude)
    for views in (torch.rand(64, 3, 16, 16), torch.zeros(64, 3, 16, 16), torch.ones(64, 3, 16, 16)):
        found = apply_operations(views, ops, strengths)
        assert found.shape == views.shape
        assert found.dtype == torch.float32
        assert 0 <= found.min() <= found.max() <= 1


def test_operations_are_applied_in_order():
    views = torch.rand(1, 3, 16, 16)
    indices = [list(OPERATIONS).index(name) for name in ("rotate", "solarize")]
    found = apply_operations(views, np.array([indices]), np.array([[10.0, 0.4]]))
    assert torch.equal(found, OPERATIONS["solarize"].change(OPERATIONS["rotate"].change(views, 10.0), 0.4))
