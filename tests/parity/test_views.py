"""Views: the crops that are drawn, and the pixels of training and evaluation views."""

import numpy as np
import pytest
import torch

from funmatch.config import recipes
from funmatch.ops.crops import central_view, crop_resize_flip
from funmatch.ops.sampling import sample_inception_boxes, step_generator

SIZES = [(375, 500), (333, 500), (500, 333), (128, 128), (64, 300), (600, 400)]
DRAWS = 3000


def options(name: str) -> dict:
    return dict(recipes.find(name).knobs)


def drawn_by_tensorflow(tf, size: tuple[int, int], covered: float, ratio: tuple[float, float]) -> np.ndarray:
    draw = tf.function(
        lambda: tf.concat(
            tf.image.sample_distorted_bounding_box(
                [*size, 3], tf.zeros([0, 0, 4]) if not covered else tf.constant([[[0.0, 0, 1, 1]]]),
                min_object_covered=covered, aspect_ratio_range=ratio, area_range=(0.05, 1.0), max_attempts=100,
                use_image_if_no_bounding_boxes=True,
            )[:2],
            0,
        )
    )  # fmt: skip
    tf.random.set_seed(0)
    boxes = np.array([draw().numpy() for _ in range(DRAWS)])
    return boxes[:, [0, 1, 3, 4]]


def features(boxes: np.ndarray) -> dict[str, np.ndarray]:
    top, left, height, width = boxes.astype(float).T
    return {"area": height * width, "aspect": width / height, "y": top + height / 2, "x": left + width / 2}


@pytest.mark.parametrize("recipe", ["pet37-fast", "tf-pet37-300"])
@pytest.mark.parametrize("size", SIZES)
def test_crops(size, recipe, tf, record):
    ks_2samp = pytest.importorskip("scipy.stats").ks_2samp
    own, is_paper = options(recipe), recipe == "pet37-fast"
    theirs = features(
        drawn_by_tensorflow(tf, size, 0.0 if is_paper else 0.1, (0.75, 1.33) if is_paper else (3 / 4, 4 / 3))
    )
    heights, widths = (np.full(DRAWS, each) for each in size)
    shape = {"min_area": own.get("crop_min_area", 0.05), "ratio": own.get("crop_ratio", (3 / 4, 4 / 3))}
    ours = features(sample_inception_boxes(step_generator(5, 3), heights, widths, **shape))
    least = min(float(ks_2samp(ours[name], theirs[name]).pvalue) for name in ours)
    record(
        f"crops of {recipe} from {size[0]} × {size[1]} pixels, least of 4 p-values", "TensorFlow", least, at_least=1e-3
    )


@pytest.mark.parametrize("size", [(375, 500), (160, 240), (333, 251), (90, 400), (97, 101)])
@pytest.mark.parametrize("method", ["area", "tf"])
def test_evaluation_views(size, method, tf, record):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    scale = 160 / min(size)
    height, width = (round(each * scale) for each in size)
    resized = tf.image.resize(image, (height, width), method={"tf": "bilinear"}.get(method, method)).numpy()
    top, left = (height - 128) // 2, (width - 128) // 2
    expected = resized[top : top + 128, left : left + 128]
    found = central_view(torch.from_numpy(image), 160, 128, method=method).permute(1, 2, 0).numpy() * 255
    what = f"evaluation view ({method}) of {size[0]} × {size[1]} pixels, grey levels"
    record(what, "TensorFlow", np.abs(found - expected).max(), at_most=0.05)


def test_the_papers_recipes_evaluate_by_area():
    for recipe in recipes.RECIPES.values():
        expected = "tf" if recipe.source == recipes.EARLIER else "area"
        assert recipe.knobs["eval_resample"] == expected, recipe.name


@pytest.mark.parametrize("native", [True, False])
def test_training_views(native, tf, record):
    image = np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)
    boxes = sample_inception_boxes(step_generator(0, 0), np.full(32, 300), np.full(32, 400))
    found = crop_resize_flip([torch.from_numpy(image)] * 32, boxes, np.zeros(32, bool), 128, native=native)
    crops = [image[top : top + height, left : left + width] for top, left, height, width in boxes.tolist()]
    expected = np.stack([tf.image.resize(crop, (128, 128)).numpy() for crop in crops])
    off = np.abs(found.permute(0, 2, 3, 1).numpy() * 255 - expected).max()
    record(f"training views{', native kernel' if native else ''}, grey levels", "TensorFlow", off, at_most=0.05)
