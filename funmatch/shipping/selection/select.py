"""Chooses images from a pool by a teacher's confidence, and writes them as a table that runs can read."""

import os
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from funmatch.config import Select
from funmatch.data.cache.scan import reason_of
from funmatch.data.dataset import ReadOptions
from funmatch.data.limits import is_of_machine
from funmatch.data.prefetch import prefetch_items
from funmatch.errors import InputError
from funmatch.models.inference.features import is_headless
from funmatch.runtime import devices
from funmatch.runtime.log import info
from funmatch.runtime.text import counted
from funmatch.shipping import tables
from funmatch.shipping.counter import Counter
from funmatch.shipping.inference import decoding_of, ready
from funmatch.shipping.selection.choose import EXAMPLES, Choice, Chooser, KeptClear
from funmatch.shipping.selection.copies import CopyIndex, codes_of_windows
from funmatch.shipping.selection.extract import extract
from funmatch.shipping.selection.scores import Scores, place_of, score
from funmatch.shipping.sources.files import Decoding, ImageFile
from funmatch.shipping.sources.find import EVALUATION, TRAINING, ImageStream, find_images, open_images
from funmatch.shipping.tables import Column
from funmatch.training.student.trained_model import TrainedModel, open_described_model

COLUMNS = [Column("path", str), Column("label", str), Column("confidence", float)]


