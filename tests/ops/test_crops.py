"""Views against a resampler written out pixel by pixel, and against numbers from TensorFlow."""

import numpy as np
import pytest
import torch

from funmatch.ops.crops import central_view, crop_resize_flip, resize, stack_views
from funmatch.ops.mixing import mix_views, mixup
from funmatch.ops.native import build


def resample_by_definition(image, height, width):
    """Bilinear, half-pixel centres, no antialias, edges repeated: the definition, one pixel at a time in float64."""
    h, w = image.shape[:2]
    result = np.zeros((height, width, 3))
    for i in range(height):
        for j in range(width):
            y = min(max((i + 0.5) * h / height - 0.5, 0), h - 1)
            x = min(max((j + 0.5) * w / width - 0.5, 0), w - 1)
            y0, x0 = int(y), int(x)
            y1, x1 = min(y0 + 1, h - 1), min(x0 + 1, w - 1)
            dy, dx = y - y0, x - x0
            upper = image[y0, x0] * (1 - dx) + image[y0, x1] * dx
            lower = image[y1, x0] * (1 - dx) + image[y1, x1] * dx
            result[i, j] = upper * (1 - dy) + lower * dy
    return result


@pytest.fixture(name="image")
def noise():
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (31, 23, 3), dtype=np.uint8))


@pytest.fixture(params=["together", "one by one", "by torch"], autouse=True)
def resampling_path(request, monkeypatch):
    """Every path that resamples: images of one size together, or one by one, by the native kernel or by torch."""
    if request.param != "together":
        monkeypatch.setattr("funmatch.ops.crops.MAX_BATCHED_PIXELS", 0)
    if request.param == "by torch":
        monkeypatch.setattr("funmatch.ops.resample.why_unavailable", lambda: "unwanted")
    elif build.find_compiler() is None:
        pytest.skip("there is no C++ compiler here")


@pytest.mark.parametrize("box", [(0, 0, 31, 23), (4, 5, 9, 11), (30, 22, 1, 1), (0, 3, 31, 2)])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("side", [1, 8, 40])
def test_view_equals_the_crop_resampled_by_definition(image, box, flip, side):
    (view,) = crop_resize_flip([image], np.array([box]), np.array([flip]), side)
    top, left, h, w = box
    expected = resample_by_definition(image[top : top + h, left : left + w].numpy().astype(float), side, side)
    expected = expected[:, ::-1] if flip else expected
    np.testing.assert_allclose(view.permute(1, 2, 0).numpy() * 255, expected, atol=2e-3)


def test_views_equal_tensorflows():
    """`tf.image.resize(x[1:6, 2:8], (4, 10), method="bilinear")` of TensorFlow 2.21, rows 0 and 3 of channel 0."""
    x = torch.from_numpy((np.arange(7 * 9 * 3).reshape(7, 9, 3) * 37 % 251).astype(np.uint8))
    tensorflow = {
        0: [216.375, 160.375, 76.375, 142.975, 159.375, 75.375, 91.775, 158.375, 74.3749, 18.375],
        3: [197.625, 141.625, 57.625, 124.225, 140.625, 56.625, 73.025, 139.625, 187.4, 219.25],
    }
    exact = resize(x[1:6, 2:8], 4, 10)[0]
    for row, values in tensorflow.items():
        np.testing.assert_allclose(exact[row], values, atol=2e-3)


def test_images_of_different_sizes_make_one_batch(image):
    other = image[:10, :10].contiguous()
    views = crop_resize_flip([image, other], np.array([[0, 0, 31, 23], [0, 0, 10, 10]]), np.array([False, False]), 6)
    assert views.shape == (2, 3, 6, 6)
    assert views.dtype == torch.float32
    assert views.is_contiguous(memory_format=torch.channels_last)
    assert 0 <= views.min() <= views.max() <= 1


@pytest.mark.parametrize(("height", "width"), [(31, 23), (20, 50), (8, 8), (5, 90), (70, 9)])
def test_evaluation_view_is_the_centre_of_the_resized_image(height, width):
    image = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8))
    scale = 10 / min(height, width)
    h, w = round(height * scale), round(width * scale)
    resized = resample_by_definition(image.numpy().astype(float), h, w)
    top, left = (h - 8) // 2, (w - 8) // 2
    view = central_view(image, 10, 8).permute(1, 2, 0).numpy() * 255
    np.testing.assert_allclose(view, resized[top : top + 8, left : left + 8], atol=2e-3)


def test_mixup_mixes_each_image_with_the_one_before_it():
    views = torch.rand(5, 3, 2, 2)
    crops = torch.cat([views[-1:], views])
    mixed = mixup(crops, 0.7)
    for i in range(5):
        torch.testing.assert_close(mixed[i], 0.7 * views[i] + 0.3 * views[i - 1])


def test_teacher_and_student_get_the_same_mixed_views():
    crops = torch.rand(5, 3, 2, 2)
    (teacher,), student = mix_views(crops, (None,), 0.6)
    assert teacher is student
    torch.testing.assert_close(teacher, 0.6 * crops[1:] + 0.4 * crops[:-1])
    (teacher,), student = mix_views(crops, (None,), 1.0)
    assert teacher is student
    assert torch.equal(teacher, crops[1:])


@pytest.mark.parametrize("method", ["tf", "antialias"])
def test_views_are_stacked_into_the_memory_that_networks_read(image, method):
    views = [central_view(each, 20, 16, method=method) for each in (image, image.flip(1), image.repeat(4, 3, 1))]
    views.append(views[0].contiguous())
    stacked = stack_views(views)
    assert torch.equal(stacked, torch.stack(views))
    assert stacked.is_contiguous(memory_format=torch.channels_last)
