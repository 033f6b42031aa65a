"""Holds out splits from the training images, by content and seed alone."""

import hashlib
from dataclasses import replace
from fractions import Fraction

import numpy as np

from funmatch.data.cache.scan import Scan
from funmatch.data.dataset import ORDER, Dataset, SplitListing
from funmatch.errors import InputError


def apply_split(dataset: Dataset, scanned: Scan) -> tuple[Dataset, Scan]:
    """Holds out splits from the training images as `dataset.split_spec` says.

    Images are ranked by a keyed digest of their content; the first share becomes test, if it is requested, the next
    validation. Names and folders do not matter, and images of the same content stay in one split.

    Returns:
        the data set with all splits made, and its scan in the same order.

    Raises:
        InputError: a split would be empty.
    """
    if dataset.split_spec is None:
        return dataset, scanned
    count = len(dataset.splits["train"])
    start = sum(len(split) for name, split in list(dataset.splits.items())[: list(dataset.splits).index("train")])
    content = scanned.rows["digest"][start : start + count]
    ranks = _ranks(content.tolist(), dataset.split_spec.seed)
    # Stable: copies of one image have equal ranks, and stay in the order of the listing.
    order = np.argsort(ranks, kind="stable")
    labelled = dataset.splits["train"].labels >= 0
    # Labelled images first, since evaluation needs labels; shares then count only those.
    if labelled.any() and not labelled.all():
        order = np.concatenate([order[labelled[order]], order[~labelled[order]]])
        count = int(labelled.sum())
    chosen: dict[str, np.ndarray] = {}
    begin = 0
    # Test first, so that another share for validation leaves the test images the same.
    for name in ("test", "val"):
        if share := dataset.split_spec.shares.get(name):
            end = begin + (int(share * count) if isinstance(share, Fraction) else share)
            # Copies of the last image have its rank; left behind, they would leak into training.
            while begin < end < count and ranks[order[end]] == ranks[order[end - 1]]:
                end += 1
            chosen[name] = np.sort(order[begin:end]) + start
            begin = end
    rest = order[begin:]
    # Unlabelled images were sorted behind all labelled ones, so there may be copies of held-out images among them.
    copies = np.isin(ranks[rest], ranks[order[:begin]])
    chosen["train"] = np.sort(rest[~copies]) + start
    if copies.any():
        note = f"{dataset.name}: {copies.sum():,} unlabelled copies of held-out images are left out of training"
        dataset = replace(dataset, notes=(*dataset.notes, note))
    for name, positions in chosen.items():
        if not len(positions):
            raise InputError(f"{dataset.name}: of {count} training images, the split leaves none for {name}")
    return _rearrange(dataset, scanned, chosen)


def _ranks(digests: list[bytes], seed: int) -> np.ndarray:
    """Returns a pseudo-random number for each content, (n,) uint64."""
    # A keyed hash and not a generator: an image keeps its rank when others are added, removed or renamed.
    key = seed.to_bytes(8, "little")
    keyed = (hashlib.blake2b(digest, digest_size=8, key=key).digest() for digest in digests)
    return np.frombuffer(b"".join(keyed), "<u8")


def _rearrange(dataset: Dataset, scanned: Scan, chosen: dict[str, np.ndarray]) -> tuple[Dataset, Scan]:
    """Returns data set and scan with splits of the images at these positions of the old order."""
    jobs = dataset.jobs()
    begin = 0
    for name, split in dataset.splits.items():
        if name != "train":
            chosen[name] = np.arange(begin, begin + len(split))
        begin += len(split)
    chosen = {name: chosen[name] for name in ORDER if name in chosen}
    splits = {name: _listing_of(dataset, [jobs[i] for i in positions]) for name, positions in chosen.items()}

    def read(split: str, index: int) -> bytes:
        return dataset.read(*jobs[chosen[split][index]])

    order = np.concatenate(list(chosen.values()))
    new_positions = {int(old): new for new, old in enumerate(order)} if scanned.reasons else {}
    reasons = {new_positions[i]: reason for i, reason in scanned.reasons.items()}
    return replace(dataset, splits=splits, read=read, split_spec=None), Scan(scanned.rows[order], reasons)


def _listing_of(dataset: Dataset, jobs: list[tuple[str, int]]) -> SplitListing:
    names = [dataset.splits[split].names[i] for split, i in jobs]
    return SplitListing(names, np.array([dataset.splits[split].labels[i] for split, i in jobs], np.int32))