def run(config: Select, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Chooses images from a pool, and writes their table.

    Args:
        given: modules from Python, by the names that stand for them.

    Returns:
        `images` (of the pool), `unreadable` (of these), `unsure` (below the least confidence), `chosen`, `classes` (by
        name: `chosen`, `candidates`, and `confidence`, the least of a chosen one or None), `short` (names of classes
        with fewer than were asked for), `kept_clear` and `repeated` (near copies that were left out: `images` and
        `examples`), `out`, `teacher`, `seconds`.

    Raises:
        InputError: the file exists, there are no images, they are not files and --extract is not given, or the teacher
            has no classes.
    """
    config.check()
    out = config.out.expanduser()
    tables.check_out(out, overwrite=config.overwrite)
    kind = tables.pick_format(None, out)
    # Before loading, so that a wrong --device does not cost a download.
    device = devices.pick_device(config.device)
    precision = devices.resolve_precision(config.precision, device)
    stream = _nameable(open_images(config, config.pool, TRAINING), config)
    trained = _open_teacher(config, given)
    how = decoding_of(config, trained)
    # Before the pool: that it is missing is then said within a minute, and not after hours.
    avoided, kept_clear = _images_to_avoid(config, how)
    network, counter = ready(trained, device, precision), Counter("select", stream.count)
    with counter:
        place = place_of(trained, how, precision)
        scores = score(stream.images, network, how, config.batch, device, place, counter)
    classes = trained.class_names
    chooser = Chooser(
        len(classes), config.per_class, config.min_confidence, config.alike,
        lambda number: _decode(scores.images[number], how), kept_clear,
    )  # fmt: skip
    choice = chooser.choose(scores.rows)
    rows = _rows(scores, choice, classes, out, config.extract and config.extract.expanduser())
    with tables.open_table(out, kind, COLUMNS) as table:
        table.write(rows)
    return _result(config, scores, choice, classes, avoided) | {
        "unreadable": counter.unreadable, "out": str(out), "teacher": config.teacher,
        "seconds": round(counter.seconds, 3),
    }  # fmt: skip


def _open_teacher(config: Select, given: Mapping[str, Any] | None) -> TrainedModel:
    trained = open_described_model(config, config.teacher, given)
    if is_headless(trained.classifier):
        raise InputError(
            f"teacher {config.teacher} has no classes, so it is sure of none; fit some on labelled images with "
            "funmatch head, or pass clip:MODEL with --classes-from"
        )
    if trained.classifier.card.task == "multilabel":
        raise InputError(
            f"teacher {config.teacher} gives every class a probability of its own (multilabel), so an image has no "
            "surest class; pass a teacher of one class an image"
        )
    return trained


def _nameable(stream: ImageStream, config: Select) -> ImageStream:
    """Returns the images of a pool.

    Raises:
        InputError: the first is no file, as those of shards, which a table of paths can name only where they are
            extracted.
    """
    first, shown = next(stream.images, None), " ".join(config.pool)
    if first is None:
        raise InputError(f"{shown} has no images to choose from")
    # One that is missing is told as any that cannot be read.
    if not config.extract and not os.path.lexists(os.path.expanduser(first.path)) and _is_readable(first):
        raise InputError(
            f"the images of {shown} are not files of their own, e.g. {first.path}, so a table of paths cannot name "
            "them; pass --extract FOLDER, which writes the chosen ones as files"
        )
    return ImageStream(chain([first], stream.images), stream.count)


def _is_readable(image: ImageFile) -> bool:
    try:
        return bool(image.read())
    except Exception as error:  # readers raise many types
        if is_of_machine(error):
            raise
        return False


def _images_to_avoid(config: Select, how: Decoding) -> tuple[list[str], KeptClear | None]:
    """Returns the paths of images to keep clear of, and what finds near copies of them."""
    if not config.without:
        info("no --without: images that are in the evaluation images, too, are not left out")
        return [], None
    options = ReadOptions(config.data_dir, unlabelled=True, follow_links=True, on_bad="skip")
    stream = find_images(config.without, options, EVALUATION)
    counter = Counter("keep clear", stream.count)
    images: list[ImageFile] = []
    codes: list[np.ndarray] = []

    def coded(image: ImageFile) -> tuple[ImageFile, np.ndarray | str]:
        try:
            return image, codes_of_windows(image.pixels(how))
        except Exception as error:  # decoders raise many types
            if is_of_machine(error):
                raise
            return image, reason_of(error)

    with counter:
        for image, found in prefetch_items(coded, stream.images, devices.spare_threads()):
            reason = found if isinstance(found, str) else None
            counter.add([image.path], [reason])
            if not isinstance(found, str):
                images.append(image)
                codes.append(found)
    if counter.unreadable:
        info(
            f"WARNING: {counter.unreadable:,} of {counted(counter.images, 'image')} to keep clear of cannot be read, "
            f"e.g. {counter.example}"
        )
    if not images:
        raise InputError(f"no image of {' '.join(config.without)} can be read, so none can be kept clear of")
    index = CopyIndex(np.concatenate(codes), np.repeat(np.arange(len(codes)), len(codes[0])))
    return [image.path for image in images], KeptClear(index, lambda number: _decode(images[number], how))


def _decode(image: ImageFile, how: Decoding) -> np.ndarray:
    try:
        return image.pixels(how)
    except Exception as error:  # it was readable before, so the image itself is not at fault
        raise InputError(f"{image.path}: {reason_of(error)}; it was readable before. Start the command again") from None


def _rows(
    scores: Scores, choice: Choice, classes: Sequence[str], out: Path, extracted: Path | None
) -> list[dict[str, Any]]:
    """Returns the rows of the table, class by class, with paths relative to its folder where they lie in it.

    Args:
        extracted: folder to write the images into, if they are to be.
    """
    folder = os.path.abspath(out.parent)

    def path_of(image: ImageFile) -> str:
        return str(extract(image, extracted)) if extracted else image.path

    # Stable: within a class, the surest come first.
    order = sorted(choice.chosen, key=lambda place: int(scores.rows[place]["label"]))
    return [
        {
            "path": _relative(os.path.abspath(os.path.expanduser(path_of(scores.images[place]))), folder),
            "label": classes[scores.rows[place]["label"]],
            "confidence": float(scores.rows[place]["confidence"]),
        }
        for place in order
    ]


def _relative(path: str, folder: str) -> str:
    return os.path.relpath(path, folder) if path.startswith(folder.rstrip(os.sep) + os.sep) else path


def _result(
    config: Select, scores: Scores, choice: Choice, classes: Sequence[str], avoided: Sequence[str]
) -> dict[str, Any]:
    labels = scores.rows["label"][choice.chosen]
    confidence = scores.rows["confidence"][choice.chosen]
    names = [image.path for image in scores.images]

    def about_copies(pairs: Sequence[tuple[int, int]], others: Sequence[str]) -> dict[str, Any]:
        shown = [[names[place], others[other]] for place, other in pairs[:EXAMPLES]]
        return {"images": len(pairs), "examples": shown}

    about = {
        name: {
            "chosen": int((labels == number).sum()),
            "candidates": int(choice.candidates[number]),
            # float of the shortest text, as in the table.
            "confidence": float(tables.short(confidence[labels == number].min())) if number in labels else None,
        }
        for number, name in enumerate(classes)
    }
    return {
        "images": len(scores.images), "unsure": choice.unsure, "chosen": len(choice.chosen), "classes": about,
        "short": [name for name, each in about.items() if each["chosen"] < config.per_class],
        "kept_clear": about_copies(choice.kept_clear, avoided),
        "repeated": about_copies(choice.repeated, names),
    }  # fmt: skip
