"""Decides how the images of a data set are stored: by which options, under which key, and whether decoded."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from funmatch.data.cache.check import FORMAT
from funmatch.data.cache.scan import Scan
from funmatch.data.dataset import Dataset
from funmatch.data.limits import MAX_PIXELS, MAX_SCANS, Limits


@dataclass(frozen=True)
class CacheOptions:
    """Options for storing images.

    Attributes:
        cap: longest short side, pixels; larger images are scaled down to it.
        decoder: `pillow`, `torchcodec`, or `auto`, which is torchcodec where it is installed.
        way: `resident` (stored decoded), `streaming` (stored encoded, decoded at each use), or `auto`, which is
            resident up to `resident_gb`.
        resident_gb: decoded pixels up to which `auto` is resident, 10⁹ bytes.
        max_pixels: larger images count as unreadable.
        on_bad: `stop` with an error at unreadable images, or `skip` them.
        home: folder of all caches; None is `files.cache_home()`.
        max_scans: JPEGs of more scans count as unreadable.
    """

    cap: int = 512
    decoder: str = "auto"
    way: str = "auto"
    resident_gb: float = 32.0
    max_pixels: int = MAX_PIXELS
    on_bad: str = "stop"
    home: Path | None = None
    max_scans: int = MAX_SCANS

    @property
    def limits(self) -> Limits:
        """Limits of single images."""
        return Limits(self.max_pixels, self.max_scans)


def content_key(dataset: Dataset, scanned: Scan, options: CacheOptions) -> str:
    """Returns a digest of all that views depend on: contents, splits, labels, and how images are decoded."""
    # Runs record this key and refuse to resume with another one: a change here orphans caches and runs.
    parts = repr((FORMAT, options.cap, options.decoder, dataset.classes))
    digest = hashlib.blake2b(parts.encode(), digest_size=16)
    for name, split in dataset.splits.items():
        digest.update(f"{name} {len(split)}\0".encode() + split.labels.tobytes())
    # "bad" too: a smaller --max-pixels leaves images out whose content is the same.
    digest.update(scanned.rows["digest"].tobytes() + scanned.rows["bad"].tobytes())
    # Labels are numbers of these sets then: the same numbers of other sets are other labels.
    if dataset.label_sets is not None:
        digest.update(b"label sets" + dataset.label_sets.tobytes())
    return digest.hexdigest()


def choose_way(scanned: Scan, options: CacheOptions) -> tuple[str, int]:
    """Returns `resident` or `streaming`, and the bytes that it takes on the disk."""
    rows = scanned.rows[~scanned.rows["bad"]]
    short = np.minimum(rows["height"], rows["width"]).clip(1)
    scale = np.minimum(1, options.cap / short)
    # In 64 bits: height × width of a large image overflows the 32 bits of the rows.
    decoded = int((3 * rows["height"].astype(np.int64) * rows["width"] * scale**2).sum())
    way = options.way
    if way == "auto":
        way = "resident" if decoded <= options.resident_gb * 1e9 else "streaming"
    return way, decoded if way == "resident" else int(rows["length"].sum())
