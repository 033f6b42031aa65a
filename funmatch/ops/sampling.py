"""Every random choice of a step, as a pure function of (seed, step).

The draws are made on the CPU for the *global* batch and sliced by each process, so a run has no sampler,
no worker and no generator state to save: stopped and started again, on one process or on several, it
walks the same path.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np

SAMPLING_VERSION = 1
"""Of all that is drawn here: what was computed for the views of another version is not for these."""
ASPECT_RANGE = (3 / 4, 4 / 3)
CROP_TRIES = 100


@dataclass(frozen=True)
class StepSample:
    """What step `step` does to each of its `n` images.

    Attributes:
        indices: which image of the split, (n,) int64.
        boxes: the crop as (top, left, height, width) in pixels of the image, (n, 4): whole ones, int64, for Inception
            crops; float64 for mild ones, whose corner lies on a pixel of the resized image.
        flips: whether the crop is mirrored, (n,) bool.
        lam: the MixUp weight of the image itself: one number a batch, or one an image, (n,) float64; 1 without.
        own: boxes and flips of the teacher's own view of the same images, or None where it is shown the student's.
    """

    indices: np.ndarray
    boxes: np.ndarray
    flips: np.ndarray
    lam: float | np.ndarray
    teacher_view: tuple[np.ndarray, np.ndarray] | None = None


@dataclass(frozen=True)
class MixupOptions:
    """How MixUp's λ is drawn.

    Attributes:
        a: of Beta(a, a), from which λ comes; 1 is uniform, 0 is no MixUp.
        each: one λ an image, not one a batch.
        larger: take max(λ, 1 − λ), so that no image counts less than its partner.
        lam: this λ at every step, not a drawn one; as it is.
    """

    a: float = 1.0
    per_image: bool = False
    take_max: bool = True
    lam: float | None = None

    def lam_at(self, uniforms):
        """λ at uniform numbers in [0, 1)."""
        if self.a == 0:
            return np.ones_like(uniforms)
        if self.lam is not None:
            return np.full_like(uniforms, self.lam)
        lam = beta_quantile(uniforms, self.a)
        return np.maximum(lam, 1 - lam) if self.take_max else lam


# Streams of a step's random numbers: what is drawn from one does not move what is drawn from another.
STEP_STREAM, TEACHER_STREAM, LAMBDA_STREAM, ENSEMBLE_STREAM, CUTMIX_STREAM, RANDAUGMENT_STREAM = range(6)


def step_generator(seed: int, step: int, stream: int = STEP_STREAM) -> np.random.Generator:
    """The generator of one step. Only its uniform doubles are used, whose stream numpy keeps stable."""
    entropy = np.random.SeedSequence((seed, step), spawn_key=(stream,) if stream else ())
    return np.random.Generator(np.random.Philox(entropy))


def sample_step(
    seed: int,
    step: int,
    batch: int,
    count: int,
    sizes,
    *,
    boxes=None,
    mixing: MixupOptions = MixupOptions(),
    mirrored: bool = True,
    own: bool = False,
) -> StepSample:
    """Draws step `step` of a run for the global batch.

    Args:
        seed: the run's seed.
        step: counted from 0.
        batch: images in the global batch; may be larger than `count`.
        count: images in the split.
        sizes: a function from indices (n,) to (heights, widths), each (n,), in pixels.
        boxes: a function from a generator and these sizes to crops, (n, 4); by default `inception_boxes`.
        mixing: of MixUp.
        mirrored: whether half of the views are.
        own: whether the teacher's view has draws of its own, from the same distribution.
    """
    boxes = boxes or sample_inception_boxes
    rng = step_generator(seed, step)
    uniform = np.asarray(rng.random())
    lam = (
        mixing.lam_at(step_generator(seed, step, LAMBDA_STREAM).random(batch))
        if mixing.per_image
        else float(mixing.lam_at(uniform))
    )
    indices = shuffle_positions(seed, np.arange(step * batch, (step + 1) * batch, dtype=np.int64), count)
    shape = sizes(indices)

    def looked(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        flips = rng.random(batch) < 0.5
        return boxes(rng, *shape), flips & mirrored

    crops, flips = looked(rng)
    return StepSample(indices, crops, flips, lam, looked(step_generator(seed, step, TEACHER_STREAM)) if own else None)


def beta_quantile(uniforms, a: float):
    """The values of Beta(a, a), a > 0, at uniform numbers in [0, 1): its quantile function."""
    if a == 1:
        return uniforms
    from scipy.special import betaincinv  # takes a tenth of a second to import

    return betaincinv(a, a, uniforms)


def sample_whole_boxes(_rng: np.random.Generator, heights, widths) -> np.ndarray:
    """Each image from edge to edge: (n, 4) int64, top, left, height, width."""
    heights, widths = np.asarray(heights, np.int64), np.asarray(widths, np.int64)
    return np.stack([np.zeros_like(heights), np.zeros_like(widths), heights, widths], axis=1)


def box_sampler(crop: str, *, min_area: float = 0.05, side: int = 0, resize: int = 0):
    """The function from a generator and sizes to crops of a name: inception, mild, squash or whole.

    Args:
        min_area: of Inception crops.
        side, resize: of mild ones (squash: of both sides resized).
    """
    if crop == "whole":
        return sample_whole_boxes
    if crop == "inception":
        return partial(sample_inception_boxes, min_area=min_area)
    return partial(sample_mild_boxes, side=side, resize=resize, squash=crop == "squash")


def sample_mild_boxes(
    rng: np.random.Generator, heights, widths, *, side: int, resize: int, squash: bool = False
) -> np.ndarray:
    """Mild random crops: images resized so that the short side is `resize`, then a random square of `side` cut out.

    Only the corner is random, and uniform over the pixels of the resized image (paper, section 3: 128 of 160).

    Args:
        rng: where the uniform numbers come from.
        heights, widths: of each image, (n,), pixels.
        side: of the crop, pixels of the resized image.
        resize: its short side, pixels, at least `side`.
        squash: resize both sides to `resize`, whatever shape that gives things.

    Returns:
        (top, left, height, width) in pixels of the image as it is, (n, 4) float64.
    """
    size = np.stack([heights, widths], axis=1).astype(np.float64)
    scale = resize / (size if squash else size.min(axis=1, keepdims=True))
    resized = np.maximum(np.rint(size * scale), side)
    corner = np.floor(rng.random(size.shape) * (resized - side + 1))
    return np.concatenate([corner * size / resized, side * size / resized], axis=1)


def sample_inception_boxes(
    rng: np.random.Generator, heights, widths, *, min_area: float = 0.05, max_area: float = 1.0
) -> np.ndarray:
    """Inception crops with the distribution of TensorFlow's `sample_distorted_bounding_box`.

    An aspect ratio is uniform in [3/4, 4/3]; the crop's *height* is uniform between those that give the
    smallest and the largest area at that aspect and still fit; the corner is uniform. Up to 100 tries, each
    with an aspect of its own, else the whole image. (`torchvision`'s `RandomResizedCrop` draws the *area*
    uniformly, which gives larger crops: about 0.53 of the image on average, against 0.34 for 375 × 500 pixels.)

    As there, the last corner that would fit is never drawn, which shows on small images only.

    Args:
        rng: where the uniform numbers come from.
        heights, widths: of each image, (n,), pixels.
        min_area, max_area: share of the image's area, in (0, 1].

    Returns:
        (top, left, height, width), (n, 4) int64.
    """
    heights, widths = np.asarray(heights, np.int64), np.asarray(widths, np.int64)
    boxes, fits = _try_boxes(rng.random((len(heights), 4)), heights, widths, min_area, max_area)
    for i in np.flatnonzero(~fits):
        uniforms = rng.random((CROP_TRIES - 1, 4))
        height, width = np.full(CROP_TRIES - 1, heights[i]), np.full(CROP_TRIES - 1, widths[i])
        tries, ok = _try_boxes(uniforms, height, width, min_area, max_area)
        boxes[i] = tries[np.argmax(ok)] if ok.any() else (0, 0, heights[i], widths[i])
    return boxes


def _try_boxes(uniforms, image_h, image_w, min_area, max_area):
    """One try a row: boxes (n, 4) and whether each is valid (n,). `uniforms` is (n, 4) in [0, 1)."""
    u_aspect, u_height, u_top, u_left = uniforms.T
    aspect = ASPECT_RANGE[0] + u_aspect * (ASPECT_RANGE[1] - ASPECT_RANGE[0])
    area = image_h * image_w
    low = np.rint(np.sqrt(min_area * area / aspect)).astype(np.int64)
    high = np.rint(np.sqrt(max_area * area / aspect)).astype(np.int64)
    # The tallest crop whose rounded width still fits beside it.
    high = np.where(np.rint(high * aspect) > image_w, ((image_w + 0.5 - 1e-7) / aspect).astype(np.int64), high)
    high = np.minimum(high, image_h)
    low = np.minimum(low, high)
    h = low + (u_height * (high - low + 1)).astype(np.int64)
    w = np.rint(h * aspect).astype(np.int64)
    # Rounding may leave the bounds by a pixel: one pixel taller, or shorter, is tried before giving up.
    h = h + (h * w < min_area * area)
    w = np.rint(h * aspect).astype(np.int64)
    h = h - (h * w > max_area * area)
    w = np.rint(h * aspect).astype(np.int64)
    fits = (h * w >= min_area * area) & (h * w <= max_area * area)
    fits &= (w <= image_w) & (h <= image_h) & (w > 0) & (h > 0)
    top = (u_top * np.maximum(image_h - h, 0)).astype(np.int64)
    left = (u_left * np.maximum(image_w - w, 0)).astype(np.int64)
    return np.stack([top, left, h, w], axis=1), fits


def shuffle_positions(seed: int, positions, count: int) -> np.ndarray:
    """The image at each position of an endless run of epochs, each epoch in an order of its own.

    Position p lies in epoch p // count. Within an epoch the order is a keyed permutation that is *computed*,
    a Feistel network on the smallest square grid that holds `count`, walked until it lands inside
    (Black & Rogaway, "Ciphers with arbitrary finite domains", 2002). So no order is stored, no epoch begins
    with a pause, and any step can be asked for at once, whatever the number of images.

    Args:
        seed: the run's seed.
        positions: (n,) int64, counted from 0.
        count: images in the split, at least 1.

    Returns:
        (n,) int64 in [0, count).
    """
    positions = np.asarray(positions, np.int64)
    epochs, places = positions // count, positions % count
    side = int(np.ceil(np.sqrt(count)))
    keys = _mixed(epochs.astype(np.uint64) + _mixed(np.uint64(seed % 2**64)))
    result = _feistel(places, keys, side)
    outside = np.flatnonzero(result >= count)
    while outside.size:
        result[outside] = _feistel(result[outside], keys[outside], side)
        outside = outside[result[outside] >= count]
    return result


def _feistel(places: np.ndarray, keys: np.ndarray, side: int, rounds: int = 8) -> np.ndarray:
    """A keyed bijection of [0, side²)."""
    left, right = places // side, places % side
    for number in range(rounds):
        scrambled = _mixed(right.astype(np.uint64) ^ (keys + np.uint64(number << 48)))
        left, right = right, (left + (scrambled % np.uint64(side)).astype(np.int64)) % side
    return left * side + right


def _mixed(x):
    """SplitMix64's finaliser (Steele, Lea & Flood, 2014): 64 bits in, 64 well-mixed bits out."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
