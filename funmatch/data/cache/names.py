"""Finds the names of cached images: a cache knows only their content."""

from collections import defaultdict, deque
from collections.abc import Sequence

from funmatch.data.cache.open_cache import absolute
from funmatch.data.cache.scan import by_split, scan
from funmatch.data.cache.stores import CachedSplit
from funmatch.data.cache.storing import CacheOptions
from funmatch.data.dataset import ReadOptions, Track, untracked
from funmatch.data.readers.open import open_dataset
from funmatch.runtime.disk.files import cache_home


def image_names(
    specs: Sequence[str],
    options: ReadOptions,
    cache_options: CacheOptions,
    split: CachedSplit,
    *,
    track: Track = untracked,
) -> list[str]:
    """Returns the name of each image of a split, as messages call it; of several copies of an image any.

    The data set is listed again, and its images are found by their content, which was read when it was cached.

    Args:
        specs, options, cache_options: with which the data set was opened.
        track: shows progress.

    Raises:
        InputError: the data set is gone.
    """
    listed = open_dataset([*specs], absolute(options), track)
    scanned = scan(listed, cache_options.home or cache_home(), track, limits=cache_options.limits)
    names: dict[bytes, deque[str]] = defaultdict(deque)
    # Those of the split first: a copy in another split has another name.
    for name, rows, _ in sorted(by_split(listed, scanned), key=lambda each: each[0] != split.name):
        for digest, image in zip(rows["digest"].tolist(), listed.splits[name].names, strict=True):
            names[digest].append(image)
    found = []
    for number, digest in enumerate(split.digests.tolist()):
        known = names.get(digest)
        # An image that was replaced since has no name; its place in the split is one.
        own = (known.popleft() if len(known) > 1 else known[0]) if known else f"{split.name}/{number}"
        found.append(own)
    return found
