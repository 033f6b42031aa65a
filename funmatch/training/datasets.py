"""Opens the data sets of a configuration."""

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any, TypeVar

import numpy as np

from funmatch.config import TAUGHT, Finetune, Images, Train, Words
from funmatch.config.data import NO_VALIDATION, VALIDATION_SHARE
from funmatch.config.finished.model import WithImages
from funmatch.data.cache.names import image_names
from funmatch.data.cache.open_cache import Cache, open_cache, open_known_cache
from funmatch.data.cache.stores import CachedSplit
from funmatch.data.cache.storing import CacheOptions
from funmatch.data.dataset import ReadOptions, SplitSpec, parse_share
from funmatch.data.readers.class_notes import first_of
from funmatch.data.remote.single import local_file
from funmatch.errors import InputError
from funmatch.runtime.log import info, track

Options = TypeVar("Options", bound=Train)
Read = TypeVar("Read", bound=Images)
EVALUATED = ("val", "test")
"""Splits that `eval_data` provides."""


def read_options(config: Images) -> ReadOptions:
    """Returns how images are listed and read, as configured."""
    spec = SplitSpec({} if config.val is None else {"val": parse_share(config.val)}, config.val_seed)
    # By name, so that an option of a new reader is a field of `ReadOptions` and of `config.Images`, and nothing here.
    names = {field.name for field in fields(ReadOptions)} & set(Images.model_fields)
    values = {name: getattr(config, name) for name in names}
    # None where a model says it, and none did.
    values["class_file"] = local_file(config.class_file, track)
    values["task"] = config.task or ReadOptions.task
    # Without --val a seed alone still counts: the data set's own share is then cut by another seed.
    return ReadOptions(**values, split_spec=spec if config.val is not None or config.val_seed else None)


def cache_options(config: Images) -> CacheOptions:
    """Returns how decoded images are cached, as configured."""
    return CacheOptions(
        config.cap, config.decoder, config.pixels, config.resident_gb, config.max_pixels, config.on_bad,
        max_scans=config.max_scans,
    )  # fmt: skip


def open_data_set(
    config: Images, data: tuple[str, ...], *, refresh: bool = False, log: Callable[[str], None] = info
) -> Cache:
    """Opens a data set, which is decoded into the cache the first time.

    Args:
        data: names of the sources that are joined.
        refresh: read every file again, and check the cache.
        log: prints a line.
    """
    return open_cache(data, read_options(config), cache_options(config), track=track, log=log, refresh=refresh)


def open_known_data_set(config: Images, data: tuple[str, ...], *, log: Callable[[str], None] = info) -> Cache:  # noqa: ARG001
    """Opens a data set that was opened on this machine before, and neither lists, decodes nor downloads any.

    Raises:
        InputError: it was not.
    """
    cache = open_known_cache(data, read_options(config), cache_options(config))
    if cache is None:
        raise InputError(f"{' '.join(data)} has not been opened on this machine, or has changed since")
    return cache


def open_run_data(
    config: Train, log: Callable[[str], None] = info, open_set: Callable[..., Cache] = open_data_set
) -> Cache:
    """Opens the images of a run: a training split, and splits for evaluation, which may be of another data set.

    The classes are those of the evaluation images. So with `eval_data`, the labels of the training images are dropped
    unless they are of the same classes.

    Args:
        log: prints a line.
        open_set: opens one of the two data sets: `open_data_set`, or `open_known_data_set`.

    Raises:
        InputError: there is no training split.
    """
    training = open_set(config, config.data, log=log)
    if not config.eval_data:
        return training
    # `unlabelled` is about the training images; without labels there would be no accuracy to evaluate.
    labelled = config.model_copy(update={"unlabelled": False})
    evaluation = open_set(labelled, config.eval_data)
    splits = {name: evaluation.splits[name] for name in EVALUATED if name in evaluation.splits}
    # A folder without splits is evaluated on whole.
    if not splits:
        splits = {"test": replace(evaluation.splits["train"], name="test")}
    if "train" not in training.splits:
        raise InputError(f"{training.name} has no training split; its splits: {', '.join(training.splits)}")
    train = training.splits["train"]
    # Equal numbers of two data sets do not mean equal classes.
    if training.classes != evaluation.classes:
        train = train.without_labels()
    # By content, since the same photo often lies in two data sets under different names.
    for name, split in splits.items():
        if leaked := len(np.intersect1d(train.digests, split.digests)):
            info(f"WARNING: {leaked:,} images of {evaluation.name}'s {name} are also in {training.name}'s train")
    return replace(
        training,
        key=f"{training.key}+{evaluation.key}",
        classes=evaluation.classes,
        unnamed=evaluation.unnamed,
        splits={"train": train, **splits},
    )


