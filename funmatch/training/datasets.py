"""The images that a configuration asks for, opened."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from funmatch.config import TAUGHT, Evaluate, Images, Train, Words
from funmatch.data.cache.build import CacheOptions
from funmatch.data.cache.device_store import device_bytes, move_to_device
from funmatch.data.cache.open_cache import Cache, open_cache
from funmatch.data.dataset import ReadOptions, SplitSpec, parse_share
from funmatch.data.readers.open import resolve_names
from funmatch.errors import InputError, is_out_of_memory
from funmatch.runtime.log import info, track

JUDGED = ("val", "test")


def read_options(config: Images) -> ReadOptions:
    """How a configuration wants images read."""
    cut = SplitSpec({} if config.val is None else {"val": parse_share(config.val)}, config.val_seed)
    return ReadOptions(
        data_dir=config.data_dir,
        cut=cut if config.val is not None or config.val_seed else None,
        unlabelled=config.unlabelled,
        follow_links=config.follow_links,
        image_feature=config.image_feature,
        label_feature=config.label_feature,
        first_label=config.first_label,
        class_file=config.class_file,
    )


def cache_options(config: Images) -> CacheOptions:
    """How a configuration wants images kept."""
    return CacheOptions(config.cap, config.decoder, config.pixels, config.resident_gb, config.max_pixels, config.on_bad)


def open_data_set(config: Images, data: tuple[str, ...], *, afresh: bool = False) -> Cache:
    """A data set, read and kept as the configuration says."""
    cache = open_cache(data, read_options(config), cache_options(config), track=track, tell=info, afresh=afresh)
    return cache.without_labels() if config.unlabelled else cache


def open_run_data(config: Train) -> Cache:
    """The images of a run: those to learn from, and those to judge on, which may be of another data set.

    Classes are those of the images that are judged on. So with `eval_data`, labels of the training images count
    for nothing unless they are of the same classes.
    """
    learnt = open_data_set(config, config.data)
    if not config.eval_data:
        return learnt
    plain = config.model_copy(update={"unlabelled": False})
    judged = open_data_set(plain, config.eval_data)
    splits = {name: judged.splits[name] for name in JUDGED if name in judged.splits}
    if not splits:
        splits = {"test": replace(judged.splits["train"], name="test")}
    if "train" not in learnt.splits:
        raise InputError(f"{learnt.name} has no split train to learn from; it has: {', '.join(learnt.splits)}")
    train = learnt.splits["train"]
    if learnt.classes != judged.classes:
        train = train.without_labels()
    for name, split in splits.items():
        if leaked := len(np.intersect1d(train.digests, split.digests)):
            info(f"WARNING: {leaked:,} images of {judged.name}'s {name} are also in {learnt.name}'s train")
    return replace(
        learnt,
        key=f"{learnt.key}+{judged.key}",
        classes=judged.classes,
        unnamed=judged.unnamed,
        splits={"train": train, **splits},
    )


def move_data_to_device(cache: Cache, device: torch.device, gigabytes: float) -> Cache:
    """The images to learn from and to watch on with their pixels on the device, as far as they are resident and fit.

    Args:
        gigabytes: 10⁹ bytes that they may take there.
    """
    left, splits = int(gigabytes * 1e9), dict(cache.splits)
    for name in ("train", "val"):
        split = splits.get(name)
        if split is None or split.store.decodes or not left:
            continue
        size = device_bytes(split)
        if size > left:
            info(f"{name}: {size / 1e9:.1f} GB of pixels stay on the host, since --device-gb is {gigabytes:g}")
            continue
        try:
            splits[name], note = move_to_device(split, device)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            info(f"WARNING: {device} has no room for {size / 1e9:.1f} GB of {name} pixels; they stay on the host")
            continue
        left -= size
        if note:
            info(f"WARNING: {note}")
        info(f"{name}: {size / 1e9:.2f} GB of pixels are on {device}, which cuts the views itself")
    return replace(cache, splits=splits)


def open_evaluation_data(config: Evaluate, verb: str, knobs: dict[str, Any]) -> tuple[Cache, Words, Words]:
    """The images to judge on, and the names of those that a run learnt from and of those that it is judged on.

    They are as said, or those of the run with this verb and these knobs.

    Raises:
        InputError: neither says which.
    """
    if config.data:
        return open_data_set(config, config.data), config.data, config.data
    if not knobs:
        raise InputError(f"which images? {config.model} is no run, so give --data")
    said = {
        name: getattr(config, name)
        for name, field in Images.model_fields.items()
        if name != "as_json" and getattr(config, name) != field.default
    }
    run = TAUGHT[verb].model_validate(knobs | said)
    return open_run_data(run), run.data, run.eval_data or run.data


def absolute_paths(config: Train) -> dict[str, Any]:
    """The words for images with their paths from the root, so that a run's record can be used from anywhere."""
    found: dict[str, Any] = {name: tuple(map(resolve_names, getattr(config, name))) for name in ("data", "eval_data")}
    for name in ("data_dir", "class_file"):
        if path := getattr(config, name):
            found[name] = path.expanduser().absolute()
    return found
