"""Draws every random choice of a step as a pure function of (seed, step).

The choices are drawn on the CPU for the *global* batch and sliced by each process, so a run has no sampler, no worker
and no generator state to save: a run that is stopped and resumed, on one process or several, draws the same.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from funmatch.config.choices import CROP_RATIO
from funmatch.ops.mixing import MixupOptions
from funmatch.ops.order import Order, shuffle_positions

SAMPLING_VERSION = 1
"""Version of all that is drawn here; logits that were computed for another version's views do not fit these."""


CROP_TRIES = 100

BoxSampler = Callable[[np.random.Generator, np.ndarray, np.ndarray], np.ndarray]
"""Draws crops (n, 4) given a generator, and the images' heights and widths, (n,) each."""


@dataclass(frozen=True)
class StepSample:
    """The choices of step `step` for each of the `n` images of its global batch.

    Attributes:
        indices: (n,) int64, the images' numbers in the split.
        boxes: (n, 4) crops as (top, left, height, width) in pixels of the image: int64 for Inception crops, float64 for
            mild ones, whose corner lies on a pixel of the resized image.
        flips: (n,) bool, whether the crop is mirrored.
        lam: MixUp weight of the image itself: one number, or (n,) float64; 1 without MixUp.
        teacher_view: boxes and flips of the teacher's own view, or None if it shares the student's.
    """

    indices: np.ndarray
    boxes: np.ndarray
    flips: np.ndarray
    lam: float | np.ndarray
    teacher_view: tuple[np.ndarray, np.ndarray] | None = None


# Independent streams of a step's random numbers, so that turning on one option does not change another's draws. The
# numbers are part of every run: a stream keeps its number, a new one gets the next.
STEP_STREAM, TEACHER_STREAM, LAMBDA_STREAM, ENSEMBLE_STREAM, CUTMIX_STREAM, RANDAUGMENT_STREAM = range(6)
AUGMENT_STREAM, POLICY_STREAM = 6, 7


def step_generator(seed: int, step: int, stream: int = STEP_STREAM) -> np.random.Generator:
    """Returns the generator of one step's stream.

    Args:
        seed: the run's seed.
        step: counted from 0.
        stream: one of the streams above.
    """
    # Only `random()` may be used, whose stream numpy keeps; those of `integers` or `normal` change with its versions.
    entropy = np.random.SeedSequence((seed, step), spawn_key=(stream,) if stream else ())
    return np.random.Generator(np.random.Philox(entropy))


