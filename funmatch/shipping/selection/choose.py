"""Chooses images class by class: those that a teacher is surest of, without near copies."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from funmatch.shipping.selection.copies import CopyIndex, codes_of_windows, likeness, nearest_images, views_of
from funmatch.shipping.selection.memory import UNREADABLE

EXAMPLES = 5

Pixels = Callable[[int], np.ndarray]
"""Number of an image to its pixels, (height, width, 3) uint8."""


@dataclass(frozen=True)
class KeptClear:
    """Images of which near copies are left out.

    Attributes:
        index: of the codes of all of them.
        pixels: of one of them.
    """

    index: CopyIndex
    pixels: Pixels


@dataclass
class Choice:
    """The images that were chosen from a pool, by their places in it.

    Attributes:
        chosen: the surest first.
        candidates: number of images of each class that the teacher is sure enough of, (classes,).
        unsure: number of images that it is not.
        kept_clear: left out as near copies of images to keep clear of: place, and number of that image.
        repeated: left out as near copies of chosen ones: place, and place of that one.
    """

    chosen: list[int]
    candidates: np.ndarray
    unsure: int
    kept_clear: list[tuple[int, int]] = field(default_factory=list)
    repeated: list[tuple[int, int]] = field(default_factory=list)


@dataclass(frozen=True)
class Chooser:
    """Chooses up to `per_class` images of each class, which is the most probable one of an image.

    Images are taken in the order of their probability; of equal ones, in their own order. A near copy of an image to
    keep clear of, or of one that was chosen before, is left out, and the next takes its place.

    Attributes:
        classes: number of classes.
        per_class: most images of a class.
        min_confidence: least probability.
        alike: from which likeness on two images are near copies.
        pixels: of an image of the pool.
        kept_clear: images to keep clear of, or None.
    """

    classes: int
    per_class: int
    min_confidence: float
    alike: float
    pixels: Pixels
    kept_clear: KeptClear | None = None

    def choose(self, rows: np.ndarray) -> Choice:
        """Chooses from a pool.

        Args:
            rows: `memory.ROW` of its images.
        """
        readable = rows["label"] != UNREADABLE
        sure = readable & (rows["confidence"] >= np.float32(self.min_confidence))
        # Stable, so that of equal ones the first comes first.
        order = np.flatnonzero(sure)[np.argsort(-rows["confidence"][sure], kind="stable")]
        counts = np.bincount(rows["label"][sure], minlength=self.classes)
        found = Choice([], counts, int(readable.sum()) - len(order))
        taken = [_Taken() for _ in range(self.classes)]
        # Near copies usually have one class. Those that have not are found if their codes are equal.
        equal: dict[int, list[int]] = {}
        labels, codes = rows["label"].tolist(), rows["code"]
        for place in order.tolist():
            among, own = taken[labels[place]], codes[place]
            if among.count == self.per_class:
                continue
            copy = _Copy(self, place)
            if (other := copy.of_kept_clear(own)) is not None:
                found.kept_clear.append((place, other))
            elif (other := copy.of_chosen([*among.near(own), *equal.get(int(own), [])])) is not None:
                found.repeated.append((place, other))
            else:
                equal.setdefault(int(own), [place])
                among.add(place, codes_of_windows(copy.own_pixels()))
                found.chosen.append(place)
        return found


class _Copy:
    """An image that may be a near copy; it is decoded where it is needed, once."""

    def __init__(self, chooser: Chooser, place: int) -> None:
        self.chooser, self.place = chooser, place
        self._pixels: np.ndarray | None = None
        self._views: np.ndarray | None = None

    def own_pixels(self) -> np.ndarray:
        """Returns its pixels."""
        self._pixels = self.chooser.pixels(self.place) if self._pixels is None else self._pixels
        return self._pixels

    def of_kept_clear(self, own: np.uint64) -> int | None:
        """Returns the number of the image to keep clear of that it is a near copy of, or None."""
        kept = self.chooser.kept_clear
        return next((each for each in kept.index.near(own) if self._is_like(kept.pixels(each))), None) if kept else None

    def of_chosen(self, places: list[int]) -> int | None:
        """Returns which of the chosen images it is a near copy of, or None."""
        return next((each for each in places if self._is_like(self.chooser.pixels(each))), None)

    def _is_like(self, other: np.ndarray) -> bool:
        self._views = views_of(self.own_pixels()) if self._views is None else self._views
        return likeness(self._views, views_of(other)) >= self.chooser.alike


class _Taken:
    """The codes of the images of a class that were chosen."""

    def __init__(self) -> None:
        self.count, self.used = 0, 0
        self.codes, self.images = np.zeros(0, np.uint64), np.zeros(0, np.int64)

    def near(self, own: np.uint64) -> list[int]:
        """Returns the places of images that have a near code, the nearest first."""
        return list(nearest_images(self.codes[: self.used], self.images[: self.used], own))

    def add(self, place: int, codes: np.ndarray) -> None:
        """Adds an image with the codes of its windows."""
        if self.used + len(codes) > len(self.codes):
            # Twice as much, so that they are not copied for each image.
            more = self.used + len(codes)
            self.codes = np.concatenate([self.codes, np.zeros(more, np.uint64)])
            self.images = np.concatenate([self.images, np.zeros(more, np.int64)])
        self.codes[self.used : self.used + len(codes)] = codes
        self.images[self.used : self.used + len(codes)] = place
        self.used += len(codes)
        self.count += 1
