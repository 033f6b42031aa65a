"""RandAugment against torchvision's own, one operation at a time, and what its draws promise."""

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
"""On bytes, torchvision cuts off what is behind the point, of a grey value and then of the result."""


def bytes_of(n: int, side: int, seed: int = 0) -> torch.Tensor:
    """Images with structure: noise that is smoother from one image to the next, and not of the full range."""
    coarse = torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    noise = torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(seed + 1))
    smooth = torch.nn.functional.interpolate(coarse, (side, side), mode="bilinear")
    share = torch.linspace(0, 0.5, n)[:, None, None, None]
    return ((1 - share) * smooth + share * noise).mul(230).add(10).to(torch.uint8)


def torchvisions(image: torch.Tensor, name: str, magnitude: int, sign: int) -> torch.Tensor:
    """What torchvision's RandAugment does when it has drawn this."""
    grey = [0.5] * 3 if image.is_floating_point() else [127.5] * 3
    theirs = v2.RandAugment(interpolation=InterpolationMode.NEAREST, fill=grey)
    of, signed = theirs._AUGMENTATION_SPACE[NAMES[name]]
    strengths = of(MAX_MAGNITUDE + 1, *image.shape[-2:])
    strength = 0.0 if strengths is None else float(strengths[magnitude]) * (sign if signed else 1)
    return theirs._apply_image_or_video_transform(
        image, NAMES[name], strength, interpolation=theirs.interpolation, fill=theirs._fill
    )


def ours(views: torch.Tensor, name: str, magnitude: float, sign: int = 1) -> torch.Tensor:
    operation = OPERATIONS[name]
    strength = operation.weakest + (operation.strongest - operation.weakest) * magnitude / MAX_MAGNITUDE
    shape = len(views), 1
    strengths = np.full(shape, strength * (sign if operation.signed else 1))
    return apply_operations(views, np.full(shape, list(OPERATIONS).index(name)), strengths)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("side", [3, 32, 57])
def test_every_operation_is_torchvisions(name, side):
    images = bytes_of(6, side)
    for magnitude in (0, 1, 9, 17, 30):
        for sign in (1, -1):
            found = ours(images / 255, name, magnitude, sign)
            wanted = torch.stack([torchvisions(image / 255, name, magnitude, sign) for image in images])
            assert (found - wanted).abs().max() <= (1 / 255 if name == "posterize" else 1e-5), (magnitude, sign)
            wanted = torch.stack([torchvisions(image, name, magnitude, sign) for image in images]) / 255
            limit = (2 if name in TRUNCATED else 1) / 255 + 1e-6
            assert (found - wanted).abs().max() <= limit, (magnitude, sign)


def test_all_operations_are_torchvisions():
    assert set(NAMES.values()) == set(v2.RandAugment._AUGMENTATION_SPACE)
    assert {NAMES[name] for name, each in OPERATIONS.items() if each.signed} == {
        name for name, (_, signed) in v2.RandAugment._AUGMENTATION_SPACE.items() if signed
    }


@pytest.mark.parametrize("name", [name for name in OPERATIONS if name not in ("autocontrast", "equalize")])
def test_magnitude_0_is_the_identity(name):
    views = torch.rand(4, 3, 20, 20)
    torch.testing.assert_close(ours(views, name, 0), views, rtol=0, atol=1e-6)


def test_what_comes_in_from_beyond_the_border_is_grey():
    views = torch.ones(1, 3, 331, 331)
    found = ours(views, "translate-x", MAX_MAGNITUDE)
    assert (found[..., :149] == 0.5).all()
    assert (found[..., 151:] == 1).all()
    assert (ours(views, "rotate", MAX_MAGNITUDE)[..., 0, 0] == 0.5).all()


def drawn(n: int, operations: int, magnitude: float, seed: int = 0):
    return draw_operations(step_generator(seed, 0), n, operations, magnitude)


def test_draws_are_uniform_and_signs_are_fair():
    ops, strengths = drawn(14_000, 2, 12)
    assert ops.shape == strengths.shape == (14_000, 2)
    for column in ops.T:
        assert ((np.bincount(column, minlength=14) - 1000) ** 2 / 1000).sum() < 34.5, "13 degrees of freedom, p = 0.001"
    for place, (name, each) in enumerate(OPERATIONS.items()):
        found = strengths[ops == place]
        size = each.weakest + (each.strongest - each.weakest) * 0.4
        np.testing.assert_allclose(np.abs(found), size)
        negative = np.mean(found < 0)
        assert abs(negative - 0.5) < 3.3 * 0.5 / len(found) ** 0.5 if each.signed else negative == 0, name


def test_draws_are_a_function_of_their_generator():
    for one, other in zip(drawn(50, 3, 9), drawn(50, 3, 9), strict=True):
        np.testing.assert_array_equal(one, other)
    assert (drawn(50, 3, 9)[0] != drawn(50, 3, 9, seed=1)[0]).any()
    assert [part.shape for part in drawn(5, 0, 9)] == [(5, 0), (5, 0)]


@pytest.mark.parametrize("side", [8, 33])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_image_does_not_depend_on_its_batch(side, layout):
    """Whichever rows a process has, each comes out with the same bits; and nothing else is random or changed."""
    views = torch.rand(40, 3, side, side).contiguous(memory_format=layout)
    before = views.clone()
    ops, strengths = drawn(40, 2, 14)
    whole, state = apply_operations(views, ops, strengths), torch.get_rng_state()
    for rows in (np.arange(40), np.arange(9, 20) - 10, np.array([7]), np.arange(40)[::-1].copy()):
        found = apply_operations(views[torch.from_numpy(rows % 40)], ops[rows], strengths[rows])
        assert torch.equal(found, whole[torch.from_numpy(rows % 40)])
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(views, before)
    assert whole.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("magnitude", [0, 9, 30])
def test_views_stay_in_their_range(magnitude):
    ops, strengths = drawn(64, 4, magnitude)
    for views in (torch.rand(64, 3, 16, 16), torch.zeros(64, 3, 16, 16), torch.ones(64, 3, 16, 16)):
        found = apply_operations(views, ops, strengths)
        assert found.shape == views.shape
        assert found.dtype == torch.float32
        assert 0 <= found.min() <= found.max() <= 1


def test_operations_follow_one_another():
    views = torch.rand(1, 3, 16, 16)
    places = [list(OPERATIONS).index(name) for name in ("rotate", "solarize")]
    found = apply_operations(views, np.array([places]), np.array([[10.0, 0.4]]))
    assert torch.equal(found, OPERATIONS["solarize"].change(OPERATIONS["rotate"].change(views, 10.0), 0.4))
