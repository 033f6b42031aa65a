"""Cutting splits off the training images, by content and seed alone."""

import hashlib
from dataclasses import replace
from fractions import Fraction

import numpy as np

from funmatch.data.cache.scan import Scan
from funmatch.data.dataset import ORDER, Dataset, SplitListing
from funmatch.errors import InputError


def apply_split(source: Dataset, found: Scan) -> tuple[Dataset, Scan]:
    """Cuts the training images as the source asks, by content and seed alone.

    The images are ranked by a keyed digest of their content; the first share is test, if one is cut, the next
    validation. Neither names nor places count, and images of the same content stay on one side.

    Raises:
        InputError: a split would be empty.
    """
    if source.cut is None:
        return source, found
    count = len(source.splits["train"])
    start = sum(len(split) for name, split in list(source.splits.items())[: list(source.splits).index("train")])
    content = found.rows["digest"][start : start + count]
    ranks = _ranks(content.tolist(), source.cut.seed)
    order = np.argsort(ranks, kind="stable")
    labelled = source.splits["train"].labels >= 0
    if labelled.any() and not labelled.all():  # what is judged on should have labels
        order = np.concatenate([order[labelled[order]], order[~labelled[order]]])
        count = int(labelled.sum())
    chosen: dict[str, np.ndarray] = {}
    begin = 0
    for name in ("test", "val"):
        if share := source.cut.shares.get(name):
            end = begin + (int(share * count) if isinstance(share, Fraction) else share)
            while begin < end < count and ranks[order[end]] == ranks[order[end - 1]]:
                end += 1
            chosen[name] = np.sort(order[begin:end]) + start
            begin = end
    rest = order[begin:]
    copies = np.isin(ranks[rest], ranks[order[:begin]])  # unlabelled ones of what is judged on
    chosen["train"] = np.sort(rest[~copies]) + start
    if copies.any():
        note = f"{source.name}: {copies.sum():,} unlabelled copies of images that were cut off are left out"
        source = replace(source, notes=(*source.notes, note))
    for name, places in chosen.items():
        if not len(places):
            raise InputError(f"of {count} training images of {source.name}, the cut leaves none for {name}")
    return _rearranged(source, found, chosen)


def _ranks(digests: list[bytes], seed: int) -> np.ndarray:
    key = seed.to_bytes(8, "little")
    keyed = (hashlib.blake2b(digest, digest_size=8, key=key).digest() for digest in digests)
    return np.frombuffer(b"".join(keyed), "<u8")


def _rearranged(source: Dataset, found: Scan, chosen: dict[str, np.ndarray]) -> tuple[Dataset, Scan]:
    """Source and survey with splits made of the images at these places of the old order."""
    jobs = source.jobs()
    begin = 0
    for name, split in source.splits.items():
        if name != "train":
            chosen[name] = np.arange(begin, begin + len(split))
        begin += len(split)
    chosen = {name: chosen[name] for name in ORDER if name in chosen}
    splits = {name: _picked(source, [jobs[i] for i in places]) for name, places in chosen.items()}

    def read(split: str, index: int) -> bytes:
        return source.read(*jobs[chosen[split][index]])

    order = np.concatenate(list(chosen.values()))
    where = {int(old): new for new, old in enumerate(order)} if found.reasons else {}
    reasons = {where[i]: reason for i, reason in found.reasons.items()}
    return replace(source, splits=splits, read=read, cut=None), Scan(found.rows[order], reasons)


def _picked(source: Dataset, jobs: list[tuple[str, int]]) -> SplitListing:
    names = [source.splits[split].names[i] for split, i in jobs]
    return SplitListing(names, np.array([source.splits[split].labels[i] for split, i in jobs], np.int32))