def open_with_validation(config: Options, *, began_without: bool = False) -> tuple[Cache, Options]:
    """Opens the images of a run, and holds some of the training images out where there is no validation split.

    This is the rule of all commands that train: the test images are looked at once, at the end, so what is watched and
    chosen by during training must be other images.

    Args:
        began_without: whether the run began, in a version without this rule, with neither.

    Returns:
        the images, and the options with what `val` and `keep` turned out to be.
    """
    if config.val not in (None, NO_VALIDATION):
        return _warn_of_classes(open_run_data(config)), config
    log = _once(info)
    cache = open_run_data(config, log)
    # None in the record says that the data has a validation split, or that there was no rule yet.
    if "val" in cache.splits or began_without or "train" not in cache.splits:
        # Such a fine-tuning, with --eval-data, kept the final weights.
        last = isinstance(config, Finetune) and "val" not in cache.splits
        return cache, config.model_copy(update={"val": None} | ({"keep": "last"} if last else {}))
    if config.val is None and not config.eval_data:
        cache, held_out = hold_out(config, cache, lambda each: open_run_data(each, log))
        return _warn_of_classes(cache), held_out
    without = f"{' '.join(config.eval_data)} has no validation split" if config.eval_data else "--val none"
    last = "and evaluated on test once, at the end" if "test" in cache.splits else "and there is no test split either"
    info(
        f"WARNING: {without}: nothing is held out, so the model is watched on images that it is trained on, {last}; "
        "the final weights are kept"
    )
    # By training images the best weights cannot be told.
    return cache, config.model_copy(update={"val": NO_VALIDATION, "keep": "last"})


def hold_out(config: Read, cache: Cache, open_again: Callable[[Read], Cache]) -> tuple[Cache, Read]:
    """Opens images that have no validation split again, with the usual share of the training images held out for one.

    Args:
        cache: the images as they are.
        open_again: opens them with other options.

    Returns:
        the images, and the options with what `val` turned out to be.
    """
    held_out = config.model_copy(update={"val": VALIDATION_SHARE})
    opened = open_again(held_out)
    info(
        f"{opened.name} has no validation split: holding out {VALIDATION_SHARE} of the training images "
        f"({len(opened.splits['val']):,} of {len(cache.splits['train']):,}); --val sets how many, --val none trains on "
        "all"
    )
    return opened, held_out


def _warn_of_classes(cache: Cache) -> Cache:
    """Returns the images; warns of classes of which all images were held out."""
    train, val = (cache.splits[name].class_counts(len(cache.classes)) for name in ("train", "val"))
    if lost := [cache.classes[label] for label in np.flatnonzero((val > 0) & (train == 0))]:
        info(
            f"WARNING: all images of {first_of(lost)} were held out, so the model never sees one; pass another "
            "--val-seed, a smaller --val, or more images"
        )
    return cache


def _once(log: Callable[[str], None]) -> Callable[[str], None]:
    """Returns a function that prints each line once, for data that is opened twice."""
    printed: set[str] = set()

    def print_new(line: str) -> None:
        if line not in printed:
            printed.add(line)
            log(line)

    return print_new


def about_images(split: CachedSplit, cache: Cache, val: str | None) -> dict[str, Any]:
    """Returns what a result says of the images that it is of.

    Args:
        split: the images.
        cache: those of the run.
        val: the resolved option.

    Returns:
        `split`, `pictures` (their number), and `held_out_of`, the number of training images that a validation split was
        held out of.
    """
    about = {"split": split.name, "pictures": len(split)}
    if split.name != "val" or val in (None, NO_VALIDATION):
        return about
    return about | {"held_out_of": len(cache.splits["train"]) + len(cache.splits["val"])}


def open_evaluation_data(
    config: WithImages, model: str, verb: str, knobs: Mapping[str, Any]
) -> tuple[Cache, Words, Words]:
    """Opens the images to evaluate on: as given, or those of the run with this verb and these options.

    Args:
        model: its name, for messages.
        verb, knobs: of the run; empty where there is none.

    Returns:
        the images, and the names of the run's training and evaluation data.

    Raises:
        InputError: no images are given, and the model is not a run that has some.
    """
    if config.data:
        return open_data_set(config, config.data), config.data, config.data
    if not knobs:
        raise InputError(f"no images to evaluate on: {model} is not a run, so pass --data")
    run = run_images(config, verb, knobs)
    return open_run_data(run), run.data, run.eval_data or run.data


def run_images(config: WithImages, verb: str, knobs: Mapping[str, Any]) -> Train:
    """Returns the options of a run with those of a command for finished models that replace them."""
    # Its data may have moved since.
    overrides = {
        name: getattr(config, name)
        for name in Images.model_fields
        if name != "as_json" and getattr(config, name) != type(config).model_fields[name].default
    }
    return TAUGHT[verb].model_validate({**knobs, **overrides})


def name_training_images(config: Train, split: CachedSplit) -> list[str]:
    """Returns the name of each image of a run's training split.

    Raises:
        InputError: the images are gone.
    """
    return image_names(config.data, read_options(config), cache_options(config), split)


def name_images(config: WithImages, verb: str, knobs: Mapping[str, Any], split: CachedSplit) -> list[str]:
    """Returns the name of each image of a split that `open_evaluation_data` opened.

    Raises:
        InputError: the images are gone.
    """
    if config.data:
        images, data = config, config.data
    else:
        images = run_images(config, verb, knobs)
        data = images.data if split.name == "train" else images.eval_data or images.data
        # As they were opened: `unlabelled` is about the training images.
        images = images.model_copy(update={"unlabelled": False}) if data == images.eval_data else images
    return image_names(data, read_options(images), cache_options(images), split, track=track)
