"""BiT-HyperRule: how to fine-tune, from how many images there are and how large they are.

Kolesnikov et al., "Big Transfer (BiT): General visual representation learning", ECCV 2020 (arXiv 1912.11370), section
3.3: one rule instead of a search. The steps are those of its published code.
"""

BATCH = 512
"""Images a step for which the rule's learning rate was made."""
SMALL, MEDIUM = 20_000, 500_000
"""Training images below which a data set is small, or of medium size."""


def steps(images: int) -> int:
    """Length of the run in updates, for so many training images."""
    return _by_size(images, 500, 10_000, 20_000)


def decay_steps(images: int) -> tuple[int, ...]:
    """The steps at which the learning rate is divided by ten."""
    return _by_size(images, (200, 300, 400), (3_000, 6_000, 9_000), (6_000, 12_000, 18_000))


def warmup_steps(images: int) -> int:
    """Steps over which the learning rate rises from 0."""
    return _by_size(images, 100, 500, 500)


def mixup(images: int) -> float:
    """The a of Beta(a, a), from which MixUp's λ is drawn; 0 for no MixUp."""
    return _by_size(images, 0.0, 0.1, 0.1)


def lr(batch: int) -> float:
    """SGD's learning rate at the top of the schedule, for so many images a step."""
    return 0.003 * batch / BATCH


def sides(area: float) -> tuple[int, int]:
    """To which short side images are resized, and the side of the crop, in pixels.

    Args:
        area: of the images, pixels.
    """
    return (160, 128) if area < 96 * 96 else (512, 480)


def _by_size(images, small, medium, large):
    return small if images < SMALL else medium if images < MEDIUM else large
