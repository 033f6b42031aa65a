"""Holds out splits from the training images, by content and seed alone."""

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction

import numpy as np

from funmatch.data.cache.scan import Scan
from funmatch.data.dataset import ORDER, Dataset
from funmatch.errors import InputError

LEFT_OUT = len(ORDER)
"""Stands for no split among the numbers of `choose_splits`, which otherwise are places in `ORDER`."""


def apply_split(dataset: Dataset, scanned: Scan, numbers: np.ndarray | None) -> tuple[Dataset, Scan]:
    """Holds out splits from the training images.

    Args:
        dataset, scanned: the data set and its scan.
        numbers: as `choose_splits` returns them.

    Returns:
        the data set with all splits made, and its scan in the same order.
    """
    if numbers is None:
        return dataset, scanned
    if copies := int((numbers == LEFT_OUT).sum()):
        note = f"{dataset.name}: {copies:,} unlabelled copies of held-out images are left out of training"
        dataset = replace(dataset, notes=(*dataset.notes, note))
    start = _start_of_training(dataset)
    chosen = {ORDER[k]: np.flatnonzero(numbers == k) + start for k in _present(numbers)}
    return pick_images(replace(dataset, split_spec=None), scanned, _with_other_splits(dataset, chosen))


def choose_splits(dataset: Dataset, scanned: Scan) -> np.ndarray | None:
    """Chooses a split for each training image, by content and seed alone.

    Images are ranked by a keyed digest of their content; the first share becomes test, if it is requested, the next
    validation. Names and folders do not matter, and images of the same content stay in one split.

    Returns:
        (n,) uint8, places in `ORDER` or `LEFT_OUT`; None if nothing is to be held out.

    Raises:
        InputError: a split would be empty.
    """
    spec = dataset.split_spec
    if spec is None:
        return None
    train = dataset.splits["train"]
    count, start = len(train), _start_of_training(dataset)
    ranks = _ranks(scanned.rows["digest"][start : start + count].tolist(), spec.seed)
    # Stable: copies of one image have equal ranks, and stay in the order of the listing.
    order = np.argsort(ranks, kind="stable")
    labelled = train.labels >= 0
    # Labelled images first, since evaluation needs labels; shares then count only those.
    if labelled.any() and not labelled.all():
        order = np.concatenate([order[labelled[order]], order[~labelled[order]]])
        count = int(labelled.sum())
    numbers = np.full(len(train), ORDER.index("train"), np.uint8)
    begin = 0
    # Test first, so that another share for validation leaves the test images the same.
    for name in ("test", "val"):
        if share := spec.shares.get(name):
            # At least one image: a tenth of nine would be none.
            end = begin + (max(1, int(share * count)) if isinstance(share, Fraction) else share)
            # Copies of the last image have its rank; left behind, they would leak into training.
            while begin < end < count and ranks[order[end]] == ranks[order[end - 1]]:
                end += 1
            numbers[order[begin:end]] = ORDER.index(name)
            begin = end
    # Unlabelled images were sorted behind all labelled ones, so there may be copies of held-out images among them.
    rest = order[begin:]
    numbers[rest[np.isin(ranks[rest], ranks[order[:begin]])]] = LEFT_OUT
    for name in ("train", *(name for name, share in spec.shares.items() if share)):
        if not (numbers == ORDER.index(name)).any():
            raise InputError(
                f"{dataset.name}: of {count} training images, the split leaves none for {name}; hold out fewer, or "
                "pass --val none"
            )
    return numbers


def _present(numbers: np.ndarray) -> list[int]:
    return [k for k in range(len(ORDER)) if (numbers == k).any()]


def _start_of_training(dataset: Dataset) -> int:
    """Returns the place of the first training image in the order of `Dataset.jobs`."""
    names = list(dataset.splits)
    return sum(len(dataset.splits[name]) for name in names[: names.index("train")])


def _ranks(digests: list[bytes], seed: int) -> np.ndarray:
    """Returns a pseudo-random number for each content, (n,) uint64."""
    # A keyed hash and not a generator: an image keeps its rank when others are added, removed or renamed.
    key = seed.to_bytes(8, "little")
    keyed = (hashlib.blake2b(digest, digest_size=8, key=key).digest() for digest in digests)
    return np.frombuffer(b"".join(keyed), "<u8")


def _with_other_splits(dataset: Dataset, chosen: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the positions of the splits that training images were chosen for, and those of all other splits."""
    begin = 0
    for name, split in dataset.splits.items():
        if name != "train":
            chosen[name] = np.arange(begin, begin + len(split))
        begin += len(split)
    return {name: chosen[name] for name in ORDER if name in chosen}


def pick_images(dataset: Dataset, scanned: Scan, chosen: Mapping[str, np.ndarray]) -> tuple[Dataset, Scan]:
    """Returns the data set and its scan with some of the images.

    Args:
        dataset, scanned: the data set and its scan.
        chosen: positions in the order of `Dataset.jobs` by new split, each of images of one split; all unreadable
            images are among them.
    """
    jobs = dataset.jobs()
    splits = {
        name: dataset.splits[jobs[positions[0]][0]].subset([jobs[i][1] for i in positions])
        for name, positions in chosen.items()
    }

    def read(split: str, index: int) -> bytes:
        return dataset.read(*jobs[chosen[split][index]])

    order = np.concatenate(list(chosen.values()))
    new_positions = {int(old): new for new, old in enumerate(order)} if scanned.reasons else {}
    reasons = {new_positions[i]: reason for i, reason in scanned.reasons.items()}
    return replace(dataset, splits=splits, read=read), Scan(scanned.rows[order], reasons)
