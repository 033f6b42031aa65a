"""Draws every random choice of a step as a pure function of (seed, step).

The choices are drawn on the CPU for the *global* batch and sliced by each process, so a run has no sampler, no worker
and no generator state to save: a run that is stopped and resumed, on one process or several, draws the same.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from funmatch.ops.boxes import BoxSampler, sample_inception_boxes

SAMPLING_VERSION = 1
"""Version of all that is drawn here; logits that were computed for another version's views do not fit these."""


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


@dataclass(frozen=True)
class MixupOptions:
    """How MixUp's λ is drawn.

    Attributes:
        a: parameter of Beta(a, a), the distribution of λ; 1 is uniform, 0 turns MixUp off.
        per_image: draw a λ for each image instead of one for the batch.
        take_max: use max(λ, 1 − λ), so that no image counts less than its partner.
        lam: a fixed λ, used as it is, instead of a drawn one.
    """

    a: float = 1.0
    per_image: bool = False
    take_max: bool = True
    lam: float | None = None

    def lam_at(self, uniforms: np.ndarray) -> np.ndarray:
        """Maps uniform numbers in [0, 1) to λ, in the same shape."""
        # First, since Beta(0, 0) has no quantile function; and MixUp off wins over a fixed λ.
        if self.a == 0:
            return np.ones_like(uniforms)
        if self.lam is not None:
            return np.full_like(uniforms, self.lam)
        lam = beta_quantile(uniforms, self.a)
        return np.maximum(lam, 1 - lam) if self.take_max else lam


# Independent streams of a step's random numbers, so that turning on one option does not change another's draws. The
# numbers are part of every run: a stream keeps its number, a new one gets the next.
STEP_STREAM, TEACHER_STREAM, LAMBDA_STREAM, ENSEMBLE_STREAM, CUTMIX_STREAM, RANDAUGMENT_STREAM = range(6)


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
    mixing: MixupOptions = MixupOptions(),
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
        mixing: how MixUp's λ is drawn.
        flip: mirror half of the views.
        teacher_view: draw the teacher's view for itself, from the same distribution.
    """
    boxes = boxes or sample_inception_boxes
    rng = step_generator(seed, step)
    # Drawn even if it is not used: λ comes first in its stream, and the crops after it must not depend on MixUp.
    uniform = np.asarray(rng.random())
    lam = (
        mixing.lam_at(step_generator(seed, step, LAMBDA_STREAM).random(batch))
        if mixing.per_image
        else float(mixing.lam_at(uniform))
    )
    # Positions run on over epochs: a batch may span two of them, and no image is dropped at the end of one.
    indices = shuffle_positions(seed, np.arange(step * batch, (step + 1) * batch, dtype=np.int64), count)
    heights, widths = sizes(indices)

    def sample_view(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        # Drawn before the crops and masked afterwards, so that `flip` changes no crop either.
        flips = rng.random(batch) < 0.5
        return boxes(rng, heights, widths), flips & flip

    crops, flips = sample_view(rng)
    own = sample_view(step_generator(seed, step, TEACHER_STREAM)) if teacher_view else None
    return StepSample(indices, crops, flips, lam, own)


def beta_quantile(uniforms: np.ndarray, a: float) -> np.ndarray:
    """Maps uniform numbers in [0, 1) to Beta(a, a), a > 0, by its quantile function; the same shape."""
    if a == 1:
        return uniforms
    # By the quantile function, not `rng.beta`, whose stream numpy does not keep. Imported here: it takes 0.1 s.
    from scipy.special import betaincinv

    return betaincinv(a, a, uniforms)


def shuffle_positions(seed: int, positions: np.ndarray, count: int) -> np.ndarray:
    """Returns the image at each position of an endless sequence of epochs, each epoch in a new order.

    Position p lies in epoch p // count. Within an epoch the order is a keyed permutation that is *computed*: a Feistel
    network on the smallest square grid that holds `count`, applied until the result is below `count` (cycle walking;
    Black & Rogaway, "Ciphers with arbitrary finite domains", 2002). So no order is stored, no epoch begins with a
    pause, and any step can be computed directly, whatever the number of images.

    Args:
        seed: the run's seed.
        positions: (n,) int64, counted from 0.
        count: images in the split, at least 1.

    Returns:
        (n,) int64 in [0, count).
    """
    # int64 throughout: a run of 30,000 epochs of ImageNet has more positions than 32 bits can count.
    positions = np.asarray(positions, np.int64)
    epochs, places = positions // count, positions % count
    side = int(np.ceil(np.sqrt(count)))
    # The seed is mixed before the epoch is added: seed 0, epoch 1 must not be seed 1, epoch 0. Negative seeds and those
    # of more than 64 bits, are taken modulo 2⁶⁴.
    keys = _mix64(epochs.astype(np.uint64) + _mix64(np.uint64(seed % 2**64)))
    result = _feistel(places, keys, side)
    # side² < count + 2·√count + 1, so few results lie outside, and the loop ends after a few turns.
    outside = np.flatnonzero(result >= count)
    while outside.size:
        result[outside] = _feistel(result[outside], keys[outside], side)
        outside = outside[result[outside] >= count]
    return result


def _feistel(places: np.ndarray, keys: np.ndarray, side: int, rounds: int = 8) -> np.ndarray:
    """Permutes [0, side²) by a keyed Feistel network.

    Args:
        places: (n,) int64 in [0, side²).
        keys: (n,) uint64.
        side: of the grid.
        rounds: of the network; part of what decides the order.
    """
    # Addition modulo `side` instead of the usual XOR, since `side` is not a power of two.
    left, right = places // side, places % side
    for number in range(rounds):
        scrambled = _mix64(right.astype(np.uint64) ^ (keys + np.uint64(number << 48)))
        left, right = right, (left + (scrambled % np.uint64(side)).astype(np.int64)) % side
    return left * side + right


def _mix64(x: Any) -> Any:
    """Applies SplitMix64's finalizer (Steele, Lea & Flood, 2014): 64 bits in, 64 well-mixed bits out.

    Args:
        x: uint64, a scalar or (n,).
    """
    # Products modulo 2⁶⁴ are meant; numpy warns of them for scalars.
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
