"""Finds the images that paths, patterns, lists and data sets name, one after the other, without listing all first."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import chain
from pathlib import Path

from funmatch.config.finished.predict import ImageReading
from funmatch.data.dataset import ORDER, Dataset, ReadOptions, Track
from funmatch.data.decode import EXTENSIONS
from funmatch.data.readers.folder_listing import ending
from funmatch.data.readers.open import check_spec, is_source, open_dataset, recommend_reader
from funmatch.data.readers.split_names import SPLIT_NAMES
from funmatch.data.remote.fetch import AS_FOLDER, EVERYTHING, fetch
from funmatch.errors import InputError, hide_secrets, unknown
from funmatch.runtime.addresses import check_scheme_if_any, is_address
from funmatch.runtime.log import info, track
from funmatch.shipping.sources.files import MAGIC, ImageFile, match_pattern, one_file, read_list, walk_folder

TRAINING, EVALUATION = "training", "evaluation"
"""Splits of a data set: the one that is trained on, or the only one; validation and test images, or all if there are
neither."""
LIST = "-"
"""Stands for a list of paths on standard input."""


@dataclass(frozen=True)
class ImageStream:
    """Images in their order.

    Attributes:
        images: each once, found while they are consumed.
        count: how many they are; None where that is known only at the end.
    """

    images: Iterator[ImageFile]
    count: int | None


def find_images(
    paths: Sequence[str], options: ReadOptions, split: str | None = None, track: Track = track
) -> ImageStream:
    """Finds the images of several paths, in their order.

    Args:
        paths: each a file, a folder, a pattern with `*`, `?`, `[…]` or `**`, a data set (`tfrecord:…`, `wds:…`,
            `hf:…`, a name of the catalog), or `-` for a list of paths on standard input.
        options: how data sets are read.
        split: auto, train, val, test or all, of data sets and folders that have several; `TRAINING` or `EVALUATION`;
            None is auto, and takes folders whole, as `TRAINING` does.
        track: shows progress.

    Raises:
        InputError: a path names nothing, or holds no image.
    """
    streams = [_find(path, options, split, track) for path in paths]
    counts = [stream.count for stream in streams]
    count = None if None in counts else sum(each for each in counts if each is not None)
    return ImageStream(chain.from_iterable(stream.images for stream in streams), count)


def open_images(config: ImageReading, paths: Sequence[str], split: str | None = None) -> ImageStream:
    """Finds the images of paths, as configured.

    Args:
        split: as of `find_images`, where the configuration has none.
    """
    # Labels are not used, so they need not be there or fit.
    names = {field.name for field in fields(ReadOptions)} & set(type(config).model_fields)
    read = {name: getattr(config, name) for name in names}
    # A file that is not there gets a row that says so, as one that cannot be decoded.
    options = ReadOptions(**read, unlabelled=True, follow_links=True, on_bad="skip")
    return find_images(paths, options, config.split or split)


def check_path(path: str) -> None:
    """Raises `InputError` for a path that names nothing, without opening data sets."""
    if path == LIST:
        return
    if is_source(path) or (is_address(path) and not _names_images(path)):
        check_spec(path)
        return
    if is_address(path):
        return
    place = os.path.expanduser(path)
    if os.path.lexists(place):
        # A parquet file, an archive or a list is a source of images of another kind, which has a prefix.
        if os.path.isfile(place) and ending(place) not in EXTENSIONS and (advice := recommend_reader(Path(place))):
            raise InputError(f"{path} is not an image; {advice}")
    elif not MAGIC.search(path):
        check_missing(path)


def names_several(path: str) -> bool:
    """Returns whether a path is that of a folder, a pattern or a data set, rather than of one file."""
    place = os.path.expanduser(path)
    if is_address(path):
        return not _names_images(path) or bool(set("*{[") & set(path))
    return is_source(path) or os.path.isdir(place) or (bool(MAGIC.search(path)) and not os.path.lexists(place))


def check_missing(path: str) -> None:
    """Raises the `InputError` for a path that does not exist."""
    check_scheme_if_any(path)
    raise InputError(
        f"no file or folder {path}; for many paths, pass a pattern in quotes ('photos/**/*.jpg'), or a list"
    )


def _find(path: str, options: ReadOptions, split: str | None, track: Track) -> ImageStream:
    check_path(path)
    if path == LIST:
        return ImageStream(_started(read_list(sys.stdin), lambda: "the list of paths on standard input is empty"), None)
    place = os.path.expanduser(path)
    if is_address(path) and (_names_images(path) or split in (None, TRAINING)):
        return _of_address(path, track)
    if is_source(path) or is_address(path) or (split not in (None, TRAINING) and os.path.isdir(place)):
        return _of_dataset(path, options, split or "auto", track)
    if os.path.isdir(place):
        return ImageStream(_started(walk_folder(place), lambda: _no_images(path, place)), None)
    if os.path.lexists(place):
        return ImageStream(iter([one_file(place)]), 1)
    return ImageStream(_started(match_pattern(place), lambda: f"no image matches {path}"), None)


def _names_images(address: str) -> bool:
    """Returns whether an address names images one by one or by a pattern, by the ending of its last part."""
    return ending(hide_secrets(address).partition("?")[0]) in EXTENSIONS


def _of_address(address: str, track: Track) -> ImageStream:
    """Finds the images of a folder, a pattern or a file on a server, which are named by their addresses."""
    if _names_images(address):
        found = fetch(address, EVERYTHING, track)
        images = [replace(one_file(str(path)), path=name) for path, name in zip(found.files, found.names, strict=True)]
        return ImageStream(iter(images), len(images))
    found = fetch(address, AS_FOLDER, track)
    folder, shown = str(found.folder), hide_secrets(address).rstrip("/")
    if not found.folder.is_dir():
        raise InputError(f"{shown} is not an image; expected an image, a folder of images, or an archive of one")
    named = (replace(image, path=shown + image.path.removeprefix(folder)) for image in walk_folder(folder))
    return ImageStream(_started(named, lambda: _no_images(shown, folder)), None)


def _started(images: Iterator[ImageFile], complaint: Callable[[], str]) -> Iterator[ImageFile]:
    """Returns images of which the first is found already; raises `InputError` where there is none."""
    first = next(images, None)
    if first is None:
        raise InputError(complaint())
    return chain([first], images)


def _no_images(path: str, folder: str) -> str:
    advice = recommend_reader(Path(folder)) or f"images end in {', '.join(sorted(EXTENSIONS))}"
    return f"{path} has no images; {advice}"


def _of_dataset(spec: str, options: ReadOptions, split: str, track: Track) -> ImageStream:
    dataset = open_dataset(spec, options, track)
    names = _pick_splits(dataset, spec, split)
    # All images are the same whatever is held out of those for training, and published splits are complete.
    spec_of_splits = dataset.split_spec
    if spec_of_splits and split != "all" and {*names} & {"train", *spec_of_splits.shares}:
        # Here, since they load torch. What is held out is chosen by content, for which every image is read once.
        from funmatch.data.cache.open_cache import scan_dataset
        from funmatch.data.cache.storing import CacheOptions

        dataset, _ = scan_dataset(dataset, CacheOptions(), track)
    # Names in a folder are relative to it; those of shards are no paths.
    root, first = dataset.root or os.path.expanduser(dataset.location), dataset.splits[names[0]].names[0]
    root = root if os.path.isfile(os.path.join(root, first)) else ""
    images = (
        ImageFile(os.path.join(root, dataset.splits[name].names[i]), partial(dataset.read, name, i))
        for name in names
        for i in range(len(dataset.splits[name]))
    )
    return ImageStream(images, sum(len(dataset.splits[name]) for name in names))


def _pick_splits(dataset: Dataset, spec: str, split: str) -> list[str]:
    """Returns the names of the splits to read; `auto` is test, else val, else train, as for `evaluate`."""
    held_out = dataset.split_spec.shares if dataset.split_spec else {}
    known = [name for name in ORDER if name in dataset.splits or name in held_out]
    if split == "all":
        return [*dataset.splits]
    if split == TRAINING:
        return known[:1]
    if split == EVALUATION:
        return [name for name in known if name != "train"] or known
    if split == "auto":
        if len(known) > 1:
            info(f"{spec}: the images of {known[-1]}; pass --split for others ({', '.join(known)}, all)")
        return known[-1:]
    name = SPLIT_NAMES.get(split, split)
    if name not in known:
        raise unknown(f"split of {spec}", split, [*known, "all"])
    return [name]
