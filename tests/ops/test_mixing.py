"""CutMix and MixUp against timm's, and against loops over images and pixels."""

import numpy as np
import pytest
import timm.data.mixup
import torch

from funmatch.ops.distances import mix_labels
from funmatch.ops.mixing import beta_quantile, boxes_from_uniforms, cutmix, kept_fraction, mixup
from funmatch.ops.sampling import step_generator


def batch(n: int, side: int, seed: int = 0) -> torch.Tensor:
    """Crops of a batch with the last image repeated in front, (1 + n, 3, side, side)."""
    views = torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(seed))
    return torch.cat([views[-1:], views]).contiguous(memory_format=torch.channels_last)


def sample_boxes(n: int, a: float = 1.0, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(boxes_from_uniforms(step_generator(seed, 0).random((n, 3)), a)).float()


@pytest.mark.parametrize("a", [0.2, 1.0, 4.0])
def test_boxes_equal_their_definition(a):
    uniforms = step_generator(1, 0).random((200, 3))
    for (u, y, x), box in zip(uniforms, boxes_from_uniforms(uniforms, a), strict=True):
        side = (1 - float(beta_quantile(u, a))) ** 0.5
        top, bottom = max(y - side / 2, 0), min(y + side / 2, 1)
        left, right = max(x - side / 2, 0), min(x + side / 2, 1)
        np.testing.assert_allclose(box, [top, left, bottom - top, right - left], atol=1e-12)


def test_box_inside_the_image_covers_one_minus_lambda():
    uniforms = np.array([[0.75, 0.5, 0.5], [0.0, 0.5, 0.5], [0.0, 0.0, 0.0], [1 - 1e-16, 0.3, 0.9]])
    boxes = boxes_from_uniforms(uniforms)
    np.testing.assert_allclose(boxes[:3], [[0.25, 0.25, 0.5, 0.5], [0, 0, 1, 1], [0, 0, 0.5, 0.5]])
    found = kept_fraction(torch.from_numpy(boxes).float(), 32)
    assert found.dtype == torch.float32
    assert found.tolist() == [0.75, 0, 0.75, 1]


def test_boxes_have_timms_distribution():
    """Kolmogorov-Smirnov test of kept shares of 4,000 images at p = 0.001; at 512 pixels rounding hardly matters."""
    n, side, state = 4000, 512, np.random.RandomState(0)
    ours = np.sort(kept_fraction(sample_boxes(n), side).numpy())
    np.random.seed(1)
    theirs = [timm.data.mixup.cutmix_bbox_and_lam((3, side, side), lam)[1] for lam in state.rand(n)]
    both = np.concatenate([ours, theirs])
    cdf_gap = [np.mean(ours <= value) - np.mean(np.array(theirs) <= value) for value in both]
    assert np.abs(cdf_gap).max() < 1.95 * (2 / n) ** 0.5


@pytest.mark.parametrize("side", [1, 7, 32])
def test_cutmix_equals_a_loop_over_pixels(side):
    views, boxes = batch(6, side), sample_boxes(6)
    found, shares = cutmix(views, boxes), kept_fraction(boxes, side)
    assert found.is_contiguous(memory_format=torch.channels_last)
    for i, (top, left, height, width) in enumerate(boxes.double().tolist()):
        own = 0
        for y in range(side):
            for x in range(side):
                inside = top <= (y + 0.5) / side < top + height and left <= (x + 0.5) / side < left + width
                assert torch.equal(found[i, :, y, x], views[i if inside else i + 1, :, y, x])
                own += not inside
        assert shares[i].item() == pytest.approx(own / side**2)


def test_one_box_can_be_shared_by_the_batch():
    views, box = batch(5, 16), sample_boxes(1)
    assert torch.equal(cutmix(views, box), cutmix(views, box.expand(5, 4)))
    labels = torch.tensor([2, 0, 1, 1, 0, 2])
    share = kept_fraction(box, 16)
    assert torch.equal(mix_labels(labels, share, 3), mix_labels(labels, share.expand(5), 3))


def test_box_without_area_changes_nothing():
    views = batch(3, 8)
    for box in ([0.3, 0.4, 0, 0], [0, 0, 0, 1], [0.5, 0.5, 0.01, 0.01]):
        boxes = torch.tensor([box])
        assert torch.equal(cutmix(views, boxes), views[1:])
        assert kept_fraction(boxes, 8).item() == 1
    assert torch.equal(cutmix(views, torch.tensor([[0.0, 0, 1, 1]])), views[:-1])


def test_cutmix_of_a_slice_equals_the_slice_of_the_batch():
    views, boxes = batch(8, 12), sample_boxes(8)
    all_at_once = cutmix(views, boxes)
    for rows in (slice(0, 4), slice(4, 8), slice(7, 8)):
        assert torch.equal(cutmix(views[rows.start : rows.stop + 1], boxes[rows]), all_at_once[rows])


def test_box_covers_the_same_share_at_every_side():
    boxes = sample_boxes(50)
    exact = 1 - boxes[:, 2] * boxes[:, 3]
    for side in (32, 128, 224):
        assert (kept_fraction(boxes, side) - exact).abs().max() < 2.1 / side


@pytest.mark.parametrize("kind", ["cutmix", "mixup"])
def test_mixing_equals_timms(kind, monkeypatch):
    """timm pairs the first image with the last; in a batch of two, that is each with the one before it."""
    side, timm_boxes, found = 24, [], timm.data.mixup.cutmix_bbox_and_lam

    def record_box(*args, **options):
        box, lam = found(*args, **options)
        timm_boxes.append(box)
        return box, lam

    monkeypatch.setattr(timm.data.mixup, "cutmix_bbox_and_lam", record_box)
    theirs = timm.data.mixup.Mixup(
        mixup_alpha=float(kind == "mixup"), cutmix_alpha=float(kind == "cutmix"), mode="elem", label_smoothing=0.1,
        num_classes=5,
    )  # fmt: skip
    np.random.seed(0)
    for seed in range(20):
        views, timm_boxes[:] = batch(2, side, seed), []
        labels = torch.tensor([3, 1, 3])
        expected, targets = theirs(views[1:].clone(), labels[1:])
        if kind == "cutmix":
            edges = [(top, left, bottom - top, right - left) for top, bottom, left, right in timm_boxes]
            boxes = torch.tensor(edges) / side
            ours, lam = cutmix(views, boxes), kept_fraction(boxes, side)
            assert torch.equal(ours, expected)
        else:
            lam = (targets[:, [1, 3]].diagonal() - 0.02) / 0.9  # timm returns no lambda, but its labels show it
            torch.testing.assert_close(mixup(views, lam), expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(mix_labels(labels, lam, 5, 0.1), targets, rtol=0, atol=1e-6)


@pytest.mark.parametrize("side", [1, 7, 32])
@pytest.mark.parametrize("lam", [0.0, 0.123456789, 0.5, 0.7, 1.0])
def test_equal_lambdas_per_image_equal_one_lambda_bitwise(side, lam):
    views = batch(5, side)
    assert torch.equal(mixup(views, torch.full((5,), lam)), mixup(views, lam))
    labels = torch.tensor([2, 0, 1, 1, 0, 2])
    torch.testing.assert_close(mix_labels(labels, torch.full((5,), lam), 3), mix_labels(labels, lam, 3))


def test_each_image_can_have_its_own_lambda():
    views, lam = batch(5, 6), torch.linspace(0, 1, 5)
    labels = torch.tensor([2, 0, 1, 1, 0, 2])
    pixels, classes = views.numpy().astype(float), np.eye(3)[labels.numpy()]
    mixed, mixed_labels = mixup(views, lam), mix_labels(labels, lam, 3)
    for i, share in enumerate(lam.tolist()):
        np.testing.assert_allclose(mixed[i], share * pixels[i + 1] + (1 - share) * pixels[i], atol=1e-6)
        np.testing.assert_allclose(mixed_labels[i], share * classes[i + 1] + (1 - share) * classes[i], atol=1e-6)
