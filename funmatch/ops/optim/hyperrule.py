"""Chooses how to fine-tune from the number and the size of the training images: BiT-HyperRule.

Kolesnikov et al., "Big Transfer (BiT): General visual representation learning", ECCV 2020 (arXiv 1912.11370), section
3.3: one rule instead of a search. The steps are those of its published code.
"""

from typing import TypeVar

T = TypeVar("T")

BATCH = 512
"""Batch size to which the rule's learning rate belongs."""
SMALL, MEDIUM = 20_000, 500_000
"""Numbers of training images below which a data set is small, or of medium size."""


def steps(images: int) -> int:
    """Returns the length of the run in updates, for a number of training images."""
    return _by_size(images, 500, 10_000, 20_000)


def decay_steps(images: int) -> tuple[int, ...]:
    """Returns the steps at which the learning rate is divided by ten."""
    return _by_size(images, (200, 300, 400), (3_000, 6_000, 9_000), (6_000, 12_000, 18_000))


def warmup_steps(images: int) -> int:
    """Returns the number of steps over which the learning rate rises from 0."""
    return _by_size(images, 100, 500, 500)


def mixup(images: int) -> float:
    """Returns the a of Beta(a, a), from which MixUp's λ is drawn; 0 turns MixUp off."""
    return _by_size(images, 0.0, 0.1, 0.1)


def lr(batch: int) -> float:
    """Returns SGD's peak learning rate for a batch size; it grows linearly."""
    return 0.003 * batch / BATCH


def sides(area: float) -> tuple[int, int]:
    """Returns the short side to which images are resized, and the side of the crop, in pixels.

    Args:
        area: typical area of the images, pixels.
    """
    # The crop is what the network sees; the paper's 128-pixel teachers use the sizes of small images for all data sets.
    # By area, not by side, as in the published code.
    return (160, 128) if area < 96 * 96 else (512, 480)


def _by_size(images: int, small: T, medium: T, large: T) -> T:
    # `<` as in the published code: exactly 20,000 images are already of medium size.
    return small if images < SMALL else medium if images < MEDIUM else large
