"""Draws the boxes of random crops: Inception, mild, or the whole image.

Only `random()` of a generator is used, whose stream numpy keeps stable; see `sampling.step_generator`.
"""

from collections.abc import Callable
from functools import partial

import numpy as np

ASPECT_RANGE = (3 / 4, 4 / 3)
CROP_TRIES = 100

BoxSampler = Callable[[np.random.Generator, np.ndarray, np.ndarray], np.ndarray]
"""Draws crops (n, 4) given a generator, and the images' heights and widths, (n,) each."""


def sample_whole_boxes(_rng: np.random.Generator, heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """Returns each image from edge to edge as a box: (n, 4) int64, top, left, height, width."""
    heights, widths = np.asarray(heights, np.int64), np.asarray(widths, np.int64)
    return np.stack([np.zeros_like(heights), np.zeros_like(widths), heights, widths], axis=1)


def box_sampler(crop: str, *, min_area: float = 0.05, side: int = 0, resize: int = 0) -> BoxSampler:
    """Returns the function that draws crops of a kind.

    Args:
        crop: inception, mild, squash (mild, with both sides resized) or whole.
        min_area: least area of Inception crops, as a fraction of the image.
        side, resize: of mild crops, as of `sample_mild_boxes`.
    """
    if crop == "whole":
        return sample_whole_boxes
    if crop == "inception":
        return partial(sample_inception_boxes, min_area=min_area)
    return partial(sample_mild_boxes, side=side, resize=resize, squash=crop == "squash")


def sample_mild_boxes(
    rng: np.random.Generator,
    heights: np.ndarray,
    widths: np.ndarray,
    *,
    side: int,
    resize: int,
    squash: bool = False,
) -> np.ndarray:
    """Draws mild crops: images resized so that the short side is `resize`, then a random square of `side` cut out.

    Only the corner is random, and uniform over the pixels of the resized image (paper, section 3: 128 of 160).

    Args:
        rng: source of the uniform numbers.
        heights, widths: of the images, (n,) pixels.
        side: of the crop, pixels of the resized image.
        resize: short side of the resized image, pixels, at least `side`.
        squash: resize both sides to `resize`, without regard to the image's aspect.

    Returns:
        (n, 4) float64: top, left, height, width in pixels of the original image.
    """
    size = np.stack([heights, widths], axis=1).astype(np.float64)
    scale = resize / (size if squash else size.min(axis=1, keepdims=True))
    resized = np.maximum(np.rint(size * scale), side)
    # + 1, since here the last corner is as likely as any other.
    corner = np.floor(rng.random(size.shape) * (resized - side + 1))
    return np.concatenate([corner * size / resized, side * size / resized], axis=1)


def sample_inception_boxes(
    rng: np.random.Generator,
    heights: np.ndarray,
    widths: np.ndarray,
    *,
    min_area: float = 0.05,
    max_area: float = 1.0,
) -> np.ndarray:
    """Draws Inception crops with the distribution of TensorFlow's `sample_distorted_bounding_box`.

    The aspect ratio is uniform in [3/4, 4/3]; the crop's *height* is uniform between those that give the smallest and
    the largest area at that aspect and still fit; the corner is uniform. Up to 100 tries, each with a new aspect, else
    the whole image. (`torchvision`'s `RandomResizedCrop` draws the *area* uniformly, which gives larger crops: about
    0.53 of the image on average, against 0.34 for 375 × 500 pixels.)

    Args:
        rng: source of the uniform numbers.
        heights, widths: of the images, (n,) pixels.
        min_area, max_area: bounds of the crop's area, as fractions of the image's, in (0, 1].

    Returns:
        (n, 4) int64: top, left, height, width.
    """
    heights, widths = np.asarray(heights, np.int64), np.asarray(widths, np.int64)
    # One try for all at once; only the few images that it does not fit draw on, all their tries together.
    boxes, fits = _try_boxes(rng.random((len(heights), 4)), heights, widths, min_area, max_area)
    for i in np.flatnonzero(~fits):
        uniforms = rng.random((CROP_TRIES - 1, 4))
        height, width = np.full(CROP_TRIES - 1, heights[i]), np.full(CROP_TRIES - 1, widths[i])
        tries, ok = _try_boxes(uniforms, height, width, min_area, max_area)
        # The first that fits, and the whole image if none does, as in TensorFlow.
        boxes[i] = tries[np.argmax(ok)] if ok.any() else (0, 0, heights[i], widths[i])
    return boxes


def _try_boxes(
    uniforms: np.ndarray, image_h: np.ndarray, image_w: np.ndarray, min_area: float, max_area: float
) -> tuple[np.ndarray, np.ndarray]:
    """Tries one Inception crop for each row.

    Args:
        uniforms: (n, 4) in [0, 1): for the aspect, the height, the top and the left.
        image_h, image_w: (n,) int64, pixels.
        min_area, max_area: fractions of the image's area.

    Returns:
        boxes (n, 4) int64, and whether each is valid, (n,) bool.
    """
    u_aspect, u_height, u_top, u_left = uniforms.T
    aspect = ASPECT_RANGE[0] + u_aspect * (ASPECT_RANGE[1] - ASPECT_RANGE[0])
    area = image_h * image_w
    # rint rounds halves to even, as TensorFlow's lrintf does.
    low = np.rint(np.sqrt(min_area * area / aspect)).astype(np.int64)
    high = np.rint(np.sqrt(max_area * area / aspect)).astype(np.int64)
    # The tallest crop whose rounded width still fits; 1e-7 keeps a width of exactly n + 1/2 from rounding up.
    high = np.where(np.rint(high * aspect) > image_w, ((image_w + 0.5 - 1e-7) / aspect).astype(np.int64), high)
    high = np.minimum(high, image_h)
    low = np.minimum(low, high)
    h = low + (u_height * (high - low + 1)).astype(np.int64)
    w = np.rint(h * aspect).astype(np.int64)
    # Rounding may leave the bounds by a pixel: one pixel taller, or shorter, is tried before giving up, as TensorFlow.
    h = h + (h * w < min_area * area)
    w = np.rint(h * aspect).astype(np.int64)
    h = h - (h * w > max_area * area)
    w = np.rint(h * aspect).astype(np.int64)
    fits = (h * w >= min_area * area) & (h * w <= max_area * area)
    fits &= (w <= image_w) & (h <= image_h) & (w > 0) & (h > 0)
    # As in TensorFlow the last corner that would fit is never drawn, which shows on small images only.
    top = (u_top * np.maximum(image_h - h, 0)).astype(np.int64)
    left = (u_left * np.maximum(image_w - w, 0)).astype(np.int64)
    return np.stack([top, left, h, w], axis=1), fits
