"""Corruptions are deterministic, stay in [0, 1] and grow with their severity."""

import pytest
import torch

from funmatch.ops.corruptions import CORRUPTIONS, SEVERITIES, Damage


def smooth_views(count=6, side=32):
    noise = torch.rand(count, 3, side // 4, side // 4, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(noise, size=(side, side), mode="bilinear")


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corruption_grows_with_severity(name):
    views = smooth_views()
    distances = [(Damage(name, each).apply(views) - views).abs().mean().item() for each in SEVERITIES]
    assert distances[0] > 0
    # Saturation is taken away first, then exaggerated.
    assert distances == sorted(distances) or name == "saturation"


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("side", [1, 2, 31])
def test_corrupted_views_keep_shape_and_range(name, side):
    views = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    for severity in SEVERITIES:
        corrupted = Damage(name, severity).apply(views)
        assert corrupted.shape == views.shape
        assert corrupted.min() >= 0
        assert corrupted.max() <= 1


@pytest.mark.parametrize("name", ["noise", "elastic"])
def test_corruption_depends_on_the_image_and_the_seed_not_on_the_batch(name):
    views = smooth_views()
    whole = Damage(name, 3).apply(views)
    assert torch.equal(Damage(name, 3).apply(views[2:4], 2), whole[2:4])
    assert not torch.equal(Damage(name, 3, seed=1).apply(views), whole)
    assert not torch.equal(Damage(name, 3).apply(views[:1].expand(2, -1, -1, -1))[0], whole[1])


def test_corrupting_leaves_the_generator_of_torch_as_it_was():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    Damage("noise", 2).apply(smooth_views())
    assert torch.equal(torch.rand(3), expected)