def sample_step(
    seed: int,
    step: int,
    batch: int,
    count: int,
    sizes: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
    *,
    boxes: BoxSampler | None = None,
    mixing: MixupOptions | None = None,
    order: Order | None = None,
    flip: bool = True,
    teacher_view: bool = False,
) -> StepSample:
    """Draws step `step` of a run for the global batch.

    Args:
        seed: the run's seed.
        step: counted from 0.
        batch: images in the global batch; may be larger than `count`.
        count: images in the split.
        sizes: maps indices (n,) to heights and widths, (n,) each, in pixels.
        boxes: draws the crops; `sample_inception_boxes` if None.
        mixing: how MixUp's λ is drawn; `MixupOptions()` if None.
        order: of the images; `shuffle_positions` if None.
        flip: mirror half of the views.
        teacher_view: draw the teacher's view for itself, from the same distribution.
    """
    boxes, mixing = boxes or sample_inception_boxes, mixing or MixupOptions()
    rng = step_generator(seed, step)
    # Drawn even if it is not used: λ comes first in its stream, and the crops after it must not depend on MixUp.
    uniform = np.asarray(rng.random())
    lam = (
        mixing.lam_at(step_generator(seed, step, LAMBDA_STREAM).random(batch))
        if mixing.per_image
        else float(mixing.lam_at(uniform))
    )
    # Positions run on over epochs: a batch may span two of them, and no image is dropped at the end of one.
    positions = np.arange(step * batch, (step + 1) * batch, dtype=np.int64)
    indices = order(seed, positions) if order else shuffle_positions(seed, positions, count)
    heights, widths = sizes(indices)

    def sample_view(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        # Drawn before the crops and masked afterwards, so that `flip` changes no crop either.
        flips = rng.random(batch) < 0.5
        return boxes(rng, heights, widths), flips & flip

    crops, flips = sample_view(rng)
    own = sample_view(step_generator(seed, step, TEACHER_STREAM)) if teacher_view else None
    return StepSample(indices, crops, flips, lam, own)


def sample_whole_boxes(_rng: np.random.Generator, heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """Returns each image from edge to edge as a box: (n, 4) int64, top, left, height, width."""
    heights, widths = np.asarray(heights, np.int64), np.asarray(widths, np.int64)
    return np.stack([np.zeros_like(heights), np.zeros_like(widths), heights, widths], axis=1)


def box_sampler(
    crop: str, *, min_area: float = 0.05, ratio: tuple[float, float] = CROP_RATIO, side: int = 0, resize: int = 0
) -> BoxSampler:
    """Returns the function that draws crops of a kind.

    Args:
        crop: inception, mild, squash (mild, with both sides resized) or whole.
        min_area, ratio: of Inception crops, as of `sample_inception_boxes`.
        side, resize: of mild crops, as of `sample_mild_boxes`.
    """
    if crop == "whole":
        return sample_whole_boxes
    if crop == "inception":
        return partial(sample_inception_boxes, min_area=min_area, ratio=ratio)
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
    ratio: tuple[float, float] = CROP_RATIO,
) -> np.ndarray:
    """Draws Inception crops with the distribution of TensorFlow's `sample_distorted_bounding_box`.

    The aspect ratio is uniform in `ratio`; the crop's *height* is uniform between those that give the smallest and
    the largest area at that aspect and still fit; the corner is uniform. Up to 100 tries, each with a new aspect, else
    the whole image. (`torchvision`'s `RandomResizedCrop` draws the *area* uniformly, which gives larger crops: about
    0.53 of the image on average, against 0.34 for 375 × 500 pixels.)

    Args:
        rng: source of the uniform numbers.
        heights, widths: of the images, (n,) pixels.
        min_area, max_area: bounds of the crop's area, as fractions of the image's, in (0, 1].
        ratio: bounds of width / height. [0.75, 1.33] is TensorFlow's default, with which the paper's code draws.

    Returns:
        (n, 4) int64: top, left, height, width.
    """
    heights, widths = np.asarray(heights, np.int64), np.asarray(widths, np.int64)
    # One try for all at once; only the few images that it does not fit draw on, all their tries together.
    boxes, fits = _try_boxes(rng.random((len(heights), 4)), heights, widths, (min_area, max_area), ratio)
    for i in np.flatnonzero(~fits):
        uniforms = rng.random((CROP_TRIES - 1, 4))
        height, width = np.full(CROP_TRIES - 1, heights[i]), np.full(CROP_TRIES - 1, widths[i])
        tries, ok = _try_boxes(uniforms, height, width, (min_area, max_area), ratio)
        # The first that fits, and the whole image if none does, as in TensorFlow.
        boxes[i] = tries[np.argmax(ok)] if ok.any() else (0, 0, heights[i], widths[i])
    return boxes


def _try_boxes(
    uniforms: np.ndarray,
    image_h: np.ndarray,
    image_w: np.ndarray,
    areas: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[np.ndarray, np.ndarray]:
    """Tries one Inception crop for each row.

    Args:
        uniforms: (n, 4) in [0, 1): for the aspect, the height, the top and the left.
        image_h, image_w: (n,) int64, pixels.
        areas: bounds of the area, as fractions of the image's.
        ratio: bounds of width / height.

    Returns:
        boxes (n, 4) int64, and whether each is valid, (n,) bool.
    """
    u_aspect, u_height, u_top, u_left = uniforms.T
    min_area, max_area = areas
    aspect = ratio[0] + u_aspect * (ratio[1] - ratio[0])
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
